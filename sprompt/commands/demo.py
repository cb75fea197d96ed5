"""`sprompt demo`, or `make demo`: the whole chain on synthetic scenes, from pictures to a table of results and a gallery."""

import dataclasses
import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sprompt.commands import run_folder
from sprompt.commands.parsing import parse
from sprompt.data.coco import CocoDataset
from sprompt.data.reading import read_json
from sprompt.engine.evaluators.coco import coco_metrics

BACKBONE = Path(__file__).parents[1] / "weights" / "scenes-resnet18.safetensors"
#: run -> what its fine-tuning starts from, and how the table calls it
STARTS = {
    "scratch": "backbone only",
    "pseudo": "pre-trained on proposals as pseudo-labels",
    "prompts": "pre-trained with saliency prompts",
}


@dataclasses.dataclass
class Demo:
    """Runs the whole chain at toy size, in minutes on two CPU cores, and shows each command as you would type it.

    Synthetic scenes -> proposals -> pre-training with and without prompts -> fine-tuning on few labels -> metrics, curves, gallery.
    The backbone is a small one that comes with the package, trained on such scenes by `sprompt backbone`.
    """

    out: Path = Path("demo")
    """Folder for everything it makes; run again, it goes on where it was."""
    unlabelled: int = 240
    """Scenes for pre-training."""
    labelled: int = 400
    """Scenes with labels, of which `fraction` is used."""
    fraction: float = 0.05
    """Share of the labelled scenes that fine-tuning sees."""
    validation: int = 60
    """Scenes that results are measured on."""
    seed: int = 0
    """Of the scenes and of training."""

    def run(self) -> None:
        began = time.monotonic()
        self._scenes()
        out, backbone = self.out, BACKBONE
        self._sprompt(
            f"propose --preset tiny --images {out}/unlabelled/images --backbone {backbone} --out {out}/proposals.json"
        )
        for run, method in (("pseudo", "--method.assign none --method.kernel-weight 0"), ("prompts", "")):
            self._sprompt(
                f"pretrain --preset tiny --images {out}/unlabelled/images --proposals {out}/proposals.json --backbone {backbone} "
                f"--out {out}/pretrain-{run} --train.seed {self.seed} {method}"
            )
        for run in STARTS:
            start = f"--backbone {backbone}" if run == "scratch" else f"--checkpoint {out}/pretrain-{run}"
            self._sprompt(
                f"finetune --preset tiny --data.images {out}/labelled/images --data.annotations {out}/labelled/instances.json "
                f"--data.fraction {self.fraction} --val.images {out}/validation/images "
                f"--val.annotations {out}/validation/instances.json {start} --out {out}/finetune-{run} --train.seed {self.seed}"
            )
        views = " ".join(f"{out}/finetune-{run}" for run in STARTS)
        self._sprompt(f"view {views} {out}/pretrain-pseudo {out}/pretrain-prompts --out {out}/view")
        self._table()
        print(f"{time.monotonic() - began:.0f} s in all; open {out / 'view' / 'index.html'} in a browser")

    def _scenes(self) -> None:
        from sprompt.data.synthetic import write_scenes

        for place, (name, count) in enumerate(
            (("unlabelled", self.unlabelled), ("labelled", self.labelled), ("validation", self.validation))
        ):
            print(f"drawing {count} scenes in {self.out / name}", flush=True)
            write_scenes(self.out / name, count, seed=3 * self.seed + place)

    def _sprompt(self, line: str) -> None:
        print(f"\n$ sprompt {line}", flush=True)
        name, *rest = shlex.split(line)
        parse(name, rest).run()

    def _table(self) -> None:
        table = Table(
            title=f"Mask AP on {self.validation} scenes after fine-tuning on {self.fraction:.0%} of {self.labelled}"
        )
        for column in ("start", "AP", "AP50", "AP75", "AP, classes pooled"):
            table.add_column(column, justify="left" if column == "start" else "right")
        labels = self.out / "validation"
        truth = CocoDataset(labels / "images", labels / "instances.json", keep_empty=True).ground_truth()
        for run, name in STARTS.items():
            folder = self.out / f"finetune-{run}"
            metrics = read_json(folder / run_folder.METRICS)
            pooled = coco_metrics(truth, read_json(folder / run_folder.PREDICTIONS), class_agnostic=True)["AP"]
            table.add_row(name, *(f"{100 * v:.1f}" for v in (metrics["AP"], metrics["AP50"], metrics["AP75"], pooled)))
        Console().print(table)

"""`sprompt demo`, or `make demo`: the whole chain on synthetic scenes, from pictures to a table of results and a gallery."""

import dataclasses
import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sprompt.commands import run_folder
from sprompt.commands.parsing import parse
from sprompt.data.reading import read_json

WEIGHTS = Path(__file__).parents[1] / "weights" / "scenes-knet.safetensors"
LIKENESS = 0.8  # of the scenes that WEIGHTS were trained on
#: run -> its start in the table, and the option that gives it
STARTS = {
    "scratch": ("from scratch", ""),
    "backbone": ("from the backbone (DenseCL)", f"--backbone {WEIGHTS}"),
    "pretrained": ("from Saliency Prompt pre-training", f"--checkpoint {WEIGHTS}"),
}


@dataclasses.dataclass
class Demo:
    """Shows in a few minutes on two CPU cores what pre-training is worth when labels are few. Prints each command as you would type it.

    First the chain on synthetic scenes: proposals, and a short pre-training on them. Then the same fine-tuning on few labels from three
    starts: from scratch, from a backbone, and from a K-Net that comes with the package. Saliency Prompt pre-trained this K-Net on
    1 200 scenes, for longer than the demo can (sprompt/weights/README.md). A table, learning curves and a gallery compare them.
    """

    out: Path = Path("demo")
    """Folder for everything that the demo makes. Run again, it goes on where it was."""
    unlabelled: int = 60
    """Scenes for the short pre-training."""
    labelled: int = 60
    """Scenes with labels, for fine-tuning: 5 % of the number that the K-Net of the package saw without labels."""
    validation: int = 100
    """Scenes that results are measured on."""
    seed: int = 0
    """Seed of the scenes and of training."""

    def run(self) -> None:
        began = time.monotonic()
        self._scenes()
        out = self.out
        images, proposals = out / "unlabelled" / "images", out / "proposals.json"
        self._sprompt(f"propose --preset tiny --images {images} --backbone {WEIGHTS} --out {proposals}")
        self._sprompt(
            f"pretrain --preset tiny --images {images} --proposals {proposals} --backbone {WEIGHTS} --out {out}/pretrain "
            f"--train.epochs 2 --train.warmup-steps 5 --train.drops --train.seed {self.seed}"
        )
        for run, (_, start) in STARTS.items():
            self._sprompt(
                f"finetune --preset tiny --data.images {out}/labelled/images --data.annotations {out}/labelled/instances.json "
                f"--val.images {out}/validation/images "
                f"--val.annotations {out}/validation/instances.json {start} --out {out}/finetune-{run} --evaluate-every 10 "
                f"--train.seed {self.seed}"
            )
        views = " ".join(f"{out}/finetune-{run}" for run in STARTS)
        self._sprompt(f"view {out}/pretrain {views} --out {out}/view")
        self._table()
        print(f"{time.monotonic() - began:.0f} s in all; open {out / 'view' / 'index.html'} in a browser")

    def _scenes(self) -> None:
        from sprompt.data.synthetic import write_scenes

        for place, (name, count) in enumerate(
            (("unlabelled", self.unlabelled), ("labelled", self.labelled), ("validation", self.validation))
        ):
            print(f"drawing {count} scenes in {self.out / name}", flush=True)
            write_scenes(self.out / name, count, seed=3 * self.seed + place, likeness=LIKENESS)

    def _sprompt(self, line: str) -> None:
        print(f"\n$ sprompt {line}", flush=True)
        name, *rest = shlex.split(line)
        parse(name, rest).run()

    def _table(self) -> None:
        table = Table(title=f"Mask AP on {self.validation} scenes after fine-tuning on {self.labelled} labelled scenes")
        for column in ("start", "AP", "AP50", "AP75", "AP, classes pooled"):
            table.add_column(column, justify="left" if column == "start" else "right")
        for run, (name, _) in STARTS.items():
            metrics = read_json(self.out / f"finetune-{run}" / run_folder.METRICS)
            table.add_row(name, *(f"{100 * metrics[key]:.1f}" for key in ("AP", "AP50", "AP75", "APpooled")))
        Console().print(table)

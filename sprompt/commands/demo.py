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
LIKENESS = 0.8  # likeness of the scenes that WEIGHTS were trained on
#: Name of the run -> (name of its start in the table, option that selects this start).
STARTS = {
    "scratch": ("from scratch", ""),
    "backbone": ("from the backbone (DenseCL)", f"--backbone {WEIGHTS}"),
    "pretrained": ("from Saliency Prompt pre-training", f"--checkpoint {WEIGHTS}"),
}


@dataclasses.dataclass
class Demo:
    """Shows how much pre-training helps when labels are few. It takes a few minutes on two CPU cores and prints each command
    that it runs.

    First it makes proposals for synthetic scenes and does a short pre-training on them. Then it runs the same fine-tuning on
    few labels from three starts: from scratch, from a backbone, and from a K-Net that comes with the package. This K-Net was
    pre-trained by Saliency Prompt on 1 200 scenes, for longer than a demo may take (sprompt/weights/README.md). A table,
    learning curves and a gallery compare the three runs.
    """

    out: Path = Path("demo")
    """Folder for all files of the demo. If you run the demo again, it goes on where it stopped."""
    unlabelled: int = 60
    """Number of scenes without labels, for the short pre-training."""
    labelled: int = 60
    """Number of scenes with labels, for fine-tuning. The default is 5 % of the scenes that the K-Net of the package was
    pre-trained on."""
    validation: int = 100
    """Number of scenes to measure the results on."""
    seed: int = 0
    """Seed of the scenes and of training."""

    def run(self) -> None:
        began = time.monotonic()
        out = run_folder.to_write(self.out, folder=True)
        self._scenes()
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

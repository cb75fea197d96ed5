"""`sprompt demo`, or `make demo`: the whole chain on synthetic scenes, or pre-training on your own pictures, and a gallery."""

import dataclasses
import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sprompt.atomic import atomic_write
from sprompt.commands import run_folder
from sprompt.commands.parsing import parse
from sprompt.data.reading import read_json

WEIGHTS = Path(__file__).parents[1] / "weights" / "scenes-knet.safetensors"
LIKENESS = 0.8  # likeness of the scenes that WEIGHTS were trained on
#: Name of the run -> (name of its start in the table, option that WEIGHTS are given to).
STARTS = {
    "scratch": ("from scratch", ""),
    "backbone": ("from the backbone (DenseCL)", "--backbone"),
    "pretrained": ("from Saliency Prompt pre-training", "--checkpoint"),
}


_STEPS, _BATCH = 1000, 8  # of the pre-training on photographs, for some minutes on two cores


@dataclasses.dataclass
class Demo:
    """Shows how much pre-training helps when labels are few. It takes a few minutes on two CPU cores and prints each command
    that it runs.

    First it makes proposals for synthetic scenes and does a short pre-training on them. Then it runs the same fine-tuning on
    few labels from three starts: from scratch, from a backbone, and from a K-Net that comes with the package. This K-Net was
    pre-trained by Saliency Prompt on 1 200 scenes, for longer than a demo may take (sprompt/weights/README.md). A table,
    learning curves and a gallery compare the three runs.

    With --images it takes your photographs, which need no labels: it makes proposals with a backbone that knows ImageNet, pre-trains
    a small Mask2Former on them, and shows in a gallery what both find. It needs `pip install "sprompt[imagenet]"`, or a --backbone.
    """

    out: Path = Path("demo")
    """Folder for all files of the demo. If you run the demo again, it goes on where it stopped."""
    images: Path | None = None
    """Folder of photographs, subfolders included. Default: synthetic scenes."""
    pictures: int = 200
    """Largest number of pictures of --images that are used; they are spread evenly over the folder."""
    backbone: Path = Path(run_folder.IMAGENET)
    """Backbone for --images: `imagenet`, or a file of an EfficientNet-Lite 0."""
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
        run_folder.to_write(self.out, folder=True)
        if self.images is None:
            self._on_scenes()
        else:
            self._on_photographs(self.images)
        print(f"{time.monotonic() - began:.0f} s in all; open {self.out / 'view' / 'index.html'} in a browser")

    def _on_photographs(self, images: Path) -> None:
        if self.pictures < 1:
            raise ValueError(f"--pictures: must be at least 1, got {self.pictures}")
        names = run_folder.folder_of(images, None).file_names
        number = min(self.pictures, len(names))
        backbone = run_folder.backbone_file(self.backbone, "backbone")
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write(self.out / "pictures.txt", "".join(f"{names[k * len(names) // number]}\n" for k in range(number)))
        print(f"{number} of the {len(names)} pictures in {images}")
        out, folder, start = map(_quoted, (self.out, images, backbone))
        epochs = -(-_STEPS * _BATCH // number)
        self._sprompt(
            f"propose --preset photographs --images {folder} --only {out}/pictures.txt --backbone {start} --out {out}/proposals.json"
        )
        self._sprompt(
            f"pretrain --preset photographs --model mask2former --images {folder} --proposals {out}/proposals.json "
            f"--backbone {start} --out {out}/pretrain "
            f"--train.epochs {epochs} --train.batch-size {_BATCH} --train.drops {max(1, 3 * epochs // 4)} --train.seed {self.seed}"
        )
        self._sprompt(
            f"predict --images {folder} --only {out}/pictures.txt --checkpoint {out}/pretrain --out {out}/predict"
        )
        self._sprompt(f"view {out}/pretrain {out}/predict --out {out}/view")

    def _on_scenes(self) -> None:
        self._scenes()
        out, weights = _quoted(self.out), _quoted(WEIGHTS)
        images, proposals = f"{out}/unlabelled/images", f"{out}/proposals.json"
        self._sprompt(f"propose --preset tiny --images {images} --backbone {weights} --out {proposals}")
        self._sprompt(
            f"pretrain --preset tiny --images {images} --proposals {proposals} --backbone {weights} --out {out}/pretrain "
            f"--train.epochs 2 --train.warmup-steps 5 --train.drops --train.seed {self.seed}"
        )
        for run, (_, option) in STARTS.items():
            start = f"{option} {weights}" if option else ""
            self._sprompt(
                f"finetune --preset tiny --data.images {out}/labelled/images --data.annotations {out}/labelled/instances.json "
                f"--val.images {out}/validation/images "
                f"--val.annotations {out}/validation/instances.json {start} --out {out}/finetune-{run} --evaluate-every 10 "
                f"--train.seed {self.seed}"
            )
        views = " ".join(f"{out}/finetune-{run}" for run in STARTS)
        self._sprompt(f"view {out}/pretrain {views} --out {out}/view")
        self._table()

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


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))

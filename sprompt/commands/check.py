"""`sprompt check`: reads pictures and labels before a training, and measures how long the training will take."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

from sprompt.commands import run_folder
from sprompt.commands.labelled_data import LabelledData
from sprompt.data.annotations import named
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.transforms import Augment
from sprompt.engine.config import TrainConfig
from sprompt.methods.registry import METHODS, MethodConfig
from sprompt.methods.supervised import SupervisedConfig
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import ModelConfig, build
from sprompt.settings import Hidden

_NAMES = 10  # names that a line lists
_ROWS = 30  # classes in the table


@dataclasses.dataclass
class Check:
    """Reads every picture and every mask before a training. Reports each problem that would stop or spoil the training. Writes
    no file.

    Give labelled pictures with the options of `sprompt finetune` (--data..., --val...), or a folder of pictures without labels
    with --images. With --preset the command also takes a few steps of the training that `sprompt finetune` does with the same
    options. It then prints how long all steps take on this machine, and the peak memory. The exit status is 1 if a problem
    would stop or spoil the training, else 0.
    """

    data: LabelledData = dataclasses.field(default_factory=LabelledData)
    """Pictures to train on."""
    val: LabelledData = dataclasses.field(default_factory=lambda: LabelledData(split="val"))
    """Pictures to evaluate on."""
    images: Path | None = None
    """Folder of pictures without labels to check instead of --data, subfolders included."""
    cpu: bool = False
    """Do not use a GPU for the measured steps."""
    keep_pictures: bool = False
    """Read and resize every picture once and keep all pictures on the device, as in `sprompt finetune`."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network."""
    augment: Augment = dataclasses.field(
        default_factory=lambda: Augment(800, 1333, rotate_probability=0.5, rotate_degrees=9.0)
    )
    """Random changes of the pictures in training."""
    method: MethodConfig = dataclasses.field(default_factory=SupervisedConfig)
    """The training method."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(epochs=48, drops=(36, 44), warmup_steps=100, clip=4.0)
    )
    """Length and optimisation."""
    preset: Annotated[str | None, Hidden] = None
    """Name of the preset. Its settings of `finetune` are the defaults."""

    PRESET_OF: ClassVar[str] = "finetune"

    def run(self) -> int:
        """Prints the report. Returns the exit status."""
        if self.images is not None and (self.data.given() or self.val.given()):
            raise ValueError("--images: must be left out if --data or --val is given; check them one after the other")
        if self.images is not None:
            bad = self._unlabelled(self.images)
        elif self.data.given():
            bad = self._labelled()
        else:
            raise ValueError("check: needs --data.images and --data.annotations, or --images; see --help")
        print(
            f"findings that would stop or spoil training (marked with !): {bad}"
            if bad
            else "nothing would stop or spoil training"
        )
        return int(bad > 0)

    def _unlabelled(self, images: Path) -> int:
        from sprompt.data.checking import of_pictures
        from sprompt.data.folder import PictureFolder

        pictures = PictureFolder(run_folder.existing(images, "images", folder=True))
        seen = run_folder.read_all("check", pictures)
        sides = sorted(min(one.size) for one in seen if one.size is not None)
        print(f"{images}: {len(pictures)} pictures")
        if sides:
            print(f"  shorter side: {sides[0]} to {sides[-1]} pixels, median {median(sides):g}")
        for problem in pictures.problems:
            print(f"  {problem}")
        # a training without labels leaves unreadable pictures out
        findings = [finding._replace(spoils=len(sides) == 0) for finding in of_pictures(seen)]
        return _told(findings)

    def _labelled(self) -> int:
        from sprompt.data import checking

        opened: dict[str, tuple[CocoDataset, list[checking.Seen]]] = {}
        bad = 0
        for name, given in (("data", self.data), ("val", self.val)):
            if not given.given():
                continue
            try:
                dataset = given.open(name, keep_empty=True)
            except DataError as error:
                print(f"{name}:")
                bad += _told([checking.Finding(str(error), [], True)])
                continue
            seen = run_folder.read_all(f"check {name}", dataset)
            opened[name] = dataset, seen
            objects = sum(len(one.areas) for one in seen)
            print(
                f"{name}: {len(dataset)} pictures with {objects} objects in {dataset.source}; classes: {named(dataset.classes)}"
            )
            bad += _told(checking.of_labels(dataset, seen))
            for line in checking.sizes(seen, self.augment).splitlines():
                print(f"  {line}")
        if len(opened) == 2:
            both = checking.of_both(*opened["data"], *opened["val"])
            if both:
                print("data and val:")
            bad += _told(both)
        if opened:
            _show({name: checking.by_class(*pair) for name, pair in opened.items()})
        if "data" in opened:
            self._model(*opened["data"])
        return bad

    def _model(self, dataset: CocoDataset, seen: Sequence[Any]) -> None:
        """Prints whether the model has enough queries for these pictures, and how long its training takes."""
        import torch

        from sprompt.data.checking import crowded

        config = dataclasses.replace(self.model, num_classes=max(1, len(dataset.classes)))
        with torch.device("meta"):
            queries = build(config).num_queries
        if (line := crowded(seen, queries)) is not None:
            print(line)
        usable = [index for index, one in enumerate(seen) if one.areas]
        if self.preset is None:
            print("give --preset NAME to measure also how long training takes on this machine")
        elif not usable or any(one.faults for one in seen):
            print(
                "the time of training is not measured; --data must have objects, and all its pictures and masks must be "
                "readable"
            )
        else:
            self._measure(dataset.subset(usable), config)

    def _measure(self, dataset: CocoDataset, config: ModelConfig) -> None:
        import torch

        from sprompt.engine.train import trial

        torch.manual_seed(self.train.seed)
        print(f"measuring a few steps of training with --preset {self.preset}", flush=True)
        method = METHODS.owner(self.method)
        config = dataclasses.replace(config, num_classes=len(method.classes(self.method, dataset)))
        task = method.on(build(config), self.method, dataset, self.train.seed)
        batches = run_folder.batches(dataset, self.augment, keep=self.keep_pictures, cpu=self.cpu)
        result = trial(task, batches, self.train, cpu=self.cpu)
        where = "the GPU" if result.device.type == "cuda" else f"{torch.get_num_threads()} threads of this CPU"
        owner = "of the GPU" if result.device.type == "cuda" else "of this process"
        print(
            f"  {result.seconds:.3g} s a step on {where} (mean of {result.measured} steps, batches of {self.train.batch_size})\n"
            f"  {duration(result.steps * result.seconds)} for all {result.steps} steps ({self.train.epochs} epochs of {len(dataset)} "
            f"pictures), without evaluation\n"
            f"  peak memory {owner}: {result.bytes / 1e9:.2g} GB"
        )


def duration(seconds: float) -> str:
    """A time as text, in hours, minutes or seconds.

    >>> duration(40), duration(600), duration(9000)
    ('40 seconds', '10 minutes', '2.5 hours')
    """
    for name, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} seconds"


def _told(findings: Sequence[Any]) -> int:
    """Prints findings. Returns the number of findings that would stop or spoil training."""
    for text, names, spoils in findings:
        print(f"  {'! ' if spoils else ''}{text}")
        for name in names[:_NAMES]:
            print(f"      {name}")
        if len(names) > _NAMES:
            print(f"      and {len(names) - _NAMES} more")
    return sum(finding.spoils for finding in findings)


def _show(parts: dict[str, dict[str, tuple[int, int]]]) -> None:
    """Prints the numbers of pictures and objects of each class, the class with the most objects first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("class")
    for column in [f"{what}: {name}" for what in ("pictures", "objects") for name in parts]:
        table.add_column(column, justify="right")
    every = {name: None for part in parts.values() for name in part}
    order = sorted(every, key=lambda name: -sum(part.get(name, (0, 0))[1] for part in parts.values()))
    head, tail = (order, []) if len(order) <= _ROWS else (order[: _ROWS // 2], order[len(order) - _ROWS // 2 + 1 :])
    for name in head + tail:
        if tail and name is tail[0]:
            table.add_row(f"… {len(order) - len(head) - len(tail)} more", *[""] * 2 * len(parts))
        table.add_row(Text(name), *[str(part.get(name, (0, 0))[i]) for i in (0, 1) for part in parts.values()])
    Console().print(table)

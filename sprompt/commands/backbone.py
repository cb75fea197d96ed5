"""`sprompt backbone`: trains a self-supervised backbone (DenseCL) on pictures without labels."""

import dataclasses
from functools import partial
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.folder import Unbroken
from sprompt.data.loader import Batches
from sprompt.engine.config import TrainConfig
from sprompt.engine.train import train
from sprompt.methods.densecl import DenseCL, DenseCLConfig, TwoViews, collate_views
from sprompt.nn.distributed import is_first
from sprompt.nn.weights import load_backbone, save_backbone
from sprompt.settings import to_plain


@dataclasses.dataclass
class Backbone:
    """Trains a ResNet or an EfficientNet-Lite on pictures without labels, by DenseCL. Use it if you have pictures but no checkpoint.

    Writes OUT/backbone.safetensors, which `propose`, `pretrain` and `finetune` take. If you start the same command again, it
    goes on from its last checkpoint. If a picture cannot be read, the command prints its name and trains on another picture
    instead.
    """

    images: Path
    """Folder of pictures, subfolders included."""
    out: Path = Path("runs/backbone")
    """Run folder."""
    only: Path | None = None
    """Text file that lists the pictures to use, one file name a line; `sprompt split` writes such lists. Default: all
    pictures."""
    init: Path | None = None
    """Weights to start from: a file, a run folder that holds a backbone, or `imagenet`."""
    half: bool = False
    """Write the weights in float16. The file then has half the size."""
    cpu: bool = False
    """Do not use a GPU."""
    densecl: DenseCLConfig = dataclasses.field(default_factory=DenseCLConfig)
    """The network and the method."""
    views: TwoViews = dataclasses.field(default_factory=TwoViews)
    """Random changes of the pictures."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            epochs=200,
            batch_size=256,
            optimiser="sgd",
            learning_rate=0.3,
            weight_decay=1e-4,
            clip=None,
            schedule="cosine",
        )
    )
    """Length and optimisation."""

    def run(self) -> None:
        import torch

        pictures = run_folder.folder_of(self.images, self.only)
        run_folder.say(f"{len(pictures)} pictures in {self.images}")
        for problem in pictures.problems:
            run_folder.say(f"  {problem}")
        task = DenseCL(self.densecl)
        init = None if self.init is None else run_folder.backbone_file(self.init, "init")
        if init is not None:
            run_folder.say(
                load_backbone(
                    task.backbone,
                    init,
                    ("--densecl.backbone", "--densecl.depth", "--densecl.width", "--densecl.variant"),
                )
            )
        with run_folder.begun(self.out, self) as record:
            result = train(
                task, partial(Batches, Unbroken(pictures), self.views, collate_views), self.train, self.out, cpu=self.cpu,
                record=record,
                identity={
                    "pictures": run_folder.listing(pictures.file_names), "densecl": to_plain(self.densecl),
                    "views": to_plain(self.views), "init": run_folder.digest(init),
                },
            )  # fmt: skip
            if is_first():
                save_backbone(
                    self.out / run_folder.BACKBONE, task.backbone, torch.float16 if self.half else torch.float32
                )
        run_folder.say(f"{self.out / run_folder.BACKBONE} after {result.step} steps")

"""`sprompt labeler`: trains Mask Auto-Labeler, which finds the masks of objects from their boxes."""

import dataclasses
from functools import partial
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.annotations import left_out
from sprompt.data.boxes import CROWD, read_boxes
from sprompt.data.reading import read_json
from sprompt.engine.config import TrainConfig
from sprompt.engine.train import train
from sprompt.methods.auto_labeler.config import AutoLabelerConfig, CropConfig, NetworkConfig
from sprompt.nn.distributed import is_first
from sprompt.settings import to_plain


@dataclasses.dataclass
class Labeler:
    """Trains a network that finds the mask of an object in its box (Mask Auto-Labeler). It needs boxes only: masks in the file are never
    read.

    Writes OUT/labeler.safetensors, with which `label` writes masks into boxes. If you start the same command again, it goes on from its
    last checkpoint.
    """

    images: Path
    """Folder of the pictures."""
    annotations: Path
    """COCO-style JSON file with the boxes."""
    out: Path = Path("runs/labeler")
    """Run folder."""
    backbone: Path | None = None
    """Encoder to start from: a file of a network of the sizes in --network, a run folder with a backbone, or `imagenet`. Without it the
    encoder starts from random values."""
    cpu: bool = False
    """Do not use a GPU."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """Sizes of the network."""
    crops: CropConfig = dataclasses.field(default_factory=CropConfig)
    """The objects that are trained on, and random changes of their crops."""
    losses: AutoLabelerConfig = dataclasses.field(default_factory=AutoLabelerConfig)
    """The losses and the teacher."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            epochs=10,
            batch_size=32,
            learning_rate=4.8e-5,
            weight_decay=5e-4,
            betas=(0.9, 0.9),
            clip=None,
            schedule="epoch_cosine",
            warmup_steps=0,
        )
    )
    """Length and optimisation. A batch counts objects."""

    def run(self) -> None:
        import torch

        from sprompt.methods.auto_labeler.network import build_network, save_network
        from sprompt.methods.auto_labeler.samples import BoxedObjects, CropBatches, Cropped
        from sprompt.methods.auto_labeler.task import AutoLabeler
        from sprompt.nn.weights import load_backbone

        images = run_folder.existing(self.images, "images", folder=True)
        source = run_folder.existing(self.annotations, "annotations", folder=False)
        pictures = read_boxes(images, read_json(source), str(source))
        objects = BoxedObjects(pictures, self.crops.min_area)
        boxes = sum(map(len, pictures.boxes))
        run_folder.say(f"{len(objects)} objects to train on, of {boxes} in {len(pictures.pictures)} pictures")
        for problem in pictures.problems:
            run_folder.say(f"  {problem}")
        if crowds := pictures.unusable[CROWD]:
            run_folder.say(f"  {left_out(str(source), crowds, CROWD)}")
        if small := boxes - len(objects):
            run_folder.say(
                f"  {source}: {small} boxes have at most {self.crops.min_area:g} pixels and are not trained on"
            )
        if not len(objects):
            raise ValueError(
                f"--annotations: must hold a box of more than {self.crops.min_area:g} pixels, got none in {source}; "
                "--crops.min-area sets the number"
            )
        torch.manual_seed(self.train.seed)
        network = build_network(self.network)
        init = None if self.backbone is None else run_folder.backbone_file(self.backbone, "backbone")
        if init is not None:
            options = (
                "--network.backbone",
                "--network.depth",
                "--network.backbone-width",
                "--network.backbone-variant",
            )
            run_folder.say(load_backbone(network.backbone, init, options))
        task = AutoLabeler(network, self.losses, self.train.accumulate)
        batches = partial(CropBatches, objects, Cropped(self.crops, self.network.crop))
        with run_folder.begun(self.out, self) as record:
            train(
                task, batches, self.train, self.out, cpu=self.cpu,
                record=record,
                identity={
                    "boxes": run_folder.digest(source), "objects": len(objects), "network": to_plain(self.network),
                    "crops": to_plain(self.crops), "losses": to_plain(self.losses), "init": run_folder.digest(init),
                },
            )  # fmt: skip
            if is_first():
                save_network(self.out / run_folder.LABELER, task.student, self.network)
        run_folder.say(f"the network is in {self.out / run_folder.LABELER}")

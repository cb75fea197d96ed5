"""`sprompt finetune`: labelled pictures to a model."""

import dataclasses
from pathlib import Path
from typing import Any

from sprompt.commands import runs
from sprompt.commands.evaluate import report
from sprompt.commands.labels import Labels
from sprompt.commands.testing import Testing
from sprompt.data.coco import CocoDataset
from sprompt.data.transforms import Augment
from sprompt.engine.config import TrainConfig
from sprompt.engine.train import train
from sprompt.methods.supervised import Supervised
from sprompt.models.knet import KNet, KNetConfig
from sprompt.nn.weights import load_backbone
from sprompt.settings import to_plain


@dataclasses.dataclass
class Finetune:
    """Trains on labelled pictures: from a pre-trained model (--init), from a backbone only (--backbone), or from scratch.

    Writes OUT/model.safetensors and, if --val is given, OUT/metrics.json. Started again it goes on where it was.
    """

    data: Labels = dataclasses.field(default_factory=Labels)
    """Pictures to train on."""
    val: Labels = dataclasses.field(default_factory=lambda: Labels(split="val"))
    """Pictures to evaluate on at the end; none if its images are not given."""
    out: Path = Path("runs/finetune")
    """Run folder."""
    init: Path | None = None
    """Model to start from: the run folder or the file of `sprompt pretrain` or `sprompt finetune`, or an official K-Net file."""
    backbone: Path | None = None
    """Backbone to start from, if there is no --init."""
    reset_classifier: bool = True
    """With --init: fresh classification layers. False keeps them where the number of classes is the same."""
    evaluate_every: int = 0
    """Evaluate on --val after every so many epochs, as well as at the end; 0: only at the end."""
    cpu: bool = False
    """Do not use a GPU."""
    keep_pictures: bool = False
    """Read and resize every picture once and keep them all on the device, about 6 bytes a pixel of the resized ones: for some thousand
    small ones that only mirroring changes."""
    model: KNetConfig = dataclasses.field(default_factory=KNetConfig)
    """The network where there is no --init; the number of classes is that of the data."""
    augment: Augment = dataclasses.field(
        default_factory=lambda: Augment(800, 1333, rotate_probability=0.5, rotate_degrees=9.0)
    )
    """How pictures are changed."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(
            epochs=48, drops=(36, 44), warmup_steps=100, backbone_lr_factor=0.25, clip=4.0
        )
    )
    """Length and optimisation."""
    test: Testing = dataclasses.field(default_factory=Testing)
    """How --val is predicted."""

    def run(self) -> None:
        dataset = self.data.open("data", keep_empty=False)
        if not len(dataset):
            raise ValueError(f"--data: must hold a picture with an annotation, got none in {self.data.annotations}")
        val = self.val.open("val", keep_empty=True) if self.val.given() else None
        if val is not None and val.classes != dataset.classes:
            raise ValueError(f"--val: must have the classes of --data, {dataset.classes}, got {val.classes}")
        runs.say(f"{len(dataset)} pictures, {len(dataset.classes)} classes to train on")
        for problem in dataset.problems:
            runs.say(f"  {problem}")
        model = self._model(dataset)
        runs.say_if_crowded(dataset, model.config.kernels)
        record = runs.begin(self.out, self)

        def after_epoch(epoch: int) -> dict[str, float]:
            if val is None or not self.evaluate_every or epoch % self.evaluate_every or epoch == self.train.epochs:
                return {}
            return {f"val/{k}": v for k, v in self._metrics(model, val, quiet=True).items() if isinstance(v, float)}

        train(
            Supervised(model), runs.batches(dataset, self.augment, keep=self.keep_pictures, cpu=self.cpu),
            self.train, self.out, cpu=self.cpu,
            after_epoch=after_epoch,
            record=record,
            identity={
                "labels": runs.digest(self.data.annotations), "pictures": dataset.image_ids, "classes": dataset.classes,
                "model": to_plain(model.config), "init": runs.digest(runs.model_file(self.init) if self.init else self.backbone),
                "reset_classifier": self.reset_classifier, "augment": to_plain(self.augment),
            },
        )  # fmt: skip
        runs.save(self.out, model, dataset.classes, self.augment)
        if val is not None:
            self._metrics(model, val, quiet=False)

    def _model(self, dataset: CocoDataset) -> KNet:
        import torch

        torch.manual_seed(self.train.seed)
        count = len(dataset.classes)
        if self.init is None:
            model = KNet(dataclasses.replace(self.model, num_classes=count))
            if self.backbone is not None:
                runs.say(load_backbone(model.backbone, runs.existing(self.backbone, "backbone", folder=False)))
            return model
        if self.backbone is not None:
            raise ValueError("--backbone: must be left out where --init is given; the model has its own")
        model, classes, _, said = runs.open_model(self.init, dataclasses.replace(self.model, num_classes=count))
        runs.say(said)
        self._check_network(model.config)
        model.freeze_backbone(self.model.frozen_stages)
        if self.reset_classifier:
            model.reset_classifier(count)
        elif classes is not None and classes != dataset.classes and not (count == 1 and classes == ["object"]):
            raise ValueError(
                f"--reset-classifier: must be True for other classes than the model's, {classes}, got {dataset.classes}"
            )
        return model

    def _check_network(self, own: KNetConfig) -> None:
        """Refuses sizes of the network that the model of --init does not have."""
        for name, asked in to_plain(self.model).items():
            if name in ("num_classes", "frozen_stages") or asked in (getattr(own, name), getattr(KNetConfig(), name)):
                continue
            option = f"--model.{name.replace('_', '-')}"
            raise ValueError(f"{option}: is {asked}, but the model of --init has {getattr(own, name)}; leave it out")

    def _metrics(self, model: KNet, val: CocoDataset, quiet: bool) -> dict[str, Any]:
        size = (self.augment.shorts[1], self.augment.long)
        return report(model, val, self.out, self.test.sized(size), cpu=self.cpu, quiet=quiet)

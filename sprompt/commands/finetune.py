"""`sprompt finetune`: trains a model on labelled pictures."""

import dataclasses
from pathlib import Path
from typing import Any

from sprompt.commands import run_folder
from sprompt.commands.evaluate import report
from sprompt.commands.labelled_data import LabelledData
from sprompt.commands.prediction import Prediction
from sprompt.data.annotations import named
from sprompt.data.checking import refuse_broken
from sprompt.data.coco import CocoDataset
from sprompt.data.transforms import Augment
from sprompt.engine.checkpoint import Checkpoints
from sprompt.engine.config import TrainConfig
from sprompt.engine.evaluators.coco import CocoConfig
from sprompt.engine.evaluators.registry import EvaluatorConfig
from sprompt.engine.train import train
from sprompt.engine.trained import load, model_file
from sprompt.methods.registry import METHODS, MethodConfig
from sprompt.methods.supervised import SupervisedConfig
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import MODELS, ModelConfig, build
from sprompt.nn.distributed import launched
from sprompt.nn.weights import load_backbone
from sprompt.settings import flat, to_plain


@dataclasses.dataclass
class Finetune:
    """Trains on labelled pictures: from a trained model (--checkpoint), from a backbone only (--backbone), or from scratch.

    Writes OUT/model.safetensors and, if --val is given, OUT/metrics.json. If you start the same command again, it goes on from
    its last checkpoint.
    """

    data: LabelledData = dataclasses.field(default_factory=LabelledData)
    """Pictures to train on."""
    val: LabelledData = dataclasses.field(default_factory=lambda: LabelledData(split="val"))
    """Pictures to evaluate on at the end. Without --val.images nothing is evaluated. Before the first step the command reads
    all these pictures and masks once, and refuses broken ones."""
    out: Path = Path("runs/finetune")
    """Run folder."""
    checkpoint: Path | None = None
    """Trained model to start from: the run folder or the file of `sprompt pretrain` or `sprompt finetune`, or an official release."""
    backbone: Path | None = None
    """Backbone to start from if there is no --checkpoint: a file, a run folder with a backbone, or `imagenet`."""
    reset_classifier: bool = True
    """With --checkpoint: start with fresh classification layers. False keeps the layers; the data must then have the model's
    classes."""
    evaluate_every: int = 0
    """Epochs between two evaluations on --val. 0 evaluates only at the end."""
    cpu: bool = False
    """Do not use a GPU."""
    keep_pictures: bool = False
    """Read and resize every picture once and keep all pictures on the device. This takes about 6 bytes a pixel of the
    resized picture, so it is for at most some thousand small pictures. The only random change of the pictures may be
    mirroring."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network, if there is no --checkpoint."""
    method: MethodConfig = dataclasses.field(default_factory=SupervisedConfig)
    """The training method."""
    augment: Augment = dataclasses.field(
        default_factory=lambda: Augment(800, 1333, rotate_probability=0.5, rotate_degrees=9.0)
    )
    """Random changes of the pictures."""
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(epochs=48, drops=(36, 44), warmup_steps=100, clip=4.0)
    )
    """Length and optimisation."""
    test: Prediction = dataclasses.field(default_factory=Prediction)
    """Settings of the prediction on --val."""
    evaluator: EvaluatorConfig = dataclasses.field(default_factory=CocoConfig)
    """Comparison of predictions with the labels of --val."""

    def run(self) -> None:
        dataset = self.data.open("data", keep_empty=False)
        if not len(dataset):
            raise ValueError(f"--data: must hold a picture with an annotation, got none in {self.data.annotations}")
        val = self.val.open("val", keep_empty=True) if self.val.given() else None
        method = METHODS.owner(self.method)
        classes = method.classes(self.method, dataset)
        agnostic = classes != dataset.classes
        if val is not None:
            if val.classes != dataset.classes and not (agnostic or self.evaluator.any_classes):
                raise ValueError(f"--val: must have the classes of --data, {dataset.classes}, got {val.classes}")
            self.evaluator.check(val.categories)
        run_folder.say(f"{len(dataset)} pictures to train on; classes: {named(dataset.classes)}")
        for problem in dataset.problems:
            run_folder.say(f"  {problem}")
        if val is not None:
            run_folder.say_lost(val)
        if val is not None and not Checkpoints(self.out / "checkpoints", self.train.keep).steps():
            self._check(val)
        start = self._start()
        model = self._model(classes, start)
        run_folder.say_if_crowded(dataset, model.num_queries)
        task = method.on(model, self.method, dataset, self.train.seed)
        watch = task.watch(dataset, self.augment, self.out)

        def after_epoch(epoch: int) -> dict[str, float]:
            watched = dict(watch(epoch)) if watch else {}
            if val is None or not self.evaluate_every or epoch % self.evaluate_every or epoch == self.train.epochs:
                return watched
            metrics = self._metrics(model, val, agnostic, quiet=True)
            return watched | {f"val/{k}": v for k, v in metrics.items() if isinstance(v, float)}

        with run_folder.begun(self.out, dataclasses.replace(self, model=model.config)) as record:
            train(
                task, run_folder.batches(dataset, self.augment, keep=self.keep_pictures, cpu=self.cpu),
                self.train, self.out, cpu=self.cpu,
                after_epoch=after_epoch,
                record=record,
                identity={
                    "labels": run_folder.digest(self.data.annotations), "pictures": dataset.image_ids,
                    "classes": dataset.classes, "model": to_plain(model.config), "method": to_plain(self.method),
                    "init": run_folder.digest(start),
                    "reset_classifier": self.reset_classifier, "augment": to_plain(self.augment),
                },
            )  # fmt: skip
            run_folder.save(self.out, model, classes, self.augment)
            if val is not None:
                self._metrics(model, val, agnostic, quiet=False)

    def _start(self) -> Path | None:
        """The file of the initial weights; None if training starts from scratch."""
        if self.checkpoint is not None:
            return model_file(self.checkpoint)
        return None if self.backbone is None else run_folder.backbone_file(self.backbone, "backbone")

    def _check(self, val: CocoDataset) -> None:
        """Raises DataError if a picture or mask of --val cannot be read. Each process of a launcher reads a share of the
        pictures."""
        rank, world = launched()
        seen = run_folder.read_all("check --val", val, indices=range(rank, len(val), world), digests=False)
        refuse_broken(val, "val", seen)

    def _model(self, classes: list[str], start: Path | None) -> Any:
        import torch

        torch.manual_seed(self.train.seed)
        count = len(classes)
        model: Any
        if self.checkpoint is None:
            if self.backbone is None and self.model.frozen_stages == 4:  # all
                raise ValueError(
                    "--checkpoint: must be given, or --backbone, if --model.frozen-stages is 4; a backbone of random weights would never "
                    "learn"
                )
            model = build(dataclasses.replace(self.model, num_classes=count))
            if start is None:
                run_folder.say("training starts from random weights: neither --checkpoint nor --backbone is given")
            else:
                run_folder.say(load_backbone(model.backbone, start))
            return model
        if self.backbone is not None:
            raise ValueError("--backbone: must be left out if --checkpoint is given; the checkpoint holds a backbone")
        trained = load(self.checkpoint, dataclasses.replace(self.model, num_classes=count), "cpu")
        model, held = trained.model, trained.classes
        run_folder.say(trained.about)
        self._check_network(model.config)
        model.freeze_backbone(self.model.frozen_stages)
        if self.reset_classifier:
            model.reset_classifier(count)
        elif held is not None and held != classes and not (count == 1 and held == ["object"]):
            raise ValueError(
                f"--reset-classifier: must be True unless the data have the model's classes, {held}, got {classes}"
            )
        return model

    def _check_network(self, own: ModelConfig) -> None:
        """Raises ValueError if --model asks for another network or other sizes than the model of --checkpoint has."""
        if type(own) is not type(self.model):
            there, asked = (MODELS.name(type(config)) for config in (own, self.model))
            raise ValueError(f"--model: is {asked}, but --checkpoint holds {there}; leave out --model")
        wanted, held, default = (flat(to_plain(config)) for config in (self.model, own, type(self.model)()))
        for name, value in wanted.items():
            if name in ("name", "num_classes", "frozen_stages") or value in (held[name], default[name]):
                continue
            option = f"--model.{name.replace('_', '-')}"
            raise ValueError(
                f"{option}: is {value}, but the model of --checkpoint has {held[name]}; leave the option out"
            )

    def _metrics(self, model: Any, val: CocoDataset, agnostic: bool, quiet: bool) -> dict[str, Any]:
        size = (self.augment.shorts[1], self.augment.long)
        return report(
            model, val, self.out, self.test.sized(size), evaluator=self.evaluator, cpu=self.cpu, quiet=quiet,
            class_agnostic=agnostic,
        )  # fmt: skip

"""`sprompt pretrain`: pre-trains a model on proposals, by Saliency Prompt."""

import dataclasses
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.coco import CocoDataset
from sprompt.data.transforms import Augment
from sprompt.engine.config import TrainConfig
from sprompt.engine.train import train
from sprompt.methods.registry import METHODS, MethodConfig
from sprompt.methods.saliency_prompt import SaliencyPromptConfig
from sprompt.methods.saliency_prompt.generate import fingerprint
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import ModelConfig, build
from sprompt.nn.weights import load_backbone
from sprompt.settings import to_plain


@dataclasses.dataclass
class Pretrain:
    """Trains a model on mask proposals as class-agnostic labels. The proposals prompt its queries, and kernel supervision draws the queries
    to the seeds of their proposals.

    Writes OUT/model.safetensors, which `finetune` takes. If you start the same command again, it goes on from its last
    checkpoint. `--method supervised --model.frozen-stages 4` uses the proposals as pseudo-labels only, without prompts.
    """

    images: Path
    """Folder of the pictures that the proposals belong to."""
    proposals: Path
    """File written by `sprompt propose`."""
    backbone: Path
    """The model's backbone: a file, a run folder with a backbone, or `imagenet`. Kernel supervision needs the backbone that the
    proposals were made with. The method decides whether the backbone stays frozen."""
    out: Path = Path("runs/pretrain")
    """Run folder."""
    keep_empty: bool = False
    """Train also on pictures without proposals. All their pixels are background."""
    half: bool = False
    """Write the weights in float16. The file then has half the size."""
    cpu: bool = False
    """Do not use a GPU."""
    keep_pictures: bool = False
    """Read and resize every picture once and keep all pictures on the device. This takes about 6 bytes a pixel of the
    resized picture, so it is for at most some thousand small pictures. The only random change of the pictures may be
    mirroring."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network."""
    method: MethodConfig = dataclasses.field(default_factory=SaliencyPromptConfig)
    """The training method."""
    augment: Augment = dataclasses.field(default_factory=lambda: Augment(800, 1333))
    """Random changes of the pictures."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length and optimisation."""

    def run(self) -> None:
        import torch

        dataset = CocoDataset(
            run_folder.existing(self.images, "images", folder=True),
            run_folder.existing(self.proposals, "proposals", folder=False),
            class_agnostic=True,
            keep_empty=self.keep_empty,
        )
        run_folder.say(f"{len(dataset)} pictures with proposals in {self.proposals}")
        for problem in dataset.problems:
            run_folder.say(f"  {problem}")
        torch.manual_seed(self.train.seed)
        model = build(dataclasses.replace(self.model, num_classes=1))
        run_folder.say_if_crowded(dataset, model.num_queries)
        run_folder.say(load_backbone(model.backbone, run_folder.backbone_file(self.backbone, "backbone")))
        task = METHODS.owner(self.method).on(model, self.method, dataset, self.train.seed)
        if isinstance(self.method, SaliencyPromptConfig) and self.method.uses_seeds:
            self._check_backbone(dataset, fingerprint(model.backbone))
        settings = dataclasses.replace(self, model=model.config)
        with run_folder.begun(self.out, settings) as record:
            train(
                task, run_folder.batches(dataset, self.augment, keep=self.keep_pictures, cpu=self.cpu),
                self.train, self.out, cpu=self.cpu,
                after_epoch=task.watch(dataset, self.augment, self.out),
                record=record,
                identity={
                    "proposals": run_folder.digest(self.proposals), "backbone": fingerprint(model.backbone),
                    "pictures": len(dataset), "model": to_plain(model.config), "method": to_plain(self.method),
                    "augment": to_plain(self.augment),
                },
            )  # fmt: skip
            run_folder.save(self.out, model, ["object"], self.augment, half=self.half)

    def _check_backbone(self, dataset: CocoDataset, own: str) -> None:
        """Kernels are pulled to features of the model's own backbone, at the seeds that the backbone of the proposals chose."""
        if dataset.info["proposals"].get("backbone", own) != own:
            raise ValueError(
                f"--backbone: kernel supervision needs the backbone that {self.proposals} was made with, got another; give that "
                "backbone, make the proposals again with this one, or give --method.kernel-weight 0"
            )

"""`sprompt pretrain`: proposals to a pre-trained K-Net, by Saliency Prompt."""

import dataclasses
from functools import partial
from pathlib import Path

from sprompt.commands import runs
from sprompt.data.coco import CocoDataset
from sprompt.data.transforms import Augment
from sprompt.engine.config import TrainConfig
from sprompt.engine.train import train
from sprompt.methods.saliency_prompt import Pretraining, ProposalConfig, SaliencyPromptConfig
from sprompt.methods.saliency_prompt.generate import fingerprint
from sprompt.methods.saliency_prompt.stability import Stability
from sprompt.models.knet import KNet, KNetConfig
from sprompt.nn.weights import load_backbone
from sprompt.settings import to_plain


@dataclasses.dataclass
class Pretrain:
    """Trains K-Net on mask proposals as class-agnostic labels, its kernels prompted by them, with kernel supervision.

    Writes OUT/model.safetensors, which `finetune` takes. Started again it goes on where it was. `--method.assign none
    --method.kernel-weight 0` trains on pseudo-labels alone.
    """

    images: Path
    """Folder of the pictures that the proposals are of."""
    proposals: Path
    """File written by `sprompt propose`."""
    backbone: Path
    """The backbone that the proposals were made with; it stays as it is."""
    out: Path = Path("runs/pretrain")
    """Run folder."""
    keep_empty: bool = False
    """Train on pictures without proposals too, as background."""
    cpu: bool = False
    """Do not use a GPU."""
    keep_pictures: bool = False
    """Read and resize every picture once and keep them all on the device, about 6 bytes a pixel of the resized ones: for some thousand
    small ones that only mirroring changes."""
    model: KNetConfig = dataclasses.field(default_factory=lambda: KNetConfig(num_classes=1, frozen_stages=4))
    """The network."""
    method: SaliencyPromptConfig = dataclasses.field(default_factory=SaliencyPromptConfig)
    """Prompts and kernel supervision."""
    augment: Augment = dataclasses.field(default_factory=lambda: Augment(800, 1333))
    """How pictures are changed."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Length and optimisation."""

    def run(self) -> None:
        import torch

        dataset = CocoDataset(
            runs.existing(self.images, "images", folder=True),
            runs.existing(self.proposals, "proposals", folder=False),
            class_agnostic=True,
            keep_empty=self.keep_empty,
        )
        runs.say(f"{len(dataset)} pictures with proposals in {self.proposals}")
        for problem in dataset.problems:
            runs.say(f"  {problem}")
        frozen = self.model.frozen_stages == 4
        if frozen != self.method.freeze_backbone:
            raise ValueError(
                f"--method.freeze-backbone: is {self.method.freeze_backbone}, but --model.frozen-stages is "
                f"{self.model.frozen_stages}; to train the backbone give False and the stages that stay frozen, such as 1; else True "
                "and 4"
            )
        torch.manual_seed(self.train.seed)
        model = KNet(dataclasses.replace(self.model, num_classes=1))
        runs.say_if_crowded(dataset, model.config.kernels)
        runs.say(load_backbone(model.backbone, runs.existing(self.backbone, "backbone", folder=False)))
        made_with = dataset.info["proposals"] if dataset.has_seeds else {}
        if made_with.get("backbone", fingerprint(model.backbone)) != fingerprint(model.backbone):
            raise ValueError(
                f"--backbone: must be the one that {self.proposals} was made with, got another; kernels would be drawn to "
                "features that mean something else"
            )
        proposals = ProposalConfig.from_record(made_with) if made_with else None
        task = Pretraining(model, self.method, proposals=proposals, seed=self.train.seed)
        record = runs.begin(self.out, self)
        train(
            task, runs.batches(dataset, self.augment, keep=self.keep_pictures, cpu=self.cpu),
            self.train, self.out, cpu=self.cpu,
            after_epoch=partial(Stability(task, dataset, self.augment, self.out), keep=runs.first()),
            record=record,
            identity={
                "proposals": runs.digest(self.proposals), "backbone": fingerprint(model.backbone), "pictures": len(dataset),
                "model": to_plain(self.model), "method": to_plain(self.method), "augment": to_plain(self.augment),
            },
        )  # fmt: skip
        runs.save(self.out, model, ["object"], self.augment)

"""Sizes and loss weights of a K-Net."""

from __future__ import annotations

from dataclasses import dataclass

from sprompt.models.backbone import BackboneConfig
from sprompt.models.registry import ModelConfig
from sprompt.settings import check_choices, check_sizes, check_weights

#: Bounds of the sizes, so that a file cannot ask for a network that fits no machine.
_WHOLE = {
    "channels": (2, 8192),
    "kernels": (1, 100_000),
    "num_classes": (1, 1_000_000),
    "stages": (1, 64),
    "heads": (1, 1024),
    "feedforward": (1, 65536),
    "frozen_stages": (-1, 4),
}


@dataclass(frozen=True)
class KNetConfig(BackboneConfig, ModelConfig):
    """The defaults are K-Net with ResNet-50, FPN and three update stages for COCO."""

    channels: int = 256
    """Width of the pyramid, the mask features and the kernels. It must be even and a multiple of heads."""
    kernels: int = 100
    """Number of kernels: the largest number of masks in an image."""
    stages: int = 3
    """Number of kernel update heads, one after the other."""
    heads: int = 8
    """Number of heads of the attention between kernels. channels must be a multiple of it."""
    feedforward: int = 2048
    """Hidden channels of the stages' feed-forward layers."""
    fold: bool = True
    """Apply the affine feature transforms of the stages to kernels and pooled sums instead of the features. This is faster.
    The results are the same up to rounding."""

    loss_class: float = 2.0
    """Weight of the focal loss of the classes."""
    loss_mask: float = 1.0
    """Weight of the masks' cross-entropy."""
    loss_dice: float = 4.0
    """Weight of the masks' dice loss."""
    loss_seg: float = 1.0
    """Weight of the kernel head's dense class loss."""
    cost_class: float = 2.0
    """Weight of the class in the cost of matching kernels to labels."""
    cost_mask: float = 1.0
    """Weight of the masks' cross-entropy in the cost of matching."""
    cost_dice: float = 4.0
    """Weight of the masks' dice loss in the cost of matching."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        self.check_backbone()
        check_sizes(self, _WHOLE)
        if self.channels % 2 or self.channels % self.heads:
            raise ValueError(
                f"KNetConfig: channels must be even and a multiple of heads = {self.heads}, got {self.channels}"
            )
        if not isinstance(self.fold, bool):
            raise ValueError(f"KNetConfig: fold must be True or False, got {self.fold!r}")
        check_weights(self)

"""Sizes and loss weights of a Mask2Former."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sprompt.models.backbone import BackboneConfig, Kind
from sprompt.models.registry import ModelConfig
from sprompt.nn.swin import SwinConfig
from sprompt.settings import check_choices, check_sizes, check_weights

#: Bounds of the sizes, so that a file cannot ask for a network that no machine holds.
_WHOLE = {
    "channels": (4, 8192),
    "queries": (1, 100_000),
    "num_classes": (1, 1_000_000),
    "encoder_layers": (1, 64),
    "decoder_layers": (1, 64),
    "heads": (1, 1024),
    "encoder_feedforward": (1, 65536),
    "decoder_feedforward": (1, 65536),
    "frozen_stages": (-1, 4),
    "points": (1, 1 << 20),
}


@dataclass(frozen=True)
class Mask2FormerConfig(BackboneConfig, ModelConfig):
    """The defaults are Mask2Former with ResNet-50 for the instances of COCO."""

    backbone: Literal[Kind, "swin"] = "resnet"  # type: ignore[assignment]  # one kind more
    """A ResNet, with the three settings that follow, a Swin, with those of `swin`, or an EfficientNet-Lite."""
    swin: SwinConfig = field(default_factory=SwinConfig)
    """Sizes of the Swin."""
    channels: int = 256
    """Width of the pixel decoder, the mask features and the queries; a multiple of 4 and of the heads."""
    queries: int = 100
    """Number of queries: the largest number of masks in an image."""
    heads: int = 8
    """Heads of every attention; they divide the channels."""
    encoder_layers: int = 6
    """Layers of deformable attention in the pixel decoder."""
    encoder_feedforward: int = 1024
    """Hidden channels of the pixel decoder's feed-forward layers."""
    decoder_layers: int = 9
    """Layers of masked attention; layer i reads the map of stride 32, 16, 8, 32, ..."""
    decoder_feedforward: int = 2048
    """Hidden channels of the decoder's feed-forward layers."""
    points: int = 12544
    """Points of a mask at which costs and losses are computed."""

    loss_class: float = 2.0
    """Weight of the cross-entropy of the classes."""
    loss_mask: float = 5.0
    """Weight of the masks' cross-entropy."""
    loss_dice: float = 5.0
    """Weight of the masks' dice loss."""
    no_object: float = 0.1
    """Weight of queries without a target in the cross-entropy of the classes."""
    cost_class: float = 2.0
    """Weight of the class in the cost of matching queries to labels."""
    cost_mask: float = 5.0
    """Weight of the masks' cross-entropy in the cost of matching."""
    cost_dice: float = 5.0
    """Weight of the masks' dice in the cost of matching."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        if not isinstance(self.swin, SwinConfig):
            raise ValueError(f"Mask2FormerConfig: swin must be a SwinConfig, got {self.swin!r}")
        self.check_backbone()
        check_sizes(self, _WHOLE)
        if self.channels % 4 or self.channels % self.heads:
            raise ValueError(
                f"Mask2FormerConfig: channels must be a multiple of 4 and of heads = {self.heads}, got {self.channels}"
            )
        check_weights(self)

"""Sizes and loss weights of a QueryInst."""

from __future__ import annotations

from dataclasses import dataclass

from sprompt.models.backbone import BackboneConfig
from sprompt.models.registry import ModelConfig
from sprompt.settings import check_choices, check_sizes, check_weights

#: Bounds of the sizes, so that a file cannot ask for a network that no machine holds.
_WHOLE = {
    "channels": (1, 2048),
    "queries": (1, 100_000),
    "num_classes": (1, 1_000_000),
    "stages": (1, 64),
    "heads": (1, 1024),
    "dynamic_channels": (1, 1024),
    "feedforward": (1, 65536),
    "frozen_stages": (-1, 4),
}


@dataclass(frozen=True)
class QueryInstConfig(BackboneConfig, ModelConfig):
    """The defaults are QueryInst with ResNet-50, FPN, 100 queries and six stages for COCO."""

    channels: int = 256
    """Width of the pyramid, the queries and the mask heads; a multiple of the heads."""
    queries: int = 100
    """Number of queries, each with a box."""
    stages: int = 6
    """Number of stages, one after the other. Each has its own box head and mask head."""
    heads: int = 8
    """Heads of the attention between queries; they divide the channels."""
    dynamic_channels: int = 64
    """Channels between the two layers that a query makes."""
    feedforward: int = 2048
    """Hidden channels of the stages' feed-forward layers."""

    loss_class: float = 2.0
    """Weight of the focal loss of the classes."""
    loss_l1: float = 5.0
    """Weight of the distance of boxes, in shares of the image's sides."""
    loss_giou: float = 2.0
    """Weight of the boxes' generalised IoU loss."""
    loss_dice: float = 8.0
    """Weight of the masks' dice loss."""
    cost_class: float = 2.0
    """Weight of the class in the cost of matching queries to labels."""
    cost_l1: float = 5.0
    """Weight of the distance of boxes in the cost of matching."""
    cost_giou: float = 2.0
    """Weight of the boxes' generalised IoU in the cost of matching."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        self.check_backbone()
        check_sizes(self, _WHOLE)
        if self.channels % self.heads:
            raise ValueError(
                f"QueryInstConfig: channels must be a multiple of heads = {self.heads}, got {self.channels}"
            )
        check_weights(self)

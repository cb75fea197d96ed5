"""Sizes and loss weights of a FastInst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sprompt.models.backbone import BackboneConfig
from sprompt.models.registry import ModelConfig
from sprompt.settings import check_choices, check_sizes, check_weights

#: Bounds of the sizes, so that a file cannot ask for a network that no machine holds.
_WHOLE = {
    "channels": (4, 8192),
    "queries": (1, 100_000),
    "auxiliary_queries": (0, 100_000),
    "num_classes": (1, 1_000_000),
    "decoder_layers": (1, 64),
    "heads": (1, 1024),
    "decoder_feedforward": (1, 65536),
    "frozen_stages": (-1, 4),
    "points": (1, 1 << 20),
}


@dataclass(frozen=True)
class FastInstConfig(BackboneConfig, ModelConfig):
    """The defaults are FastInst-D3 with ResNet-50 for the instances of COCO. D1 has one decoder layer."""

    channels: int = 256
    """Width of the pixel decoder and the queries; a multiple of 4 and of the heads."""
    queries: int = 100
    """Number of queries: the largest number of masks in an image, and the least number of cells of stride 16."""
    auxiliary_queries: int = 8
    """Number of learned queries that take part in attention but predict nothing."""
    selection: Literal["activation", "learned"] = "activation"
    """The queries are the cells that are most likely objects, or learned vectors as in other models, for comparison."""
    heads: int = 8
    """Heads of every attention; they divide the channels."""
    decoder_layers: int = 3
    """Layers of the decoder."""
    decoder_feedforward: int = 1024
    """Hidden channels of the decoder's feed-forward layers."""
    points: int = 12544
    """Points of a mask at which costs and losses are computed."""
    guided: bool = True
    """Train with a second pass of every layer, in which a query reads the pixels of its label only."""

    loss_proposal: float = 20.0
    """Weight of the cross-entropy of the cells that queries are chosen from."""
    loss_class: float = 2.0
    """Weight of the cross-entropy of the classes."""
    loss_mask: float = 5.0
    """Weight of the masks' cross-entropy."""
    loss_dice: float = 5.0
    """Weight of the masks' dice loss."""
    no_object: float = 0.1
    """Weight of queries without a target in the cross-entropy of the classes."""
    cost_class: float = 2.0
    """Weight of the class in the costs of matching cells and queries to labels."""
    cost_mask: float = 5.0
    """Weight of the masks' cross-entropy in the cost of matching."""
    cost_dice: float = 5.0
    """Weight of the masks' dice in the cost of matching."""
    cost_location: float = 1000.0
    """Cost of a cell, or of a query chosen there, outside of the label's mask."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        self.check_backbone()
        check_sizes(self, _WHOLE)
        if self.channels % 4 or self.channels % self.heads:
            raise ValueError(
                f"FastInstConfig: channels must be a multiple of 4 and of heads = {self.heads}, got {self.channels}"
            )
        if not isinstance(self.guided, bool):
            raise ValueError(f"FastInstConfig: guided must be True or False, got {self.guided!r}")
        check_weights(self)

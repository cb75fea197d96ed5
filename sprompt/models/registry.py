"""The models by name, and what their configurations have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from sprompt.registry import Named, Registry
from sprompt.settings import Hidden

MODELS = Registry(
    "model", {"knet": "sprompt.models.knet:KNet", "mask2former": "sprompt.models.mask2former:Mask2Former"}
)


@dataclass(frozen=True)
class ModelConfig(Named):
    """Settings of a model: all that its constructor takes."""

    registry = MODELS

    num_classes: Annotated[int, Hidden] = 80
    """Number of classes. Commands set it to that of the data."""
    frozen_stages: int = 1
    """How much of the backbone is frozen: -1 nothing, 0 the stem, 1 the stem and the first stage, ... 4 everything."""


def build(config: ModelConfig) -> Any:
    """A new model with these settings."""
    return MODELS.owner(config)(config)

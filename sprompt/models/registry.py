"""The models by name, and the base of their configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from sprompt.registry import Named, Registry
from sprompt.settings import Hidden

MODELS = Registry(
    "model",
    {
        "knet": "sprompt.models.knet:KNet",
        "mask2former": "sprompt.models.mask2former:Mask2Former",
        "fastinst": "sprompt.models.fastinst:FastInst",
        "queryinst": "sprompt.models.queryinst:QueryInst",
    },
)


@dataclass(frozen=True)
class ModelConfig(Named):
    """Settings of a model, the only argument of its constructor."""

    registry = MODELS

    num_classes: Annotated[int, Hidden] = 80
    """Number of classes. Commands set it to that of the data."""
    frozen_stages: int = 1
    """Frozen part of the backbone: -1 nothing, 0 the stem, 1 the stem and the first stage, and so on; 4 everything."""


def build(config: ModelConfig) -> Any:
    """A new model with these settings."""
    return MODELS.owner(config)(config)

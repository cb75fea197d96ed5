"""Training on labels, without prompts: fine-tuning, or training from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.methods.registry import MethodConfig
from sprompt.models.protocol import ParameterGroup, QueryModel, Targets, checked_model, features_of


@dataclass(frozen=True)
class SupervisedConfig(MethodConfig):
    """Settings of training on labels."""

    class_agnostic: bool = False
    """Give all labels one class, "object"."""


class Supervised(nn.Module):
    """The task of a model and labels, without prompts. `forward` returns (loss, its terms for the log)."""

    Config = SupervisedConfig

    def __init__(self, model: nn.Module, config: SupervisedConfig | None = None) -> None:
        super().__init__()
        self.model = checked_model(model)
        self.config = config or SupervisedConfig()

    @staticmethod
    def classes(config: SupervisedConfig, dataset: Any) -> list[str]:
        return ["object"] if config.class_agnostic else list(dataset.classes)

    @classmethod
    def on(cls, model: nn.Module, config: SupervisedConfig, dataset: Any, seed: int) -> Supervised:
        check_classes(cls.classes(config, dataset), cast(QueryModel, model).num_classes)
        return cls(model, config)

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        return cast(QueryModel, self.model).parameter_groups()

    def watch(self, dataset: Any, augment: Any, out: Path) -> None:
        return None

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = cast(QueryModel, self.model)
        labels = torch.zeros_like(batch.labels) if self.config.class_agnostic else batch.labels
        features = features_of(model, batch.images, batch.sizes)
        outputs = model.decode(features, None, Targets(batch.masks, labels, batch.counts))
        terms = model.losses(outputs, batch.masks, labels, batch.counts).terms
        return summed(terms.values()), {name: term.detach() for name, term in terms.items()}


def summed(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([term.float() for term in terms]).sum()


def check_classes(classes: Sequence[str], num_classes: int) -> None:
    """Raises ValueError if the labels do not have `num_classes` classes. Call it before the first step."""
    if len(classes) != num_classes:
        names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"num_classes: the model must have as many classes as the labels, {len(classes)} ({names}), got {num_classes}; "
            "give it fresh classifiers of that number"
        )

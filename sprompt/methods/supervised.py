"""Training on labels, without prompts: fine-tuning, or training from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.models.protocol import QueryModel


class Supervised(nn.Module):
    """The task of a model and labels, without prompts. `forward` returns (loss, its terms for the log)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = checked_model(model)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = cast(QueryModel, self.model)
        outputs = model.decode(model.encode(batch.images))
        terms = model.losses(outputs, batch.masks, batch.labels, batch.counts).terms
        return summed(terms.values()), {name: term.detach() for name, term in terms.items()}


def summed(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([term.float() for term in terms]).sum()


def checked_model(model: nn.Module) -> nn.Module:
    """Returns the model; raises TypeError if it is no nn.Module or lacks a member of `sprompt.models.protocol.QueryModel`."""
    wanted = ("sites", "channels", "num_classes", "backbone", "encode", "decode", "losses", "predictions")
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        lack = f"one without {', '.join(missing)}" if missing else "something else"
        raise TypeError(
            f"model: must be an nn.Module with all of sprompt.models.protocol.QueryModel, got {type(model).__name__}, {lack}"
        )
    return model


def check_classes(classes: Sequence[str], num_classes: int) -> None:
    """Raises ValueError if the labels do not have `num_classes` classes. Call it before the first step."""
    if len(classes) != num_classes:
        names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"num_classes: the model must have as many classes as the labels, {len(classes)} ({names}), got {num_classes}; "
            "give it fresh classifiers of that number"
        )

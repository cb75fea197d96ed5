"""The training methods by name, and what the commands ask of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.registry import Named, Registry

METHODS = Registry(
    "method",
    {
        "saliency-prompt": "sprompt.methods.saliency_prompt:Pretraining",
        "segprompt": "sprompt.methods.segprompt:SegPrompt",
        "supervised": "sprompt.methods.supervised:Supervised",
    },
)


@dataclass(frozen=True)
class MethodConfig(Named):
    """Settings of a method."""

    registry = METHODS


class Method(Protocol):
    """The task of a model and labelled pictures: an nn.Module that `sprompt.engine.train.train` trains."""

    Config: ClassVar[type[MethodConfig]]

    @staticmethod
    def classes(config: Any, dataset: Any) -> list[str]:
        """Names of the classes that the model must have for a CocoDataset."""

    @classmethod
    def on(cls, model: nn.Module, config: Any, dataset: Any, seed: int) -> Any:
        """The task of training a model on a CocoDataset. Raises ValueError where they do not fit."""

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradient, and scalars for the log."""

    def watch(self, dataset: Any, augment: Any, out: Path) -> Callable[..., Mapping[str, float]] | None:
        """A function that is called with the number of epochs done, and `keep` (whether this process writes files), after each; its
        numbers are logged. None: nothing is watched."""

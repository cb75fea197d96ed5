"""The evaluators by name, and the interface of an evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from rich.table import Table

from sprompt.registry import Named, Registry

EVALUATORS = Registry(
    "evaluator",
    {
        "coco": "sprompt.engine.evaluators.coco:Coco",
        "open-world": "sprompt.engine.evaluators.open_world:OpenWorld",
    },
)


@dataclass(frozen=True)
class EvaluatorConfig(Named):
    """Settings of an evaluator, the only argument of its constructor."""

    registry = EVALUATORS
    #: Whether the classes of the results have no influence, so that a model of any classes can be measured on any categories.
    any_classes: ClassVar[bool] = False

    def check(self, categories: Sequence[Mapping[str, Any]]) -> None:
        """Raises DataError if the settings do not fit the categories of a COCO file. Call it before a long prediction."""


class Evaluator(Protocol):
    Config: ClassVar[type[EvaluatorConfig]]

    def metrics(
        self, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, class_agnostic: bool
    ) -> dict[str, Any]:
        """Compares COCO results with the content of a COCO file. All values must be JSON values, because they go into
        metrics.json."""

    def table(self, metrics: Mapping[str, Any]) -> Table:
        """The most important metrics, for a terminal."""

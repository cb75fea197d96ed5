"""Open-world recall: how many objects of each category are found by masks without classes.

Detections have one class, whatever their results say; a picture's 100 best ones count. For each category that a picture has, its
objects are matched with all detections of the picture, by COCO's greedy rule. The categories are independent, so a detection may
find objects of several of them. The recall of a category is the share of its objects that are found. The average recall (AR) of
a group is the mean over ten IoUs, from 0.5 to 0.95, and over those of its categories that have objects. ARs, ARm and ARl are
for objects below 32², from 32² to 96² and above 96² pixels (both ends included), by the area that the labels state. An object
with an area of 0 does not count, and no crowd does.

The merged protocol pools the categories. It has an average precision too, with the crowds as COCO has them. Among separate
categories precision has no meaning: a detection of one category would be a false positive of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from sprompt.data import lvis_ow
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.engine.evaluators.recall import RANGES, Counts, count
from sprompt.engine.evaluators.registry import EvaluatorConfig

NUMBERS = tuple(RANGES)
MERGED = ("AP", "AP50", "AP75", *NUMBERS)
MAX_GROUPS = 1 << 24  # bytes of a file of groups


@dataclass(frozen=True)
class OpenWorldConfig(EvaluatorConfig):
    """Recall without classes, for groups of categories."""

    any_classes: ClassVar[bool] = True
    groups: Path | None = None
    """JSON file of the groups: {name: [category ids]}. Default: known, seen and unseen of LVIS-OW, if the annotations are
    those of LVIS v1, whose categories have a frequency."""

    def check(self, categories: Sequence[Mapping[str, Any]]) -> None:
        self.groups_of(categories)

    def groups_of(self, categories: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
        if self.groups is not None:
            return read_groups(self.groups, [category["id"] for category in categories])
        frequency = {c["id"]: c["frequency"] for c in categories if "frequency" in c}
        return lvis_ow.groups(frequency, "the categories of the annotations") if frequency else {}


class OpenWorld:
    """AR of all categories and of their groups, and the merged protocol."""

    Config = OpenWorldConfig

    def __init__(self, config: OpenWorldConfig) -> None:
        self.config = config

    def metrics(
        self, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, class_agnostic: bool
    ) -> dict[str, Any]:
        """`NUMBERS`, "hit_rate" and "categories" (the number of those with objects), for all categories; the same under
        "groups" for each group; under "merged" `MERGED`; under "per_category" the numbers of each category with objects.

        All are between 0 and 1, or −1 where the labels have no such object. The hit rate of a category is the share of its
        pictures in which one of its objects is found at IoU 0.5. That of a group is the mean over its categories.

        Args:
            truth, results: as for `coco_metrics`; category_id of a result is not read.
            class_agnostic: has no influence.
        """
        categories = sorted(truth["categories"], key=lambda category: category["id"])
        place = {category["id"]: row for row, category in enumerate(categories)}
        groups = self.config.groups_of(categories)
        counts = count(truth, results, place)
        recall, hit_rate = counts.recall(), counts.hit_rate()
        metrics = _numbers(recall[:-1], hit_rate[:-1])
        metrics["groups"] = {}
        group_of = {}
        for name, ids in groups.items():
            rows = [place[own] for own in ids if own in place]
            group_of.update(dict.fromkeys(rows, name))
            metrics["groups"][name] = _numbers(recall[rows], hit_rate[rows])
        metrics["merged"] = _precision(counts) | {name: _mean(r) for name, r in zip(NUMBERS, recall[-1], strict=True)}
        metrics["per_category"] = {
            category["name"]: {"group": group_of.get(row), "objects": int(counts.objects[row, 0]), "hit_rate": hit_rate[row].item()}
            | {name: _mean(r) for name, r in zip(NUMBERS, recall[row], strict=True)}
            for row, category in enumerate(categories)
            if counts.objects[row, 0]
        }  # fmt: skip
        return metrics

    def table(self, metrics: Mapping[str, Any]) -> Table:
        """A row for each group, in per cent. A dash stands for -1, and for what a row does not have."""
        table = Table(caption="merged: all categories as one class")
        for title in ("", *NUMBERS, "hit rate", "AP", "categories"):
            table.add_column(title, justify="right" if title else "left")
        merged = {"hit_rate": -1, "categories": 1, **metrics["merged"]}
        for name, row in {"all": metrics, **metrics["groups"], "merged": merged}.items():
            shown = [row[n] for n in NUMBERS] + [row["hit_rate"], row.get("AP", -1)]
            table.add_row(name, *(f"{100 * v:.1f}" if v >= 0 else "–" for v in shown), str(row["categories"]))
        return table


def read_groups(path: Path, known: Sequence[int]) -> dict[str, list[int]]:
    """Groups of categories from a JSON file. DataError refuses a file of another form, a category in two groups, and a group
    without any category of the annotations, whose ids are `known`."""
    found = read_json(path, MAX_GROUPS)
    if not isinstance(found, dict) or not all(
        isinstance(ids, list) and all(type(own) is int for own in ids) for ids in found.values()
    ):
        raise DataError(f"{path}: must be an object of groups, {{name: [category ids]}}; correct it")
    several = sorted(own for own, n in Counter(chain(*found.values())).items() if n > 1)
    if several:
        raise DataError(f"{path}: a category must be in one group, once, got category {several[0]} more often")
    for name, ids in found.items():
        if not set(ids) & set(known):
            raise DataError(f"{path}: group {name} must have categories of the annotations, got none of their ids")
    return found


def _numbers(recall: np.ndarray, hit_rate: np.ndarray) -> dict[str, Any]:
    """The numbers of some categories, from their recalls (categories, ranges, thresholds)."""
    numbers: dict[str, Any] = {name: _mean(recall[:, a]) for a, name in enumerate(NUMBERS)}
    return numbers | {"hit_rate": _mean(hit_rate), "categories": int((hit_rate >= 0).sum())}


def _precision(counts: Counts) -> dict[str, float]:
    """AP, AP50 and AP75 of the merged protocol, by COCO's rule: precision at 101 recalls, where the precision at a recall is
    the largest one at this recall or above."""
    precision = counts.precision(np.linspace(0.0, 1.0, 101))
    return {"AP": _mean(precision), "AP50": _mean(precision[0]), "AP75": _mean(precision[5])}


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0

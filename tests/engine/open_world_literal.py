"""The open-world protocol word by word: loops over categories, pictures, ranges of the area and thresholds. Slow, for tests.

Nothing of the library is used: masks are dense arrays, the IoU is a quotient of two counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RANGES = {"AR100": (0, 1e10), "ARs": (0, 1024), "ARm": (1024, 9216), "ARl": (9216, 1e10)}
LEVELS = np.linspace(0.5, 0.95, 10).tolist()


def iou(a: np.ndarray, b: np.ndarray) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


def match(ious: list[list[float]], ignored: list[bool], level: float) -> list[int]:
    """The object of each detection, -1 for none. Detections come in order of score."""
    free = [True] * len(ignored)
    found = []
    for row in ious:
        best, best_iou = -1, min(level, 1 - 1e-10)
        for wanted in (False, True):  # objects that count come first
            for g, value in enumerate(row):
                if ignored[g] == wanted and free[g] and value >= best_iou:
                    best, best_iou = g, value
            if best >= 0:
                break
        if best >= 0:
            free[best] = False
        found.append(best)
    return found


def counts(
    pictures: list[int],
    labels: list[dict[str, Any]],
    results: list[dict[str, Any]],
    categories: list[int],
) -> dict[int, dict[str, Any]]:
    """By category: "found" [range][threshold], "objects" [range], "pictures", "hits". Labels and results have a dense mask."""
    every: dict[int, dict[str, Any]] = {}
    for category in categories:
        own = {"found": [[0] * 10 for _ in RANGES], "objects": [0] * len(RANGES), "pictures": 0, "hits": 0}
        for picture in pictures:
            targets = [a for a in labels if a["image_id"] == picture and a["category_id"] == category and a["area"] > 0]
            there = [r for r in results if r["image_id"] == picture]
            there = sorted(there, key=lambda r: -r["score"])[:100]  # sorted() keeps the order of equal scores
            ious = [[iou(r["mask"], a["mask"]) for a in targets] for r in there]
            for a, (least, most) in enumerate(RANGES.values()):
                ignored = [not least <= t["area"] <= most for t in targets]
                own["objects"][a] += ignored.count(False)
                if a == 0:
                    own["pictures"] += False in ignored
                for t, level in enumerate(LEVELS):
                    found = match(ious, ignored, level)
                    hits = sum(g >= 0 and not ignored[g] for g in found)
                    own["found"][a][t] += hits
                    if a == 0 and t == 0:
                        own["hits"] += hits > 0
        every[category] = own
    return every


def average_recall(own: list[dict[str, Any]], name: str) -> float:
    """The mean of found / objects over thresholds and over the categories that have objects; -1 if none has."""
    a = list(RANGES).index(name)
    recalls = [n / c["objects"][a] for c in own if c["objects"][a] for n in c["found"][a]]
    return sum(recalls) / len(recalls) if recalls else -1


def hit_rate(own: list[dict[str, Any]]) -> float:
    rates = [c["hits"] / c["pictures"] for c in own if c["pictures"]]
    return sum(rates) / len(rates) if rates else -1

"""Predictions of a picture against its labels: found labels, false predictions, missed labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sprompt.masks import BitMasks
from sprompt.report.records import Instance

IOU = 0.5  # lower bound of the IoU of a prediction and the label that it finds


@dataclass(frozen=True)
class Compared:
    """The predictions of one picture above the threshold, and its labels."""

    masks: BitMasks  # (P,) predictions, by decreasing score
    predictions: list[Instance]
    found: list[int]  # (P,) index of the matched label; -1 for none, -2 for a crowd: neither found nor false
    ious: list[float]  # (P,) IoU with the matched label; without a match the largest IoU with a label of its class
    label_masks: BitMasks  # (G,)
    labels: list[Instance]

    @property
    def counts(self) -> tuple[int, int, int]:
        """True positives, false positives, missed labels."""
        true, false = sum(f >= 0 for f in self.found), sum(f == -1 for f in self.found)
        return true, false, sum(not label.crowd for label in self.labels) - true


def compare(
    masks: BitMasks, predictions: Sequence[Instance], label_masks: BitMasks, labels: Sequence[Instance]
) -> Compared:
    """Matches predictions and labels as COCO does at IoU 0.5.

    By decreasing score, each prediction takes the free label of its class with the largest IoU, if that is at least 0.5.
    """
    order = sorted(range(len(predictions)), key=lambda i: -(predictions[i].score or 0.0))
    masks, predictions = masks[torch.tensor(order, dtype=torch.int64)], [predictions[i] for i in order]
    ious = masks.iou(label_masks).tolist() if len(masks) and len(label_masks) else [[0.0] * len(labels) for _ in order]
    inside = _inside(masks, label_masks, labels)
    taken: set[int] = set()
    found, best = [], []
    for p, prediction in enumerate(predictions):
        same = [g for g, label in enumerate(labels) if label.category == prediction.category]
        free = [g for g in same if g not in taken and not labels[g].crowd and ious[p][g] >= IOU]
        if free:
            match = max(free, key=lambda g: (ious[p][g], g))
            taken.add(match)
            found.append(match)
            best.append(ious[p][match])
        else:
            crowd = any(labels[g].crowd and inside[p][g] >= IOU for g in same)
            found.append(-2 if crowd else -1)
            best.append(max((ious[p][g] for g in same if not labels[g].crowd), default=0.0))
    return Compared(masks, predictions, found, best, label_masks, list(labels))


def _inside(masks: BitMasks, label_masks: BitMasks, labels: Sequence[Instance]) -> list[list[float]]:
    """Share of each prediction that lies in each label. COCO uses this share, not the IoU, for crowds."""
    if not len(masks) or not any(label.crowd for label in labels):
        return [[0.0] * len(labels) for _ in range(len(masks))]
    both = BitMasks((masks.words[:, None] & label_masks.words[None]), masks.size).area()
    return (both / masks.area().clamp(min=1)[:, None]).tolist()


def best_threshold(compared: Sequence[Compared]) -> float:
    """The score threshold with the best F1 over these pictures. Predictions with lower scores do not change the matches above
    it."""
    scores = [
        (p.score or 0.0, f >= 0) for c in compared for p, f in zip(c.predictions, c.found, strict=True) if f != -2
    ]
    labels = sum(not label.crowd for c in compared for label in c.labels)
    best, threshold, true = 0.0, max((s for s, _ in scores), default=0.5), 0
    scores.sort(key=lambda pair: -pair[0])
    for n, (score, hit) in enumerate(scores, 1):
        true += hit
        last_of_ties = n == len(scores) or scores[n][0] < score
        if last_of_ties and 2 * true / (n + labels) > best:
            best, threshold = 2 * true / (n + labels), score
    return threshold


def above(compared: Compared, threshold: float) -> Compared:
    """The same picture without the predictions below this score."""
    n = sum((p.score or 0.0) >= threshold for p in compared.predictions)
    return Compared(
        compared.masks[:n], compared.predictions[:n], compared.found[:n], compared.ious[:n],
        compared.label_masks, compared.labels,
    )  # fmt: skip

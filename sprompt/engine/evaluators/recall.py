"""Counts of found objects by category, area and IoU, one picture at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sprompt.data.segmentation import decode
from sprompt.engine.evaluators import results as checked
from sprompt.masks import BitMasks
from sprompt.ops import mask_iou, match_detections

#: {name of the recall: least and largest area of its objects, in pixels}.
RANGES = {"AR100": (0, 1e10), "ARs": (0, 32**2), "ARm": (32**2, 96**2), "ARl": (96**2, 1e10)}
#: The thresholds of pycocotools, bit for bit.
LEVELS = np.linspace(0.5, 0.95, 10)
BEST = 100  # detections of a picture that count


class Counts:
    """C categories, and behind them all objects as one; A ranges of the area; T thresholds.

    Of the detections of the merged protocol only scores and two numbers of T bits are kept: 12 bytes each.
    """

    def __init__(self, categories: int) -> None:
        C, A, T = categories + 1, len(RANGES), len(LEVELS)
        self.found = np.zeros((C, A, T), np.int64)
        self.objects = np.zeros((C, A), np.int64)
        self.pictures = np.zeros(C, np.int64)  # with an object
        self.hits = np.zeros(C, np.int64)  # pictures with an object that is found at the first threshold
        self._scores: list[np.ndarray] = []
        self._right: list[np.ndarray] = []  # bit t: found an object at threshold t
        self._left_out: list[np.ndarray] = []  # bit t: lies in a crowd

    def recall(self) -> np.ndarray:
        """float64 (C + 1, A, T), −1 where there are no objects."""
        objects = self.objects[:, :, None]
        return np.where(objects > 0, self.found / np.maximum(objects, 1), -1.0)

    def hit_rate(self) -> np.ndarray:
        """float64 (C + 1,), −1 for a category without objects."""
        return np.where(self.pictures > 0, self.hits / np.maximum(self.pictures, 1), -1.0)

    def precision(self, recalls: np.ndarray) -> np.ndarray:
        """float64 (T, R): the precision of the merged protocol at these recalls, by the rule and in the order of operations
        of pycocotools. −1 without objects."""
        precision = np.full((len(LEVELS), len(recalls)), -1.0)
        if not self.objects[-1, 0]:
            return precision
        scores, right, left_out = (
            np.concatenate([np.empty(0, kind), *parts])
            for parts, kind in ((self._scores, np.float64), (self._right, np.uint16), (self._left_out, np.uint16))
        )
        order = np.argsort(-scores, kind="stable")
        for t in range(len(LEVELS)):
            hit, counted = (right[order] >> t & 1).astype(bool), (left_out[order] >> t & 1) == 0
            hits, misses = np.cumsum(hit).astype(float), np.cumsum(counted & ~hit).astype(float)
            exact = hits / (misses + hits + np.spacing(1))
            best = np.append(np.maximum.accumulate(exact[::-1])[::-1], 0.0)  # behind the end the precision is 0
            precision[t] = best[np.searchsorted(hits / self.objects[-1, 0], recalls, side="left")]
        return precision

    # -- one picture

    def add(
        self,
        detections: BitMasks,
        scores: np.ndarray,
        targets: BitMasks,
        categories: np.ndarray,
        areas: np.ndarray,
        crowd: np.ndarray,
    ) -> None:
        """Adds a picture: detections (D,) by decreasing score, targets (G,) with their categories, in [0, C)."""
        iou = mask_iou(targets, detections, dtype=torch.float64)
        self._add_recall(iou, categories, areas, crowd)
        self._add_precision(iou, detections, scores, targets, crowd)

    def _add_recall(self, iou: torch.Tensor, categories: np.ndarray, areas: np.ndarray, crowd: np.ndarray) -> None:
        """Matches the objects of each category in each range on their own. COCO's rule says the same in more words: objects of
        other ranges are ignored, and a detection takes an ignored object only where it takes no other."""
        none = iou.new_full((1, iou.shape[1]), -1.0)  # the row that pads lists: it reaches no threshold
        rows = torch.cat((iou, none))
        A, merged = len(RANGES), len(self.found) - 1
        places, keys = [], []  # of each object once for its category and once for all, in each range that has its area
        for number, (least, most) in enumerate(RANGES.values()):
            there = np.flatnonzero(~crowd & (areas >= least) & (areas <= most))
            places += [there, there]
            keys += [categories[there] * A + number, np.full(len(there), merged * A + number)]
        every_key, place = np.concatenate(keys), np.concatenate(places)
        place = place[np.argsort(every_key, kind="stable")]
        key, length = np.unique(every_key, return_counts=True)
        start = np.cumsum(length) - length
        category, a = key // A, key % A
        self.objects[category, a] += length
        self.pictures[category[a == 0]] += 1
        for chosen in _of_similar_length(length):
            column = np.arange(length[chosen].max())
            real = column < length[chosen, None]
            index = np.where(real, place[np.where(real, start[chosen, None] + column, 0)], len(iou))
            match = match_detections(rows[torch.from_numpy(index)].mT, torch.from_numpy(LEVELS))
            found = (match >= 0).sum(-1).numpy()
            self.found[category[chosen], a[chosen]] += found
            whole = a[chosen] == 0
            self.hits[category[chosen][whole]] += found[whole, 0] > 0

    def _add_precision(
        self, iou: torch.Tensor, detections: BitMasks, scores: np.ndarray, targets: BitMasks, crowd: np.ndarray
    ) -> None:
        flags = torch.from_numpy(crowd)
        if crowd.any():
            # The IoU of COCO with a crowd is the intersection over the area of the detection. The intersection is a whole
            # number below 2^31, which the rounding errors do not reach.
            own, theirs = detections.area().double(), targets.area().double()
            common = (iou / (1 + iou) * (own + theirs[:, None])).round()
            iou = torch.where(flags[:, None], common / own.clamp(min=1), iou)
        match = match_detections(iou.mT, torch.from_numpy(LEVELS), None, flags).numpy()
        in_crowd = np.append(crowd, False)[match]  # −1, no match, is the last
        bits = (1 << np.arange(len(LEVELS)))[:, None]
        self._scores.append(scores)
        self._right.append((((match >= 0) & ~in_crowd) * bits).sum(0).astype(np.uint16))
        self._left_out.append((in_crowd * bits).sum(0).astype(np.uint16))


def _of_similar_length(length: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of lists in parts. A part's lengths have the same number of binary digits, so padding less than doubles them."""
    digits = np.frexp(length)[1]
    for own in np.unique(digits):
        yield np.flatnonzero(digits == own)


def count(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], place: Mapping[int, int]) -> Counts:
    """Compares results with the labels. `place` gives the row of each category id. The masks of one picture at a time are in
    memory."""
    sizes = checked.sizes(truth)
    found: dict[Any, list[tuple[float, int]]] = {image: [] for image in sizes}
    for number, result in enumerate(results):
        with checked.record(number):
            image, score = checked.picture_of(result, sizes), float(result["score"])
            checked.rle_of(result, sizes[image], image)
            found[image].append((score, number))
    labels: dict[Any, list[Mapping[str, Any]]] = {image: [] for image in sizes}
    for annotation in truth["annotations"]:
        if annotation["area"] > 0:
            labels[annotation["image_id"]].append(annotation)
    counts = Counts(len(place))
    for image in sorted(sizes):  # the order in which pycocotools ranks equal scores
        own, targets = found.pop(image), labels.pop(image)
        scores = np.array([score for score, _ in own])
        best = np.argsort(-scores, kind="stable")[:BEST]
        rles = [results[own[i][1]]["segmentation"] for i in best]
        first = min((own[i][1] for i in best), default=0)
        counts.add(
            checked.decoded(rles, sizes[image], image, first),
            scores[best],
            _masks(targets, sizes[image]),
            np.array([place[a["category_id"]] for a in targets], np.int64),
            np.array([a["area"] for a in targets], np.float64),
            np.array([bool(a.get("iscrowd", 0)) for a in targets], bool),
        )
    return counts


def _masks(targets: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> BitMasks:
    def name(i: int) -> str:
        return f"annotation {targets[i].get('file_id', targets[i]['id'])} of the labels"

    return decode([a["segmentation"] for a in targets], size, name)

"""How well labels meet true masks: their IoU by category and by size."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sprompt.data.annotations import is_mask_of
from sprompt.data.boxes import BoxedPictures
from sprompt.data.segmentation import decode
from sprompt.masks import BitMasks
from sprompt.nn.mask_labeler import SIZE_CLASSES, size_class


def quality(pictures: BoxedPictures, truth: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    """The IoU of each label with the mask of its annotation, averaged by category, and then over the categories that occur.

    Args:
        pictures: the boxes that were labelled.
        truth: the content of the COCO file of these boxes. Annotations without a mask do not count.
        labels: the content of the labelled file. An annotation without a label has an IoU of 0.

    Returns: "IoU" (the mean over categories), "per_class" {name: mean}, "objects" (their number), and for each size class the same mean
    over its objects only ("small", ...; absent without such objects).
    """
    found = {record["id"]: record for record in labels["annotations"]}
    true = {record["id"]: record for record in truth["annotations"]}
    every: list[tuple[int, int, float]] = []  # category, size class, IoU
    for picture, boxes in zip(pictures.pictures, pictures.boxes, strict=True):
        chosen = [box for box in boxes if is_mask_of(true[box.annotation].get("segmentation"), picture.size)]
        records = [true[box.annotation] for box in chosen]
        names = [f"{pictures.source}: annotation {record['id']}" for record in records]
        masks = decode([record["segmentation"] for record in records], picture.size, names.__getitem__)
        labelled = [i for i, record in enumerate(records) if record["id"] in found]
        own = BitMasks.from_rle([found[records[i]["id"]]["segmentation"] for i in labelled], picture.size)
        ious = dict(zip(labelled, _pairwise(own, masks[labelled]), strict=True))
        every += [
            (record["category_id"], size_class(box.area), ious.get(i, 0.0))
            for i, (record, box) in enumerate(zip(records, chosen, strict=True))
        ]
    classes = dict(pictures.categories)
    means = _by_category(every)
    result: dict[str, Any] = {"objects": len(every), "per_class": {classes[own]: mean for own, mean in means.items()}}
    if every:
        result["IoU"] = sum(means.values()) / len(means)
    for kind, name in enumerate(SIZE_CLASSES):
        if part := _by_category([entry for entry in every if entry[1] == kind]):
            result[name] = sum(part.values()) / len(part)
    return result


def _pairwise(a: BitMasks, b: BitMasks) -> list[float]:
    """The IoU of each mask with the one at the same place."""
    both = BitMasks(a.words & b.words, a.size).area().double()
    return (both / ((a.area() + b.area()) - both + 1e-6)).tolist()


def _by_category(entries: list[tuple[int, int, float]]) -> dict[int, float]:
    """The mean IoU of each category, by ascending id."""
    groups: dict[int, list[float]] = defaultdict(list)
    for category, _, iou in entries:
        groups[category].append(iou)
    return {category: sum(groups[category]) / len(groups[category]) for category in sorted(groups)}

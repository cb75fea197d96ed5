"""Run lengths and polygons of COCO files, decoded to bits. Every value is checked, since files may be wrong or hostile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sprompt.data.errors import DataError
from sprompt.masks import BitMasks, Size


def is_segmentation(value: Any) -> bool:
    """Whether a value has the form of run lengths, or of a list of polygons with at least one polygon of three corners."""
    if isinstance(value, dict):
        return "size" in value and "counts" in value
    if isinstance(value, list):
        for part in value:  # faster than any(): a COCO file has a million polygons
            if isinstance(part, list) and len(part) >= 6:
                return True
    return False


def decode(segmentations: Sequence[Any], size: Size, name: Callable[[int], str]) -> BitMasks:
    """Masks (L,) of this size. Polygons are filled as pycocotools does; polygons with less than three corners are empty.

    DataError refuses a segmentation that is broken, of another size, or far outside the picture, and calls the i-th `name(i)`.
    """
    rles = [_filled(s, size, name(i)) if isinstance(s, list) else s for i, s in enumerate(segmentations)]
    try:
        return BitMasks.from_rle(rles, size)
    except (ValueError, TypeError):
        for i, rle in enumerate(rles):
            try:
                BitMasks.from_rle([rle], size)
            except (ValueError, TypeError) as error:
                reason = str(error).replace("rle_decode: rles[0]", "its run lengths").removeprefix("rle_decode: ")
                raise DataError(f"{name(i)}: {reason}") from None
        raise


def outlines(polygons: list[Any], size: Size, name: str) -> list[np.ndarray]:
    """The corners [x, y, x, y, …] of the polygons that have at least three. DataError calls their annotation `name`."""
    parts = []
    reach = max(size)
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            points = np.empty((0, 0))
        if points.ndim != 1 or len(points) % 2:
            raise DataError(f"{name}: polygons must be lists of numbers x, y, x, y, …, got {polygon!r:.60}")
        # pycocotools walks along every edge, so one distant corner could take any amount of memory
        if not ((points >= -reach) & (points <= 2 * reach)).all():
            raise DataError(
                f"{name}: corners must lie in or near the picture of {size[0]}x{size[1]}, got {polygon!r:.60}; "
                "were the labels made for another size?"
            )
        if len(points) >= 6:  # pycocotools takes four numbers for a box
            parts.append(points)
    return parts


def _filled(polygons: list[Any], size: Size, name: str) -> dict[str, Any]:
    """Run lengths of the union of polygons [x, y, x, y, …]."""
    height, width = size
    parts = outlines(polygons, size, name)
    if not parts:
        return {"size": list(size), "counts": [height * width]}
    return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))

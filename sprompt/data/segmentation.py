"""Masks as COCO files hold them: run lengths or polygons, to bits. Nothing in them is trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sprompt.data.errors import DataError
from sprompt.masks import BitMasks, Size


def is_segmentation(value: Any) -> bool:
    """Whether it has the form of run lengths or of polygons at least one of which has three corners."""
    if isinstance(value, dict):
        return "size" in value and "counts" in value
    if isinstance(value, list):
        for part in value:  # a loop, since a COCO file has a million of them
            if isinstance(part, list) and len(part) >= 6:
                return True
    return False


def decode(segmentations: Sequence[Any], size: Size, name: Callable[[int], str]) -> BitMasks:
    """Masks (L,) of this size. Polygons are filled as pycocotools does; parts of less than three corners hold nothing.

    `name(i)` is what DataError calls the i-th when it is broken, of another size, or drawn far outside the picture.
    """
    rles = [_filled(s, size, name, i) if isinstance(s, list) else s for i, s in enumerate(segmentations)]
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


def _filled(polygons: list[Any], size: Size, name: Callable[[int], str], index: int) -> dict[str, Any]:
    """Run lengths of the union of polygons [x, y, x, y, …]."""
    height, width = size
    parts = []
    reach = max(size)
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            points = np.empty((0, 0))
        if points.ndim != 1 or len(points) % 2:
            raise DataError(f"{name(index)}: polygons must be lists of numbers x, y, x, y, …, got {polygon!r:.60}")
        # the filling walks along every edge, so that one far corner could cost any amount of memory
        if not ((points >= -reach) & (points <= 2 * reach)).all():
            raise DataError(
                f"{name(index)}: corners must lie in or near the picture of {height}x{width}, got {polygon!r:.60}; "
                "were the labels made for another size?"
            )
        if len(points) >= 6:  # pycocotools takes four numbers for a box
            parts.append(points)
    if not parts:
        return {"size": list(size), "counts": [height * width]}
    return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))

"""Features of boxes, sampled from the levels of a pyramid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.roi_align import op

#: Levels of a pyramid (max_views of csrc/common/views.h).
LEVELS = 8
#: Sides of maps are below it and strides at most so large: they and halves of them are exact in float32.
SIDE = 2**23
#: Bins and samples of a side of a box. A GPU kernel has a table of them in shared memory.
BINS, SAMPLES = 256, 1024


def roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    size: int,
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
    sampling: int = 2,
    counts: Tensor | None = None,
) -> Tensor:
    """Features of boxes: every box is cut into size x size bins, and a bin is the mean of sampling x sampling values of a map.

    A box (x1, y1, x2, y2) has the width w = max(x2 − x1, 0) and the height h alike. It is read from one map, that of level
    clamp(⌊log₂(√(w·h)/56 + 10⁻⁶)⌋, 0, V − 1), V being the number of maps. With the stride s of this map, the samples of a box lie
    in columns x1/s − ½ + (i + ½)·(w/s)/(size·sampling), 0 ≤ i < size·sampling, and in rows alike. A value is bilinear between
    the centres of cells. A sample with a column or row below −1 or above the size of the map is 0. Other samples are moved to
    the nearest place between the centres of the outer cells. This is torchvision's roi_align with aligned=True, and on a
    pyramid its MultiScaleRoIAlign, for boxes of at least no width and height.

    Args:
        maps: One to eight maps (B, C, h, w) of one dtype, float32, bfloat16 or float16 (float64: on the reference), finest
            first. Any strides. Maps whose rows or whose channels are contiguous are not copied.
        boxes: (B, N, 4) float, in pixels of the padded input, in any order. They are used in float32 (float64 with maps of
            float64). They may leave the picture. A box without width or height, or with x2 < x1 or y2 < y1, is on the finest
            level. A box with a coordinate that is NaN or infinite is 0.
        size: Bins of a side, from 1 to 256.
        strides: Pixels of a cell of every map, from 1 to 2²³, as many as maps.
        sampling: Samples of a side of a bin, at least 1. size·sampling is at most 1024.
        counts: (B,) int64, the number of real boxes of each picture; None means all N.

    Returns: (B, N, C, size, size) in the dtype of the maps. Rows behind counts[b] are 0. Sums are in float32. Cells whose share
    of a bin is 0 have no influence, not even NaN. B, N, C and sizes of maps may be 0; a map without cells is 0 everywhere.
    Gradient to the maps, in their dtype; none to the boxes. Boxes behind counts[b] and boxes that are not finite have none. Each
    cell sums its shares in float32, in the order of the boxes. Double backward is not supported. Deterministic. Autocast
    changes nothing.

    >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    >>> roi_align([ramp], torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]), 2, strides=(4,)).tolist()
    [[[[[0.5, 2.5], [0.5, 2.5]]]]]
    """
    name = "roi_align"
    _check_maps(name, maps, strides)
    B = maps[0].shape[0]
    checks.tensor(name, "boxes", boxes, checks.FLOATS)
    checks.shape(name, "boxes", boxes, "(B, N, 4)", (B, None, 4), "give x1, y1, x2, y2 of the boxes of each picture")
    checks.whole(name, "size", size, "be a whole number of at least 1", 1)
    checks.whole(name, "sampling", sampling, "be a whole number of at least 1", 1)
    if size > BINS:
        checks.bad_value(name, "size", f"be at most {BINS}", size, "resize the result of fewer bins")
    if size * sampling > SAMPLES:
        checks.bad_value(name, "sampling", f"give at most {SAMPLES} samples a side", size * sampling, "take fewer")
    checks.counts(name, counts, B)
    checks.same_device(name, maps=maps[0], boxes=boxes, counts=counts)
    wide = torch.float64 if maps[0].dtype is torch.float64 else torch.float32
    if boxes.dtype is not wide or boxes.requires_grad:
        boxes = boxes.detach().to(wide)
    return op.roi_align(list(maps), boxes, counts, size, sampling, list(strides))


def _check_maps(name: str, maps: Any, strides: Any) -> None:
    if not isinstance(maps, (list, tuple)):
        checks.bad_type(name, "maps", "be a list of maps", type(maps).__name__, "one map: put it into a list")
    if not 1 <= len(maps) <= LEVELS:
        checks.bad_value(name, "maps", f"be 1 to {LEVELS} maps", len(maps))
    first = maps[0]
    checks.tensor(name, "maps", first, checks.FLOATS)
    dtype, device, sizes = first.dtype, first.device, (*first.shape[:2], None, None)
    for level in maps:
        checks.tensor(name, "maps", level, checks.FLOATS)
        checks.shape(name, "maps", level, "(B, C, h, w)", sizes, "levels share B and C")
        if level.dtype is not dtype:
            wanted, got = (str(m.dtype).removeprefix("torch.") for m in (first, level))
            checks.bad_type(name, "maps", f"have one dtype ({wanted})", got, "convert them")
        _, _, height, width = level.shape
        if height >= SIDE or width >= SIDE:
            checks.bad_value(name, "maps", f"have sides below {SIDE}", (height, width))
        if level.device != device:
            checks.same_device(name, **{"maps[0]": first, "maps": level})
    if not isinstance(strides, (list, tuple)):
        checks.bad_type(name, "strides", "be a list of whole numbers", type(strides).__name__)
    if len(strides) != len(maps):
        checks.bad_value(name, "strides", f"have one number per map, {len(maps)}", len(strides))
    rule = f"hold whole numbers from 1 to {SIDE}"
    for stride in strides:
        checks.whole(name, "strides", stride, rule, 1, SIDE)

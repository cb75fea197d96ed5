"""Resizes masks directly to bits."""

from typing import Any

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.resize_masks import op

_PIXELS = 2**31 - 1


def resize_masks(
    soft: Tensor, size: tuple[int, int], *, threshold: float = 0.0, crop: tuple[float, float] | None = None
) -> BitMasks:
    """Resizes soft masks bilinearly and thresholds them, without storing the float image.

    Pixel (y, x) of size (H, W) is set where the map, interpolated bilinearly (half-pixel centres, no antialias) at row
    (y + ½)·ch/H − ½ and column (x + ½)·cw/W − ½, both clamped to the map's cells, is > threshold. With crop=None this is
    `torch.nn.functional.interpolate(soft, size, mode="bilinear") > threshold`, except for values within rounding of the
    threshold.

    Args:
        soft: (..., h, w) float, any strides: logits, or probabilities with a suitable threshold.
        size: (H, W), whole numbers, at most 2³¹ − 1 pixels.
        threshold: compared strictly.
        crop: (ch, cw) in cells of the map, 0 < ch <= h, 0 < cw <= w, fractions allowed. Only this top-left part becomes the
            image, which cuts padding off. None keeps the whole map.

    Returns: BitMasks of shape (...) and size (H, W). No masks, H = 0 or W = 0 give masks without words. An empty map (h or
    w of 0) can only become an empty image.
    Values: a pixel that gives weight to a NaN cell is not set. ±inf counts as ±2¹²⁷.
    Exact on every backend: coordinates are in float64, weights are rounded to float32, and float32 arithmetic runs along rows,
    then along columns. Float64 maps are computed in float64, by the reference.
    Not differentiable. Autocast changes nothing.

    >>> resize_masks(torch.tensor([[-1.0, 1.0]]), (1, 4)).to_dense().int().tolist()
    [[0, 0, 1, 1]]
    >>> resize_masks(torch.tensor([[-1.0, 1.0, 9.0]]), (1, 4), crop=(1.0, 2.0)).to_dense().int().tolist()
    [[0, 0, 1, 1]]
    """
    checks.tensor("resize_masks", "soft", soft, checks.FLOATS, "use BitMasks.resize for bit masks")
    if soft.dim() < 2:
        checks.bad_value("resize_masks", "soft", "have shape (..., h, w)", tuple(soft.shape))
    height, width = checked_size("resize_masks", size, (soft.shape[-2], soft.shape[-1]))
    checks.number("resize_masks", "threshold", threshold, "be a number")
    rows, columns = _checked_crop(crop, soft)
    words = op.resize_masks(soft, height, width, float(threshold), rows, columns)
    return BitMasks(words, (height, width))


def checked_size(op: str, size: Any, cells: tuple[int, int]) -> tuple[int, int]:
    """Checks that a map of h x w cells can be resized to `size`. Returns the size as two numbers."""
    if not (isinstance(size, (tuple, list)) and len(size) == 2):
        checks.bad_type(op, "size", "be (H, W)", repr(size))
    for side in size:
        checks.whole(op, "size", side, "be two whole numbers, at least 0")
    height, width = size
    if height * width > _PIXELS:
        checks.bad_value(
            op, "size", f"have at most {_PIXELS} pixels", f"{height}x{width}", "is it in the order (H, W)?"
        )
    if (cells[0] == 0 or cells[1] == 0) and height * width > 0:
        checks.bad_value(op, "size", f"be empty for an empty map of {cells[0]}x{cells[1]}", (height, width))
    return height, width


def _checked_crop(crop: Any, soft: Tensor) -> tuple[float | None, float | None]:
    if crop is None:
        return None, None
    if not (isinstance(crop, (tuple, list)) and len(crop) == 2):
        checks.bad_type("resize_masks", "crop", "be (ch, cw) or None", repr(crop))
    for extent, cells, letter in zip(crop, soft.shape[-2:], "hw", strict=True):
        rule = f"lie in (0, {cells}], the map's {letter}"
        checks.number("resize_masks", "crop", extent, rule)
        if not 0 < extent <= cells:
            checks.bad_value("resize_masks", "crop", rule, extent, "crop counts cells of the map, not pixels")
    return float(crop[0]), float(crop[1])

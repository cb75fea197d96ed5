"""Resizes masks directly to bits."""

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.ops import checks
from sprompt.ops.resize_masks import op

_PIXELS = 2**31 - 1


class ResizedMasks(NamedTuple):
    """The result of `resize_masks(..., sums=True)`."""

    masks: BitMasks
    sums: Tensor  # float32 (...): Σ σ(value) over the pixels of each mask
    areas: Tensor  # int64 (...): their number


@overload
def resize_masks(
    soft: Tensor, size: Size, *, threshold: float = 0.0, crop: tuple[float, float] | None = None, via: Size | None = None,
    sums: Literal[False] = False,
) -> BitMasks: ...  # fmt: skip
@overload
def resize_masks(
    soft: Tensor, size: Size, *, threshold: float = 0.0, crop: tuple[float, float] | None = None, via: Size | None = None,
    sums: Literal[True],
) -> ResizedMasks: ...  # fmt: skip
def resize_masks(
    soft: Tensor, size: Size, *, threshold: float = 0.0, crop: tuple[float, float] | None = None, via: Size | None = None,
    sums: bool = False,
) -> BitMasks | ResizedMasks:  # fmt: skip
    """Resizes soft masks bilinearly and thresholds them, without storing the float image.

    Pixel (y, x) of size (H, W) is set where the map, interpolated bilinearly (half-pixel centres, no antialias) at row
    (y + ½)·ch/H − ½ and column (x + ½)·cw/W − ½, both clamped to the map's cells, is > threshold. With crop=None this is
    `torch.nn.functional.interpolate(soft, size, mode="bilinear") > threshold`, except for values within rounding of the
    threshold.

    With `via` two such maps run in a row: the map is resized to `via`, `crop` keeps the top-left part of that, and this part
    is resized to `size`. Neither float image exists. This is `interpolate(interpolate(soft, via)[..., :ch, :cw], size) >
    threshold`, except for values within rounding of the threshold.

    Args:
        soft: (..., h, w) float, any strides: logits, or probabilities with a suitable threshold.
        size: (H, W), whole numbers, at most 2³¹ − 1 pixels.
        threshold: compared strictly.
        crop: (ch, cw) in cells of the map, 0 < ch <= h, 0 < cw <= w, fractions allowed. Only this top-left part becomes the
            image, which cuts padding off. None keeps the whole map. With `via`: two whole numbers of cells of `via`.
        via: (h', w'), whole numbers from 1 to 2³¹ − 1. None: one map.
        sums: whether to return the sums of the probabilities as well. They are for scores by the quality of a mask: its mean
            probability is sums / areas.

    Returns: BitMasks of shape (...) and size (H, W). No masks, H = 0 or W = 0 give masks without words. An empty map (h or
    w of 0) can only become an empty image. With sums=True: ResizedMasks(masks, sums, areas). sums float32 (...) are Σ σ(value)
    over the set pixels, with σ(z) = 1/(1 + e^−z) of the interpolated values, and areas int64 (...) the numbers of set pixels;
    both are 0 for an empty mask.
    Values: a pixel that gives weight to a NaN cell is not set. ±inf counts as ±2¹²⁷.
    The bits are exact on every backend: coordinates are in float64, weights are rounded to float32, and float32 arithmetic runs
    along rows, then along columns. With `via` a pixel is a weighted sum of up to 4 cells per axis; their weights are products
    in float64. Float64 maps are computed in float64, by the reference.
    Sums are deterministic for every number of threads. At most 2048 pixels of a row are added in float32, and these sums in
    float64. The relative error is at most 2⁻¹⁶ plus the error of the values, about 10⁻⁶ of the largest logit of the map.
    Not differentiable. Autocast changes nothing.

    >>> resize_masks(torch.tensor([[-1.0, 1.0]]), (1, 4)).to_dense().int().tolist()
    [[0, 0, 1, 1]]
    >>> resize_masks(torch.tensor([[-1.0, 1.0, 9.0]]), (1, 4), crop=(1.0, 2.0)).to_dense().int().tolist()
    [[0, 0, 1, 1]]
    >>> found = resize_masks(torch.tensor([[-1.0, 1.0]]), (1, 2), via=(1, 4), crop=(1, 4), sums=True)
    >>> found.masks.to_dense().int().tolist(), found.areas.item(), round(found.sums.item(), 4)
    ([[0, 1]], 1, 0.6792)
    """
    checks.tensor("resize_masks", "soft", soft, checks.FLOATS, "use BitMasks.resize for bit masks")
    if soft.dim() < 2:
        checks.bad_value("resize_masks", "soft", "have shape (..., h, w)", tuple(soft.shape))
    height, width = checked_size("resize_masks", size, (soft.shape[-2], soft.shape[-1]))
    checks.number("resize_masks", "threshold", threshold, "be a number")
    if via is None:
        rows, columns = _checked_crop(crop, soft)
        if not sums:
            return BitMasks(op.resize_masks(soft, height, width, float(threshold), rows, columns), (height, width))
        via_height = via_width = None
    else:
        via_height, via_width = _checked_via(via)
        rows, columns = _checked_crop_of_via(crop, (via_height, via_width))
    words, total, areas = op.resize_masks_general(
        soft, height, width, float(threshold), rows, columns, via_height, via_width, bool(sums)
    )
    masks = BitMasks(words, (height, width))
    return ResizedMasks(masks, total, areas) if sums else masks


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


def _checked_via(via: Any) -> Size:
    if not (isinstance(via, (tuple, list)) and len(via) == 2):
        checks.bad_type("resize_masks", "via", "be (h, w) or None", repr(via))
    for side in via:
        checks.whole("resize_masks", "via", side, "be two whole numbers, at least 1", 1)
        if side > _PIXELS:
            checks.bad_value("resize_masks", "via", f"be at most {_PIXELS} on each side", side)
    return via[0], via[1]


def _checked_crop_of_via(crop: Any, via: Size) -> tuple[float | None, float | None]:
    if crop is None:
        return None, None
    if not (isinstance(crop, (tuple, list)) and len(crop) == 2):
        checks.bad_type("resize_masks", "crop", "be (ch, cw) or None", repr(crop))
    for extent, cells, letter in zip(crop, via, "hw", strict=True):
        rule = f"be a whole number from 1 to {cells}, the {letter} of via"
        checks.whole("resize_masks", "crop", extent, rule, 1)
        if extent > cells:
            checks.bad_value("resize_masks", "crop", rule, extent, "with via, crop counts cells of via")
    return float(crop[0]), float(crop[1])

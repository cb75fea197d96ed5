"""Bit masks: packing, area, boxes, intersection over union."""

from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.masks import op

DENSE = (torch.bool, *checks.INTEGERS, *checks.FLOATS)


def pack_masks(masks: Tensor, threshold: float = 0.5) -> BitMasks:
    """Packs dense masks to bits.

    bit(p) = [masks[p] ≠ 0] for bool and integers, [masks[p] > threshold] for floats.

    Args:
        masks: (..., H, W) bool, integer or float, any strides. NaN is not set.
        threshold: used for floats only. The comparison is strict. The threshold is rounded to float32, except for float64
        masks.

    Returns: BitMasks of shape (...) and size (H, W). H or W of 0 gives masks without words.
    Not differentiable. Exact on every backend. Autocast changes nothing.

    >>> pack_masks(torch.tensor([[0.2, 0.7], [0.5, float("nan")]])).to_dense().int().tolist()
    [[0, 1], [0, 0]]
    """
    checks.tensor("pack_masks", "masks", masks, DENSE)
    if masks.dim() < 2:
        checks.bad_value("pack_masks", "masks", "have shape (..., H, W)", tuple(masks.shape))
    checks.number("pack_masks", "threshold", threshold, "be a number")
    return BitMasks(op.pack_masks(masks, float(threshold)), (masks.shape[-2], masks.shape[-1]))


def unpack_masks(masks: BitMasks, dtype: torch.dtype = torch.bool) -> Tensor:
    """Dense masks (..., H, W) of 0 and 1 in a dtype: the inverse of `pack_masks`. `BitMasks.to_dense` calls it."""
    pixels = op.unpack_masks(masks.words, masks.pixels)
    return pixels.reshape(*masks.shape, *masks.size).to(dtype)


def as_bits(op: str, arg: str, masks: Any, threshold: float = 0.5) -> BitMasks:
    """The masks argument of an op as BitMasks. BitMasks are returned as they are, dense tensors (..., H, W) are packed."""
    if isinstance(masks, BitMasks):
        return masks
    if not isinstance(masks, Tensor):
        checks.bad_type(op, arg, "be a BitMasks or a dense tensor", type(masks).__name__)
    checks.tensor(op, arg, masks, DENSE)
    if masks.dim() < 2:
        checks.bad_value(op, arg, "have shape (..., H, W)", tuple(masks.shape), "dense masks end in height and width")
    return pack_masks(masks, threshold)


def mask_area(masks: BitMasks | Tensor) -> Tensor:
    """Number of set pixels.

    Args:
        masks: BitMasks (...), or dense (..., H, W), packed by `pack_masks`.

    Returns: int64 (...). Exact, deterministic, not differentiable.

    >>> mask_area(torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 0]]])).tolist()
    [3, 0]
    """
    return op.mask_area(as_bits("mask_area", "masks", masks).words)


def mask_boxes(masks: BitMasks | Tensor) -> Tensor:
    """Tightest box of each mask: x1, y1 are its first column and row, x2, y2 are one behind its last column and row.

    Args:
        masks: BitMasks (...), or dense (..., H, W).

    Returns: int64 (..., 4); zeros where a mask is empty. Exact, deterministic, not differentiable.

    >>> mask_boxes(torch.tensor([[[0, 0, 0], [0, 1, 1]]])).tolist()
    [[1, 1, 3, 2]]
    """
    bits = as_bits("mask_boxes", "masks", masks)
    return op.mask_boxes(bits.words, *bits.size)


def mask_iou(a: BitMasks | Tensor, b: BitMasks | Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Intersection over union of every mask of a with every mask of b.

    iou[n, m] = |aₙ ∩ bₘ| / |aₙ ∪ bₘ| from exact integer counts, divided in float64 and rounded to the dtype. It is 0
    where both are empty.

    Args:
        a: BitMasks (..., N), or dense (..., N, H, W).
        b: BitMasks (..., M), or dense (..., M, H, W), of the same batch dimensions and size; None means a.
        dtype: float32 or float64. A threshold such as 0.7 needs float64: 7/10 in float32 is below it.

    Returns: (..., N, M) in this dtype. N or M of 0 give an empty result. Deterministic, not differentiable.

    >>> mask_iou(torch.tensor([[[1, 1], [0, 0]], [[0, 1], [0, 1]]])).tolist()
    [[1.0, 0.3333333432674408], [0.3333333432674408, 1.0]]
    """
    bits_a = as_bits("mask_iou", "a", a)
    if not bits_a.shape:
        checks.bad_value("mask_iou", "a", "be a list of masks, (..., N)", "a single mask", "index it with [None]")
    checks.choice("mask_iou", "dtype", dtype, (torch.float32, torch.float64))
    double = dtype == torch.float64
    if b is None:
        return op.mask_iou(bits_a.words, None, bits_a.size[1], double)
    bits_b = as_bits("mask_iou", "b", b)
    if not bits_b.shape:
        checks.bad_value("mask_iou", "b", "be a list of masks, (..., M)", "a single mask", "index it with [None]")
    if bits_a.size != bits_b.size:
        checks.bad_value(
            "mask_iou", "b", f"have masks of the size of a, {bits_a.size}", bits_b.size, "resize one of them"
        )
    if bits_a.shape[:-1] != bits_b.shape[:-1]:
        checks.bad_value(
            "mask_iou", "b", f"have the batch dimensions of a, {tuple(bits_a.shape[:-1])}", tuple(bits_b.shape[:-1])
        )
    checks.same_device("mask_iou", a=bits_a.words, b=bits_b.words)
    return op.mask_iou(bits_a.words, bits_b.words, bits_a.size[1], double)

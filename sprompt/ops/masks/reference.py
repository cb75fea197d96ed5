"""The masks ops in plain PyTorch, on words int32 (..., n)."""

import torch
from torch import Tensor

from sprompt.masks import words_for


def pack_masks(masks: Tensor, threshold: float) -> Tensor:
    if masks.is_floating_point():
        level = torch.tensor(threshold, dtype=torch.float32 if masks.dtype != torch.float64 else torch.float64)
        bits = masks.to(level.dtype) > level.item()
    else:
        bits = masks != 0
    bits = bits.flatten(-2)
    n = words_for(bits.shape[-1])
    bits = torch.nn.functional.pad(bits, (0, 32 * n - bits.shape[-1])).unflatten(-1, (n, 32))
    weights = 1 << torch.arange(32, device=masks.device)  # int64: bit 31 is 2^31, which the conversion wraps
    return (bits * weights).sum(-1).to(torch.int32)


def unpack_masks(words: Tensor, pixels: int) -> Tensor:
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    bits = (words[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :pixels] != 0


def mask_area(words: Tensor) -> Tensor:
    return unpack_masks(words, 32 * words.shape[-1]).sum(-1)


def mask_boxes(words: Tensor, height: int, width: int) -> Tensor:
    dense = unpack_masks(words, height * width).unflatten(-1, (height, width))
    sides = []
    for occupied in (dense.any(-2), dense.any(-1)):  # columns, rows
        size = occupied.shape[-1]
        place = torch.arange(size, device=words.device)
        low = torch.where(occupied, place, size).amin(-1) if size else occupied.sum(-1)
        high = torch.where(occupied, place + 1, 0).amax(-1) if size else occupied.sum(-1)
        sides.append((torch.where(high > 0, low, 0), high))
    (x1, x2), (y1, y2) = sides
    return torch.stack((x1, y1, x2, y2), -1)


def mask_iou(a: Tensor, b: Tensor | None, width: int) -> Tensor:
    """One mask of a at a time: the largest temporary is one row of pairs."""
    b = a if b is None else b
    dense_b = unpack_masks(b, 32 * b.shape[-1])
    area_a, area_b = mask_area(a), mask_area(b)
    rows = []
    for i in range(a.shape[-2]):
        common = (unpack_masks(a[..., i, :], 32 * a.shape[-1])[..., None, :] & dense_b).sum(-1)
        either = area_a[..., i, None] + area_b - common
        rows.append((common.double() / either.clamp(min=1).double()).float())
    return torch.stack(rows, -2) if rows else a.new_zeros((*a.shape[:-1], b.shape[-2]), dtype=torch.float32)


def window_masks(
    words: Tensor, height: int, width: int, top: int, left: int, out_height: int, out_width: int, flip: bool
) -> Tensor:
    dense = unpack_masks(words, height * width).unflatten(-1, (height, width))
    edges = (-left, left + out_width - width, -top, top + out_height - height)  # negative: cut off
    dense = (
        torch.nn.functional.pad(dense, edges)
        if min(*_sizes_after(height, width, edges)) > 0
        else dense.new_zeros((*dense.shape[:-2], out_height, out_width))
    )
    return pack_masks(dense.flip(-1) if flip else dense, 0.5)


def _sizes_after(height: int, width: int, edges: tuple[int, int, int, int]) -> tuple[int, int]:
    left, right, top, bottom = edges
    return height + min(top, 0) + min(bottom, 0), width + min(left, 0) + min(right, 0)

"""The masks ops in plain PyTorch, on words int32 (..., n)."""

import torch
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.declare import Args


def pack(masks: Tensor, threshold: float) -> Tensor:
    """Words of (..., H, W)."""
    if masks.is_floating_point():
        level = torch.tensor(threshold, dtype=torch.float32 if masks.dtype != torch.float64 else torch.float64)
        bits = masks.to(level.dtype) > level.item()
    else:
        bits = masks != 0
    bits = bits.flatten(-2)
    n = words_for(bits.shape[-1])
    bits = torch.nn.functional.pad(bits, (0, 32 * n - bits.shape[-1])).unflatten(-1, (n, 32))
    weights = 1 << torch.arange(32, device=masks.device)  # int64: bit 31 is 2^31, and to(int32) wraps it
    return (bits * weights).sum(-1).to(torch.int32)


def unpack(words: Tensor, pixels: int) -> Tensor:
    """The first `pixels` pixels of every mask, bool (..., pixels)."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    bits = (words[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :pixels] != 0


def areas(words: Tensor) -> Tensor:
    return unpack(words, 32 * words.shape[-1]).sum(-1)


def pack_masks(a: Args) -> Tensor:
    return pack(a.masks, a.threshold)


def unpack_masks(a: Args) -> Tensor:
    return unpack(a.words, a.pixels)


def mask_area(a: Args) -> Tensor:
    return areas(a.words)


def mask_boxes(a: Args) -> Tensor:
    dense = unpack(a.words, a.height * a.width).unflatten(-1, (a.height, a.width))
    sides = []
    for occupied in (dense.any(-2), dense.any(-1)):  # columns, rows
        size = occupied.shape[-1]
        place = torch.arange(size, device=dense.device)
        low = torch.where(occupied, place, size).amin(-1) if size else occupied.sum(-1)
        high = torch.where(occupied, place + 1, 0).amax(-1) if size else occupied.sum(-1)
        sides.append((torch.where(high > 0, low, 0), high))
    (x1, x2), (y1, y2) = sides
    return torch.stack((x1, y1, x2, y2), -1)


def mask_iou(a: Args) -> Tensor:
    """Takes one mask of a at a time, so that the largest temporary is one row of pairs."""
    x, y = a.a, a.a if a.b is None else a.b
    dtype = torch.float64 if a.double else torch.float32
    dense = unpack(y, 32 * y.shape[-1])
    area_x, area_y = areas(x), areas(y)
    rows = []
    for i in range(x.shape[-2]):
        common = (unpack(x[..., i, :], 32 * x.shape[-1])[..., None, :] & dense).sum(-1)
        either = area_x[..., i, None] + area_y - common
        rows.append((common.double() / either.clamp(min=1).double()).to(dtype))
    return torch.stack(rows, -2) if rows else x.new_zeros((*x.shape[:-1], y.shape[-2]), dtype=dtype)


def window_masks(a: Args) -> Tensor:
    words, height, width, top, left, out_height, out_width, flip = a
    dense = unpack(words, height * width).unflatten(-1, (height, width))
    edges = (-left, left + out_width - width, -top, top + out_height - height)  # negative: cut off
    kept_height = height + min(edges[2], 0) + min(edges[3], 0)
    kept_width = width + min(edges[0], 0) + min(edges[1], 0)
    if min(kept_height, kept_width) > 0:
        dense = torch.nn.functional.pad(dense, edges)
    else:
        dense = dense.new_zeros((*dense.shape[:-2], out_height, out_width))
    return pack(dense.flip(-1) if flip else dense, 0.5)

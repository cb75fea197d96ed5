"""roi_align in plain PyTorch. Sums are in float32 (float64 for float64)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.deform_attn.reference import add_rows, wide


class Share(NamedTuple):
    """One of the four cells around the samples of a level. All tensors are (B, N, S, S), S = size · sampling: row, column."""

    row: Tensor  # of a map as (B·h·w, C)
    part: Tensor  # of the cell in the sample; 0 for samples of other levels


def levels_of(boxes: Tensor, maps: int) -> Tensor:
    """The level of each box, (B, N). The rounding of a logarithm has no influence: ⌊log₂ t⌋ ≥ k means t ≥ 2ᵏ."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    t = (width * height).sqrt() / 56 + 1e-6
    return (t[..., None] >= 2.0 ** torch.arange(1, maps, device=boxes.device)).sum(-1)


def axis(low: Tensor, high: Tensor, stride: int, cells: int, size: int, sampling: int) -> tuple[Tensor, ...]:
    """The samples between low and high (B, N) along one axis: whether they are inside, the cell at or before them, and their
    distance from its centre, all (B, N, S)."""
    start, extent = low / stride - 0.5, (high - low).clamp(min=0) / stride
    step = extent / (size * sampling)
    at = start[..., None] + (torch.arange(size * sampling, device=low.device) + 0.5).to(low.dtype) * step[..., None]
    inside = (at >= -1) & (at <= cells)
    at = torch.where(inside, at, 0).clamp(0, max(cells - 1, 0))
    cell = at.floor()
    return inside, cell.long(), at - cell


def shares(boxes: Tensor, real: Tensor, h: int, w: int, stride: int, size: int, sampling: int) -> Iterator[Share]:
    """The four cells around every sample of the boxes that are `real` (B, N), in a map of h x w cells."""
    b = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None, None]
    in_x, left, right_part = (t[:, :, None] for t in axis(boxes[..., 0], boxes[..., 2], stride, w, size, sampling))
    in_y, top, below_part = (t[..., None] for t in axis(boxes[..., 1], boxes[..., 3], stride, h, size, sampling))
    inside = in_x & in_y & real[..., None, None]
    for below in (0, 1):
        for right in (0, 1):
            part = (below_part if below else 1 - below_part) * (right_part if right else 1 - right_part)
            row = (b * h + (top + below).clamp(max=h - 1)) * w + (left + right).clamp(max=w - 1)
            yield Share(row, torch.where(inside, part, 0))


def levels(a: Args, sizes: list[tuple[int, int]], size: int) -> Iterator[tuple[int, Iterator[Share]]]:
    """The number and the shares of every map that has cells."""
    real = a.boxes.isfinite().all(-1)
    if a.counts is not None:
        real &= torch.arange(a.boxes.shape[1], device=a.boxes.device) < a.counts[:, None]
    boxes = torch.where(real[..., None], a.boxes, 0)
    level = levels_of(boxes, len(sizes))
    for v, (h, w) in enumerate(sizes):
        if h * w > 0:
            yield v, shares(boxes, real & (level == v), h, w, a.strides[v], size, a.sampling)


def roi_align(a: Args) -> Tensor:
    B, C = a.maps[0].shape[:2]
    N, S = a.boxes.shape[1], a.size * a.sampling
    out = wide(a.maps[0]).new_zeros(B, N, S, S, C)
    for v, around in levels(a, [(m.shape[2], m.shape[3]) for m in a.maps], a.size):
        rows = wide(a.maps[v]).permute(0, 2, 3, 1).flatten(0, 2)
        for share in around:
            part = share.part[..., None]
            out += torch.where(part != 0, part * rows[share.row], 0)
    bins = out.reshape(B, N, a.size, a.sampling, a.size, a.sampling, C).mean((3, 5))
    return bins.permute(0, 1, 4, 2, 3).to(a.maps[0].dtype, memory_format=torch.contiguous_format)


def roi_align_backward(a: Args) -> list[Tensor]:
    B, _, C, size, _ = a.grad.shape
    sizes = list(zip(a.sizes[::2], a.sizes[1::2], strict=True))
    bins = wide(a.grad).permute(0, 1, 3, 4, 2) / a.sampling**2
    samples = bins.repeat_interleave(a.sampling, 2).repeat_interleave(a.sampling, 3)
    sums = [bins.new_zeros(B * h * w, C) for h, w in sizes]
    for v, around in levels(a, sizes, size):
        for share in around:
            part = share.part[..., None]
            add_rows(sums[v], share.row.flatten(), torch.where(part != 0, part * samples, 0).flatten(0, 3))
    return [
        x.reshape(B, h, w, C).permute(0, 3, 1, 2).to(a.grad.dtype, memory_format=torch.contiguous_format)
        for x, (h, w) in zip(sums, sizes, strict=True)
    ]

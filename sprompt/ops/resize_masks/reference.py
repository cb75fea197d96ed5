"""resize_masks in plain PyTorch. It defines the result to the bit."""

from typing import NamedTuple

import torch
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import pack, unpack
from sprompt.ops.resize_masks.op import extent


class Taps(NamedTuple):
    """The two cells of every output coordinate of one axis and their weights, each (size,)."""

    first: Tensor
    second: Tensor
    w0: Tensor
    w1: Tensor


def taps(size: int, cells: int, extent: float, dtype: torch.dtype, device: torch.device) -> Taps:
    """Coordinates in float64, weights rounded to dtype. A cell of weight 0 is replaced by its neighbour, which has weight 1."""
    place = ((torch.arange(size, dtype=torch.float64, device=device) + 0.5) * (extent / size) - 0.5).clamp(0, cells - 1)
    floor = place.floor()
    w1 = (place - floor).to(dtype)
    w0 = 1 - w1
    low = floor.long()
    return Taps(torch.where(w0 > 0, low, low + 1), torch.where(w1 > 0, low + 1, low), w0, w1)


def interpolate(soft: Tensor, height: int, width: int, extent_height: float, extent_width: float) -> Tensor:
    """(M, height, width) <- (M, h, w): along rows first, then along columns."""
    x = taps(width, soft.shape[2], extent_width, soft.dtype, soft.device)
    y = taps(height, soft.shape[1], extent_height, soft.dtype, soft.device)
    wide = soft[:, :, x.first] * x.w0 + soft[:, :, x.second] * x.w1
    return wide[:, y.first] * y.w0[:, None] + wide[:, y.second] * y.w1[:, None]


def resized(soft: Tensor, height: int, width: int, threshold: float, extent: tuple[float, float]) -> Tensor:
    """words (..., n) <- soft (..., h, w). The first `extent` cells per axis become the image. Takes some masks at a time."""
    *batch, h, w = soft.shape
    n = words_for(height * width)
    words = soft.new_empty((torch.Size(batch).numel(), n), dtype=torch.int32)
    if words.numel() == 0:
        return words.reshape(*batch, n)
    dtype = torch.float64 if soft.dtype == torch.float64 else torch.float32
    largest = 2.0**1023 if dtype == torch.float64 else 2.0**127
    cells = soft.reshape(-1, h, w)
    step = 1 + (1 << 22) // (height * width)
    for i in range(0, len(words), step):
        held = cells[i : i + step].to(dtype).clamp(-largest, largest)
        words[i : i + step] = pack(interpolate(held, height, width, *extent), threshold)
    return words.reshape(*batch, n)


def resize_masks(a: Args) -> Tensor:
    """Float64 maps are computed in float64, all other maps in float32."""
    return resized(a.soft, a.height, a.width, a.threshold, extent(a))


def resize_bits(a: Args) -> Tensor:
    """Resizes cells of 0 and 1 with threshold 1/2. Takes some masks at a time."""
    words, h, w, height, width = a
    batch = words.shape[:-1]
    n = words_for(height * width)
    out = words.new_empty((batch.numel(), n), dtype=torch.int32)
    if out.numel() == 0:
        return out.reshape(*batch, n)
    flat = words.reshape(-1, words.shape[-1])
    step = 1 + (1 << 22) // (height * width + h * w)
    for i in range(0, len(flat), step):
        cells = unpack(flat[i : i + step], h * w).unflatten(-1, (h, w)).float()
        out[i : i + step] = resized(cells, height, width, 0.5, (h, w))
    return out.reshape(*batch, n)

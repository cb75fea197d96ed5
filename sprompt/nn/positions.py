"""Encodings of positions: fixed ones, and learned ones for every size of a map."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import Size


def sine_positions(channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Sine positional encoding (channels, height, width); dtype and device are those of `like`.

    The first half of the channels encodes y, the second half x. Position i of n is (i + 1) / (n + 1e-6) · 2π. With F channels
    in a half, channel k of it is the sine (even k) or cosine (odd k) of position / 10000^(2⌊k/2⌋ / F).
    """
    half = channels // 2
    k = torch.arange(half, device=like.device)
    periods = 10000 ** (2 * torch.div(k, 2, rounding_mode="floor").to(like.dtype) / half)

    def encoding(n: int) -> Tensor:  # (half, n)
        positions = torch.arange(1, n + 1, device=like.device, dtype=like.dtype) / (n + 1e-6) * (2 * math.pi)
        angles = positions / periods[:, None]
        return torch.where(k[:, None] % 2 == 0, angles.sin(), angles.cos())

    rows, columns = encoding(height), encoding(width)
    return torch.cat([rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1)])


class ResizedGrid:
    """(1, C, g, g), a grid of positions -> (h·w, C), the position of every cell of a map of another size, by bilinear interpolation.

    Calls on the CPU without gradients keep the results of the last sizes. A result counts only as long as the grid has the values it was
    made of: they are compared, because in-place changes may leave no other trace. On a GPU the comparison would take longer than the
    resize.
    """

    most = 8  # sizes; pictures of one data set have few, and a map of 80×108 cells of 256 channels has 9 MB

    def __init__(self) -> None:
        self._kept: tuple[Tensor, dict[Size, Tensor]] | None = None

    def __call__(self, grid: Tensor, size: Size) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not grid.is_cpu:
            return _resized(grid, size)
        if self._kept is None or self._kept[0].dtype != grid.dtype or not torch.equal(self._kept[0], grid):
            self._kept = grid.clone(), {}
        kept = self._kept[1]
        if size not in kept:
            if len(kept) == self.most:
                del kept[next(iter(kept))]
            kept[size] = _resized(grid, size)
        return kept[size]


def _resized(grid: Tensor, size: Size) -> Tensor:
    return F.interpolate(grid, size, mode="bilinear", align_corners=False)[0].flatten(1).T

"""Deformable convolution (Dai et al. 2017): the taps of a 3×3 kernel read the map where a second convolution points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.conv import full_precision
from sprompt.ops import deform_attn


class Offsets(nn.Conv2d):
    """The convolution that moves the taps: a map (B, C, H, W) -> (B, 18, h, w), the y and x of one tap after the other, row by row, in
    cells of the map. It starts at 0, and is computed in float32 under autocast too."""

    def __init__(self, inputs: int, stride: int = 1) -> None:
        super().__init__(inputs, 18, 3, stride, padding=1)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(full_precision(x))


class DeformConv(nn.Conv2d):
    """A 3×3 convolution without bias, whose taps `Offsets` of the same stride move.

    The map is bilinear between the centres of its cells, and 0 outside. A tap with a coordinate that does not lie between −1 and the
    size of the map, both excluded, reads 0.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]  # it has a second input
        # `deform_attn` takes coordinates from 0 to 1. Over sides that are powers of 2 they keep all their digits.
        height, width = (1 << (side - 1).bit_length() for side in x.shape[2:])
        values = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])).flatten(2).mT[:, :, None]
        rows, columns = self._taps(offsets)
        points = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1).flatten(1, 2)[:, :, None, None, None]
        read = deform_attn(values, [(height, width)], points, points.new_ones(1).expand(points.shape[:-1]))
        # The values at the taps are a map of three times the sides. Its windows of 3×3 do not overlap.
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(read.mT.unflatten(2, rows.shape[1:]), weight, stride=3)

    def _taps(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """y and x (B, 3h, 3w) of all taps, in cells: a window of 3×3 for each of the h·w outputs."""
        moves = offsets.unflatten(1, (3, 3, 2)).permute(3, 0, 4, 1, 5, 2).flatten(2, 3).flatten(3)
        taps = torch.arange(-1, 2, device=offsets.device)
        rows, columns = (
            (torch.arange(0, stride * n, stride, device=offsets.device)[:, None] + taps).flatten()
            for stride, n in zip(self.stride, offsets.shape[2:], strict=True)
        )
        return rows[:, None] + moves[0], columns + moves[1]

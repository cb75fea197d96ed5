"""A light pixel decoder: a feature pyramid on a map that is pooled to several sizes first (PPM-FPN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.conv import Conv, ConvGN


class PyramidPooling(nn.Module):
    """A map (B, C, h, w), C a multiple of 4, and its means over 1, 4, 9 and 36 windows, mixed: (B, C, h, w)."""

    sizes = (1, 2, 3, 6)

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.pooled = nn.ModuleList(Conv(channels, quarter) for _ in self.sizes)
        self.mix = Conv(channels + len(self.sizes) * quarter, channels)

    def forward(self, x: Tensor) -> Tensor:
        means = [F.relu(conv(F.adaptive_avg_pool2d(x, n))) for conv, n in zip(self.pooled, self.sizes, strict=True)]
        resized = [F.interpolate(m, x.shape[2:], mode="bilinear", align_corners=False) for m in means]
        return F.relu(self.mix(torch.cat([*resized, x], 1)))


class PPMFPN(nn.Module):
    """Maps of several widths, finest first -> maps of one width and the same sizes.

    From the coarsest map to the finest: a lateral 1×1 convolution, plus the output of the coarser level resized bilinearly, then an
    output 3×3 convolution, each with a group norm. Unlike in an FPN, a level hands on its output and not its sum. The coarsest lateral map
    passes through `PyramidPooling`.
    """

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvGN(width, channels, relu=False) for width in inputs)
        self.pooling = PyramidPooling(channels)
        self.output = nn.ModuleList(ConvGN(channels, channels, 3) for _ in inputs)
        for module in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(module.conv.weight, a=1)  # type: ignore[arg-type, union-attr]  # a ConvGN

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = list(zip(self.lateral, self.output, maps, strict=True))[::-1]
        lateral, output, coarsest = levels[0]
        found = [output(self.pooling(lateral(coarsest)))]
        for lateral, output, x in levels[1:]:
            own = lateral(x)
            found.append(output(own + F.interpolate(found[-1], own.shape[2:], mode="bilinear", align_corners=False)))
        return found[::-1]

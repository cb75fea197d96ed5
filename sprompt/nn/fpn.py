"""Feature pyramid network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.conv import Conv


class FPN(nn.Module):
    """Maps of several widths, finest first -> maps of one width and the same sizes.

    A 1×1 lateral convolution of each map; sums from the coarsest map to the finest (nearest upsampling to the finer size); a
    3×3 output convolution of each sum.
    """

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Conv(width, channels) for width in inputs)
        self.fpn_convs = nn.ModuleList(Conv(channels, channels, 3) for _ in inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(sums) - 1, 0, -1):
            finer = sums[level - 1]
            sums[level - 1] = finer + F.interpolate(sums[level], size=finer.shape[-2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=True)]

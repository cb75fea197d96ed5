"""Semantic FPN: four pyramid maps become two maps of stride 8, one to locate objects and one to classify them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sprompt.nn.conv import ConvGN, full_precision
from sprompt.nn.positions import sine_positions

#: Number of 3×3 convolutions of each level. A twofold upsampling follows each of the first l - 1 convolutions of level l.
_CONVS = (1, 1, 2, 3)


class SemanticFPN(nn.Module):
    """Maps P2 to P5 (strides 4 to 32) of one width -> (localisation, semantics), both of stride 8 and the same width.

    P5 gets a positional encoding. 3×3 convolutions bring each level to stride 8: the convolution of P2 has stride 2; P4 and P5
    have bilinear upsampling between their convolutions. Two 1×1 convolutions of the sum of the levels give the two maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.convs_all_levels = nn.ModuleList()
        for level, count in enumerate(_CONVS):
            path = nn.Sequential()
            for j in range(count):
                path.add_module(f"conv{j}", ConvGN(channels, channels, 3, stride=2 if level == 0 else 1))
                if j < level - 1:
                    path.add_module(f"upsample{j}", nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.convs_all_levels.append(path)
        self.conv_pred = ConvGN(channels, channels)
        self.aux_convs = nn.ModuleList([ConvGN(channels, channels)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        coarsest = full_precision(maps[-1])
        positions = sine_positions(self.channels, coarsest.shape[-2], coarsest.shape[-1], coarsest)
        inputs = [*maps[:-1], coarsest + positions]
        total = self.convs_all_levels[0](inputs[0])
        for path, x in zip(self.convs_all_levels[1:], inputs[1:], strict=True):
            total = total + path(x)
        return self.conv_pred(total), self.aux_convs[0](total)

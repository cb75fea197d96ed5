"""Convolutions with their normalisation and activation, and the precision of that normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def full_precision(x: Tensor) -> Tensor:
    """Half types become float32; other dtypes stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Conv(nn.Module):
    """A convolution with bias that keeps the size of the map; no norm or activation follows it."""

    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvGN(nn.Module):
    """Convolution without bias, group norm, and a ReLU unless `relu` is False. The norm is computed in float32 under autocast too."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        self.relu = relu
        self.gn = nn.GroupNorm(math.gcd(32, outputs), outputs)  # 32 groups at every usual width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        with torch.autocast(x.device.type, enabled=False):
            normed = self.gn(full_precision(x))
            return (F.relu(normed, inplace=True) if self.relu else normed).to(x.dtype)

"""Layers of query heads: attention between queries, a feed-forward layer, and the branches of their predictions."""

from __future__ import annotations

import math

from torch import Tensor, nn

#: Initial bias of a classifier. It gives every class the probability 0.01.
RARE = -math.log(99)


class SelfAttention(nn.Module):
    """x + attention of x (B, N, C) to itself."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    """x + two linear layers with a ReLU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True)), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def branch(channels: int, layers: int = 1) -> nn.Sequential:
    """Linear layers, each with a layer norm and a ReLU."""
    return nn.Sequential(
        *(
            module
            for _ in range(layers)
            for module in (nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True))
        )
    )

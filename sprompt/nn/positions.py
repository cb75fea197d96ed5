"""Fixed encodings of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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

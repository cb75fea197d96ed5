"""Fixed encodings of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_positions(
    size: tuple[int, int], channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sines and cosines of the row and the column of every cell: (H·W, channels).

    Rows and columns count from 1 and are scaled to (0, 2π]. The first half of the channels encodes the row, the second the column;
    channel pairs 2k, 2k + 1 hold sine and cosine at the wavelength 10000^(4k / channels).
    """
    half = channels // 2
    wavelength = TEMPERATURE ** (2 * torch.arange(half, device=device).div(2, rounding_mode="floor").to(dtype) / half)
    angles = []
    for length in size:
        place = torch.arange(1, length + 1, dtype=dtype, device=device)
        place = place / (place[-1:] + 1e-6) * (2 * math.pi)
        angle = place[:, None] / wavelength
        angles.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1))
    rows, columns = angles
    rows = rows[:, None].expand(-1, size[1], -1)
    columns = columns[None].expand(size[0], -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)

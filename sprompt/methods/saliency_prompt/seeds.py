"""Feature vectors of seeds, read again where the seeds lay."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled_at(features: Tensor, points: Tensor, scales: Tensor) -> Tensor:
    """Vectors (B, G, D) of pyramid seeds.

    A seed of scale 0 is the cell in which its point lies; of scale 1, and of scale 2, it is the mean of the 2×2 cells around its
    point: a half is the mean of 2×2, a quarter the mean of the central 2×2 of a 4×4 block. As it is the point that counts, and
    no lattice of blocks, a mirrored or resized view gives the vector of the same place.

    Args:
        features: (B, D, H, W).
        points: (B, G, 2) float, x and y in cells: those of the seed at row r, column c, scale s are (c + ½) 2ˢ and (r + ½) 2ˢ.
        scales: (B, G).
    """
    height, width = features.shape[2:]
    inner = scales > 0
    y, x = _pair(points[..., 1], inner, height), _pair(points[..., 0], inner, width)
    places = y[..., :, None] * width + x[..., None, :]  # (B, G, 2, 2)
    batch, number = scales.shape
    index = places.reshape(batch, 1, -1).expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).reshape(batch, features.shape[1], number, 4).mean(3).mT


def _pair(place: Tensor, inner: Tensor, cells: int) -> Tensor:
    """The two cells (B, G, 2) beside the crossing of cells nearest to a place (B, G), or twice the cell that it is in."""
    crossing = (place + 0.5).floor().clamp(1, max(cells - 1, 1))
    low, high = torch.where(inner, crossing - 1, place.floor()), torch.where(inner, crossing, place.floor())
    return torch.stack([low, high], -1).clamp(0, cells - 1).long()


def windows_at(features: Tensor, points: Tensor, grid: tuple[int, int], extent: Tensor, valid: Tensor) -> Tensor:
    """Vectors (B, G, D) of grid seeds: means over the valid cells of the window of adaptive pooling in which a point lies.

    Args:
        features: (B, D, H, W).
        points: (B, G, 2) float, x and y in cells.
        grid: windows, (height, width).
        extent: (B, 2) int64, how many rows and columns of the map belong to each image; the windows divide these.
        valid: (B, H, W) bool.
    """
    inside = valid[:, None].to(features.dtype)
    for axis, pieces in enumerate(grid):  # rows, then columns; a window is the product of an interval of each
        size = extent[:, axis, None].to(points.dtype)
        piece = (points[..., 1 - axis] * pieces / size).floor().clamp(0, pieces - 1)
        start, end = (piece * size / pieces).floor(), ((piece + 1) * size / pieces).ceil()
        cell = torch.arange(features.shape[2 + axis], device=features.device)
        member = (cell >= start[..., None]) & (cell < end[..., None])  # (B, G, cells)
        inside = inside * (member[:, :, :, None] if axis == 0 else member[:, :, None, :])
    total = inside.flatten(2) @ features.flatten(2).mT
    return total / inside.sum((2, 3)).clamp(min=1)[..., None]

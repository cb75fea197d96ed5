"""Feature vectors of seeds, read from a map at the points of the seeds."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled_at(features: Tensor, points: Tensor, scales: Tensor) -> Tensor:
    """Vectors (B, G, D) of pyramid seeds.

    A seed of scale 0 is the cell that holds its point. A seed of scale 1 or 2 is the mean of the 2×2 cells around its point: at
    half scale a cell is the mean of 2×2 cells, at quarter scale the mean of the central 2×2 of a block of 4×4. The cells follow
    from the point, not from a fixed lattice of blocks, so a mirrored or resized view gives the vector of the same place.

    Args:
        features: (B, D, H, W).
        points: (B, G, 2) float, x and y in cells. The seed at row r, column c, scale s has x = (c + ½) 2ˢ and y = (r + ½) 2ˢ.
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
    """Along one axis: the two cells (B, G, 2) on both sides of the cell border nearest to a place (B, G) where `inner` is true.

    Elsewhere both are the cell that holds the place.
    """
    crossing = (place + 0.5).floor().clamp(1, max(cells - 1, 1))
    low, high = torch.where(inner, crossing - 1, place.floor()), torch.where(inner, crossing, place.floor())
    return torch.stack([low, high], -1).clamp(0, cells - 1).long()


def windows_at(features: Tensor, points: Tensor, grid: tuple[int, int], extent: Tensor, valid: Tensor) -> Tensor:
    """Vectors (B, G, D) of grid seeds. Each is the mean over the valid cells of the window that holds its point.

    The windows are those of adaptive average pooling.

    Args:
        features: (B, D, H, W).
        points: (B, G, 2) float, x and y in cells.
        grid: windows, (height, width).
        extent: (B, 2) int64, the number of rows and columns of the map that belong to each image and are divided into windows.
        valid: (B, H, W) bool.
    """
    inside = valid[:, None].to(features.dtype)
    for axis, pieces in enumerate(grid):  # rows, then columns: a window is an interval of each
        size = extent[:, axis, None].to(points.dtype)
        piece = (points[..., 1 - axis] * pieces / size).floor().clamp(0, pieces - 1)
        start, end = (piece * size / pieces).floor(), ((piece + 1) * size / pieces).ceil()
        cell = torch.arange(features.shape[2 + axis], device=features.device)
        member = (cell >= start[..., None]) & (cell < end[..., None])  # (B, G, cells)
        inside = inside * (member[:, :, :, None] if axis == 0 else member[:, :, None, :])
    total = inside.flatten(2) @ features.flatten(2).mT
    return total / inside.sum((2, 3)).clamp(min=1)[..., None]

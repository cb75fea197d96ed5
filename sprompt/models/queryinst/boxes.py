"""Boxes x1, y1, x2, y2 in pixels of the padded images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sprompt.masks import Size

_MOST = math.log(1000 / 16)  # upper bound of the change of a side's logarithm
_LEAST = 1e-6  # of areas that divide


def scales(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """(B, 1, 4): w, h, w, h of every image. The sides are arguments of kernels, so that nothing waits for the device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    sides = [torch.cat([like.new_full((1,), size[axis], dtype=dtype) for size in sizes]) for axis in (1, 0)]
    return torch.stack([*sides, *sides], 1)[:, None]


def corners(boxes: Tensor) -> Tensor:
    """Centre x, y, width, height -> corners. A learned side below 0 counts as 0."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([centre - half, centre + half], -1)


def refined(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes with the centre moved by half of deltas x, y in shares of the sides, and sides times e to the deltas 2, 3. Nothing is
    clipped to the image."""
    centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    centre = centre + side * deltas[..., :2] / 2
    half = side * deltas[..., 2:].clamp(-_MOST, _MOST).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU minus the share of the common bounding box that neither box covers: (..., 4), (..., 4) -> (...), from -1 to 1."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = sum((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, others)) - shared
    first, last = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    around = (last - first).prod(-1)
    return shared / union.clamp(min=_LEAST) - (around - union) / around.clamp(min=_LEAST)

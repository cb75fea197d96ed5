"""projection_loss in plain PyTorch. It computes in float32 (float64 for float64)."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.projection_loss.op import EPSILON
from sprompt.ops.soft_targets import loss_dtype


def maxima(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row (B, h, w) -> (B, h), and its lowest column. NaN is the largest. Empty rows: 0 and 0."""
    if maps.shape[2] == 0:
        empty = maps.new_zeros(maps.shape[:2])
        return empty, empty.int()
    values = maps.amax(2)
    largest = (maps == values[..., None]) | maps.isnan()
    column = torch.arange(maps.shape[2], dtype=torch.int32, device=maps.device)
    return values, torch.where(largest, column, maps.shape[2]).amin(2)


def projection_loss(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    """d dice / da = −2b / D + 4a Σab / D² with the denominator D."""
    dtype = loss_dtype(a.masks, a.boxes)
    masks, boxes = (x.to(dtype).contiguous() for x in (a.masks, a.boxes))
    losses, slopes, places = [], [], []
    for rows, rows_of_box in ((masks, boxes), (masks.mT, boxes.mT)):
        (m, place), (t, _) = maxima(rows), maxima(rows_of_box)
        product, denominator = (m * t).sum(1, keepdim=True), ((m * m).sum(1) + (t * t).sum(1) + EPSILON)[:, None]
        losses.append((1 - 2 * product / denominator)[:, 0])
        slopes.append(4 * m * product / denominator**2 - 2 * t / denominator)
        places.append(place)
    return losses[0] + losses[1], torch.cat(slopes, 1), torch.cat(places, 1)


def projection_loss_backward(a: Args) -> Tensor:
    h = a.masks.shape[1]
    out = a.slopes.new_zeros(a.masks.shape)
    if out.numel() > 0:
        slopes, places = a.grad[:, None] * a.slopes, a.places.long()
        out.scatter_add_(2, places[:, :h, None], slopes[:, :h, None])
        out.scatter_add_(1, places[:, None, h:], slopes[:, None, h:])
    return out.to(a.masks.dtype)

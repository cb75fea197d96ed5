"""deform_attn in plain PyTorch. Sums are in float32 (float64 for float64)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sprompt.ops.declare import Args


class Corner(NamedTuple):
    """One of the four cells around the points of one place t of a level. All tensors are (B, Q, H)."""

    inside: Tensor  # the cell lies in the map, and the point samples the map
    row: Tensor  # of values (B·S·H, D); 0 outside
    share: Tensor  # of the cell in the sample: the bilinear weight
    by_x: Tensor  # derivative of the share by x
    by_y: Tensor


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def computing(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    """values (B·S·H, D), points (B, Q, H, P, 2), weights (B, Q, H, P), all in the dtype of the sums."""
    dtype = torch.float64 if torch.float64 in (a.values.dtype, a.points.dtype, a.weights.dtype) else torch.float32
    B, S, H, D = a.values.shape
    Q, P = a.points.shape[1], a.points.shape[3:-1].numel()
    return (
        a.values.to(dtype).reshape(B * S * H, D),
        a.points.to(dtype).reshape(B, Q, H, P, 2),
        a.weights.to(dtype).reshape(B, Q, H, P),
    )


def places(levels: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """For every point of a query's head: its place in the lists, the first cell of its level, h and w of its level."""
    place = first = 0
    for h, w, number in zip(levels[::3], levels[1::3], levels[2::3], strict=True):
        for _ in range(number):
            yield place, first, h, w
            place += 1
        first += h * w


def corners(points: Tensor, cells: int, first: int, h: int, w: int) -> list[Corner]:
    """The corners around points (B, Q, H, 2) of the level with h x w cells that begins at cell `first` of `cells`."""
    B, _, H, _ = points.shape
    x, y = points[..., 0] * w - 0.5, points[..., 1] * h - 0.5
    samples = (x > -1) & (x < w) & (y > -1) & (y < h)  # false for NaN
    x, y = torch.where(samples, x, 0), torch.where(samples, y, 0)
    left, top = x.floor(), y.floor()
    b = torch.arange(B, device=points.device)[:, None, None]
    head = torch.arange(H, device=points.device)
    found = []
    for below in (0, 1):
        for right in (0, 1):
            i, j = top.long() + below, left.long() + right
            inside = samples & (i >= 0) & (i < h) & (j >= 0) & (j < w)
            row = (b * cells + first + i * w + j) * H + head
            share_x, share_y = (x - left if right else left + 1 - x), (y - top if below else top + 1 - y)
            by_x, by_y = (w if right else -w) * share_y, (h if below else -h) * share_x
            found.append(Corner(inside, torch.where(inside, row, 0), share_x * share_y, by_x, by_y))
    return found


def picked(rows: Tensor, corner: Corner) -> Tensor:
    """The corner's rows, (B, Q, H, D). They are 0 outside of the map."""
    if rows.shape[0] == 0:  # no cells: no corner is inside
        return rows.new_zeros(*corner.row.shape, rows.shape[1])
    return torch.where(corner.inside[..., None], rows[corner.row], 0)


def deform_attn(a: Args) -> Tensor:
    values, points, weights = computing(a)
    (B, S, H, D), Q = a.values.shape, points.shape[1]
    out = values.new_zeros(B, Q, H, D)
    for place, *level in places(a.levels):
        for corner in corners(points[..., place, :], S, *level):
            weight = torch.where(corner.inside, weights[..., place] * corner.share, 0)
            out = out + weight[..., None] * picked(values, corner)
    return out.reshape(B, Q, H * D).to(a.values.dtype)


def deform_attn_backward(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    values, points, weights = computing(a)
    (B, S, H, D), Q = a.values.shape, points.shape[1]
    grad = a.grad.to(values.dtype).reshape(B, Q, H, D)
    grad = torch.where(grad.isfinite(), grad, torch.nan)
    to_values, to_points, to_weights = (torch.zeros_like(x) for x in (values, points, weights))
    for place, *level in places(a.levels):
        weight = weights[..., place]
        for corner in corners(points[..., place, :], S, *level):
            product = (grad * picked(values, corner)).sum(-1)
            for gradient, factor in (
                (to_weights[..., place], corner.share),
                (to_points[..., place, 0], weight * corner.by_x),
                (to_points[..., place, 1], weight * corner.by_y),
            ):
                gradient += torch.where(corner.inside, factor * product, 0)
            addends = torch.where(corner.inside[..., None], (weight * corner.share)[..., None] * grad, 0)
            add_rows(to_values, corner.row.flatten(), addends.flatten(0, 2))
    return (
        to_values.reshape(a.values.shape).to(a.values.dtype) if a.to_values else a.values.new_empty(0),
        to_points.reshape(a.points.shape).to(a.points.dtype) if a.to_points else a.points.new_empty(0),
        to_weights.reshape(a.weights.shape).to(a.weights.dtype) if a.to_weights else a.weights.new_empty(0),
    )


def add_rows(out: Tensor, row: Tensor, addends: Tensor) -> None:
    """out[row] += addends, in one order on every device: on a GPU index_add_ has no fixed order, on a CPU index_put_."""
    if out.shape[0] == 0:  # no cells: every addend is 0
        return
    if out.is_cuda:
        out.index_put_((row,), addends, accumulate=True)
    else:
        out.index_add_(0, row, addends)

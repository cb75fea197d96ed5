"""The ops of this folder in plain PyTorch. Sums are in float32 (float64 for float64).

A point (x, y) lies at (x·w − ½, y·h − ½) in a map of h × w cells. Its value is interpolated first along x, then along y, each time
as a + f·(b − a). So the value is exact in a constant map. Cells outside of the map are 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops.declare import Args
from sprompt.ops.points.philox import draw


class Taps(NamedTuple):
    """Where points (B, T, 2) lie in maps of h × w cells, each (B, 1, T)."""

    column: Tensor  # int64: the upper left of the four cells around the point, from -1 to the last cell
    row: Tensor
    fx: Tensor  # the fractions in [0, 1)
    fy: Tensor
    inside: Tensor  # bool: whether one of the four cells lies in the map; False for NaN


def taps(points: Tensor, h: int, w: int) -> Taps:
    x, y = points[:, None, :, 0] * w - 0.5, points[:, None, :, 1] * h - 0.5
    inside = (x > -1) & (x < w) & (y > -1) & (y < h)
    x, y = torch.where(inside, x, -1), torch.where(inside, y, -1)
    column, row = x.floor(), y.floor()
    return Taps(column.long(), row.long(), x - column, y - row, inside)


def interpolated(cell: Callable[[int, int], Tensor], t: Taps) -> Tensor:
    """(B, N, T), from the values cell(dx, dy) of the four cells around every point."""
    upper = cell(0, 0) + t.fx * (cell(1, 0) - cell(0, 0))
    lower = cell(0, 1) + t.fx * (cell(1, 1) - cell(0, 1))
    return torch.where(t.inside, upper + t.fy * (lower - upper), 0)


def sampled(maps: Tensor, points: Tensor) -> Tensor:
    """(B, N, h, w), (B, T, 2) -> (B, N, T)."""
    t = taps(points, *maps.shape[-2:])
    stride = maps.shape[-1] + 2
    cells = F.pad(maps, (1, 1, 1, 1)).flatten(-2)

    def cell(dx: int, dy: int) -> Tensor:
        index = (t.row + 1 + dy) * stride + t.column + 1 + dx
        return cells.gather(2, index.expand(-1, maps.shape[1], -1))

    return interpolated(cell, t)


def sampled_bits(words: Tensor, height: int, width: int, points: Tensor) -> Tensor:
    """The same for masks (B, N, n), without maps of their pixels."""
    t = taps(points, height, width)
    if words.shape[2] == 0:
        return points.new_zeros(*words.shape[:2], points.shape[1])

    def cell(dx: int, dy: int) -> Tensor:
        column, row = t.column + dx, t.row + dy
        known = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        pixel = torch.where(known, row * width + column, 0)
        word = words.gather(2, (pixel // 32).expand(-1, words.shape[1], -1))
        return (word >> pixel % 32 & 1 & known).to(points.dtype)

    return interpolated(cell, t)


def scattered(grad: Tensor, points: Tensor, h: int, w: int) -> Tensor:
    """The transpose of `sampled`: (B, N, T), (B, T, 2) -> (B, N, h, w)."""
    B, N, _ = grad.shape
    t = taps(points, h, w)
    weighted = torch.where(t.inside, grad, 0)
    values, index = [], []
    for dy, share_y in ((0, 1 - t.fy), (1, t.fy)):
        for dx, share_x in ((0, 1 - t.fx), (1, t.fx)):
            values.append(weighted * share_x * share_y)
            index.append(((t.row + 1 + dy) * (w + 2) + t.column + 1 + dx).expand(B, N, -1))
    added, places = torch.cat(values, 2).flatten(0, 1), torch.cat(index, 2).flatten(0, 1)
    cells = grad.new_zeros(B * N, (h + 2) * (w + 2))
    if grad.is_cuda:  # there scatter_add_ adds in any order, and index_put_ sorts
        rows = torch.arange(B * N, device=grad.device)[:, None].expand_as(places)
        cells.index_put_((rows, places), added, accumulate=True)
    else:
        cells.scatter_add_(1, places, added)
    return cells.reshape(B, N, h + 2, w + 2)[..., 1:-1, 1:-1].clone(memory_format=torch.contiguous_format)


def wide(x: Tensor) -> Tensor:
    """Contiguous float32 or float64: torch's sums depend on the layout."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


# -- sample_points


def sample_points(a: Args) -> Tensor:
    if not a.maps.is_floating_point():
        return sampled_bits(a.maps, a.height, a.width, a.points)
    maps = wide(a.maps)
    return sampled(maps, a.points.to(maps.dtype)).to(a.maps.dtype)


def sample_points_backward(a: Args) -> Tensor:
    grad = wide(a.grad)
    return scattered(grad, a.points.to(grad.dtype), a.height, a.width).to(a.grad.dtype)


# -- point_cost


def point_cost(a: Args) -> Tensor:
    maps = wide(a.maps)
    double = a.kernels is not None and a.kernels.dtype == torch.float64
    dtype = torch.float64 if double else maps.dtype
    index = torch.arange(a.number, device=maps.device)
    points = (draw(a.seed, maps.shape[0], index) if a.points is None else a.points).to(dtype)
    z = sampled(maps.to(dtype), points)
    t = sampled_bits(a.words, a.height, a.width, points)
    with torch.autocast(z.device.type, enabled=False):  # the products are in float32
        if a.kernels is not None:
            z = a.kernels.to(dtype).contiguous() @ z
        p = z.sigmoid()
        zt, pt = z @ t.mT, p @ t.mT
    bce = (F.softplus(z).sum(2)[:, :, None] - zt) / max(a.number, 1)
    dice = 1 - (2 * pt + 1) / (p.sum(2)[:, :, None] + t.sum(2)[:, None] + 1)
    cost = a.bce_weight * bce + a.dice_weight * dice
    if a.counts is not None:
        padding = torch.arange(t.shape[1], device=t.device) >= a.counts[:, None]
        cost = cost.masked_fill(padding[:, None], 0)
    return cost


# -- point_loss


def _points(a: Args, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The points (M, T, 2) of these indices, (T,) or (M, T)."""
    masks = a.logits.shape[0]
    if a.points is None:
        return draw(a.seed, masks, index).to(dtype)
    index = index.expand(masks, -1)
    return a.points.to(dtype).gather(1, index[..., None].expand(-1, -1, 2))


def _least_certain(a: Args, logits: Tensor) -> Tensor:
    """int64 (M, kept), increasing: the drawn points of least |logit|. Ties go to the lowest index. NaN is least of all."""
    every = torch.arange(a.drawn, device=logits.device)
    certainty = sampled(logits[:, None], _points(a, every, logits.dtype))[:, 0].abs()
    certainty = torch.where(certainty.isnan(), -1, certainty)
    order = certainty.sort(dim=1, stable=True).indices
    return order[:, : a.kept].sort(1).values


def _final_points(a: Args, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, number, 2): the chosen points, then the points that are added uniformly."""
    added = torch.arange(a.drawn, a.drawn + a.number - a.kept, device=chosen.device)
    return _points(a, torch.cat((chosen, added.expand(chosen.shape[0], -1)), 1), dtype)


def point_loss(a: Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = wide(a.logits)
    chosen = _least_certain(a, logits)
    points = _final_points(a, chosen, logits.dtype)
    z = sampled(logits[:, None], points)[:, 0]
    t = sampled_bits(a.words[:, None], a.height, a.width, points)[:, 0]
    p = z.sigmoid()
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1) / max(a.number, 1)
    sums = torch.stack(((p * t).sum(1), p.sum(1) + t.sum(1)), 1)
    dice = 1 - (2 * sums[:, 0] + 1) / (sums[:, 1] + 1)
    return bce, dice, chosen.to(torch.int32, memory_format=torch.contiguous_format), sums


def point_loss_backward(a: Args) -> Tensor:
    """d bce / dz = (p − t) / T; with A = 2Σpt + 1 and D = Σp + Σt + 1: d dice / dp = (A / D − 2t) / D; dp / dz = p (1 − p)."""
    logits = wide(a.logits)
    points = _final_points(a, a.chosen.long(), logits.dtype)
    z = sampled(logits[:, None], points)[:, 0]
    t = sampled_bits(a.words[:, None], a.height, a.width, points)[:, 0]
    p, q = z.sigmoid(), (-z).sigmoid()
    above, below = 2 * a.sums[:, :1] + 1, a.sums[:, 1:] + 1
    slope = (above / below - 2 * t) / below * p * q
    grad = a.grad_bce[:, None] * (p - t) / max(a.number, 1) + a.grad_dice[:, None] * slope
    grad = scattered(grad[:, None], points, *logits.shape[1:])[:, 0]
    finite = a.grad_bce.isfinite() & a.grad_dice.isfinite()
    return torch.where(finite[:, None, None], grad, torch.nan).to(a.logits.dtype)

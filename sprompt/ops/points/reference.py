"""The ops of this folder in plain PyTorch. Sums are in float32 (float64 for float64).

A point (x, y) lies at (x·w − ½, y·h − ½) in a map of h × w cells. Its value is interpolated first along x, then along y, each time
as a + f·(b − a). So the value is exact in a constant map. Cells outside of the map are 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import unpack
from sprompt.ops.points.philox import draw


class Taps(NamedTuple):
    """Where points (..., T, 2) lie in the map with a border of one cell."""

    first: Tensor  # int64 (..., T): the upper left of the four cells around the point
    stride: int  # cells of a row
    fx: Tensor  # (..., T): the fractions in [0, 1)
    fy: Tensor
    inside: Tensor  # bool (..., T): whether one of the four cells lies in the map; False for NaN


def taps(points: Tensor, h: int, w: int) -> Taps:
    x, y = points[..., 0] * w - 0.5, points[..., 1] * h - 0.5
    inside = (x > -1) & (x < w) & (y > -1) & (y < h)
    x, y = torch.where(inside, x, -1), torch.where(inside, y, -1)
    column, row = x.floor(), y.floor()
    return Taps((row.long() + 1) * (w + 2) + column.long() + 1, w + 2, x - column, y - row, inside)


def sampled(maps: Tensor, points: Tensor) -> Tensor:
    """(B, N, h, w), (B, T, 2) -> (B, N, T)."""
    t = taps(points, *maps.shape[-2:])
    cells = F.pad(maps, (1, 1, 1, 1)).flatten(-2)

    def value(step: int) -> Tensor:
        return cells.gather(2, (t.first + step)[:, None].expand(-1, maps.shape[1], -1))

    fx, fy = t.fx[:, None], t.fy[:, None]
    upper = value(0) + fx * (value(1) - value(0))
    lower = value(t.stride) + fx * (value(t.stride + 1) - value(t.stride))
    return torch.where(t.inside[:, None], upper + fy * (lower - upper), 0)


def scattered(grad: Tensor, points: Tensor, h: int, w: int) -> Tensor:
    """The transpose of `sampled`: (B, N, T), (B, T, 2) -> (B, N, h, w)."""
    B, N, _ = grad.shape
    t = taps(points, h, w)
    fx, fy = t.fx[:, None], t.fy[:, None]
    weighted = torch.where(t.inside[:, None], grad, 0)
    shares = ((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy)
    values = torch.cat([weighted * share for share in shares], 2)
    index = torch.cat([t.first + step for step in (0, 1, t.stride, t.stride + 1)], 1)[:, None].expand(B, N, -1)
    cells = grad.new_zeros(B * N, (h + 2) * (w + 2))
    values, index = values.flatten(0, 1), index.flatten(0, 1)
    if grad.is_cuda:  # there scatter_add_ adds in any order, and index_put_ sorts
        rows = torch.arange(B * N, device=grad.device)[:, None].expand_as(index)
        cells.index_put_((rows, index), values, accumulate=True)
    else:
        cells.scatter_add_(1, index, values)
    return cells.reshape(B, N, h + 2, w + 2)[..., 1:-1, 1:-1].clone(memory_format=torch.contiguous_format)


def bits(words: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Masks (..., n) as maps of 0 and 1."""
    return unpack(words, height * width).reshape(*words.shape[:-1], height, width).to(dtype)


def wide(x: Tensor) -> Tensor:
    """Contiguous float32 or float64: torch's sums depend on the layout."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


# -- sample_points


def sample_points(a: Args) -> Tensor:
    if not a.maps.is_floating_point():
        return sampled(bits(a.maps, a.height, a.width, a.points.dtype), a.points)
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
    t = sampled(bits(a.words, a.height, a.width, dtype), points)
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
    t = sampled(bits(a.words, a.height, a.width, z.dtype)[:, None], points)[:, 0]
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
    t = sampled(bits(a.words, a.height, a.width, z.dtype)[:, None], points)[:, 0]
    p, q = z.sigmoid(), (-z).sigmoid()
    above, below = 2 * a.sums[:, :1] + 1, a.sums[:, 1:] + 1
    slope = (above / below - 2 * t) / below * p * q
    grad = a.grad_bce[:, None] * (p - t) / max(a.number, 1) + a.grad_dice[:, None] * slope
    grad = scattered(grad[:, None], points, *logits.shape[1:])[:, 0]
    finite = a.grad_bce.isfinite() & a.grad_dice.isfinite()
    return torch.where(finite[:, None, None], grad, torch.nan).to(a.logits.dtype)

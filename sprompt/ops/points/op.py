"""The declarations of sample_points, point_cost and point_loss."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op
from sprompt.ops.soft_targets import loss_dtype


@op("triton")
def sample_points(maps: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """maps are floats (B, N, height, width), or the words (B, N, n) of masks of this size."""
    dtype = maps.dtype if maps.is_floating_point() else points.dtype
    return new(maps, *maps.shape[:2], points.shape[1], dtype=dtype)


@sample_points.native
def _(a: Args, out: Tensor) -> None:
    maps, points = native.rows(a.maps), a.points.contiguous()
    if a.maps.is_floating_point():
        native._C.sample_points(maps, points, out, native.threads())
    else:
        native._C.sample_bits(maps, points, a.height, a.width, out, native.threads())


@sample_points.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(a.points)
    ctx.size = a.height, a.width


@op("triton")
def sample_points_backward(grad: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    return new(grad, *grad.shape[:2], height, width)


sample_points.backward(lambda ctx, _, grad: sample_points_backward(grad, *ctx.saved_tensors, *ctx.size))


@sample_points_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.sample_points_backward(native.rows(a.grad), a.points.contiguous(), out, native.threads())


@op("triton")
def point_cost(
    maps: Tensor, kernels: Tensor | None, words: Tensor, height: int, width: int, counts: Tensor | None,
    seed: Tensor | None, points: Tensor | None, number: int, bce_weight: float, dice_weight: float,
) -> Tensor:  # fmt: skip
    """maps are the mask logits, or with kernels the features. The points are drawn from the seed, or given."""
    rows = maps.shape[1] if kernels is None else kernels.shape[1]
    return new(maps, maps.shape[0], rows, words.shape[1], dtype=loss_dtype(maps, kernels))


point_cost.values(lambda a: checks.counts_within("point_cost", a.counts, a.words.shape[1]))


def _dense(points: Tensor | None) -> Tensor | None:
    return None if points is None else points.contiguous()


@point_cost.native
def _(a: Args, cost: Tensor) -> None:
    native._C.point_cost(
        native.rows(a.maps), a.kernels, native.rows(a.words), a.height, a.width, a.counts, a.seed, _dense(a.points),
        *a[8:], cost, native.threads(),
    )  # fmt: skip


@op("triton")
def point_loss(
    logits: Tensor, words: Tensor, height: int, width: int, seed: Tensor | None, points: Tensor | None,
    number: int, drawn: int, kept: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """bce, dice, the indices of the kept points, and the sums (Σpt, Σp + Σt). Points 0 to drawn − 1 are candidates, of which
    `kept` are used. The next number − kept points are all used. Points are drawn from the seed, or given in this order."""
    M, dtype = logits.shape[0], loss_dtype(logits)
    chosen = new(logits, M, kept, dtype=torch.int32)
    return new(logits, M, dtype=dtype), new(logits, M, dtype=dtype), chosen, new(logits, M, 2, dtype=dtype)


@point_loss.native
def _(a: Args, *out: Tensor) -> None:
    native._C.point_loss(
        native.rows(a.logits), native.rows(a.words), a.height, a.width, a.seed, _dense(a.points), a.number, a.drawn, *out,
        native.threads(),
    )  # fmt: skip


@point_loss.saves
def _(ctx: Any, a: Args, bce: Tensor, dice: Tensor, chosen: Tensor, sums: Tensor) -> None:
    ctx.save_for_backward(a.logits, a.words, a.seed, a.points, chosen, sums)
    ctx.mark_non_differentiable(chosen, sums)
    ctx.numbers = a.height, a.width, a.number, a.drawn, a.kept


@op("triton")
def point_loss_backward(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, words: Tensor, seed: Tensor | None, points: Tensor | None,
    chosen: Tensor, sums: Tensor, height: int, width: int, number: int, drawn: int, kept: int,
) -> Tensor:  # fmt: skip
    return new(logits, *logits.shape)


point_loss.backward(lambda ctx, _, *grads: point_loss_backward(*grads[:2], *ctx.saved_tensors, *ctx.numbers))


@point_loss_backward.native
def _(a: Args, grad: Tensor) -> None:
    native._C.point_loss_backward(
        a.grad_bce, a.grad_dice, native.rows(a.logits), native.rows(a.words), a.height, a.width, a.seed, _dense(a.points),
        a.chosen, a.sums, a.number, a.drawn, grad, native.threads(),
    )  # fmt: skip

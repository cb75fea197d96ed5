"""The declaration of deform_attn. `levels` holds h, w and the number of points of every level, one after the other."""

from typing import Any

from torch import Tensor

from sprompt.ops.declare import Args, new, op


@op()
def deform_attn(values: Tensor, points: Tensor, weights: Tensor, levels: list[int]) -> Tensor:
    return new(values, values.shape[0], points.shape[1], values.shape[2] * values.shape[3])


@deform_attn.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(*a[:3])
    ctx.levels = a.levels


@op()
def deform_attn_backward(
    grad: Tensor, values: Tensor, points: Tensor, weights: Tensor, levels: list[int],
    to_values: bool, to_points: bool, to_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of values, points and weights. A gradient that is not needed is empty."""
    return (
        new(values, *values.shape if to_values else (0,)),
        new(points, *points.shape if to_points else (0,)),
        new(weights, *weights.shape if to_weights else (0,)),
    )


deform_attn.backward(
    lambda ctx, needs, grad: deform_attn_backward(grad, *ctx.saved_tensors, list(ctx.levels), *needs[:3])
)

"""The declaration of deform_attn. `levels` holds h, w and the number of points of every level, one after the other."""

import functools
from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op


@op("cuda")
def deform_attn(values: Tensor, points: Tensor, weights: Tensor, levels: list[int]) -> Tensor:
    return new(values, values.shape[0], points.shape[1], values.shape[2] * values.shape[3])


@functools.lru_cache(64)
def table(levels: tuple[int, ...]) -> Tensor:
    """The levels as the kernels read them, (V, 3)."""
    return torch.tensor(levels, dtype=torch.int64, device="cpu").reshape(-1, 3)


def flat(x: Tensor) -> Tensor:
    """points as (B, Q, H, 2P), or weights as (B, Q, H, P), with last stride 1."""
    return native.rows(x.flatten(3))


@deform_attn.native
def _(a: Args, out: Tensor) -> None:
    levels = table(tuple(a.levels))
    native._C.deform_attn(native.rows(a.values), flat(a.points), flat(a.weights), levels, out, native.threads())


@deform_attn.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(*a[:3])
    ctx.levels = a.levels


@op("cuda")
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


@deform_attn_backward.native
def _(a: Args, *gradients: Tensor) -> None:
    needed = (a.to_values, a.to_points, a.to_weights)
    native._C.deform_attn_backward(
        native.rows(a.grad), native.rows(a.values), flat(a.points), flat(a.weights), table(tuple(a.levels)),
        *(gradient if needs else None for gradient, needs in zip(gradients, needed, strict=True)), native.threads(),
    )  # fmt: skip

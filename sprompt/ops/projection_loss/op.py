"""The declaration of projection_loss."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op
from sprompt.ops.soft_targets import loss_dtype

#: Added to the denominator of a dice.
EPSILON = 2e-3


@op("triton")
def projection_loss(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (B,); its slopes by the maxima (B, h + w), rows first; the places int32 (B, h + w) of the maxima: the column of
    a row's maximum, the row of a column's."""
    (B, h, w), dtype = masks.shape, loss_dtype(masks, boxes)
    slopes, places = new(masks, B, h + w, dtype=dtype), new(masks, B, h + w, dtype=torch.int32)
    return new(masks, B, dtype=dtype), slopes, places


@projection_loss.native
def _(a: Args, *out: Tensor) -> None:
    native._C.projection_loss(native.rows(a.masks), native.rows(a.boxes), *out, native.threads())


@projection_loss.saves
def _(ctx: Any, a: Args, loss: Tensor, slopes: Tensor, places: Tensor) -> None:
    ctx.save_for_backward(slopes, places, a.masks)
    ctx.mark_non_differentiable(slopes, places)


@op("triton")
def projection_loss_backward(grad: Tensor, slopes: Tensor, places: Tensor, masks: Tensor) -> Tensor:
    """`masks` gives only the sizes and the dtype."""
    return new(masks, *masks.shape)


projection_loss.backward(lambda ctx, _, grad, *rest: projection_loss_backward(grad, *ctx.saved_tensors))


@projection_loss_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.projection_loss_backward(a.grad, a.slopes.contiguous(), a.places.contiguous(), out, native.threads())

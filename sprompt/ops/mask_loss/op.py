"""The declaration of mask_loss."""

from typing import Any

from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op
from sprompt.ops.targets import loss_dtype

#: Rows of a mask that are one piece of parallel work: of the upsampled map, and of the gradient.
_FORWARD_ROWS, _BACKWARD_ROWS = 64, 32


def _lines(a: Args, number: int) -> Tensor:
    """Scratch of each thread: so many rows of the upsampled map."""
    return native.scratch(native.threads(), number, a.logits.shape[2] * a.upsample + 2 * a.upsample + 64)


@op("triton")
def mask_loss(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor, Tensor]:
    M, dtype = logits.shape[0], loss_dtype(logits)
    return new(logits, M, dtype=dtype), new(logits, M, dtype=dtype), new(logits, M, 3, dtype=dtype)


@mask_loss.native
def _(a: Args, bce: Tensor, dice: Tensor, sums: Tensor) -> None:
    partial = native.scratch(a.logits.shape[0], -(-a.logits.shape[1] * a.upsample // _FORWARD_ROWS), 4, slot=1)
    native._C.mask_loss(
        native.rows(a.logits), native.rows(a.targets), a.ratio, a.upsample, _FORWARD_ROWS, _lines(a, 4), partial, bce, dice,
        sums, native.threads(),
    )  # fmt: skip


@mask_loss.saves
def _(ctx: Any, a: Args, bce: Tensor, dice: Tensor, sums: Tensor) -> None:
    ctx.save_for_backward(a.logits, a.targets, sums)
    ctx.mark_non_differentiable(sums)
    ctx.sizes = a.ratio, a.upsample


@op("triton")
def mask_loss_backward(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, ratio: int, upsample: int
) -> Tensor:
    return new(logits, *logits.shape)


mask_loss.backward(lambda ctx, _, *grads: {"logits": mask_loss_backward(*grads[:2], *ctx.saved_tensors, *ctx.sizes)})


@mask_loss_backward.native
def _(a: Args, grad: Tensor) -> None:
    native._C.mask_loss_backward(
        a.grad_bce, a.grad_dice, native.rows(a.logits), native.rows(a.targets), a.sums, a.ratio, a.upsample, _BACKWARD_ROWS,
        _lines(a, 8), grad, native.threads(),
    )  # fmt: skip

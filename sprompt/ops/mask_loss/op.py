"""The declaration of mask_loss."""

from typing import Any

from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op
from sprompt.ops.soft_targets import loss_dtype


@op("triton")
def mask_loss(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor, Tensor]:
    M, dtype = logits.shape[0], loss_dtype(logits)
    return new(logits, M, dtype=dtype), new(logits, M, dtype=dtype), new(logits, M, 3, dtype=dtype)


@mask_loss.native
def _(a: Args, *out: Tensor) -> None:
    maps = native.rows(a.logits), native.rows(a.targets)
    native._C.mask_loss(*maps, a.ratio, a.upsample, *out, native.threads())


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


mask_loss.backward(lambda ctx, _, *grads: mask_loss_backward(*grads[:2], *ctx.saved_tensors, *ctx.sizes))


@mask_loss_backward.native
def _(a: Args, grad: Tensor) -> None:
    grads, maps = (a.grad_bce, a.grad_dice), (native.rows(a.logits), native.rows(a.targets))
    native._C.mask_loss_backward(*grads, *maps, a.sums, a.ratio, a.upsample, grad, native.threads())

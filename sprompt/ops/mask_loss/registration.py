"""Fake kernels, backends and gradient of mask_loss."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.library import no_double_backward, register_gradient, register_op
from sprompt.ops.mask_loss import reference
from sprompt.ops.targets import loss_dtype, unit_stride

#: Rows of a mask that are one piece of parallel work: of the upsampled map, and of the gradient.
_FORWARD_ROWS, _BACKWARD_ROWS = 64, 32


def _scratch(logits: Tensor, slots: int, upsample: int) -> Tensor:
    return logits.new_empty(
        (native.threads(), slots, logits.shape[2] * upsample + 2 * upsample + 64), dtype=torch.float32
    )


def _mask_loss(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor, Tensor]:
    M = logits.shape[0]
    bce, dice, sums = (logits.new_empty(shape, dtype=torch.float32) for shape in ((M,), (M,), (M, 3)))
    partial = logits.new_empty((M, -(-logits.shape[1] * upsample // _FORWARD_ROWS), 4), dtype=torch.float32)
    native._C.mask_loss(
        unit_stride(logits), unit_stride(targets), ratio, upsample, _FORWARD_ROWS,
        _scratch(logits, 4, upsample), partial, bce, dice, sums, native.threads(),
    )  # fmt: skip
    return bce, dice, sums


def _mask_loss_fake(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor, Tensor]:
    M, dtype = logits.shape[0], loss_dtype(logits)
    bce, dice, sums = (logits.new_empty(shape, dtype=dtype) for shape in ((M,), (M,), (M, 3)))
    return bce, dice, sums


def _mask_loss_backward(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, ratio: int, upsample: int
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    native._C.mask_loss_backward(
        grad_bce, grad_dice, unit_stride(logits), unit_stride(targets), sums, ratio, upsample, _BACKWARD_ROWS,
        _scratch(logits, 8, upsample), grad, native.threads(),
    )  # fmt: skip
    return grad


def _mask_loss_backward_fake(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, ratio: int, upsample: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, ctx.ratio, ctx.upsample = inputs
    ctx.save_for_backward(logits, targets, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_bce: Tensor, grad_dice: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    grad = torch.ops.sprompt.mask_loss_backward(grad_bce, grad_dice, *ctx.saved_tensors, ctx.ratio, ctx.upsample)
    return grad, None, None, None


register_op("mask_loss", fake=_mask_loss_fake, reference=reference.mask_loss, native_kernel=_mask_loss, gpu="triton")
register_op(
    "mask_loss_backward",
    fake=_mask_loss_backward_fake,
    reference=reference.mask_loss_backward,
    native_kernel=_mask_loss_backward,
    gpu="triton",
)
register_gradient("mask_loss", _backward, _setup_context)
no_double_backward("mask_loss_backward", "mask_loss")

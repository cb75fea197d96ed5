"""The declarations of mask_conv, mask_bits, mask_pool and mask_update."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op


def _flat(x: Any) -> Any:
    """(B, rows, H, W) -> (B, rows, P) with last stride 1. A tensor of three dimensions keeps its shape. None stays None."""
    return None if x is None else native.rows(x.flatten(2))


def _forward(features: Tensor, kernels: Any, logits: Any, words: Any, pooled: Any) -> None:
    """Fills logits and words from kernels, or reads words if kernels are None. Fills pooled. Outputs that are None are
    skipped."""
    native._C.mask_update(_flat(features), kernels, _flat(logits), _flat(words), pooled, native.threads())


@op("triton")
def mask_conv(features: Tensor, kernels: Tensor) -> Tensor:
    return new(features, features.shape[0], kernels.shape[1], *features.shape[2:])


mask_conv.native(lambda a, logits: _forward(a.features, a.kernels, logits, None, None))
mask_conv.saves(lambda ctx, a, logits: ctx.save_for_backward(*a))


@op("triton")
def mask_bits(features: Tensor, kernels: Tensor) -> Tensor:
    return new(features, *kernels.shape[:2], words_for(features.shape[2] * features.shape[3]), dtype=torch.int32)


@mask_bits.native
def _(a: Args, words: Tensor) -> None:
    native._C.mask_bits(_flat(a.features), a.kernels, words, native.threads())


@op("triton")
def mask_pool(features: Tensor, words: Tensor) -> Tensor:
    return new(features, features.shape[0], words.shape[1], features.shape[1])


mask_pool.native(lambda a, pooled: _forward(a.features, None, None, a.words, pooled))


@mask_pool.saves
def _(ctx: Any, a: Args, pooled: Tensor) -> None:
    ctx.save_for_backward(a.words)
    ctx.size = a.features.shape[2:]


@op("triton")
def mask_pool_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return new(grad, grad.shape[0], grad.shape[2], height, width)


mask_pool.backward(lambda ctx, _, grad: mask_pool_backward(grad, *ctx.saved_tensors, *ctx.size))


@mask_pool_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.mask_update_backward(
        None, native.rows(a.grad), None, None, _flat(a.words), _flat(out), None, native.threads()
    )


@op("triton")
def mask_update(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, C), (H, W) = kernels.shape, features.shape[2:]
    words = new(features, B, N, words_for(H * W), dtype=torch.int32)
    return new(features, B, N, H, W), new(features, B, N, C), words


mask_update.native(lambda a, logits, pooled, words: _forward(a.features, a.kernels, logits, words, pooled))


@mask_update.saves
def _(ctx: Any, a: Args, logits: Tensor, pooled: Tensor, words: Tensor) -> None:
    ctx.save_for_backward(*a, words)
    ctx.set_materialize_grads(False)


@op("triton")
def mask_update_backward(
    features: Tensor, kernels: Tensor, words: Tensor, grad_logits: Tensor | None, grad_pooled: Tensor | None,
    to_features: bool, to_kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of features and kernels. A gradient that is not needed is empty."""
    return new(features, *features.shape if to_features else (0,)), new(kernels, *kernels.shape if to_kernels else (0,))


mask_update.backward(lambda ctx, needs, *grads: mask_update_backward(*ctx.saved_tensors, *grads[:2], *needs))


@mask_update_backward.native
def _backward(a: Args, grad_features: Tensor, grad_kernels: Tensor) -> None:
    to_features, to_kernels = reached(a, grad_features, grad_kernels)
    if to_features is None and to_kernels is None:
        return
    native._C.mask_update_backward(
        _flat(a.grad_logits), _flat(a.grad_pooled), None if to_kernels is None else _flat(a.features), a.kernels,
        _flat(a.words), _flat(to_features), to_kernels, native.threads(),
    )  # fmt: skip


def reached(a: Args, grad_features: Tensor, grad_kernels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that must be computed: they are needed, and an incoming gradient reaches them. The others are set to 0, and
    returned as None."""
    to_features = a.to_features and not (a.grad_logits is None and a.grad_pooled is None)
    to_kernels = a.to_kernels and a.grad_logits is not None
    for grad, to in ((grad_features, to_features), (grad_kernels, to_kernels)):
        if not to:
            grad.zero_()
    return grad_features if to_features else None, grad_kernels if to_kernels else None


@op("triton")
def mask_conv_backward(
    features: Tensor, kernels: Tensor, grad: Tensor, to_features: bool, to_kernels: bool
) -> tuple[Tensor, Tensor]:
    return mask_update_backward.outputs(features, kernels, None, grad, None, to_features, to_kernels)


def as_update(a: Args) -> Args:
    """The arguments of mask_update_backward for the gradient of mask_conv: a mask_update with only its logits in use."""
    return mask_update_backward.args(a.features, a.kernels, None, a.grad, None, a.to_features, a.to_kernels)


mask_conv.backward(lambda ctx, needs, grad: mask_conv_backward(*ctx.saved_tensors, grad, *needs))
mask_conv_backward.native(lambda a, *grads: _backward(as_update(a), *grads))

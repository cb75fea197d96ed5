"""Fake kernels, backends and gradients of mask_conv, mask_pool and mask_update."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.library import no_double_backward, register_gradient, register_op
from sprompt.ops.mask_conv import reference

BLOCK = 64  # pixels: what the kernels work on at a time
CHUNKS = 32  # about so many in all: work for the threads, and partial sums to add up


# -- native


def _rows(x: Tensor) -> Tensor:
    """(B, rows, H, W) -> (B, rows, P) with last stride 1; other strides are taken as they are."""
    flat = x.flatten(2)
    return flat if flat.shape[2] <= 1 or flat.stride(2) == 1 else flat.contiguous()


class Workspace:
    """The memory that csrc/mask_conv/mask_conv.h asks for."""

    def __init__(self, like: Tensor, batch: int, masks: int, channels: int, pixels: int, scratch: int) -> None:
        self.like, self.batch, self.masks = like, batch, masks
        self.padded = -(-channels // 128) * 128
        blocks = -(-pixels // BLOCK)
        chunks = max(CHUNKS // max(batch, 1), 4)  # an image, of the shape alone, so that sums do not depend on threads
        self.chunk = max(1, -(-blocks // chunks)) * BLOCK
        self.chunks = -(-pixels // self.chunk)
        self.scratch = self.floats(native.threads(), -(-scratch // 16) * 16)
        self.packed_size = masks * channels

    def floats(self, *sizes: int) -> Tensor:
        return self.like.new_empty(sizes, dtype=torch.float32)

    def packed(self) -> Tensor:
        return self.floats(self.batch, self.packed_size)

    def partial(self) -> Tensor:
        return self.floats(self.batch, self.chunks, self.masks, self.padded)


def _forward_workspace(features: Tensor, masks: int) -> Workspace:
    batch, channels, pixels = features.shape
    return Workspace(features, batch, masks, channels, pixels, 96 * (channels + 32) + 17 * masks + 16384)


def _mask_conv(features: Tensor, kernels: Tensor) -> Tensor:
    logits = _mask_conv_fake(features, kernels)
    x = _rows(features)
    work = _forward_workspace(x, kernels.shape[1])
    native._C.mask_update(
        x, kernels, logits.flatten(2), None, None, work.packed(), None, work.scratch, work.chunk, native.threads()
    )
    return logits


def _mask_pool(features: Tensor, words: Tensor) -> Tensor:
    pooled = _mask_pool_fake(features, words)
    x = _rows(features)
    bits = words if words.shape[2] <= 1 or words.stride(2) == 1 else words.contiguous()
    work = _forward_workspace(x, words.shape[1])
    native._C.mask_update(x, None, None, bits, pooled, None, work.partial(), work.scratch, work.chunk, native.threads())
    return pooled


def _mask_update(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, pooled, words = _mask_update_fake(features, kernels)
    x = _rows(features)
    work = _forward_workspace(x, kernels.shape[1])
    native._C.mask_update(
        x,
        kernels,
        logits.flatten(2),
        words,
        pooled,
        work.packed(),
        work.partial(),
        work.scratch,
        work.chunk,
        native.threads(),
    )
    return logits, pooled, words


def _backward(
    grad_logits: Tensor | None,
    grad_pooled: Tensor | None,
    features: Tensor | None,
    kernels: Tensor | None,
    words: Tensor | None,
    grad_features: Tensor | None,
    grad_kernels: Tensor | None,
) -> None:
    """Fills grad_features (B, C, H, W) and grad_kernels (B, N, C), each if given."""
    whole = features if features is not None else grad_features
    some = grad_logits if grad_logits is not None else grad_pooled
    assert whole is not None
    batch, channels, height, width = whole.shape
    if some is None:  # nothing flows back
        for grad in (grad_features, grad_kernels):
            if grad is not None:
                grad.zero_()
        return
    masks = some.shape[1]
    work = Workspace(whole, batch, masks, channels, height * width, 128 * (channels + 32) + 192 * masks + 16384)
    if grad_kernels is not None and grad_logits is None:
        grad_kernels.zero_()
        grad_kernels = None
    if grad_features is None and grad_kernels is None:
        return
    if grad_pooled is not None:
        grad_pooled = torch.nn.functional.pad(grad_pooled.float(), (0, work.padded - channels)).contiguous()
        assert words is not None
        words = words if words.shape[2] <= 1 or words.stride(2) == 1 else words.contiguous()
    native._C.mask_update_backward(
        _rows(grad_logits) if grad_logits is not None else None,
        grad_pooled,
        _rows(features) if features is not None and grad_kernels is not None else None,
        kernels,
        words,
        grad_features.flatten(2) if grad_features is not None else None,
        grad_kernels,
        work.packed() if grad_logits is not None and grad_features is not None else None,
        work.partial() if grad_kernels is not None else None,
        work.scratch,
        work.chunk,
        native.threads(),
    )


def _mask_update_backward(
    features: Tensor,
    kernels: Tensor,
    words: Tensor,
    grad_logits: Tensor | None,
    grad_pooled: Tensor | None,
    to_features: bool,
    to_kernels: bool,
) -> tuple[Tensor, Tensor]:
    grads = _mask_update_backward_fake(features, kernels, words, grad_logits, grad_pooled, to_features, to_kernels)
    _backward(
        grad_logits,
        grad_pooled,
        features,
        kernels,
        words,
        grads[0] if to_features else None,
        grads[1] if to_kernels else None,
    )
    return grads


def _mask_conv_backward(
    features: Tensor, kernels: Tensor, grad: Tensor, to_features: bool, to_kernels: bool
) -> tuple[Tensor, Tensor]:
    grads = _mask_conv_backward_fake(features, kernels, grad, to_features, to_kernels)
    _backward(grad, None, features, kernels, None, grads[0] if to_features else None, grads[1] if to_kernels else None)
    return grads


def _mask_pool_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    grad_features = _mask_pool_backward_fake(grad, words, height, width)
    _backward(None, grad, None, None, words, grad_features, None)
    return grad_features


# -- fake kernels: fresh, dense outputs


def _mask_conv_fake(features: Tensor, kernels: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], kernels.shape[1], *features.shape[2:]))


def _mask_pool_fake(features: Tensor, words: Tensor) -> Tensor:
    return features.new_empty((features.shape[0], words.shape[1], features.shape[1]))


def _mask_update_fake(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    words = words_for(features.shape[2] * features.shape[3])
    return (
        _mask_conv_fake(features, kernels),
        features.new_empty(kernels.shape),
        features.new_empty((*kernels.shape[:2], words), dtype=torch.int32),
    )


def _mask_conv_backward_fake(
    features: Tensor, kernels: Tensor, grad: Tensor, to_features: bool, to_kernels: bool
) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape if to_features else 0), kernels.new_empty(
        kernels.shape if to_kernels else 0
    )


def _mask_update_backward_fake(
    features: Tensor,
    kernels: Tensor,
    words: Tensor,
    grad_logits: Tensor | None,
    grad_pooled: Tensor | None,
    to_features: bool,
    to_kernels: bool,
) -> tuple[Tensor, Tensor]:
    return _mask_conv_backward_fake(features, kernels, features, to_features, to_kernels)


def _mask_pool_backward_fake(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2], height, width))


# -- gradients


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _conv_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need = ctx.needs_input_grad
    grads = torch.ops.sprompt.mask_conv_backward(*ctx.saved_tensors, grad, need[0], need[1])
    return grads[0] if need[0] else None, grads[1] if need[1] else None


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, words = inputs
    ctx.save_for_backward(words)
    ctx.size = features.shape[2:]


def _pool_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.sprompt.mask_pool_backward(grad, *ctx.saved_tensors, *ctx.size), None


def _update_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _update_grad(
    ctx: Any, grad_logits: Tensor | None, grad_pooled: Tensor | None, grad_words: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    need = ctx.needs_input_grad
    grads = torch.ops.sprompt.mask_update_backward(*ctx.saved_tensors, grad_logits, grad_pooled, need[0], need[1])
    return grads[0] if need[0] else None, grads[1] if need[1] else None


register_op("mask_conv", fake=_mask_conv_fake, reference=reference.mask_conv, native_kernel=_mask_conv, gpu="triton")
register_op(
    "mask_conv_backward",
    fake=_mask_conv_backward_fake,
    reference=reference.mask_conv_backward,
    native_kernel=_mask_conv_backward,
    gpu="triton",
)
register_gradient("mask_conv", _conv_grad, _conv_setup)
no_double_backward("mask_conv_backward", "mask_conv")

register_op("mask_pool", fake=_mask_pool_fake, reference=reference.mask_pool, native_kernel=_mask_pool, gpu="triton")
register_op(
    "mask_pool_backward",
    fake=_mask_pool_backward_fake,
    reference=reference.mask_pool_backward,
    native_kernel=_mask_pool_backward,
    gpu="triton",
)
register_gradient("mask_pool", _pool_grad, _pool_setup)
no_double_backward("mask_pool_backward", "mask_pool")

register_op(
    "mask_update", fake=_mask_update_fake, reference=reference.mask_update, native_kernel=_mask_update, gpu="triton"
)
register_op(
    "mask_update_backward",
    fake=_mask_update_backward_fake,
    reference=reference.mask_update_backward,
    native_kernel=_mask_update_backward,
    gpu="triton",
)
register_gradient("mask_update", _update_grad, _update_setup)
no_double_backward("mask_update_backward", "mask_update")

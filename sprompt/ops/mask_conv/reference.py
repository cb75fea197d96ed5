"""mask_conv, mask_pool and mask_update in plain PyTorch. features (B, C, H, W), kernels (B, N, C), words int32 (B, N, n)."""

import torch
from torch import Tensor

from sprompt.ops.masks.reference import pack, unpack


def _wide(x: Tensor) -> Tensor:
    """Contiguous, so that layouts do not change the order of sums, which are in float32 (float64 stays)."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def mask_conv(features: Tensor, kernels: Tensor) -> Tensor:
    logits = torch.bmm(_wide(kernels), _wide(features).flatten(2))
    return logits.to(features.dtype).unflatten(2, features.shape[2:])


def mask_pool(features: Tensor, words: Tensor) -> Tensor:
    x = _wide(features).flatten(2)
    held = unpack(words, x.shape[2]).to(x.dtype)
    return torch.bmm(held, x.mT).to(features.dtype)


def mask_update(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = mask_conv(features, kernels)
    words = pack(logits, 0.0)
    return logits, mask_pool(features, words), words


def mask_update_backward(
    features: Tensor,
    kernels: Tensor,
    words: Tensor,
    grad_logits: Tensor | None,
    grad_pooled: Tensor | None,
    to_features: bool,
    to_kernels: bool,
) -> tuple[Tensor, Tensor]:
    pixels = features.shape[2] * features.shape[3]
    grad_features, grad_kernels = features.new_empty(0), kernels.new_empty(0)
    if to_features:
        total = _wide(features.new_zeros(features.shape)).flatten(2)
        if grad_logits is not None:
            total = total + torch.bmm(_wide(kernels).mT, _wide(grad_logits).flatten(2))
        if grad_pooled is not None:
            total = total + torch.bmm(_wide(grad_pooled).mT, unpack(words, pixels).to(total.dtype))
        grad_features = total.to(features.dtype).unflatten(2, features.shape[2:])
    if to_kernels:
        grad_kernels = kernels.new_zeros(kernels.shape)
        if grad_logits is not None:
            grad_kernels = torch.bmm(_wide(grad_logits).flatten(2), _wide(features).flatten(2).mT).to(kernels.dtype)
    return grad_features, grad_kernels


def mask_conv_backward(
    features: Tensor, kernels: Tensor, grad: Tensor, to_features: bool, to_kernels: bool
) -> tuple[Tensor, Tensor]:
    no_words = features.new_empty((*kernels.shape[:2], 0), dtype=torch.int32)
    return mask_update_backward(features, kernels, no_words, grad, None, to_features, to_kernels)


def mask_pool_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    held = unpack(words, height * width)
    wide = _wide(grad)
    return torch.bmm(wide.mT, held.to(wide.dtype)).to(grad.dtype).unflatten(2, (height, width))

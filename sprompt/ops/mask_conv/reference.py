"""mask_conv, mask_bits, mask_pool and mask_update in plain PyTorch. features (B, C, H, W), kernels (B, N, C), words int32 (B, N, n)."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.mask_conv.op import as_update
from sprompt.ops.masks.reference import pack, unpack


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays), contiguous, so that its layout does not change the order of sums."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def mask_conv(a: Args) -> Tensor:
    logits = torch.bmm(_wide(a.kernels), _wide(a.features).flatten(2))
    return logits.to(a.features.dtype).unflatten(2, a.features.shape[2:])


def mask_bits(a: Args) -> Tensor:
    return pack(mask_conv(a) >= 0, 0.0)


def _pooled(features: Tensor, words: Tensor) -> Tensor:
    x = _wide(features).flatten(2)
    held = unpack(words, x.shape[2]).to(x.dtype)
    return torch.bmm(held, x.mT).to(features.dtype)


def mask_pool(a: Args) -> Tensor:
    return _pooled(a.features, a.words)


def mask_update(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    logits = mask_conv(a)
    words = pack(logits, 0.0)
    return logits, _pooled(a.features, words), words


def mask_update_backward(a: Args) -> tuple[Tensor, Tensor]:
    features, kernels = a.features, a.kernels
    grad_features, grad_kernels = features.new_empty(0), kernels.new_empty(0)
    if a.to_features:
        total = _wide(features.new_zeros(features.shape)).flatten(2)
        if a.grad_logits is not None:
            total = total + torch.bmm(_wide(kernels).mT, _wide(a.grad_logits).flatten(2))
        if a.grad_pooled is not None:
            total = total + torch.bmm(_wide(a.grad_pooled).mT, unpack(a.words, total.shape[2]).to(total.dtype))
        grad_features = total.to(features.dtype).unflatten(2, features.shape[2:])
    if a.to_kernels:
        grad_kernels = kernels.new_zeros(kernels.shape)
        if a.grad_logits is not None:
            grad_kernels = torch.bmm(_wide(a.grad_logits).flatten(2), _wide(features).flatten(2).mT).to(kernels.dtype)
    return grad_features, grad_kernels


def mask_conv_backward(a: Args) -> tuple[Tensor, Tensor]:
    return mask_update_backward(as_update(a))


def mask_pool_backward(a: Args) -> Tensor:
    held, wide = unpack(a.words, a.height * a.width), _wide(a.grad)
    return torch.bmm(wide.mT, held.to(wide.dtype)).to(a.grad.dtype).unflatten(2, (a.height, a.width))

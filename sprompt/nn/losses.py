"""Sigmoid focal loss (α = ¼, γ = 2), summed: of class logits, and of dense maps without storing the upsampled logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sprompt.nn.conv import full_precision

_ALPHA = 0.25
#: Number of upsampled logits that the dense loss works on at a time.
_CHUNK = 1 << 20


def focal_sum(logits: Tensor, positive: Tensor) -> Tensor:
    """Σ α (1 − q)² · cross-entropy over all elements; q is the probability of the truth, α ¼ for positives and ¾ for others.

    Args:
        logits: any shape.
        positive: bool, of that shape.
    """
    loss, _ = _focal(full_precision(logits), positive)
    return loss.sum()


def _focal(z: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every element, and its derivative by z."""
    truth = torch.where(positive, z, -z)
    alpha = torch.where(positive, _ALPHA, 1 - _ALPHA).to(z.dtype)
    rest, surprise = (-truth).sigmoid(), -F.logsigmoid(truth)  # 1 − q, −log q
    weight = alpha * rest**2
    slope = weight * (rest + 2 * (1 - rest) * surprise)
    return weight * surprise, torch.where(positive, -slope, slope)


def dense_focal_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The focal loss of logits upsampled to the size of the labels, summed over pixels and classes.

    The upsampling is bilinear with half-pixel centres.

    Args:
        logits: (B, K, h, w) float.
        labels: (B, H, W) int64, the class of every pixel; K is background.

    The forward pass computes the gradient too, for some classes at a time, so the upsampled logits of all classes are never in
    memory together. Double backward is not supported.
    """
    return _DenseFocal.apply(logits, labels)


class _DenseFocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        size = (labels.shape[1], labels.shape[2])
        z = full_precision(logits)
        total, grad = z.new_zeros(()), torch.empty_like(z)
        classes = torch.arange(z.shape[1], device=z.device)[:, None, None]
        step = max(1, _CHUNK // max(labels.numel(), 1))
        for chunk, out, of in zip(z.split(step, 1), grad.split(step, 1), classes.split(step), strict=True):
            upsampled = F.interpolate(chunk, size=size, mode="bilinear", align_corners=False)
            loss, slope = _focal(upsampled, labels[:, None] == of)
            total += loss.sum()
            out.copy_(torch.ops.aten.upsample_bilinear2d_backward(slope, size, chunk.shape, False))
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad_total * grad).to(ctx.dtype), None

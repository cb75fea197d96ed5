"""mask_loss in plain PyTorch. targets and ratio: see sprompt.ops.soft_targets."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops.declare import Args
from sprompt.ops.soft_targets import loss_dtype, soft_targets, upsampled


def _maps(a: Args) -> tuple[Tensor, Tensor]:
    """z and t, (M, P)."""
    z = upsampled(a.logits, a.upsample, loss_dtype(a.logits))
    return z.flatten(1), soft_targets(a.targets, a.ratio, z.shape[1], z.shape[2], z.dtype).flatten(1)


def mask_loss(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    z, t = _maps(a)
    p = z.sigmoid()
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1) / max(z.shape[1], 1)
    sums = torch.stack(((p * t).sum(1), (p * p).sum(1), (t * t).sum(1)), 1)
    dice = 1 - 2 * sums[:, 0] / ((sums[:, 1] + 1e-3) + (sums[:, 2] + 1e-3))
    return bce, dice, sums


def mask_loss_backward(a: Args) -> Tensor:
    """d bce / dz = (p − t) / P; d dice / dp = −2t / D + 4 p Σpt / D² with the denominator D; dp / dz = p (1 − p)."""
    z, t = _maps(a)
    p, q = z.sigmoid(), (-z).sigmoid()
    pt, pp, tt = a.sums[:, :, None].unbind(1)
    denominator = (pp + 1e-3) + (tt + 1e-3)
    slope = -2 * t / denominator + 4 * p * pt / denominator**2
    grad = a.grad_bce[:, None] * (p - t) / max(z.shape[1], 1) + a.grad_dice[:, None] * slope * p * q
    return _transposed(grad, a.logits, a.upsample).to(a.logits.dtype)


def _transposed(grad: Tensor, logits: Tensor, upsample: int) -> Tensor:
    """The gradient (M, h, w) of the logits, from the gradient (M, P) of the upsampled logits."""
    M, h, w = logits.shape
    if upsample == 1 or grad.numel() == 0:
        return grad.reshape(M, h, w)
    rows, columns = (_stretching(n, upsample, grad) for n in (h, w))
    return rows.T @ grad.reshape(M, h * upsample, w * upsample) @ columns


def _stretching(n: int, upsample: int, like: Tensor) -> Tensor:
    """The matrix (n·upsample, n) that stretches one dimension."""
    unit = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(unit, scale_factor=upsample, mode="linear", align_corners=False)[0].T

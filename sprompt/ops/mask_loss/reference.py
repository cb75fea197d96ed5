"""mask_loss in plain PyTorch. targets and ratio: see sprompt.ops.targets."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops.targets import loss_dtype, soft_targets, upsampled


def _maps(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor]:
    """z and t, (M, P)."""
    z = upsampled(logits, upsample, loss_dtype(logits))
    return z.flatten(1), soft_targets(targets, ratio, z.shape[1], z.shape[2], z.dtype).flatten(1)


def mask_loss(logits: Tensor, targets: Tensor, ratio: int, upsample: int) -> tuple[Tensor, Tensor, Tensor]:
    z, t = _maps(logits, targets, ratio, upsample)
    p = z.sigmoid()
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1) / max(z.shape[1], 1)
    sums = torch.stack(((p * t).sum(1), (p * p).sum(1), (t * t).sum(1)), 1)
    dice = 1 - 2 * sums[:, 0] / ((sums[:, 1] + 1e-3) + (sums[:, 2] + 1e-3))
    return bce, dice, sums


def mask_loss_backward(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor, ratio: int, upsample: int
) -> Tensor:
    """d bce / dz = (p − t) / P; d dice / dp = −2t / D + 4 p Σpt / D², D the denominator; dp / dz = p (1 − p)."""
    z, t = _maps(logits, targets, ratio, upsample)
    p, q = z.sigmoid(), (-z).sigmoid()
    pt, pp, tt = sums[:, :, None].unbind(1)
    denominator = (pp + 1e-3) + (tt + 1e-3)
    slope = -2 * t / denominator + 4 * p * pt / denominator**2
    grad = grad_bce[:, None] * (p - t) / max(z.shape[1], 1) + grad_dice[:, None] * slope * p * q
    return _transposed(grad, logits, upsample).to(logits.dtype)


def _transposed(grad: Tensor, logits: Tensor, upsample: int) -> Tensor:
    """The gradient (M, P) of the upsampled logits taken back to (M, h, w)."""
    M, h, w = logits.shape
    if upsample == 1 or grad.numel() == 0:
        return grad.reshape(M, h, w)
    rows, columns = (_stretching(n, upsample, grad) for n in (h, w))
    return rows.T @ grad.reshape(M, h * upsample, w * upsample) @ columns


def _stretching(n: int, upsample: int, like: Tensor) -> Tensor:
    """The matrix (n·upsample, n) that stretches one dimension."""
    unit = torch.eye(n, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(unit, scale_factor=upsample, mode="linear", align_corners=False)[0].T

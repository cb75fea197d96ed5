"""match_cost in plain PyTorch. targets and ratio: see sprompt.ops.soft_targets."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.soft_targets import loss_dtype, soft_targets, upsampled


def match_cost(a: Args) -> Tensor:
    z = upsampled(a.mask_logits, a.upsample, loss_dtype(a.mask_logits, a.class_logits))
    t = soft_targets(a.targets, a.ratio, z.shape[2], z.shape[3], z.dtype).flatten(2)
    p = z.flatten(2).sigmoid()
    pixels = p.shape[2]
    common = p @ t.mT
    bce = -(common + (1 - p) @ (1 - t).mT) / max(pixels, 1)
    dice = -2 * common / (((p * p).sum(2)[:, :, None] + 1e-3) + ((t * t).sum(2)[:, None, :] + 1e-3))
    cost = a.bce_weight * bce + a.dice_weight * dice
    if a.class_logits is not None:
        cost = cost + a.class_weight * _class_cost(a.class_logits.to(z.dtype), a.labels)
    if a.counts is not None:
        padding = torch.arange(t.shape[1], device=t.device) >= a.counts[:, None]
        cost = cost.masked_fill(padding[:, None], 0)
    return cost


def _class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """(B, N, K), (B, G) -> (B, N, G): the focal loss of the class as a positive minus its focal loss as a negative."""
    index = labels.clamp(0, class_logits.shape[2] - 1)[:, None].expand(-1, class_logits.shape[1], -1)
    z = class_logits.gather(2, index)
    q, rest = z.sigmoid(), (-z).sigmoid()
    return -0.25 * rest**2 * (q + 1e-12).log() + 0.75 * q**2 * (rest + 1e-12).log()

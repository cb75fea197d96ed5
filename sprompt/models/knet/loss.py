"""The training objective of K-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.models.knet.config import KNetConfig
from sprompt.models.knet.matching import assignments, dense_labels
from sprompt.models.knet.outputs import Outputs
from sprompt.models.protocol import Losses, Matched
from sprompt.nn.distributed import all_sum, world
from sprompt.nn.losses import dense_focal_sum, focal_sum
from sprompt.nn.set_loss import query_labels, real_labels
from sprompt.ops import mask_loss


def losses(outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor, config: KNetConfig) -> Losses:
    """Terms of the kernel head (bce, dice, seg) and of every stage (class, bce, dice), in float32 under autocast too.

    Masks are compared at stride 4: logits are upsampled twofold, and targets are reduced fourfold to soft values. Neither is stored.
    The term seg is divided by the number of foreground pixels, all other terms by the number of positives, Σ min(N, counts). Both
    numbers are means over the processes' batches, and at least 1 over all processes together. So W processes have the losses and
    gradients of one process with the whole batch, if all pictures are padded to one size.
    Without positives every term is finite and still has a gradient to every parameter. On a GPU nothing waits for the device.
    """
    _check(outputs, masks, labels, counts)
    kernels, background = outputs.masks[0].shape[1], config.num_classes
    labels = real_labels("KNet.losses", labels, counts, background)
    with torch.autocast(outputs.seg.device.type, enabled=False):
        rows = assignments(outputs, masks, labels, counts, config)
        truth = [query_labels(r, labels, kernels, background) for r in rows]
        pixels = dense_labels(masks, rows[0], truth[0], background)
        sizes = torch.stack([counts.clamp(max=kernels).sum(), (pixels < background).sum()])
        positives, foreground = (all_sum(sizes).clamp(min=1) / world()).unbind()

        select = outputs.seg.device.type == "cpu"
        bce, dice = mask_sums(outputs.masks[0], masks, rows[0], select)
        terms = {
            "head/bce": config.loss_mask * bce / positives,
            "head/dice": config.loss_dice * dice / positives,
            "head/seg": config.loss_seg * dense_focal_sum(outputs.seg, pixels) / foreground,
        }
        classes = torch.arange(background, device=labels.device)
        for s, logits in enumerate(outputs.classes):
            bce, dice = mask_sums(outputs.masks[s + 1], masks, rows[s], select)
            focal = focal_sum(logits, truth[s][:, :, None] == classes)
            terms[f"stage{s}/class"] = config.loss_class * focal / positives
            terms[f"stage{s}/bce"] = config.loss_mask * bce / positives
            terms[f"stage{s}/dice"] = config.loss_dice * dice / positives
    return Losses(terms, [Matched(k, r) for k, r in zip(outputs.kernels, rows, strict=True)])


def mask_sums(logits: Tensor, masks: BitMasks, rows: Tensor, select: bool) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and the dice of the matched pairs. Without a pair both are 0, with a gradient of 0 to the logits.

    `select` computes the matched pairs only. It needs their number, and on a GPU that would wait for the device. Otherwise all B·G pairs
    are computed, and pairs without a kernel do not count.
    """
    real = rows >= 0
    batch, kernels = logits.shape[:2]
    places = rows.clamp(min=0) + kernels * torch.arange(batch, device=rows.device)[:, None]
    if select:
        places, masks, real = places[real], masks[real], real[real]
    else:
        places, masks, real = places.flatten(), masks.reshape(-1), real.flatten()
    bce, dice = mask_loss(logits.flatten(0, 1).index_select(0, places), masks, upsample=2)
    # Costs that are not finite raise an error on a CPU. On a GPU the rows are then -2. The loss must become NaN, because these
    # rows are not background.
    otherwise = torch.where((rows == -2).any(), torch.nan, 0.0)
    return torch.where(real, bce, otherwise).sum(), torch.where(real, dice, otherwise).sum()


def _check(outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> None:
    batch, _, height, width = outputs.seg.shape
    size = (8 * height, 8 * width)
    if len(masks.shape) != 2 or masks.shape[0] != batch or masks.size != size or size[0] % 32 or size[1] % 32:
        raise ValueError(
            f"KNet.losses: masks must have shape ({batch}, G) and the size of the images, {size}, multiples of 32, got "
            f"{tuple(masks.shape)} and {masks.size}; pad masks as the images are"
        )
    if labels.shape != masks.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"KNet.losses: labels must be int64 of shape {tuple(masks.shape)}, got {labels.dtype} of {tuple(labels.shape)}; "
            "give every mask a class"
        )
    if counts.shape != (batch,) or counts.dtype != torch.int64:
        raise ValueError(
            f"KNet.losses: counts must be int64 of shape ({batch},), got {counts.dtype} of {tuple(counts.shape)}; "
            "give the number of real masks of each image"
        )

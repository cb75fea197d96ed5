"""The assignment of kernels to targets, and the class labels of kernels and pixels that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.models.knet.config import KNetConfig
from sprompt.models.knet.outputs import Outputs
from sprompt.ops import linear_assignment, match_cost


@torch.no_grad()
def assignments(outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor, config: KNetConfig) -> list[Tensor]:
    """Rows (B, G) of every stage: the kernel of each target, -1 for a target without a kernel.

    The assignment of a stage uses the predictions that enter the stage. The predictions of the kernel head enter stage 0, so
    the kernel head and stage 0 share one assignment. The kernel head predicts no classes, so this assignment uses masks only.
    """
    rows = []
    for stage, logits in enumerate(outputs.masks[:-1]):
        classes = outputs.classes[stage - 1] if stage else None
        weights = (config.cost_class, config.cost_mask, config.cost_dice)
        cost = match_cost(logits, masks, classes, labels if stage else None, counts, weights=weights, upsample=2)
        rows.append(linear_assignment(cost, counts))
    return rows


def dense_labels(masks: BitMasks, rows: Tensor, truth: Tensor, background: int) -> Tensor:
    """(B, H/4, W/4) int64: the class of every pixel at stride 4. It is the class of the matched target that touches the pixel, or
    `background`.

    A target touches a pixel if its bilinear reduction is above 0: if one of the central 2×2 pixels of the 4×4 block is set. If several
    targets touch a pixel, the target with the highest kernel index counts.

    Args:
        masks: (B, G) of size (H, W), multiples of 32.
        rows: (B, G), the kernel of each target, or negative.
        truth: (B, N), the class of each kernel.
    """
    (batch, targets), (height, width) = masks.shape, masks.size
    if targets == 0:
        return truth.new_full((batch, height // 4, width // 4), background)
    words = masks.words.reshape(batch, targets, height, width // 32)  # each row of pixels is a whole number of words
    middle = words[:, :, 1::4] | words[:, :, 2::4]
    touched = (middle >> 1) | (middle >> 2)  # bit 4j: block j of the word's 8
    key = rows.to(torch.int32)[:, :, None, None]
    owner = torch.stack([torch.where((touched >> 4 * j) & 1 == 1, key, -1).amax(1) for j in range(8)], -1)
    owner = owner.flatten(1).long()
    label = torch.where(owner >= 0, truth.gather(1, owner.clamp(min=0)), background)
    return label.reshape(batch, height // 4, width // 4)

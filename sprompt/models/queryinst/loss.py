"""The training objective of QueryInst: classes of all queries, boxes and masks of the matched ones, in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.models.protocol import Losses, Matched
from sprompt.models.queryinst.boxes import generalised_iou
from sprompt.models.queryinst.config import QueryInstConfig
from sprompt.models.queryinst.heads import MASK_CELLS, MASK_SIDE, MaskHead
from sprompt.nn.conv import full_precision
from sprompt.nn.distributed import all_sum, world
from sprompt.nn.losses import focal_sum
from sprompt.nn.set_loss import query_labels, real_labels
from sprompt.ops import crop_masks, linear_assignment, roi_align

if TYPE_CHECKING:
    from sprompt.models.queryinst.model import Outputs


def losses(
    outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor, config: QueryInstConfig, heads: Sequence[MaskHead]
) -> Losses:  # fmt: skip
    """Terms of every stage (class, l1, giou, dice), in float32 under autocast too.

    The box of a target is the tight box of its mask. A stage is matched by its own predictions. Boxes are compared in shares of the image
    without padding. All terms are divided by the number of positives, Σ min(N, counts), as a mean over the processes and at least 1.

    A mask head runs on the boxes of matched queries only. The target of a mask is 1 where RoIAlign of the label's bits in the box is at
    least ½. For targets the box is clipped to the image without padding; features are read from the whole box. All stages read features
    and targets together. A CPU computes the matched pairs; a GPU would wait for their number, so it computes all B·G pairs, and pairs
    without a query do not count, for batch norm neither. Batch norm has the statistics of its process. Without targets every term is
    finite and still has a gradient to every parameter.
    """
    _check(outputs, masks, labels, counts)
    labels = real_labels("QueryInst.losses", labels, counts, config.num_classes)
    stages, queries = outputs.stages, config.queries
    with torch.autocast(labels.device.type, enabled=False):
        boxes = torch.stack([stage.boxes for stage in stages])  # (S, B, N, 4)
        classes = full_precision(torch.stack([stage.classes for stage in stages]))
        truth = masks.boxes().to(boxes.dtype)  # (B, G, 4)
        rows = assignments(classes, boxes, truth, labels, counts, outputs.scale, config)  # (S, B, G)
        real = rows >= 0
        # Costs that are not finite raise an error on a CPU. On a GPU the rows are then -2, and the loss becomes NaN.
        otherwise = torch.where((rows == -2).any(), torch.nan, 0.0)
        positives = all_sum(counts.clamp(max=queries).sum().to(boxes.dtype)).clamp(min=1) / world()
        taken = boxes.gather(2, rows.clamp(min=0)[..., None].expand(-1, -1, -1, 4))  # (S, B, G, 4)
        l1 = ((taken - truth) / outputs.scale).abs().sum(-1)
        l1, giou = (
            torch.where(real, each, otherwise).sum((1, 2)) / positives
            for each in (l1, 1 - generalised_iou(taken, truth))
        )
        regions, cropped = _read(outputs, masks, taken.detach(), real, counts)

    terms: dict[str, Tensor] = {}
    selects = _selects(labels.device)
    known = torch.arange(config.num_classes, device=labels.device)
    for number, (stage, head) in enumerate(zip(stages, heads, strict=True)):
        own = query_labels(rows[number], labels, queries, config.num_classes)
        place = rows[number].clamp(min=0)[..., None].expand(-1, -1, config.channels)
        pairs = [regions[number], stage.attended.gather(1, place), labels, real[number], cropped[number]]
        pairs = [each.flatten(0, 1) for each in pairs]
        if selects:
            pairs = [each[pairs[3]] for each in pairs]
        features, attended, wanted, counted, target = pairs
        logits = full_precision(head(features, attended, wanted[:, None], None if selects else counted)[:, 0])
        with torch.autocast(labels.device.type, enabled=False):
            dice = torch.where(counted, _dice(logits, target), otherwise).sum() / positives
            focal = focal_sum(classes[number], own[..., None] == known) / positives
            terms[f"stage{number}/class"] = config.loss_class * focal
            terms[f"stage{number}/l1"] = config.loss_l1 * l1[number]
            terms[f"stage{number}/giou"] = config.loss_giou * giou[number]
            terms[f"stage{number}/dice"] = config.loss_dice * dice
    return Losses(terms, [Matched(stage.queries, own) for stage, own in zip(stages, rows, strict=True)])


@torch.no_grad()
def assignments(
    classes: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, counts: Tensor, scale: Tensor, config: QueryInstConfig
) -> Tensor:  # fmt: skip
    """Rows (S, B, G) of all stages: the query of each target, -1 for a target without a query.

    The cost is that of the class (focal, as in `sprompt.ops.match_cost`), the distance of the boxes in shares of the image, and their
    generalised IoU.
    """
    number, batch, queries = boxes.shape[:3]
    logits = classes.gather(3, labels[:, None].expand(number, -1, queries, -1))  # (S, B, N, G)
    q, rest = logits.sigmoid(), (-logits).sigmoid()
    focal = 0.75 * q**2 * (rest + 1e-12).log() - 0.25 * rest**2 * (q + 1e-12).log()
    own, other = boxes[:, :, :, None], truth[:, None]
    distance = ((own - other) / scale[:, None]).abs().sum(-1)
    cost = config.cost_class * focal + config.cost_l1 * distance - config.cost_giou * generalised_iou(own, other)
    return linear_assignment(cost.flatten(0, 1), counts.repeat(number)).unflatten(0, (number, batch))


def _read(
    outputs: Outputs, masks: BitMasks, boxes: Tensor, real: Tensor, counts: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The features (B, G, C, 14, 14) and the targets (B, G, 28, 28), 0 or 1, of boxes (S, B, G, 4), for each stage."""
    number, _, targets = boxes.shape[:3]
    together = boxes.permute(1, 2, 0, 3).flatten(1, 2)  # the boxes of a target in all stages stand together
    regions = roi_align(outputs.maps, together, MASK_CELLS, counts=number * counts)
    index = torch.where(real, torch.arange(targets, device=real.device), -1).permute(1, 2, 0).flatten(1)
    inside = torch.minimum(together.clamp(min=0), outputs.scale)
    cropped = (crop_masks(masks, inside, index, MASK_SIDE) >= 0.5).to(boxes.dtype)
    return regions.unflatten(1, (targets, number)).unbind(2), cropped.unflatten(1, (targets, number)).unbind(2)


def _selects(device: torch.device) -> bool:
    """Whether only the matched pairs are computed. A GPU would wait for their number."""
    return device.type == "cpu"


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 − 2Σpt / (Σp² + Σt² + 1e-5) of every mask (M, h, w)."""
    p, t = logits.sigmoid().flatten(1), target.flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.square().sum(1) + 1e-5)


def _check(outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor) -> None:
    batch, _, height, width = outputs.maps[0].shape
    size = (4 * height, 4 * width)
    if len(masks.shape) != 2 or masks.shape[0] != batch or masks.size != size:
        raise ValueError(
            f"QueryInst.losses: masks must have shape ({batch}, G) and the size of the images, {size}, got {tuple(masks.shape)} and "
            f"{masks.size}; pad masks as the images are"
        )
    if labels.shape != masks.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"QueryInst.losses: labels must be int64 of shape {tuple(masks.shape)}, got {labels.dtype} of {tuple(labels.shape)}; give "
            "every mask a class"
        )

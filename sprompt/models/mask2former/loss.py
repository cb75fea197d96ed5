"""The training objective of Mask2Former: classes, and masks at points."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.models.mask2former.config import Mask2FormerConfig
from sprompt.models.protocol import IF_MATCHED, OBJECT, Losses, Matched, Slots
from sprompt.nn.conv import full_precision
from sprompt.nn.set_loss import average_targets, class_term, mask_terms, real_labels, weighted_cross_entropy
from sprompt.ops import linear_assignment, point_cost


class Points(NamedTuple):
    """Points of other code, for comparisons: of each prediction head those of the cost (B, T, 2) and the candidates of the loss."""

    cost: list[Tensor]
    candidates: list[Tensor]


def losses(
    outputs: Any,
    masks: BitMasks,
    labels: Tensor,
    counts: Tensor,
    config: Mask2FormerConfig,
    points: Points | None = None,
) -> Losses:
    """Terms of every prediction head (class, mask, dice), in float32 under autocast too.

    Masks are compared at random points: the cost of matching at uniform points, the loss at points where the logits are least certain.
    The mask terms are divided by the number of targets, as the mean over the processes and at least 1. Logits at full resolution exist
    for matched pairs only. Without targets every term is finite and has a gradient to every parameter.
    """
    labels = real_labels("Mask2Former.losses", labels, counts, config.num_classes)
    terms: dict[str, Tensor] = {}
    matched = []
    with torch.autocast(labels.device.type, enabled=False):
        features = full_precision(outputs.mask_features)
        targets = average_targets(counts)
        for head, (classes, hidden, embeddings) in enumerate(
            zip(outputs.classes, outputs.hidden, outputs.embeddings, strict=True)
        ):
            classes, embeddings = full_precision(classes), full_precision(embeddings)
            given = None if points is None else points.cost[head]
            rows = assignment(classes, features, embeddings, masks, labels, counts, config, given)
            candidates = None if points is None else points.candidates[head]
            bce, dice = mask_terms(features, embeddings, masks, rows, config.points, candidates)
            terms[f"head{head}/class"] = config.loss_class * class_term(classes, rows, labels, config.no_object)
            terms[f"head{head}/mask"] = config.loss_mask * bce / targets
            terms[f"head{head}/dice"] = config.loss_dice * dice / targets
            matched.append(Matched(hidden, rows))
    return Losses(terms, matched[1:])  # the start queries are no decoder stage


def group_losses(
    outputs: Any, masks: BitMasks, counts: Tensor, slots: Slots, config: Mask2FormerConfig
) -> dict[str, Tensor]:
    """Terms of a group of extra queries, summed over the prediction heads, in the scale of `losses`."""
    terms: dict[str, Tensor] = {}
    with torch.autocast(counts.device.type, enabled=False):
        features = full_precision(outputs.mask_features)
        targets = average_targets(counts)
        real = torch.arange(slots.labels.shape[1], device=counts.device) < counts[:, None]
        for classes, embeddings in zip(outputs.classes, outputs.embeddings, strict=True):
            classes, embeddings = full_precision(classes), full_precision(embeddings)
            rows = slots.rows
            if rows is None:
                rows = slot_assignment(classes, features, embeddings, masks, counts, slots, config)
            matched = torch.where(real, rows, -1)
            truth = slot_truth(matched, slots)
            bce, dice = mask_terms(features, embeddings, masks, torch.where(slots.compared, matched, -1), config.points)
            for name, term in (
                ("class", config.loss_class * weighted_cross_entropy(classes, truth, config.no_object)),
                ("mask", config.loss_mask * bce / targets),
                ("dice", config.loss_dice * dice / targets),
            ):
                terms[name] = terms[name] + term if name in terms else term
    return terms


def slot_truth(rows: Tensor, slots: Slots) -> Tensor:
    """(B, M): class 0, an object, or 1, no object, from the slots (B, G) of the targets."""
    number = slots.classes.shape[1]
    taken = torch.zeros(len(rows), number + 1, dtype=torch.bool, device=rows.device)
    taken.scatter_(1, torch.where(rows >= 0, rows, number), True)  # targets without a slot go into an extra column
    return (~((slots.truth == OBJECT) | (slots.truth == IF_MATCHED) & taken[:, :number])).long()


#: Cost of a slot for a target of another class. A target is matched so only if the slots of its class do not suffice.
_FOREIGN = 1000.0


@torch.no_grad()
def slot_assignment(
    classes: Tensor, features: Tensor, embeddings: Tensor, masks: BitMasks, counts: Tensor, slots: Slots,
    config: Mask2FormerConfig,
) -> Tensor:  # fmt: skip
    """Rows (B, G): the slot of each target; -1 where no slot of its class is left."""
    weights = (config.cost_mask, config.cost_dice)
    cost = point_cost((features, embeddings), masks, counts, number=config.points, weights=weights)
    cost = cost - config.cost_class * classes.softmax(-1)[..., :1]
    foreign = slots.classes[:, :, None] != slots.labels[:, None]
    # in float64: next to 1000, float32 has no digits for probabilities
    rows = linear_assignment(cost.double() + _FOREIGN * foreign, counts)
    own = slots.classes.gather(1, rows.clamp(min=0)) == slots.labels
    return torch.where((rows >= 0) & ~own, -1, rows)


@torch.no_grad()
def assignment(
    classes: Tensor, features: Tensor, embeddings: Tensor, masks: BitMasks, labels: Tensor, counts: Tensor,
    config: Mask2FormerConfig, points: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows (B, G): the query of each target, -1 for a target without a query."""
    weights = (config.cost_mask, config.cost_dice)
    cost = point_cost((features, embeddings), masks, counts, number=config.points, points=points, weights=weights)
    probability = classes.softmax(-1).gather(2, labels[:, None].expand(-1, classes.shape[1], -1))
    return linear_assignment(cost - config.cost_class * probability, counts)

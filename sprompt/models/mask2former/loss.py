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
    with torch.autocast(labels.device.type, enabled=False):
        features = full_precision(outputs.mask_features)
        classes, embeddings = (list(map(full_precision, part)) for part in (outputs.classes, outputs.embeddings))
        cost, candidates = ([None] * len(classes), None) if points is None else points
        rows = [
            assignment(of_classes, features, of_masks, masks, labels, counts, config, given)
            for of_classes, of_masks, given in zip(classes, embeddings, cost, strict=True)
        ]
        bce, dice = head_terms(features, embeddings, masks, rows, config, candidates)
        targets = average_targets(counts)
        for head, own in enumerate(rows):
            terms[f"head{head}/class"] = config.loss_class * class_term(classes[head], own, labels, config.no_object)
            terms[f"head{head}/mask"] = config.loss_mask * bce[head] / targets
            terms[f"head{head}/dice"] = config.loss_dice * dice[head] / targets
    matched = [Matched(hidden, own) for hidden, own in zip(outputs.hidden, rows, strict=True)]
    return Losses(terms, matched[1:])  # the start queries are no decoder stage


def group_losses(
    outputs: Any, masks: BitMasks, counts: Tensor, slots: Slots, config: Mask2FormerConfig
) -> dict[str, Tensor]:
    """Terms of a group of extra queries, summed over the prediction heads, in the scale of `losses`."""
    with torch.autocast(counts.device.type, enabled=False):
        features = full_precision(outputs.mask_features)
        targets = average_targets(counts)
        real = torch.arange(slots.labels.shape[1], device=counts.device) < counts[:, None]
        classes, embeddings = (list(map(full_precision, part)) for part in (outputs.classes, outputs.embeddings))
        rows = []
        for head, own in enumerate(classes):
            found = slots.rows
            if found is None:
                found = slot_assignment(own, features, embeddings[head], masks, counts, slots, config)
            rows.append(torch.where(real, found, -1))
        compared = [torch.where(slots.compared, found, -1) for found in rows]
        bce, dice = head_terms(features, embeddings, masks, compared, config)
        truths = (slot_truth(found, slots) for found in rows)
        errors = [weighted_cross_entropy(c, t, config.no_object) for c, t in zip(classes, truths, strict=True)]
    return {
        "class": config.loss_class * torch.stack(errors).sum(),
        "mask": config.loss_mask * bce.sum() / targets,
        "dice": config.loss_dice * dice.sum() / targets,
    }


#: Targets of an image in one product of `head_terms`, counted in every head. It bounds the memory of the logits' gradients.
_AT_ONCE = 256


def head_terms(
    features: Tensor, embeddings: list[Tensor], masks: BitMasks, rows: list[Tensor], config: Mask2FormerConfig,
    candidates: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of the cross-entropy and the dice of the matched pairs of every head, (heads,) each.

    One product makes the logits of several heads. A head alone has few pairs, so that its product and the gradient to the features
    would take the time of reading and writing the features.
    """
    heads = max(1, _AT_ONCE // max(1, masks.shape[1]))
    terms = []
    for first in range(0, len(rows), heads):
        part = slice(first, first + heads)
        given = None if candidates is None else _by_image(candidates[part], rows[part])
        terms.append(_joined_terms(features, embeddings[part], masks, rows[part], config.points, given))
    bce, dice = (torch.cat(parts) for parts in zip(*terms, strict=True))
    return bce, dice


def _joined_terms(
    features: Tensor, embeddings: list[Tensor], masks: BitMasks, rows: list[Tensor], number: int, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`head_terms` by one product."""
    heads, queries = len(rows), embeddings[0].shape[1]
    joined = torch.stack([torch.where(own >= 0, own + head * queries, own) for head, own in enumerate(rows)], 1)
    repeated = BitMasks(masks.words.repeat(1, heads, 1), masks.size)
    losses = mask_terms(features, torch.cat(embeddings, 1), repeated, joined.flatten(1), number, candidates)
    bce, dice = (loss.view_as(joined).sum((0, 2)) for loss in losses)
    return bce, dice


def _by_image(candidates: list[Tensor], rows: list[Tensor]) -> Tensor:
    """The candidates of every head's pairs, by image, head and target."""
    numbers = [(own >= 0).sum(1).tolist() for own in rows]
    parts = [own.split(of_images) for own, of_images in zip(candidates, numbers, strict=True)]
    return torch.cat([part for image in zip(*parts, strict=True) for part in image])


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

"""The training objective of Mask2Former: classes, and masks at points."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import BitMasks
from sprompt.models.mask2former.config import Mask2FormerConfig
from sprompt.models.protocol import Losses, Matched
from sprompt.nn.conv import full_precision
from sprompt.nn.distributed import all_sum, world
from sprompt.ops import linear_assignment, mask_conv, point_cost, point_loss


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
    terms: dict[str, Tensor] = {}
    matched = []
    with torch.autocast(labels.device.type, enabled=False):
        features = full_precision(outputs.mask_features)
        targets = (all_sum(counts.sum().float()) / world()).clamp(min=1)
        for head, (classes, hidden, embeddings) in enumerate(
            zip(outputs.classes, outputs.hidden, outputs.embeddings, strict=True)
        ):
            classes, embeddings = full_precision(classes), full_precision(embeddings)
            given = None if points is None else points.cost[head]
            rows = assignment(classes, features, embeddings, masks, labels, counts, config, given)
            candidates = None if points is None else points.candidates[head]
            bce, dice = _mask_terms(features, embeddings, masks, rows, config, candidates)
            terms[f"head{head}/class"] = config.loss_class * _class_term(classes, rows, labels, config.no_object)
            terms[f"head{head}/mask"] = config.loss_mask * bce / targets
            terms[f"head{head}/dice"] = config.loss_dice * dice / targets
            matched.append(Matched(hidden, rows))
    return Losses(terms, matched[1:])  # the start queries are no decoder stage


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


def _class_term(classes: Tensor, rows: Tensor, labels: Tensor, no_object: float) -> Tensor:
    """Cross-entropy over all queries, as a weighted mean: queries without a target belong to the last class, of weight `no_object`."""
    batch, queries, last = classes.shape[0], classes.shape[1], classes.shape[2] - 1
    truth = labels.new_full((batch, queries + 1), last)
    truth.scatter_(1, torch.where(rows >= 0, rows, queries), labels)  # targets without a query go into an extra column
    weight = classes.new_ones(last + 1)
    weight[last] = no_object
    return F.cross_entropy(classes.flatten(0, 1), truth[:, :queries].flatten(), weight)


def _mask_terms(
    features: Tensor,
    embeddings: Tensor,
    masks: BitMasks,
    rows: Tensor,
    config: Mask2FormerConfig,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and the dice of the matched pairs."""
    real = rows >= 0
    chosen = embeddings.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, embeddings.shape[2]))
    logits = mask_conv(features, chosen).flatten(0, 1)
    if logits.device.type == "cpu":  # a GPU would wait for the number of pairs
        logits, masks, real = logits[real.flatten()], masks.reshape(-1)[real.flatten()], real[real]
    bce, dice = point_loss(logits, masks.reshape(-1), number=config.points, candidates=candidates)
    # Costs that are not finite raise an error on a CPU. On a GPU the rows are -2, and the loss must not take them for background.
    otherwise = torch.where((rows == -2).any(), torch.nan, 0.0)
    real = real.flatten()
    return torch.where(real, bce, otherwise).sum(), torch.where(real, dice, otherwise).sum()

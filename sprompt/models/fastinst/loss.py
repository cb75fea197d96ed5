"""The training objective of FastInst: classes of cells, and classes and masks of queries, also of a pass that the labels' masks guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.models.fastinst.config import FastInstConfig
from sprompt.models.protocol import Losses, Matched
from sprompt.nn.conv import full_precision
from sprompt.nn.dual_path import DualPathDecoder, Predicted
from sprompt.nn.set_loss import average_targets, class_term, mask_terms, real_labels
from sprompt.ops import linear_assignment, point_cost, sample_points

if TYPE_CHECKING:
    from sprompt.models.fastinst.model import Outputs


class Points(NamedTuple):
    """Points of other code, for comparisons: those of the costs (B, T, 2) and the candidates of the losses."""

    guide: Tensor  # the cost of the matching that guides
    cost: Sequence[Tensor]  # of every head
    candidates: Sequence[Tensor]  # of every head, then of every guided prediction


def losses(
    outputs: Outputs, masks: BitMasks, labels: Tensor, counts: Tensor, config: FastInstConfig, decoder: DualPathDecoder,
    points: Points | None = None,
) -> Losses:  # fmt: skip
    """Terms of the cells (proposal) and of every head and guided prediction (class, mask, dice), in float32 under autocast too.

    The guided predictions are those of `DualPathDecoder.again`, where a matched query reads the pixels of its target only. The matching
    of the last head guides them, and is theirs. The last head itself is matched anew, at other points. Without `config.guided` there are
    no such predictions. Points, divisors and images without targets are as in `sprompt.models.mask2former.loss`.
    """
    labels = real_labels("FastInst.losses", labels, counts, config.num_classes)
    terms: dict[str, Tensor] = {}
    predicted = outputs.decoded.predicted
    outside = None if outputs.locations is None else _outside(masks, outputs.locations)
    classes = [decoder.classes(number, found.hidden) for number, found in enumerate(predicted[:-1])]
    classes.append(outputs.classes)
    guided: list[Predicted] = []
    if config.guided:
        given = None if points is None else points.guide
        guide = assignment(classes[-1], predicted[-1], masks, labels, counts, outside, config, given)
        number, (height, width) = outputs.decoded.queries[0].shape[1], predicted[0].features.shape[2:]
        guided = decoder.again(outputs.decoded, guiding(masks, guide, number, (height, width)))
        classes += [decoder.classes(number, found.hidden) for number, found in enumerate(guided, start=1)]

    matched = []
    with torch.autocast(labels.device.type, enabled=False):
        targets = average_targets(counts)
        cells = full_precision(outputs.proposals).flatten(2).mT
        rows = cells_of_targets(outputs.proposals, masks, labels, counts, config)
        terms["proposal"] = config.loss_proposal * class_term(cells, rows, labels, no_object=1)
        for number, (logits, found) in enumerate(zip(classes, [*predicted, *guided], strict=True)):
            if number < len(predicted):
                name, given = f"head{number}", None if points is None else points.cost[number]
                rows = assignment(logits, found, masks, labels, counts, outside, config, given)
                matched.append(Matched(outputs.decoded.queries[number][:, : config.queries], rows))
            else:
                name, rows = f"guided{number - len(predicted) + 1}", guide
            logits, features, embeddings = (full_precision(x) for x in (logits, found.features, found.embeddings))
            candidates = None if points is None else points.candidates[number]
            bce, dice = mask_terms(features, embeddings, masks, rows, config.points, candidates)
            terms[f"{name}/class"] = config.loss_class * class_term(logits, rows, labels, config.no_object)
            terms[f"{name}/mask"] = config.loss_mask * bce.sum() / targets
            terms[f"{name}/dice"] = config.loss_dice * dice.sum() / targets
    return Losses(terms, matched[1:])  # the start queries are no decoder stage


@torch.no_grad()
def cells_of_targets(
    proposals: Tensor, masks: BitMasks, labels: Tensor, counts: Tensor, config: FastInstConfig
) -> Tensor:
    """Rows (B, G): the cell of each target, by its class and by whether the mask touches the cell; -1 for a target without a cell."""
    probability = full_precision(proposals).flatten(2).softmax(1)
    own = probability.gather(1, labels[..., None].expand(-1, -1, probability.shape[2])).mT
    size = (proposals.shape[2], proposals.shape[3])
    outside = ~masks.resize(size, "any").to_dense().flatten(2).mT
    return linear_assignment(_located(-config.cost_class * own, outside, config), counts)


@torch.no_grad()
def assignment(
    classes: Tensor, predicted: Predicted, masks: BitMasks, labels: Tensor, counts: Tensor, outside: Tensor | None,
    config: FastInstConfig, points: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows (B, G): the query of each target, -1 for a target without a query. outside: bool (B, Q, G), None for queries without a place."""
    with torch.autocast(labels.device.type, enabled=False):
        weights = (config.cost_mask, config.cost_dice)
        pair = (full_precision(predicted.features), full_precision(predicted.embeddings))
        cost = point_cost(pair, masks, counts, number=config.points, points=points, weights=weights)
        probability = full_precision(classes).softmax(-1).gather(2, labels[:, None].expand(-1, classes.shape[1], -1))
        cost = cost - config.cost_class * probability
        return linear_assignment(cost if outside is None else _located(cost, outside, config), counts)


def _located(cost: Tensor, outside: Tensor, config: FastInstConfig) -> Tensor:
    """Adds the cost of places outside of a target. The same assignments are best as with a reward for places inside, but costs inside keep
    all digits. The sum is in float64: next to 1000, float32 has no digits for the probability of a class."""
    return cost.double() + config.cost_location * outside


def _outside(masks: BitMasks, locations: Tensor) -> Tensor:
    """Bool (B, Q, G): whether a query was chosen where its target is not; by interpolation, so a mask has a rim of up to a pixel."""
    return ~(sample_points(masks, locations) > 0).mT


@torch.no_grad()
def guiding(masks: BitMasks, rows: Tensor, queries: int, size: Size) -> BitMasks:
    """Masks (B, queries) of this size: that of a target for the query in its row. Other queries, and those whose target has no pixel at
    this size, have empty masks: they attend everywhere."""
    words = masks.resize(size, "nearest").words
    taken = words.new_zeros(len(words), queries + 1, words.shape[2])
    place = torch.where(rows >= 0, rows, queries)  # targets without a query go into an extra row
    taken.scatter_(1, place[..., None].expand_as(words), words)
    return BitMasks(taken[:, :queries], size)

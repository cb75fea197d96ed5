"""The loss of queries that are matched to targets: classes over all queries, masks of the matched pairs at points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import BitMasks
from sprompt.nn.distributed import all_sum, world
from sprompt.ops import mask_conv, point_loss


def average_targets(counts: Tensor) -> Tensor:
    """The number of targets of all images of a process, as the mean over the processes and at least 1."""
    return (all_sum(counts.sum().float()) / world()).clamp(min=1)


def real_labels(name: str, labels: Tensor, counts: Tensor, classes: int) -> Tensor:
    """The labels (B, G), with 0 behind counts (B,). There they may be anything, and they index too.

    On a CPU it raises ValueError for the label of a target that is no class; a GPU would wait for the check.
    """
    labels = torch.where(torch.arange(labels.shape[1], device=labels.device) < counts[:, None], labels, 0)
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"{name}: labels must lie between 0 and {classes - 1}, got {int(wrong[0])}; was the model made for these classes? "
                "(reset_classifier)"
            )
    return labels


def query_labels(rows: Tensor, labels: Tensor, queries: int, background: int) -> Tensor:
    """(B, Q) int64: the class of every query, `background` for a query without a target. rows, labels: (B, G)."""
    truth = labels.new_full((len(rows), queries + 1), background)
    truth.scatter_(1, torch.where(rows >= 0, rows, queries), labels)  # targets without a query go into an extra column
    return truth[:, :queries]


def class_term(classes: Tensor, rows: Tensor, labels: Tensor, no_object: float) -> Tensor:
    """Cross-entropy over all queries, as a weighted mean: queries without a target belong to the last class, of weight `no_object`.

    Args:
        classes: (B, Q, K + 1) logits.
        rows: (B, G), the query of each target, negative for a target without a query.
        labels: (B, G).
    """
    queries, last = classes.shape[1], classes.shape[2] - 1
    return weighted_cross_entropy(classes, query_labels(rows, labels, queries, last), no_object)


def weighted_cross_entropy(classes: Tensor, truth: Tensor, no_object: float) -> Tensor:
    """The weighted mean over queries, classes (B, Q, K + 1) and truth (B, Q). The last class is no object."""
    weight = classes.new_ones(classes.shape[2])
    weight[-1] = no_object
    return F.cross_entropy(classes.flatten(0, 1), truth.flatten(), weight)


def mask_terms(
    features: Tensor, embeddings: Tensor, masks: BitMasks, rows: Tensor, number: int, candidates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice (B, G) of the matched pairs, see `point_loss`; 0 for a target without a query. Logits exist for these pairs
    only.

    Args:
        features: (B, C, h, w). embeddings: (B, Q, C): their products with the features are mask logits.
        masks: (B, G). rows: (B, G), as for `class_term`.
        number: points of a mask.
        candidates: points of other code instead of drawn ones, for the pairs in the order of the targets.
    """
    real = rows >= 0
    if features.device.type == "cpu":  # a GPU would wait for the number of pairs
        used = real.any(0)
        kept, targets = real[:, used].flatten(), masks[:, used].reshape(-1)
        logits = pair_logits(features, embeddings, rows[:, used])
        if not kept.all():
            logits, targets = logits[kept], targets[kept]
        losses = point_loss(logits, targets, number=number, candidates=candidates)
        bce, dice = (loss.new_zeros(real.shape).masked_scatter(real, loss) for loss in losses)
        return bce, dice
    logits = pair_logits(features, embeddings, rows)
    losses = point_loss(logits, masks.reshape(-1), number=number, candidates=candidates)
    # Costs that are not finite raise an error on a CPU. On a GPU the rows are -2, and the loss must not take them for background.
    otherwise = torch.where((rows == -2).any(), torch.nan, 0.0)
    bce, dice = (torch.where(real, loss.view_as(rows), otherwise) for loss in losses)
    return bce, dice


def pair_logits(features: Tensor, embeddings: Tensor, rows: Tensor) -> Tensor:
    """(B · G, h, w): the mask logits of the queries `rows` (B, G), of any query where a row is negative."""
    chosen = embeddings.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, embeddings.shape[2]))
    return mask_conv(features, chosen).flatten(0, 1)

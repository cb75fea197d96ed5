"""Matcher and mask losses of transformers' Mask2Former, and of its copies in other models, on point_cost and point_loss."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sprompt.masks import BitMasks
from sprompt.ops import linear_assignment, point_cost, point_loss
from sprompt.patch.replaced import original

Function = Callable[..., Any]
Pairs = list[tuple[Tensor, Tensor]]

#: Methods of the loss that its `loss_masks` uses. A subclass with other ones keeps transformers' path.
_USED = ("calculate_uncertainty", "sample_points_using_uncertainty", "_pad_images_to_max_in_batch")


def changes(matcher: type[nn.Module], loss: type[nn.Module], same_draws: bool) -> list[tuple[Any, str, Any]]:
    """The replaced methods: (class, name, method). same_draws: points come from torch.rand, in transformers' order."""
    return [
        (matcher, "forward", _matcher(original(matcher, "forward"), same_draws)),
        (loss, "forward", _packed_once(original(loss, "forward"))),
        (loss, "loss_masks", _loss_masks(loss, original(loss, "loss_masks"), same_draws)),
    ]


class Targets(list[Tensor]):
    """The dense target masks of every image, as the caller gave them, and beside them their bits, packed once for all calls."""

    #: The masks (G,) of each image, or None if they are not masks of 0 and 1.
    bits: list[BitMasks] | None
    #: All masks (B, G), padded with empty masks, and with empty pixels to the largest size.
    batch: BitMasks
    #: The number of masks of each image, int64 (B,).
    counts: Tensor

    @staticmethod
    def of(masks: Iterable[Tensor]) -> Targets:
        if isinstance(masks, Targets):
            return masks
        targets = Targets(masks)
        targets.bits = None
        if targets and all(_binary(dense) for dense in targets):
            targets.bits = [BitMasks.from_dense(dense.detach()) for dense in targets]
            height, width = (max(bits.size[side] for bits in targets.bits) for side in (0, 1))
            large = [b.pad(0, width - b.size[1], 0, height - b.size[0]) for b in targets.bits]
            targets.batch = BitMasks(pad_sequence([each.words for each in large], batch_first=True), (height, width))
            targets.counts = torch.tensor([len(bits) for bits in targets.bits], device=targets.batch.device)
        return targets


def _binary(masks: Any) -> bool:
    """Whether these are masks (G, H, W) of 0 and 1."""
    if not isinstance(masks, Tensor) or masks.dim() != 3:
        return False
    return masks.dtype == torch.bool or bool(((masks == 0) | (masks == 1)).all())


def _matcher(unpatched: Function, same_draws: bool) -> Function:
    @functools.wraps(unpatched)
    @torch.no_grad()
    def forward(
        self: Any, masks_queries_logits: Tensor, class_queries_logits: Tensor, mask_labels: Any, class_labels: Any
    ) -> Pairs:
        targets, images = Targets.of(mask_labels), masks_queries_logits.shape[0]
        if targets.bits is None or not len(targets) == len(class_labels) == images:
            return unpatched(self, masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        device = masks_queries_logits.device
        points = None
        if same_draws:
            points = torch.cat([torch.rand(1, self.num_points, 2, device=device) for _ in range(images)])
        counts = targets.counts.to(device)
        cost = _mask_cost(self, masks_queries_logits, targets, counts, points)
        probability = class_queries_logits.softmax(-1)
        for image, labels in enumerate(class_labels):
            cost[image, :, : len(targets[image])] -= self.cost_class * probability[image][:, labels]
        largest = torch.finfo(cost.dtype).max  # a pair without a finite cost is the last choice
        cost = torch.nan_to_num(cost, nan=largest, posinf=largest, neginf=largest)
        rows = linear_assignment(cost, counts).cpu()
        return [_by_query(each[: len(masks)]) for each, masks in zip(rows, targets, strict=True)]

    return forward


def _mask_cost(matcher: Any, logits: Tensor, targets: Targets, counts: Tensor, points: Tensor | None) -> Tensor:
    """(B, N, G), 0 on padding. Every image's points are relative to the size of its own masks."""
    assert targets.bits is not None
    device, weights = logits.device, (matcher.cost_mask, matcher.cost_dice)
    if len({bits.size for bits in targets.bits}) == 1:
        bits = targets.batch.to(device)
        return point_cost(logits, bits, counts, number=matcher.num_points, points=points, weights=weights)
    costs = [
        point_cost(
            logits[i : i + 1], bits[None].to(device), number=matcher.num_points, weights=weights,
            points=None if points is None else points[i : i + 1],
        )[0].mT
        for i, bits in enumerate(targets.bits)
    ]  # fmt: skip
    return pad_sequence(costs, batch_first=True).mT


def _by_query(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The query of each target, -1 for none -> the matched queries, increasing, and their targets."""
    targets = (rows >= 0).nonzero()[:, 0]
    queries, order = rows[targets].sort()
    return queries, targets[order]


def _packed_once(unpatched: Function) -> Function:
    place = list(inspect.signature(unpatched).parameters).index("mask_labels") - 1  # without self

    @torch.compiler.disable  # the matcher returns indices on the CPU: nothing here can be part of a graph
    @functools.wraps(unpatched)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "mask_labels" in kwargs:
            kwargs["mask_labels"] = Targets.of(kwargs["mask_labels"])
        elif len(args) > place:
            args = (*args[:place], Targets.of(args[place]), *args[place + 1 :])
        return unpatched(self, *args, **kwargs)

    return forward


def _loss_masks(owner: type[nn.Module], unpatched: Function, same_draws: bool) -> Function:
    @functools.wraps(unpatched)
    def loss_masks(
        self: Any, masks_queries_logits: Tensor, mask_labels: Any, indices: Pairs, num_masks: Any
    ) -> dict[str, Tensor]:
        targets = Targets.of(mask_labels)
        if targets.bits is None or any(getattr(type(self), name) is not getattr(owner, name) for name in _USED):
            return unpatched(self, masks_queries_logits, mask_labels, indices, num_masks)
        logits = masks_queries_logits[self._get_predictions_permutation_indices(indices)]
        bits = targets.batch.to(logits.device)[self._get_targets_permutation_indices(indices)]
        candidates = None
        if same_draws:
            kept = math.floor(self.importance_sample_ratio * self.num_points)
            numbers = math.floor(self.oversample_ratio * self.num_points), self.num_points - kept
            drawn = [torch.rand(len(logits), n, 2, device=logits.device) for n in numbers if n > 0]
            candidates = torch.cat(drawn, 1)
        bce, dice = point_loss(
            logits, bits, number=self.num_points, oversample=self.oversample_ratio,
            importance=self.importance_sample_ratio, candidates=candidates,
        )  # fmt: skip
        return {"loss_mask": bce.sum() / num_masks, "loss_dice": dice.sum() / num_masks}

    return loss_masks

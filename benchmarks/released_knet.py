"""K-Net's training step and its results in eager PyTorch, written as in the released code: the rival in `benchmarks.programs`.

It runs on the parameters of a `sprompt.models.knet.KNet`. As from the released loader, masks have one byte for each pixel. It
differs from this library in these points:

- each image is matched by itself and gets its own targets;
- the feature transform runs over the features;
- masks are thresholded after a sigmoid, and pooled by a product;
- upsampled logits are computed and kept, and the cost takes three products;
- targets are dense float maps of all kernels;
- the first stage is matched again, although its matching equals the matching of the kernel head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import Size
from sprompt.models.knet import KNet, KNetConfig

ALPHA, EPS = 0.25, 1e-12
Match = tuple[Tensor, Tensor]  # indices of kernels, ascending, and indices of their targets
Terms = dict[str, Tensor]


class Targets(NamedTuple):
    """Targets of the kernels of all images: classes (B·N,) int64, masks and weights (B·N, H/4, W/4) float32.

    Masks and weights of a kernel without a target are 0.
    """

    classes: Tensor
    masks: Tensor
    weights: Tensor


def losses(model: KNet, maps: Sequence[Tensor], masks: list[Tensor], labels: list[Tensor]) -> Terms:
    """Forward, matching and losses from pyramid maps, uint8 masks (G, H, W) and labels (G,) of each image."""
    config = model.config
    soft = [quarter(each) for each in masks]
    terms, x, kernels, logits = head_losses(model, maps, soft, labels)
    images, background = range(len(x)), config.num_classes

    before: tuple[Tensor, Tensor | None] = upsampled(logits.detach()), None  # logits, classes for matching
    results = []  # outputs of every stage, kept until the losses
    for number, stage in enumerate(model.stages):
        transformed = stage.feat_transform(x)
        classes, mask_kernels, kernels = stage(pooled(transformed, logits), kernels)
        logits = torch.cat([F.conv2d(transformed[b : b + 1], mask_kernels[b, :, :, None, None]) for b in images])
        fine = upsampled(logits)
        results.append((classes, logits, fine, kernels))
        known = before[1]
        matches = [
            assign(config, before[0][b], None if known is None else known[b], soft[b], labels[b]) for b in images
        ]
        targets = dense_targets(fine, matches, soft, labels, background)
        bce, dice = mask_terms(fine, targets, background)
        positives = max(sum(len(rows) for rows, _ in matches), 1)
        focal_loss = focal(classes.flatten(0, 1), targets.classes) / positives
        terms[f"stage{number}/class"] = config.loss_class * focal_loss
        terms[f"stage{number}/bce"] = config.loss_mask * bce
        terms[f"stage{number}/dice"] = config.loss_dice * dice
        before = fine.detach(), classes.detach()
    return terms


def head_losses(
    model: KNet, maps: Sequence[Tensor], soft: list[Tensor], labels: list[Tensor]
) -> tuple[Terms, Tensor, Tensor, Tensor]:
    """(losses, features, proposal kernels, mask logits) of the kernel head."""
    config, head = model.config, model.rpn_head
    loc, sem = head(maps)
    logits, seg, x = head.init_kernels(loc), head.conv_seg(sem), sem + loc
    kernels = head.init_kernels.weight.clone().flatten(1)[None].expand(len(x), -1, -1) + pooled(x, logits)
    fine, fine_seg = upsampled(logits), upsampled(seg)
    matches = [assign(config, fine[b].detach(), None, soft[b], labels[b]) for b in range(len(x))]
    targets = dense_targets(fine, matches, soft, labels, config.num_classes)
    bce, dice = mask_terms(fine, targets, config.num_classes)
    pixels = torch.stack([dense_labels(*of, config.num_classes) for of in zip(matches, soft, labels, strict=True)])
    foreground = (pixels < config.num_classes).sum().clamp(min=1)
    focal_loss = focal(fine_seg.permute(0, 2, 3, 1).flatten(0, 2), pixels.flatten()) / foreground
    terms = {
        "head/bce": config.loss_mask * bce,
        "head/dice": config.loss_dice * dice,
        "head/seg": config.loss_seg * focal_loss,
    }
    return terms, x, kernels, logits


def quarter(masks: Tensor) -> Tensor:
    height, width = masks.shape[-2] // 4, masks.shape[-1] // 4
    return F.interpolate(masks[:, None].float(), size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def upsampled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


def pooled(features: Tensor, logits: Tensor) -> Tensor:
    inside = (logits.sigmoid() > 0.5).float()
    return torch.einsum("bnhw,bchw->bnc", inside, features)


def assign(config: KNetConfig, logits: Tensor, classes: Tensor | None, targets: Tensor, labels: Tensor) -> Match:
    """Matches one image: logits (N, H/4, W/4), classes (N, K), targets (G, H/4, W/4)."""
    from scipy.optimize import linear_sum_assignment

    if len(targets) == 0:
        return labels.new_empty(0), labels.new_empty(0)
    p, t = logits.sigmoid(), targets
    same = torch.einsum("nhw,ghw->ng", p, t) + torch.einsum("nhw,ghw->ng", 1 - p, 1 - t)
    cost = -config.cost_mask * same / (t.shape[1] * t.shape[2])
    flat_p, flat_t = p.flatten(1), t.flatten(1)
    overlap = 2 * torch.einsum("np,gp->ng", flat_p, flat_t)
    sizes = (flat_p.pow(2).sum(1)[:, None] + 1e-3) + (flat_t.pow(2).sum(1)[None] + 1e-3)
    cost = cost - config.cost_dice * overlap / sizes
    if classes is not None:
        q = classes.sigmoid()
        positive = -(q + EPS).log() * ALPHA * (1 - q).pow(2)
        negative = -(1 - q + EPS).log() * (1 - ALPHA) * q.pow(2)
        cost = cost + config.cost_class * (positive[:, labels] - negative[:, labels])
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(rows).to(labels), torch.from_numpy(columns).to(labels)


def dense_targets(
    fine: Tensor, matches: list[Match], soft: list[Tensor], labels: list[Tensor], background: int
) -> Targets:
    each = []
    for (rows, columns), own, kinds in zip(matches, soft, labels, strict=True):
        classes = kinds.new_full((fine.shape[1],), background)
        masks, weights = fine.new_zeros(fine.shape[1:]), fine.new_zeros(fine.shape[1:])
        classes[rows], masks[rows], weights[rows] = kinds[columns], own[columns], 1
        each.append((classes, masks, weights))
    return Targets(*(torch.cat(parts) for parts in zip(*each, strict=True)))


def dense_labels(match: Match, soft: Tensor, labels: Tensor, background: int) -> Tensor:
    """(H/4, W/4): class of each pixel. Where masks overlap, the later kernel counts."""
    pixels = labels.new_full(soft.shape[1:], background)
    for column in match[1]:
        pixels[soft[column] > 0] = labels[column]
    return pixels


def mask_terms(fine: Tensor, targets: Targets, background: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of the matched kernels; 0 if there are none."""
    positive = targets.classes < background
    z, t = fine.flatten(0, 1)[positive], targets.masks[positive]
    if len(z) == 0:
        return fine.sum() * 0, fine.sum() * 0
    entropy = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean()
    p, t = z.sigmoid().flatten(1), t.flatten(1)
    dice = 1 - 2 * (p * t).sum(1) / ((p * p).sum(1) + 1e-3 + (t * t).sum(1) + 1e-3)
    return entropy, dice.mean()


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over logits (M, K) of the sigmoid focal loss; class K is background."""
    t = F.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits)
    q = logits.sigmoid()
    wrong = (1 - q) * t + q * (1 - t)
    weight = (ALPHA * t + (1 - ALPHA) * (1 - t)) * wrong.pow(2)
    return (F.binary_cross_entropy_with_logits(logits, t, reduction="none") * weight).sum()


@torch.no_grad()
def results(
    logits: Tensor, classes: Tensor, padded: Size, view: Size, picture: Size
) -> tuple[list[dict[str, Any]], list[float], list[int]]:
    """(RLEs, scores, classes) of one image, from logits (N, h, w) of stride 8 and class logits (N, K)."""
    from pycocotools import mask as coco

    scores, order = classes.sigmoid().flatten().topk(min(100, classes.numel()), sorted=True)
    soft = upsampled(logits[None])[:, order // classes.shape[1]].sigmoid()
    soft = F.interpolate(soft, size=padded, mode="bilinear", align_corners=False)[..., : view[0], : view[1]]
    soft = F.interpolate(soft, size=picture, mode="bilinear", align_corners=False)[0]
    masks = (soft > 0.5).cpu().numpy()
    rles = [coco.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0] for mask in masks]
    return rles, scores.tolist(), (order % classes.shape[1]).tolist()

"""QueryInst's heads, losses and results in eager PyTorch, written as in the released code: a rival in `benchmarks.programs`.

It runs on the parameters of a `sprompt.models.queryinst.QueryInst`. RoIAlign is a compiled kernel in the release, so it calls that of
the library. It differs from this library in these points:

- each stage reads the maps by itself, and their gradients, of the size of the pyramid, are summed;
- in training, each stage and image is matched by itself, by scipy on the host, and each stage reads features and targets by itself;
- targets are float pictures, copied for every box and sampled there; the samples of an axis are a matrix here;
- batch norm is nn.BatchNorm2d, and all classes have masks of which one is taken;
- at inference the mask head runs on the boxes of all queries and makes the masks of all classes;
- each mask is sampled at every pixel of the picture, and pixels are compared as floats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import Size
from sprompt.models.queryinst import QueryInst
from sprompt.models.queryinst.heads import MaskHead, Stage
from sprompt.models.queryinst.model import Outputs
from sprompt.nn.dynamic_interaction import DynamicInteraction
from sprompt.ops import roi_align

LARGEST = math.log(62.5)  # change of a side's logarithm


def decode(model: QueryInst, maps: list[Tensor], view: Size | None = None) -> Outputs:
    """The stages on maps (B, C, h, w). view: the size of the images without padding; None means that there is none."""
    height, width = view or (4 * maps[0].shape[2], 4 * maps[0].shape[3])
    scale = maps[0].new_tensor([width, height, width, height]).expand(len(maps[0]), 1, 4)
    centre, side = (model.rpn_head.init_proposal_bboxes.weight * scale).split(2, -1)
    boxes, queries = torch.cat([centre - side / 2, centre + side / 2], -1), model.rpn_head.init_proposal_features.weight
    queries, stages = queries.expand(len(boxes), -1, -1), []
    head: Any  # a BoxHead, which a ModuleList does not say
    for head in model.roi_head.bbox_head:
        attended = head.attention_norm(head.attention(queries))
        read = interaction(
            head.instance_interactive_conv, roi_align(maps, boxes, 7).flatten(0, 1), attended.flatten(0, 1)
        )
        queries = head.instance_interactive_conv_norm(attended + read.view_as(attended))
        queries = head.ffn_norm(head.ffn(queries))
        classes, deltas = head.fc_cls(head.cls_fcs(queries)), head.fc_reg(head.reg_fcs(queries))
        centre, side = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        centre = centre + side * deltas[..., :2] / 2
        half = side * deltas[..., 2:].clamp(-LARGEST, LARGEST).exp() / 2
        stages.append(Stage(attended, queries, classes, torch.cat([centre - half, centre + half], -1)))
        boxes = stages[-1].boxes.detach()
    return Outputs(maps, scale, stages)


def interaction(conv: DynamicInteraction, regions: Tensor, queries: Tensor) -> Tensor:
    first, second = conv.dynamic_layer(queries).chunk(2, 1)
    x = torch.bmm(regions.flatten(2).permute(0, 2, 1), first.view(len(queries), -1, conv.norm_in.normalized_shape[0]))
    x = F.relu_(conv.norm_in(x))
    x = F.relu_(conv.norm_out(torch.bmm(x, second.view(len(queries), x.shape[2], -1))))
    return F.relu_(conv.fc_norm(conv.fc_layer(x.flatten(1)))) if conv.joins else x


def all_masks(head: MaskHead, maps: list[Tensor], boxes: Tensor, queries: Tensor) -> Tensor:
    """(M, K, 28, 28) logits of boxes (M, 4) of one image or, in training, of (B, M, 4)."""
    batched = boxes if boxes.dim() == 3 else boxes[None]
    regions = roi_align(maps, batched, 14).flatten(0, 1)
    return mask_logits(head, regions, queries.flatten(0, -2))


def mask_logits(head: MaskHead, regions: Tensor, queries: Tensor) -> Tensor:
    x: Any = interaction(head.instance_interactive_conv, regions, queries).mT.unflatten(2, (14, 14))
    for block in head.convs:
        norm: Any = block.bn
        trains = head.training and len(x) >= 2
        x = F.batch_norm(
            block.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, trains, norm.momentum, norm.eps
        ).relu_()
    return head.conv_logits(F.relu_(head.upsample(x)))


# -- training


def losses(model: QueryInst, outputs: Outputs, masks: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    """masks: uint8 (G, H, W) of each image. labels: (G,) of each image."""
    config, terms = model.config, {}
    targets = [mask_boxes(own) for own in masks]
    for number, (stage, head) in enumerate(zip(outputs.stages, model.mask_heads, strict=True)):
        pairs = [matched(stage, b, targets[b], labels[b], outputs.scale[b, 0], config) for b in range(len(masks))]
        positives = max(sum(len(queries) for queries, _ in pairs), 1)
        classes = torch.full(stage.classes.shape[:2], config.num_classes, device=labels[0].device)
        predicted, wanted, scales, crops = [], [], [], []
        regions, attended, kinds = [], [], []
        for b, (queries, own) in enumerate(pairs):
            classes[b, queries] = labels[b][own]
            boxes = stage.boxes[b, queries]
            predicted.append(boxes)
            wanted.append(targets[b][own])
            scales.append(outputs.scale[b].expand(len(own), 4))
            regions.append(roi_align([x[b : b + 1] for x in outputs.maps], boxes.detach()[None], 14)[0])
            attended.append(stage.attended[b, queries])
            kinds.append(labels[b][own])
            crops.append(cropped(masks[b][own].float(), boxes.detach(), outputs.scale[b, 0]))
        boxes, truth = torch.cat(predicted), torch.cat(wanted)
        flat = stage.classes.flatten(0, 1)
        onehot = F.one_hot(classes.flatten(), config.num_classes + 1)[:, :-1].to(flat.dtype)
        p = flat.sigmoid()
        surprise = F.binary_cross_entropy_with_logits(flat, onehot, reduction="none")
        focal = surprise * (onehot * p + (1 - onehot) * (1 - p)).neg().add(1).square()
        focal = (focal * (0.25 * onehot + 0.75 * (1 - onehot))).sum()
        logits = mask_logits(head, torch.cat(regions), torch.cat(attended))
        chosen = logits[torch.arange(len(logits), device=logits.device), torch.cat(kinds)].sigmoid().flatten(1)
        target = torch.cat(crops).flatten(1)
        overlap = 2 * (chosen * target).sum(1) / (chosen.square().sum(1) + target.square().sum(1) + 1e-5)
        l1 = (boxes / torch.cat(scales) - truth / torch.cat(scales)).abs().sum()
        terms[f"stage{number}/class"] = config.loss_class * focal / positives
        terms[f"stage{number}/l1"] = config.loss_l1 * l1 / positives
        terms[f"stage{number}/giou"] = config.loss_giou * (1 - giou(boxes, truth)).sum() / positives
        terms[f"stage{number}/dice"] = config.loss_dice * (1 - overlap).sum() / positives
    return terms


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks (G, H, W), one by one."""
    boxes = masks.new_zeros(len(masks), 4, dtype=torch.float32)
    for g, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            boxes[g] = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return boxes


@torch.no_grad()
def matched(
    stage: Stage, image: int, truth: Tensor, labels: Tensor, scale: Tensor, config: Any
) -> tuple[Tensor, Tensor]:
    """The matched queries of an image, in their order, and their targets."""
    probability = stage.classes[image].sigmoid()
    negative = -(1 - probability + 1e-12).log() * 0.75 * probability.square()
    positive = -(probability + 1e-12).log() * 0.25 * (1 - probability).square()
    cost = config.cost_class * (positive - negative)[:, labels]
    boxes = stage.boxes[image]
    cost += config.cost_l1 * torch.cdist(boxes / scale, truth / scale, p=1)
    cost -= config.cost_giou * giou(boxes[:, None], truth[None])
    found = linear_sum_assignment(cost.cpu().numpy())
    queries, targets = (torch.from_numpy(part).to(boxes.device) for part in found)
    return queries, targets


def giou(a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    shared, around = sides[..., 0] * sides[..., 1], (hull[..., 0] * hull[..., 1]).clamp(min=1e-6)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    union = (areas[0] + areas[1] - shared).clamp(min=1e-6)
    return shared / union - (around - union) / around


@torch.no_grad()
def cropped(masks: Tensor, boxes: Tensor, scale: Tensor) -> Tensor:
    """(M, 28, 28) of 0 and 1: masks (M, H, W) in boxes that are clipped to the image."""
    boxes = torch.minimum(boxes.clamp(min=0), scale)
    down = shares(boxes[:, 1], boxes[:, 3], masks.shape[1])
    across = shares(boxes[:, 0], boxes[:, 2], masks.shape[2])
    return (down @ masks @ across.mT >= 0.5).float()


def shares(low: Tensor, high: Tensor, pixels: int) -> Tensor:
    """(M, 28, pixels): the share of each pixel in the mean of each part of an axis."""
    out = low.new_zeros(len(low), 28, pixels)
    for m, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if end <= start:
            continue
        each = int(np.ceil((end - start) / 28))
        place = start - 0.5 + (np.arange(28 * each) + 0.5) * (end - start) / (28 * each)
        place = torch.from_numpy(place.clip(0, pixels - 1)).to(low)
        left = place.floor().long().clamp(max=pixels - 1)
        part = torch.arange(28, device=low.device).repeat_interleave(each)
        fraction = place - left
        for pixel, weight in ((left, 1 - fraction), ((left + 1).clamp(max=pixels - 1), fraction)):
            out[m].index_put_((part, pixel), weight / each, accumulate=True)
    return out


# -- results


def results(
    model: QueryInst, outputs: Outputs, view: Size, picture: Size
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """RLEs, scores and classes of the best 100 pairs of one image."""
    from pycocotools import mask as coco

    last = outputs.stages[-1]
    kinds = last.classes.shape[2]
    logits = all_masks(model.mask_heads[-1], outputs.maps, last.boxes[0], last.attended[0])
    scores, order = last.classes[0].sigmoid().flatten().topk(min(100, last.classes[0].numel()))
    boxes = last.boxes[0, order // kinds] * last.boxes.new_tensor([picture[1] / view[1], picture[0] / view[0]] * 2)
    soft = logits.sigmoid()[order // kinds, order % kinds]
    rles: list[dict[str, Any]] = []
    for own, box in zip(soft.split(20), boxes.split(20), strict=True):  # the release pastes a few at a time too
        for mask in pasted(own, box, picture).to(torch.uint8).cpu().numpy():
            rles.append(coco.encode(np.array(mask[:, :, None], order="F"))[0])
    return rles, scores, order % kinds


def pasted(soft: Tensor, boxes: Tensor, picture: Size) -> Tensor:
    y = (torch.arange(picture[0], device=soft.device) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (torch.arange(picture[1], device=soft.device) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    shape = (len(soft), picture[0], picture[1])
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], 3)
    return F.grid_sample(soft[:, None], grid, align_corners=False)[:, 0] > 0.5

"""QueryInst written literally from its formulas: plain functions of a state dict that take every image, query and pair by itself.

It has no bit masks, no batched products of several queries and no kernels. RoIAlign is a table of the weights of cells, sample by sample
in numpy; targets are crops of dense masks; matching is scipy's on a cost of single pairs; a class's mask is a channel of the full
convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from knet_eager import Weights, attention, batchnorm, focal, fpn, layernorm, linear, resnet
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

Box = list[float]


class Stage(NamedTuple):
    attended: list[Tensor]  # of each query
    queries: list[Tensor]
    classes: list[Tensor]
    boxes: list[Tensor]


class Forward(NamedTuple):
    """Of one image."""

    maps: list[Tensor]  # (C, h, w)
    stages: list[Stage]


# -- features of boxes


def axis_samples(low: float, length: float, parts: int, each: int, cells: int) -> list[dict[int, float]]:
    """The weights of cells in each part of an axis, in the units of the cells."""
    found = []
    for part in range(parts):
        weights: dict[int, float] = {}
        for sample in range(each):
            x = low - 0.5 + (part * each + sample + 0.5) * length / (parts * each)
            if x < -1 or x > cells:
                continue
            x = min(max(x, 0.0), cells - 1.0)
            left = min(int(x), cells - 1)
            right = min(left + 1, cells - 1)
            for cell, weight in ((left, 1 - (x - left)), (right, x - left)):
                weights[cell] = weights.get(cell, 0.0) + weight / each
        found.append(weights)
    return found


def table(box: Box, parts: int, each: tuple[int, int], shape: tuple[int, int], stride: int) -> np.ndarray:
    """(parts², h·w): every part's weights of all cells. each: samples of a part down and across."""
    x1, y1, x2, y2 = (value / stride for value in box)
    down = axis_samples(y1, max(y2 - y1, 0), parts, each[0], shape[0])
    across = axis_samples(x1, max(x2 - x1, 0), parts, each[1], shape[1])
    weights = np.zeros((parts, parts, *shape))
    for i in range(parts):
        for j in range(parts):
            for y, a in down[i].items():
                for x, b in across[j].items():
                    weights[i, j, y, x] += a * b
    return weights.reshape(parts * parts, -1)


def region(maps: list[Tensor], box: Tensor, parts: int) -> Tensor:
    """(parts², C), row by row."""
    x1, y1, x2, y2 = sides = box.detach().tolist()
    root = math.sqrt(max(x2 - x1, 0) * max(y2 - y1, 0))
    level = min(max(math.floor(math.log2(root / 56 + 1e-6)), 0), 3)
    x = maps[level]
    weights = table(sides, parts, (2, 2), (x.shape[1], x.shape[2]), 4 << level)
    return torch.from_numpy(weights) @ x.flatten(1).T


def interaction(w: Weights, at: str, r: Tensor, q: Tensor) -> Tensor:
    """(cells, C) -> (cells, C)."""
    width, inner = r.shape[1], w[f"{at}.norm_in.weight"].numel()
    theta = linear(w, f"{at}.dynamic_layer", q)
    first, second = theta[: width * inner].reshape(width, inner), theta[width * inner :].reshape(inner, width)
    r = F.relu(layernorm(w, f"{at}.norm_in", r @ first))
    return F.relu(layernorm(w, f"{at}.norm_out", r @ second))


# -- stages


def stage(w: Weights, at: str, maps: list[Tensor], boxes: list[Tensor], queries: Tensor, heads: int) -> Stage:
    attended = layernorm(
        w, f"{at}.attention_norm", queries + attention(w, f"{at}.attention.attn", queries[None], heads)[0]
    )
    found = Stage(list(attended), [], [], [])
    inner = f"{at}.instance_interactive_conv"
    for box, q in zip(boxes, attended, strict=True):
        z = interaction(w, inner, region(maps, box, 7), q).reshape(-1)
        z = F.relu(layernorm(w, f"{inner}.fc_norm", linear(w, f"{inner}.fc_layer", z)))
        q = layernorm(w, f"{inner}_norm", q + z)
        hidden = F.relu(linear(w, f"{at}.ffn.layers.0.0", q))
        q = layernorm(w, f"{at}.ffn_norm", q + linear(w, f"{at}.ffn.layers.1", hidden))
        c = F.relu(layernorm(w, f"{at}.cls_fcs.1", linear(w, f"{at}.cls_fcs.0", q)))
        d = q
        for k in (0, 3, 6):
            d = F.relu(layernorm(w, f"{at}.reg_fcs.{k + 1}", linear(w, f"{at}.reg_fcs.{k}", d)))
        dx, dy, dw, dh = linear(w, f"{at}.fc_reg", d)
        x1, y1, x2, y2 = box
        cx, cy = (x1 + x2) / 2 + 0.5 * dx * (x2 - x1), (y1 + y2) / 2 + 0.5 * dy * (y2 - y1)
        most = math.log(62.5)
        width, height = (x2 - x1) * dw.clamp(-most, most).exp(), (y2 - y1) * dh.clamp(-most, most).exp()
        found.queries.append(q)
        found.classes.append(linear(w, f"{at}.fc_cls", c))
        found.boxes.append(torch.stack([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]))
    return found


def forward(w: Weights, image: Tensor, size: tuple[int, int], heads: int, added: Tensor | float = 0.0) -> Forward:
    """One image (3, H, W), of which `size` is without padding. added: to the queries before the first stage."""
    maps = [x[0] for x in fpn(w, resnet(w, image[None]))]
    queries = w["rpn_head.init_proposal_features.weight"] + added
    boxes = []
    for cx, cy, width, height in w["rpn_head.init_proposal_bboxes.weight"]:
        corners = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        boxes.append(torch.stack([side * size[1 - k % 2] for k, side in enumerate(corners)]))
    stages: list[Stage] = []
    while f"roi_head.bbox_head.{len(stages)}.fc_cls.weight" in w:
        found = stage(w, f"roi_head.bbox_head.{len(stages)}", maps, boxes, queries, heads)
        stages.append(found)
        boxes, queries = [box.detach() for box in found.boxes], torch.stack(found.queries)
    return Forward(maps, stages)


def mask_head(w: Weights, at: str, regions: list[Tensor], queries: list[Tensor], training: bool) -> list[Tensor]:
    """Logits (K, 28, 28) of every box. In training, batch norm has the statistics of these boxes if they are two at least."""
    xs = []
    for r, q in zip(regions, queries, strict=True):
        x = interaction(w, f"{at}.instance_interactive_conv", r, q)
        xs.append(x.T.reshape(1, -1, 14, 14))
    for k in range(4):
        xs = [F.conv2d(x, w[f"{at}.convs.{k}.conv.weight"], w[f"{at}.convs.{k}.conv.bias"], padding=1) for x in xs]
        norm = f"{at}.convs.{k}.bn"
        if training and len(xs) >= 2:
            values = torch.cat([x[0].flatten(1) for x in xs], 1)
            mean, var = values.mean(1), values.var(1, unbiased=False)
            scale = w[f"{norm}.weight"] / torch.sqrt(var + 1e-5)
            xs = [(x - mean[:, None, None]) * scale[:, None, None] + w[f"{norm}.bias"][:, None, None] for x in xs]
        else:
            xs = [batchnorm(w, norm, x) for x in xs]
        xs = [F.relu(x) for x in xs]
    weight, bias = w[f"{at}.upsample.weight"], w[f"{at}.upsample.bias"]
    out = []
    for x in xs:
        big = torch.zeros(weight.shape[1], 28, 28, dtype=x.dtype)
        for dy in range(2):
            for dx in range(2):
                big[:, dy::2, dx::2] = torch.einsum("chw,co->ohw", x[0], weight[:, :, dy, dx])
        big = F.relu(big + bias[:, None, None])
        out.append(F.conv2d(big[None], w[f"{at}.conv_logits.weight"], w[f"{at}.conv_logits.bias"])[0])
    return out


# -- losses


def tight(mask: Tensor) -> Box:
    rows, columns = np.nonzero(mask.numpy())
    return [float(columns.min()), float(rows.min()), columns.max() + 1.0, rows.max() + 1.0]


def area(box: Tensor | Box) -> Tensor | float:
    return (box[2] - box[0]) * (box[3] - box[1])


def giou(a: Tensor, b: Box) -> Tensor:
    zero = a.new_zeros(())
    both = [torch.maximum(a[0], a.new_tensor(b[0])), torch.maximum(a[1], a.new_tensor(b[1]))]
    both += [torch.minimum(a[2], a.new_tensor(b[2])), torch.minimum(a[3], a.new_tensor(b[3]))]
    shared = torch.maximum(both[2] - both[0], zero) * torch.maximum(both[3] - both[1], zero)
    union = area(a) + area(b) - shared
    around = (torch.maximum(a[2], a.new_tensor(b[2])) - torch.minimum(a[0], a.new_tensor(b[0]))) * (
        torch.maximum(a[3], a.new_tensor(b[3])) - torch.minimum(a[1], a.new_tensor(b[1]))
    )
    return shared / union - (around - union) / around


def distance(a: Tensor, b: Box, size: tuple[int, int]) -> Tensor:
    return sum((a[k] / size[1 - k % 2] - b[k] / size[1 - k % 2]).abs() for k in range(4))  # type: ignore[return-value]


def match(found: Stage, targets: list[Box], labels: Tensor, size: tuple[int, int]) -> dict[int, int]:
    """query -> target."""
    cost = np.zeros((len(found.boxes), len(targets)))
    for n, (box, logits) in enumerate(zip(found.boxes, found.classes, strict=True)):
        for g, target in enumerate(targets):
            q = logits.detach()[labels[g]].sigmoid()
            positive, negative = -0.25 * (1 - q) ** 2 * (q + 1e-12).log(), -0.75 * q**2 * (1 - q + 1e-12).log()
            own = box.detach()
            cost[n, g] = 2 * (positive - negative) + 5 * distance(own, target, size) - 2 * giou(own, target)
    return dict(zip(*map(list, linear_sum_assignment(cost)), strict=True))


def crop(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """(28, 28): the target of a mask in a refined box."""
    sides = [min(max(value, 0.0), float(size[1 - k % 2])) for k, value in enumerate(box.tolist())]
    if sides[2] <= sides[0] or sides[3] <= sides[1]:
        return torch.zeros(28, 28, dtype=torch.float64)
    each = (math.ceil((sides[3] - sides[1]) / 28), math.ceil((sides[2] - sides[0]) / 28))
    weights = table(sides, 28, each, (mask.shape[0], mask.shape[1]), 1)
    return torch.from_numpy((weights @ mask.double().flatten().numpy() >= 0.5).reshape(28, 28)).double()


def losses(
    w: Weights, found: list[Forward], masks: list[Tensor], labels: list[Tensor], sizes: list[tuple[int, int]], training: bool
) -> tuple[dict[str, Tensor], list[list[dict[int, int]]]]:  # fmt: skip
    """masks, labels: the real targets of every image. Returns the terms, and the matching of every stage and image."""
    terms, matches = {}, []
    boxes = [[tight(mask) for mask in own] for own in masks]
    for s in range(len(found[0].stages)):
        own = [match(f.stages[s], b, c, size) for f, b, c, size in zip(found, boxes, labels, sizes, strict=True)]
        matches.append(own)
        positives = max(sum(len(pairs) for pairs in own), 1)
        terms[f"stage{s}/class"] = terms[f"stage{s}/l1"] = terms[f"stage{s}/giou"] = torch.zeros(
            (), dtype=torch.float64
        )
        regions, queries, wanted = [], [], []
        for b, pairs in enumerate(own):
            stage = found[b].stages[s]
            for n, logits in enumerate(stage.classes):
                truth = torch.zeros_like(logits)
                if n in pairs:
                    truth[labels[b][pairs[n]]] = 1
                terms[f"stage{s}/class"] = terms[f"stage{s}/class"] + 2 * focal(logits, truth) / positives
            for n, g in pairs.items():
                box = stage.boxes[n]
                terms[f"stage{s}/l1"] = terms[f"stage{s}/l1"] + 5 * distance(box, boxes[b][g], sizes[b]) / positives
                terms[f"stage{s}/giou"] = terms[f"stage{s}/giou"] + 2 * (1 - giou(box, boxes[b][g])) / positives
                regions.append(region(found[b].maps, box, 14))
                queries.append(stage.attended[n])
                wanted.append((labels[b][g], crop(masks[b][g], box.detach(), sizes[b])))
        at = f"roi_head.mask_head.{s}"
        dice = sum(t.sum() for name, t in w.items() if name.startswith(at) and t.requires_grad) * 0
        if regions:
            for logits, (label, target) in zip(mask_head(w, at, regions, queries, training), wanted, strict=True):
                p = logits[label].sigmoid()
                overlap = 2 * (p * target).sum() / ((p**2).sum() + (target**2).sum() + 1e-5)
                dice = dice + 8 * (1 - overlap) / positives
        terms[f"stage{s}/dice"] = dice
    return terms, matches


# -- results


def predictions(
    w: Weights, found: Forward, size: tuple[int, int], original: tuple[int, int], number: int
) -> list[tuple[float, int, np.ndarray]]:
    """(score, class, probability of every pixel) of one image's best pairs of a query and a class."""
    last = found.stages[-1]
    at = f"roi_head.mask_head.{len(found.stages) - 1}"
    pairs = [(float(logits[k].sigmoid()), n, k) for n, logits in enumerate(last.classes) for k in range(len(logits))]
    results = []
    for score, n, k in sorted(pairs, key=lambda pair: -pair[0])[:number]:
        (logits,) = mask_head(w, at, [region(found.maps, last.boxes[n], 14)], [last.attended[n]], training=False)
        soft = np.zeros((30, 30))  # with a rim of 0
        soft[1:-1, 1:-1] = logits[k].sigmoid().detach().numpy()
        box = [float(side) * original[1 - i % 2] / size[1 - i % 2] for i, side in enumerate(last.boxes[n])]
        pixels = np.zeros(original)
        for y in range(original[0]):
            for x in range(original[1]):
                v = (y + 0.5 - box[1]) / (box[3] - box[1]) * 28 - 0.5
                u = (x + 0.5 - box[0]) / (box[2] - box[0]) * 28 - 0.5
                if -1 < u < 28 and -1 < v < 28:
                    i, j = math.floor(v) + 1, math.floor(u) + 1
                    a, b = v - math.floor(v), u - math.floor(u)
                    pixels[y, x] = (1 - a) * ((1 - b) * soft[i, j] + b * soft[i, j + 1]) + a * (
                        (1 - b) * soft[i + 1, j] + b * soft[i + 1, j + 1]
                    )
        results.append((score, k, pixels))
    return results

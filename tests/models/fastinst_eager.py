"""FastInst written literally from its specification: plain functions of a state dict that take every image, cell and pair by itself.

It has no bit masks, no masked-attention kernel and no shared products. It has boolean masks over all scores, dense float targets, the
sparse volume of activations, costs in the form of rewards for places inside, and scipy's matching.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from knet_eager import Weights, bilinear, layernorm, linear, resnet
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

# -- pixel decoder


def conv_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    kernel = w[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    parts = x.reshape(len(x), math.gcd(32, x.shape[1]), -1)
    mean, var = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, unbiased=False)
    x = ((parts - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)
    return x * w[f"{name}.gn.weight"][:, None, None] + w[f"{name}.gn.bias"][:, None, None]


def pyramid_pooling(w: Weights, x: Tensor) -> Tensor:
    h, w_ = x.shape[2:]
    parts = []
    for k, n in enumerate((1, 2, 3, 6)):
        means = torch.stack([
            x[:, :, i * h // n : -((i + 1) * -h // n), j * w_ // n : -((j + 1) * -w_ // n)].mean((2, 3))
            for i in range(n) for j in range(n)
        ], 2).unflatten(2, (n, n))  # fmt: skip
        at = f"pixel_decoder.pooling.pooled.{k}.conv"
        parts.append(bilinear(F.relu(F.conv2d(means, w[f"{at}.weight"], w[f"{at}.bias"])), (h, w_)))
    at = "pixel_decoder.pooling.mix.conv"
    return F.relu(F.conv2d(torch.cat([*parts, x], 1), w[f"{at}.weight"], w[f"{at}.bias"]))


def pixel_decoder(w: Weights, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def lateral(k: int, x: Tensor) -> Tensor:
        return conv_norm(w, f"pixel_decoder.lateral.{k}", x)

    def output(k: int, x: Tensor) -> Tensor:
        return F.relu(conv_norm(w, f"pixel_decoder.output.{k}", x))

    e5 = output(2, pyramid_pooling(w, lateral(2, c5)))
    own = lateral(1, c4)
    e4 = output(1, own + bilinear(e5, own.shape[2:]))
    own = lateral(0, c3)
    return output(0, own + bilinear(e4, own.shape[2:])), e4, e5


# -- queries


def chosen(logits: Tensor, number: int) -> list[int]:
    """The cells (K + 1, h, w) that become queries, by the sparse volume of the best foreground class."""
    p = logits.softmax(0)
    classes, h, w = p.shape[0] - 1, *p.shape[1:]
    volume = torch.zeros(classes, h, w, dtype=p.dtype)
    for y in range(h):
        for x in range(w):
            k = int(p[:classes, y, x].argmax())
            volume[k, y, x] = p[k, y, x]
    scores = []
    for y in range(h):
        for x in range(w):
            k = int(volume[:, y, x].argmax())
            a = volume[k, y, x]
            around = [
                volume[k, j, i]
                for j in range(y - 1, y + 2) for i in range(x - 1, x + 2)
                if (j, i) != (y, x) and 0 <= j < h and 0 <= i < w
            ]  # fmt: skip
            peak = bool(a >= 1e-6) and all(bool(a >= other) for other in around)
            scores.append(float(a) + peak)
    return sorted(range(h * w), key=lambda i: -scores[i])[:number]


# -- decoder


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, blocked: Tensor | None) -> Tensor:
    """q (N, C), k and v (S, C), blocked bool (N, S)."""
    width = q.shape[1] // heads
    parts = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if blocked is not None:
            scores = scores.masked_fill(blocked, -math.inf)
        parts.append(scores.softmax(1) @ v[:, part])
    return torch.cat(parts, 1)


def cross(
    w: Weights, name: str, query: Tensor, key: Tensor, value: Tensor, heads: int, blocked: Tensor | None
) -> Tensor:
    projected = [
        x @ weight.T + bias
        for x, weight, bias in zip(
            (query, key, value), w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3), strict=True
        )
    ]
    return linear(w, f"{name}.out_proj", attention(*projected, heads, blocked))


def feedforward(w: Weights, name: str, x: Tensor) -> Tensor:
    return layernorm(w, f"{name}.layer_norm", x + linear(w, f"{name}.fc2", F.relu(linear(w, f"{name}.fc1", x))))


def layer(
    w: Weights, number: int, q: Tensor, pq: Tensor, x: Tensor, px: Tensor, blocked: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    at = f"decoder.layers.{number}"
    guarded = blocked & ~blocked.all(1, keepdim=True)
    x = layernorm(w, f"{at}.pixel_attn_layer_norm", x + cross(w, f"{at}.pixel_attn", x + px, q + pq, q, heads, None))
    x = feedforward(w, f"{at}.pixel_feedforward", x)
    q = layernorm(w, f"{at}.query_attn_layer_norm", q + cross(w, f"{at}.query_attn", q + pq, x + px, x, heads, guarded))
    own = [linear(w, f"{at}.self_attn.{part}_proj", y) for part, y in (("q", q + pq), ("k", q + pq), ("v", q))]
    read = linear(w, f"{at}.self_attn.out_proj", attention(*own, heads, None))
    q = layernorm(w, f"{at}.self_attn_layer_norm", q + read)
    return feedforward(w, f"{at}.query_feedforward", q), x


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.2.0", F.relu(linear(w, f"{name}.1.0", F.relu(linear(w, f"{name}.0.0", x)))))


def head(w: Weights, number: int, q: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class logits (Q, K + 1) and mask logits (Q, h, w)."""
    at = f"decoder.heads.{number}"
    hidden = layernorm(w, f"{at}.layer_norm", q)
    features = linear(w, f"{at}.mask_features", x)
    masks = mlp(w, f"{at}.mask_predictor", hidden) @ features.T
    return mlp(w, f"{at}.class_predictor", hidden), masks.reshape(-1, *size)


class Forward(NamedTuple):
    """Of one image."""

    proposals: Tensor  # (K + 1, h, w)
    cells: list[int]
    locations: list[tuple[float, float]]
    classes: list[Tensor]
    masks: list[Tensor]
    states: list[tuple[Tensor, Tensor]]  # queries and pixels, at the start and after every layer
    positions: tuple[Tensor, Tensor]  # of queries and pixels


def forward(w: Weights, image: Tensor, queries: int, heads: int) -> Forward:
    e3, e4, _ = pixel_decoder(w, *resnet(w, image[None])[1:])
    at = "proposal_predictor"
    hidden = F.relu(F.conv2d(e4, w[f"{at}.0.weight"], w[f"{at}.0.bias"], padding=1))
    proposals = F.conv2d(hidden, w[f"{at}.2.weight"], w[f"{at}.2.bias"])[0]
    cells = chosen(proposals.detach(), queries)
    (h4, w4), size = e4.shape[2:], (e3.shape[2], e3.shape[3])
    locations = [((i % w4) / (w4 - 1), (i // w4) / (h4 - 1)) for i in cells]
    at_pixels = bilinear(w["positions"], size)[0].flatten(1).T
    at_cells = bilinear(w["positions"], (h4, w4))[0].flatten(1).T
    q = torch.cat([e4[0].flatten(1).T[cells], w["auxiliary_content.weight"]])
    pq = torch.cat([at_cells[cells], w["auxiliary_positions.weight"]])
    x = e3[0].flatten(1).T
    states, predicted, number = [(q, x)], [head(w, 0, q[:queries], x, size)], 0
    while f"decoder.layers.{number}.self_attn.q_proj.weight" in w:
        blocked = torch.zeros(len(q), len(x), dtype=torch.bool)
        blocked[:queries] = predicted[-1][1].flatten(1) < 0
        q, x = layer(w, number, q, pq, x, at_pixels, blocked, heads)
        number += 1
        states.append((q, x))
        predicted.append(head(w, number, q[:queries], x, size))
    return Forward(
        proposals, cells, locations, [c for c, _ in predicted], [m for _, m in predicted], states, (pq, at_pixels)
    )


# -- matching and losses


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(N, h, w) at (T, 2) -> (N, T), zero outside."""
    grid = (2 * points - 1)[None, None].expand(len(maps), -1, -1, -1)
    return F.grid_sample(
        maps[:, None], grid.to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
    )[:, 0, 0]


def matched(cost: Tensor) -> dict[int, int]:
    """{row: target}"""
    rows, columns = linear_sum_assignment(cost.detach().numpy())
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def proposal_match(out: Forward, masks: Tensor, labels: Tensor) -> dict[int, int]:
    p = out.proposals.detach().softmax(0).flatten(1)
    inside = F.adaptive_avg_pool2d(masks[None], out.proposals.shape[1:])[0].flatten(1) > 0
    cost = torch.stack([2 * -p[c] + 1000 * -inside[g].double() for g, c in enumerate(labels)], 1)
    return matched(cost)


def query_match(
    classes: Tensor, logits: Tensor, locations: list[tuple[float, float]], masks: Tensor, labels: Tensor, points: Tensor
) -> dict[int, int]:
    x, t = sample(logits.detach(), points), sample(masks, points)
    there = sample(masks, torch.tensor(locations, dtype=torch.float64))
    p = classes.detach().softmax(1)
    cost = torch.zeros(len(x), len(t), dtype=torch.float64)
    for q in range(len(x)):
        for g in range(len(t)):
            s = x[q].sigmoid()
            dice = 1 - (2 * (s * t[g]).sum() + 1) / (s.sum() + t[g].sum() + 1)
            bce = F.binary_cross_entropy_with_logits(x[q], t[g])
            location = -1 if there[g, q] > 0 else 0
            cost[q, g] = 2 * -p[q, labels[g]] + 5 * bce + 5 * dice + 1000 * location
    return matched(cost)


def mask_losses(
    logits: Tensor, masks: Tensor, pairs: dict[int, int], candidates: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Sums of bce and dice over the pairs in the order of the targets; candidates (pairs, 3P + P/4, 2)."""
    bce, dice = 0 * logits.sum(), 0 * logits.sum()
    for (q, g), drawn in zip(sorted(pairs.items(), key=lambda pair: pair[1]), candidates, strict=True):
        first, rest = drawn[: 3 * number], drawn[3 * number :]
        least = sample(logits[q : q + 1], first)[0].abs().argsort(stable=True)[: int(0.75 * number)]
        points = torch.cat([first[least], rest])
        assert len(points) == number
        x, t = sample(logits[q : q + 1], points)[0], sample(masks[g : g + 1], points)[0]
        bce = bce + F.binary_cross_entropy_with_logits(x, t)
        dice = dice + 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
    return bce, dice


def class_loss(classes: list[Tensor], labels: list[Tensor], pairs: list[dict[int, int]]) -> Tensor:
    """Over the queries of all images, divided by the sum of the weights."""
    total, weights = classes[0].new_zeros(()), 0.0
    for logits, own, found in zip(classes, labels, pairs, strict=True):
        for q in range(len(logits)):
            c = int(own[found[q]]) if q in found else logits.shape[1] - 1
            weight = 1.0 if q in found else 0.1
            total = total - weight * logits[q].log_softmax(0)[c]
            weights += weight
    return total / weights


def losses(
    w: Weights, outs: list[Forward], masks: list[Tensor], labels: list[Tensor], guide: Tensor, cost: list[Tensor],
    candidates: list[list[list[Tensor]]], number: int, heads: int,
) -> tuple[dict[str, Tensor], list[list[dict[int, int]]]]:  # fmt: skip
    """The weighted terms, and {query: target} of every head and image, the guiding ones last.

    masks: (G, H, W) float64 of every image, padded like the image. guide and cost[head] (B, T, 2), candidates[head or guided][image]
    (pairs, n, 2)."""
    batch, terms = range(len(outs)), {}
    targets = max(sum(len(own) for own in labels) / 1, 1)

    total, cells = outs[0].proposals.new_zeros(()), 0
    for b in batch:
        found = proposal_match(outs[b], masks[b], labels[b]) if len(labels[b]) else {}
        flat = outs[b].proposals.flatten(1)
        for s in range(flat.shape[1]):
            total = total - flat[:, s].log_softmax(0)[int(labels[b][found[s]]) if s in found else -1]
            cells += 1
    terms["proposal"] = 20 * total / cells

    def match(b: int, k: int, points: Tensor) -> dict[int, int]:
        if not len(labels[b]):
            return {}
        out = outs[b]
        return query_match(out.classes[k], out.masks[k], out.locations, masks[b], labels[b], points)

    def add(name: str, classes: list[Tensor], logits: list[Tensor], pairs: list[dict[int, int]], drawn: list) -> None:
        terms[f"{name}/class"] = 2 * class_loss(classes, labels, pairs)
        sums = [mask_losses(logits[b], masks[b], pairs[b], drawn[b], number) for b in batch]
        terms[f"{name}/mask"] = 5 * sum(bce for bce, _ in sums) / targets
        terms[f"{name}/dice"] = 5 * sum(dice for _, dice in sums) / targets

    stages, matches = len(outs[0].classes), []
    for k in range(stages):
        pairs = [match(b, k, cost[k][b]) for b in batch]
        matches.append(pairs)
        add(f"head{k}", [o.classes[k] for o in outs], [o.masks[k] for o in outs], pairs, candidates[k])

    fixed = [match(b, stages - 1, guide[b]) for b in batch]
    for k in range(1, stages):
        classes, logits = [], []
        for b in batch:
            (q, x), (pq, px) = outs[b].states[k], outs[b].positions
            size = (outs[b].masks[0].shape[1], outs[b].masks[0].shape[2])
            blocked = torch.zeros(len(q), len(x), dtype=torch.bool)
            for n, g in fixed[b].items():
                blocked[n] = F.interpolate(masks[b][None, g : g + 1], size, mode="nearest").flatten() == 0
            q, x = layer(w, k - 1, q, pq, x, px, blocked, heads)
            found = head(w, k, q[: len(outs[b].cells)], x, size)
            classes.append(found[0])
            logits.append(found[1])
        add(f"guided{k}", classes, logits, fixed, candidates[stages + k - 1])
    return terms, [*matches, fixed]

"""K-Net written literally from its specification: plain functions of a state dict that take every image and every pair by
itself.

It has no folding, no bit masks and no shared products. It has sigmoid > 0.5, einsum, dense soft targets, and scipy's matching
of costs that are summed directly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


# -- network


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def double(x: Tensor) -> Tensor:
    return bilinear(x, (2 * x.shape[2], 2 * x.shape[3]))


def batchnorm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean, var = (w[f"{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
    return (x - mean) / torch.sqrt(var + 1e-5) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def resnet(w: Weights, x: Tensor) -> list[Tensor]:
    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = w[f"backbone.{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def bn(name: str, x: Tensor) -> Tensor:
        return batchnorm(w, f"backbone.{name}", x)

    x = F.max_pool2d(F.relu(bn("bn1", conv("conv1", x, 2))), 3, 2, 1)
    maps = []
    for layer in range(1, 5):
        block = 0
        while f"backbone.layer{layer}.{block}.conv1.weight" in w:
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            three = f"backbone.{name}.conv3.weight" in w
            y = F.relu(bn(f"{name}.bn1", conv(f"{name}.conv1", x, 1 if three else stride)))
            y = bn(f"{name}.bn2", conv(f"{name}.conv2", y, stride if three else 1))
            if three:
                y = bn(f"{name}.bn3", conv(f"{name}.conv3", F.relu(y)))
            if f"backbone.{name}.downsample.0.weight" in w:
                x = bn(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
            x = F.relu(x + y)
            block += 1
        maps.append(x)
    return maps


def fpn(w: Weights, maps: list[Tensor]) -> list[Tensor]:
    sums = [
        F.conv2d(x, w[f"neck.lateral_convs.{i}.conv.weight"], w[f"neck.lateral_convs.{i}.conv.bias"])
        for i, x in enumerate(maps)
    ]
    for i in (2, 1, 0):
        sums[i] = sums[i] + sums[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return [
        F.conv2d(x, w[f"neck.fpn_convs.{i}.conv.weight"], w[f"neck.fpn_convs.{i}.conv.bias"], padding=1)
        for i, x in enumerate(sums)
    ]


def cgr(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = w[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    groups = math.gcd(32, x.shape[1])
    parts = x.reshape(x.shape[0], groups, -1)
    mean, var = parts.mean(2, keepdim=True), parts.var(2, keepdim=True, unbiased=False)
    x = ((parts - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)
    return F.relu(x * w[f"{name}.gn.weight"][:, None, None] + w[f"{name}.gn.bias"][:, None, None])


def positions(channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    frequencies = channels // 2
    out = torch.zeros(channels, height, width, dtype=dtype)
    for k in range(frequencies):
        period = 10000 ** (2 * (k // 2) / frequencies)
        turn = math.sin if k % 2 == 0 else math.cos
        for i in range(height):
            out[k, i, :] = turn((i + 1) / (height + 1e-6) * 2 * math.pi / period)
        for j in range(width):
            out[frequencies + k, :, j] = turn((j + 1) / (width + 1e-6) * 2 * math.pi / period)
    return out


def semantic_fpn(w: Weights, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    at = "rpn_head.localization_fpn"
    p2, p3, p4, p5 = maps
    p5 = p5 + positions(p5.shape[1], p5.shape[2], p5.shape[3], p5.dtype)
    a = cgr(w, f"{at}.convs_all_levels.0.conv0", p2, 2)
    b = cgr(w, f"{at}.convs_all_levels.1.conv0", p3)
    c = cgr(w, f"{at}.convs_all_levels.2.conv1", double(cgr(w, f"{at}.convs_all_levels.2.conv0", p4)))
    d = double(cgr(w, f"{at}.convs_all_levels.3.conv0", p5))
    d = cgr(w, f"{at}.convs_all_levels.3.conv2", double(cgr(w, f"{at}.convs_all_levels.3.conv1", d)))
    total = a + b + c + d
    return cgr(w, f"{at}.conv_pred", total), cgr(w, f"{at}.aux_convs.0", total)


def layernorm(w: Weights, name: str, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    batch, n, width = x.shape
    qkv = x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]
    q, k, v = (part.reshape(batch, n, heads, width // heads).transpose(1, 2) for part in qkv.split(width, -1))
    mixed = (q @ k.mT / math.sqrt(width // heads)).softmax(-1) @ v
    return linear(w, f"{name}.out_proj", mixed.transpose(1, 2).reshape(batch, n, width))


def update(w: Weights, at: str, x: Tensor, kernels: Tensor, masks: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    width = kernels.shape[-1]
    x = F.conv2d(x, w[f"{at}.feat_transform.conv.weight"], w[f"{at}.feat_transform.conv.bias"])
    pooled = torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).to(x.dtype), x)
    updator = f"{at}.kernel_update_conv"
    p, q = linear(w, f"{updator}.dynamic_layer", pooled), linear(w, f"{updator}.input_layer", kernels)
    gate = q[..., :width] * p[..., :width]
    alpha = layernorm(w, f"{updator}.input_norm_in", linear(w, f"{updator}.input_gate", gate)).sigmoid()
    beta = layernorm(w, f"{updator}.norm_in", linear(w, f"{updator}.update_gate", gate)).sigmoid()
    mixed = beta * layernorm(w, f"{updator}.norm_out", p[..., width:])
    mixed = mixed + alpha * layernorm(w, f"{updator}.input_norm_out", q[..., width:])
    k = F.relu(layernorm(w, f"{updator}.fc_norm", linear(w, f"{updator}.fc_layer", mixed)))
    k = layernorm(w, f"{at}.attention_norm", k + attention(w, f"{at}.attention.attn", k, heads))
    hidden = F.relu(linear(w, f"{at}.ffn.layers.0.0", k))
    k = layernorm(w, f"{at}.ffn_norm", k + linear(w, f"{at}.ffn.layers.1", hidden))
    classes = linear(w, f"{at}.fc_cls", F.relu(layernorm(w, f"{at}.cls_fcs.1", linear(w, f"{at}.cls_fcs.0", k))))
    mask_kernels = linear(
        w, f"{at}.fc_mask", F.relu(layernorm(w, f"{at}.mask_fcs.1", linear(w, f"{at}.mask_fcs.0", k)))
    )
    return classes, torch.einsum("bnc,bchw->bnhw", mask_kernels, x), k


class Forward(NamedTuple):
    masks: list[Tensor]
    classes: list[Tensor]
    kernels: list[Tensor]
    seg: Tensor


def forward(w: Weights, images: Tensor, heads: int) -> Forward:
    a, s = semantic_fpn(w, fpn(w, resnet(w, images)))
    loc, sem = cgr(w, "rpn_head.loc_convs.0", a), cgr(w, "rpn_head.seg_convs.0", s)
    x = loc + sem
    masks = [F.conv2d(loc, w["rpn_head.init_kernels.weight"])]
    seg = F.conv2d(sem, w["rpn_head.conv_seg.weight"], w["rpn_head.conv_seg.bias"])
    pooled = torch.einsum("bnhw,bchw->bnc", (masks[0].sigmoid() > 0.5).to(x.dtype), x)
    k = w["rpn_head.init_kernels.weight"].flatten(1)[None] + pooled
    classes, kernels = [], []
    stage = 0
    while f"roi_head.mask_head.{stage}.fc_cls.weight" in w:
        c, m, k = update(w, f"roi_head.mask_head.{stage}", x, k, masks[-1], heads)
        classes.append(c)
        masks.append(m)
        kernels.append(k)
        stage += 1
    return Forward(masks, classes, kernels, seg)


# -- targets, matching, losses


def soft_targets(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, H, W) bool -> (G, H/4, W/4)."""
    return bilinear(masks[None].to(dtype), (masks.shape[1] // 4, masks.shape[2] // 4))[0]


def cost(masks: Tensor, targets: Tensor, classes: Tensor | None, labels: Tensor) -> Tensor:
    """(N, h, w) logits at stride 4 and (G, h, w) -> (N, G), pair by pair in float64."""
    p, t = masks.double().sigmoid(), targets.double()
    out = torch.zeros(len(p), len(t), dtype=torch.float64)
    for n in range(len(p)):
        for g in range(len(t)):
            both, neither = (p[n] * t[g]).sum(), ((1 - p[n]) * (1 - t[g])).sum()
            out[n, g] = -(both + neither) / p[n].numel()
            out[n, g] += 4 * -2 * both / (((p[n] ** 2).sum() + 1e-3) + ((t[g] ** 2).sum() + 1e-3))
            if classes is not None:
                q = classes[n, labels[g]].double().sigmoid()
                positive = -0.25 * (1 - q) ** 2 * torch.log(q + 1e-12)
                negative = -0.75 * q**2 * torch.log(1 - q + 1e-12)
                out[n, g] += 2 * (positive - negative)
    return out


def match(masks: Tensor, targets: Tensor, classes: Tensor | None, labels: Tensor) -> dict[int, int]:
    """kernel -> target"""
    rows, columns = linear_sum_assignment(cost(double(masks[None])[0], targets, classes, labels).numpy())
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def focal(z: Tensor, y: Tensor) -> Tensor:
    q = z.sigmoid()
    truth = torch.where(y == 1, q, 1 - q)
    alpha = torch.where(y == 1, 0.25, 0.75)
    return (alpha * (1 - truth) ** 2 * F.binary_cross_entropy_with_logits(z, y, reduction="none")).sum()


def mask_terms(masks: Tensor, soft: list[Tensor], matches: list[dict[int, int]]) -> tuple[Tensor, Tensor]:
    """The means of bce and dice over the positives of the batch."""
    up = double(masks)
    z = [up[b, n] for b, pairs in enumerate(matches) for n in pairs]
    t = [soft[b][g] for b, pairs in enumerate(matches) for g in pairs.values()]
    if not z:
        return 0 * masks.sum(), 0 * masks.sum()
    logits, targets = torch.stack(z), torch.stack(t)
    p = logits.sigmoid()
    sums = [(part).flatten(1).sum(1) for part in (p * targets, p**2, targets**2)]
    dice = 1 - 2 * sums[0] / ((sums[1] + 1e-3) + (sums[2] + 1e-3))
    return F.binary_cross_entropy_with_logits(logits, targets), dice.mean()


def losses(
    out: Forward, masks: list[Tensor], labels: list[Tensor]
) -> tuple[dict[str, Tensor], list[list[dict[int, int]]]]:
    """masks: (G, H, W) bool for every image. Returns the weighted terms, and {kernel: target} for each stage and image."""
    dtype, batch, classes = out.seg.dtype, len(masks), out.seg.shape[1]
    soft = [soft_targets(m, dtype) if len(m) else m.new_zeros((0, 1, 1)) for m in masks]
    matches = []
    for stage in range(len(out.classes)):
        c = out.classes[stage - 1].detach() if stage else None
        m = out.masks[stage].detach()
        found = [
            match(m[b], soft[b], None if c is None else c[b], labels[b]) if len(soft[b]) else {} for b in range(batch)
        ]
        matches.append(found)
    positives = max(sum(len(pairs) for pairs in matches[0]), 1)

    terms = {}
    bce, dice = mask_terms(out.masks[0], soft, matches[0])
    up = double(out.seg)
    dense = torch.zeros_like(up)
    for b, pairs in enumerate(matches[0]):
        for n in sorted(pairs):
            inside = soft[b][pairs[n]] > 0
            dense[b][:, inside] = 0
            dense[b][labels[b][pairs[n]], inside] = 1
    foreground = max(int(dense.sum()), 1)
    terms |= {"head/bce": bce, "head/dice": 4 * dice, "head/seg": focal(up, dense) / foreground}
    for stage in range(len(out.classes)):
        onehot = torch.zeros_like(out.classes[stage])
        for b, pairs in enumerate(matches[stage]):
            for n, g in pairs.items():
                onehot[b, n, labels[b][g]] = 1
        bce, dice = mask_terms(out.masks[stage + 1], soft, matches[stage])
        terms[f"stage{stage}/class"] = 2 * focal(out.classes[stage], onehot) / positives
        terms |= {f"stage{stage}/bce": bce, f"stage{stage}/dice": 4 * dice}
    assert classes == up.shape[1]
    return terms, matches


# -- inference


def predictions(
    out: Forward,
    sizes: list[tuple[int, int]],
    originals: list[tuple[int, int]],
    threshold: float = 0.5,
    most: int = 100,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(masks bool (k, H, W), scores, labels) of every image. Masks are resampled twice."""
    results = []
    for b, (size, original) in enumerate(zip(sizes, originals, strict=True)):
        q = out.classes[-1][b].sigmoid()
        ranked = sorted(((-float(s), i) for i, s in enumerate(q.flatten())))[:most]
        index = torch.tensor([i for _, i in ranked])
        p = double(out.masks[-1][b : b + 1]).sigmoid()
        p = bilinear(p, (4 * p.shape[2], 4 * p.shape[3]))[..., : size[0], : size[1]]
        p = bilinear(p, original)[0]
        results.append((p[index // q.shape[1]] > threshold, q.flatten()[index], index % q.shape[1]))
    return results

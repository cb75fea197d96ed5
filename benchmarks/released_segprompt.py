"""A training step of SegPrompt on Mask2Former in eager PyTorch, written as in the released code: a rival in `benchmarks.programs`.

It runs on the parameters of a `sprompt.methods.segprompt.SegPrompt`. The choice of targets and categories on the host and the content of
the extra queries are the same in both, so it calls those of the library. It differs from this library in these points:

- mask logits of all queries at stride 4 exist after every layer, with gradient;
- attention masks are resized logits, as floats for each head; attention is that of nn.MultiheadAttention, which keeps the weights of all
  heads and returns their mean; self-attention of all queries has one dense mask;
- labels are dense: those of extraction queries are floats, resized in every layer, and all are copied as floats for every cost and loss;
- the cost samples the map of every query, and the terms of points and queries are dense temporaries; one category after the other gets
  the cost 1000 for targets of other categories; each image is matched by scipy on the host;
- prompts are averaged and kept in a loop over categories.

Two rules differ. Masks of extraction queries are resized bilinearly, in the library to cells with any of their pixels: both agree for masks
of whole blocks of 32x32 pixels. A target of a category without a free query teaches a query of another category, in the library none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from sprompt.data.sample import Batch
from sprompt.methods.segprompt import SegPrompt
from sprompt.methods.segprompt.choice import Choice
from sprompt.methods.segprompt.prompts import PromptCache
from sprompt.methods.segprompt.task import chosen
from sprompt.models.mask2former import Mask2FormerConfig
from sprompt.models.protocol import IF_MATCHED, OBJECT
from sprompt.nn.masked_decoder import CrossAttention, SelfAttention
from sprompt.nn.positions import sine_positions

#: Matched queries of an image, by increasing target, and their targets.
Pairs = tuple[Tensor, Tensor]


class Head(NamedTuple):
    """The predictions of some queries after a layer."""

    classes: Tensor  # (B, Q, 2)
    logits: Tensor  # (B, Q, h, w)

    def of(self, queries: slice) -> Head:
        return Head(self.classes[:, queries], self.logits[:, queries])


class Uniform:
    """The random points (…, 2) in [0, 1], on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def of_costs(self, images: int, number: int) -> Tensor:
        """(images, number, 2)."""
        return torch.rand(images, number, 2, device=self.device)

    def of_losses(self, pairs: list[list[int]], number: int) -> Iterator[Tensor]:
        """(pairs of all images, number, 2) for each head; pairs[head][image]."""
        return (torch.rand(sum(own), number, 2, device=self.device) for own in pairs)


def losses(
    task: SegPrompt, maps: list[Tensor], batch: Batch, masks: list[Tensor], step: int, points: Uniform
) -> dict[str, Tensor]:
    """maps: `Features.maps`. masks: bool (G, H, W) of each image. It updates the prompts too."""
    choices, model = task._choices(batch, step), task.model
    config, instances = model.config, task.config.instances
    extracted = chosen(batch, [c.extracted for c in choices], instances)
    prompt, extract = task._groups(choices, extracted.masks, step)
    content, position = (x.expand(len(choices), -1, -1) for x in task.network.learned_queries())
    own, prompts = content.shape[1], prompt.content.shape[1]
    sees = torch.zeros(own, own + prompts + instances, dtype=torch.bool, device=content.device)
    sees[:, :own] = True
    read = torch.zeros(len(choices), instances, *batch.masks.size, device=content.device)
    for b, choice in enumerate(choices):
        read[b, : len(choice.extracted)] = masks[b][choice.extracted].float()
    heads, last = decoded(
        model, torch.cat([content, prompt.content, extract.content], 1),
        torch.cat([position, prompt.position, torch.zeros_like(extract.content)], 1),
        torch.cat([sees, prompt.sees, extract.sees]), maps, read,
    )  # fmt: skip
    targets = [m[c.own] for m, c in zip(masks, choices, strict=True)]
    mine = [head.of(slice(0, own)) for head in heads]
    pairs = [matched(head, targets, config, points) for head in mine]
    truths = [objects(head, own) for head, own in zip(mine, pairs, strict=True)]
    found = set_losses(mine, truths, pairs, targets, config, points)
    terms = {f"head{head}/{name}": loss for head, own in enumerate(found) for name, loss in own.items()}

    targets = [m[c.prompted] for m, c in zip(masks, choices, strict=True)]
    labels = [of[c.prompted] for of, c in zip(batch.labels, choices, strict=True)]
    foreign = [other_categories(c, of, task.config.copies) for c, of in zip(choices, labels, strict=True)]
    mine = [head.of(slice(own, own + prompts)) for head in heads]
    pairs = [matched(head, targets, config, points, foreign) for head in mine]
    taught = [taught_slots(head, of, choices, labels, task.config.copies) for head, of in zip(mine, pairs, strict=True)]
    found = set_losses(mine, [t for t, _ in taught], [p for _, p in taught], targets, config, points)
    terms |= {f"prompt/{name}": sum(each[name] for each in found) for name in found[0]}

    targets = [m[c.extracted] for m, c in zip(masks, choices, strict=True)]
    mine = [head.of(slice(own + prompts, None)) for head in heads]
    pairs = [[(p, p) for p in (torch.arange(len(t), device=content.device) for t in targets)]] * len(heads)
    truths = [objects(head, of) for head, of in zip(mine, pairs, strict=True)]
    found = set_losses(mine, truths, pairs, targets, config, points)
    terms |= {f"extract/{name}": sum(each[name] for each in found) for name in found[0]}
    keep_prompts(task.cache, last[:, own + prompts :].detach(), extracted.labels, extracted.counts)
    return terms


# -- the decoder


def decoded(
    model: Any, content: Tensor, positions: Tensor, sees: Tensor, maps: list[Tensor], read: Tensor
) -> tuple[list[Head], Tensor]:
    """The predictions of all queries after every layer, and the queries behind the last one. Vectors are (Q, B, C), as in the release.

    `read`, float (B, M, H, W): the masks of the last M queries, in every layer.
    """
    features, *levels = maps
    module = model.transformer_module
    values = [
        (m.flatten(2) + e[:, None]).permute(2, 0, 1)
        for m, e in zip(levels[::-1], module.level_embed.weight, strict=True)
    ]
    places = [sine_positions(m.shape[1], m.shape[2], m.shape[3], m).flatten(1).T[:, None] for m in levels[::-1]]

    def predicted(x: Tensor) -> Head:
        hidden = module.decoder.layernorm(x).transpose(0, 1)
        embeddings = module.decoder.mask_predictor(hidden)
        return Head(model.class_predictor(hidden), torch.einsum("bqc,bchw->bqhw", embeddings, features))

    x, positions = content.transpose(0, 1), positions.transpose(0, 1)
    heads = [predicted(x)]
    for number, layer in enumerate(module.decoder.layers):
        level = number % len(levels)
        blocked = attention_mask(heads[-1].logits.detach(), read, levels[-1 - level].shape[2:], layer.cross_attn.heads)
        key = values[level] + places[level]
        x = layer.cross_attn_layer_norm(
            x + cross_attention(layer.cross_attn, x + positions, key, values[level], blocked)
        )
        x = layer.self_attn_layer_norm(x + self_attention(layer.self_attn, x + positions, x, ~sees))
        x = layer.final_layer_norm(x + layer.fc2(F.relu(layer.fc1(x))))
        heads.append(predicted(x))
    return heads, x.transpose(0, 1)


def attention_mask(logits: Tensor, read: Tensor, size: Any, heads: int) -> Tensor:
    """bool (B · heads, Q, h · w): the cells that a query does not read."""
    soft = F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()
    soft[:, -read.shape[1] :] = (F.interpolate(read, size, mode="bilinear", align_corners=False) > 0).float()
    blocked = soft.flatten(2)[:, None].repeat(1, heads, 1, 1).flatten(0, 1) < 0.5
    blocked[torch.where(blocked.sum(-1) == blocked.shape[-1])] = False
    return blocked


def cross_attention(own: CrossAttention, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
    return F.multi_head_attention_forward(
        query, key, value, query.shape[2], own.heads, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0,
        own.out_proj.weight, own.out_proj.bias, attn_mask=blocked,
    )[0]  # fmt: skip


def self_attention(own: SelfAttention, placed: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
    parts = own.q_proj, own.k_proj, own.v_proj
    return F.multi_head_attention_forward(
        placed, placed, value, value.shape[2], own.heads, None, torch.cat([p.bias for p in parts]), None, None, False, 0.0,
        own.out_proj.weight, own.out_proj.bias, attn_mask=blocked, use_separate_proj_weight=True,
        q_proj_weight=own.q_proj.weight, k_proj_weight=own.k_proj.weight, v_proj_weight=own.v_proj.weight,
    )[0]  # fmt: skip


# -- matching


@torch.no_grad()
def matched(
    head: Head,
    targets: list[Tensor],
    config: Mask2FormerConfig,
    drawn: Uniform,
    foreign: list[list[Pairs]] | None = None,
) -> list[Pairs]:
    """`foreign`: of each image, queries and the targets that they must not take."""
    found = []
    points = drawn.of_costs(len(targets), config.points)
    for b, masks in enumerate(targets):
        z = sampled(head.logits[b][:, None], points[b : b + 1].repeat(head.logits.shape[1], 1, 1))
        t = sampled(masks[:, None].to(z), points[b : b + 1].repeat(len(masks), 1, 1))
        positive = F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none")
        negative = F.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="none")
        bce = (torch.einsum("qt,gt->qg", positive, t) + torch.einsum("qt,gt->qg", negative, 1 - t)) / z.shape[1]
        p = z.sigmoid()
        dice = 1 - (2 * torch.einsum("qt,gt->qg", p, t) + 1) / (p.sum(1)[:, None] + t.sum(1) + 1)
        probability = head.classes[b].softmax(1)[:, :1].expand(-1, len(masks))
        cost = config.cost_mask * bce + config.cost_dice * dice - config.cost_class * probability
        for queries, others in [] if foreign is None else foreign[b]:
            cost[queries[:, None], others] = 1000
        queries, order = (torch.from_numpy(part) for part in linear_sum_assignment(cost.cpu().numpy()))
        by_target = order.argsort()
        found.append((queries[by_target].to(z.device), order[by_target].to(z.device)))
    return found


def sampled(maps: Tensor, points: Tensor) -> Tensor:
    """(N, 1, h, w), (N, T, 2) -> (N, T)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def other_categories(choice: Choice, labels: Tensor, copies: int) -> list[Pairs]:
    """For each category of an image: its queries, and the targets of other categories."""
    slots = torch.arange(len(choice.categories) * copies, device=labels.device).split(copies)
    return [(own, (labels != k).nonzero()[:, 0]) for own, k in zip(slots, choice.categories, strict=True)]


def objects(head: Head, pairs: list[Pairs]) -> Tensor:
    """(B, Q): class 0, an object, for matched queries, otherwise 1."""
    truth = torch.ones(head.classes.shape[:2], dtype=torch.int64, device=head.classes.device)
    for row, (queries, _) in zip(truth, pairs, strict=True):
        row[queries] = 0
    return truth


def taught_slots(
    head: Head, pairs: list[Pairs], choices: list[Choice], labels: list[Tensor], copies: int
) -> tuple[Tensor, list[Pairs]]:
    """The classes of prompt queries, and the pairs whose masks are compared."""
    truth, taught = objects(head, pairs), []
    for b, choice in enumerate(choices):
        for place, kind in enumerate(choice.truth):
            if kind != IF_MATCHED:
                truth[b, place * copies : (place + 1) * copies] = 0 if kind == OBJECT else 1
        queries, order = pairs[b]
        known = torch.tensor([int(k) in choice.supervised for k in labels[b][order]], dtype=torch.bool)
        taught.append((queries[known], order[known]))
    return truth, taught


# -- losses


def set_losses(
    heads: list[Head], truths: list[Tensor], pairs: list[list[Pairs]], targets: list[Tensor], config: Mask2FormerConfig, drawn: Uniform
) -> list[dict[str, Tensor]]:  # fmt: skip
    number, found = max(sum(map(len, targets)), 1), []
    candidates, kept = 3 * config.points, int(0.75 * config.points)
    further = config.points - kept
    numbers = [[len(queries) for queries, _ in own] for own in pairs]
    weight = torch.tensor([1.0, config.no_object], device=truths[0].device)
    for head, truth, own, points in zip(
        heads, truths, pairs, drawn.of_losses(numbers, candidates + further), strict=True
    ):
        image = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(own)])
        queries, order = (torch.cat(parts) for parts in zip(*own, strict=True))
        stacked = torch.stack([F.pad(t, (0, 0, 0, 0, 0, max(map(len, targets)) - len(t))) for t in targets])
        logits, masks = head.logits[image, queries][:, None], stacked.to(head.logits)[image, order][:, None]
        with torch.no_grad():
            uncertain, added = points.split([candidates, further], 1)
            least = sampled(logits, uncertain).abs().neg().topk(kept, 1).indices
            points = torch.cat([uncertain.gather(1, least[..., None].expand(-1, -1, 2)), added], 1)
            t = sampled(masks, points)
        z = sampled(logits, points)
        bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1).sum()
        p = z.sigmoid()
        dice = (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()
        surprise = F.cross_entropy(head.classes.transpose(1, 2), truth, weight)
        found.append(
            {
                "class": config.loss_class * surprise,
                "mask": config.loss_mask * bce / number,
                "dice": config.loss_dice * dice / number,
            }
        )
    return found


@torch.no_grad()
def keep_prompts(cache: PromptCache, vectors: Tensor, labels: Tensor, counts: Tensor) -> None:
    real = torch.arange(labels.shape[1], device=labels.device) < counts[:, None]
    vectors, labels = vectors[real], labels[real]
    for category in labels.unique().tolist():
        mean = vectors[labels == category].mean(0)
        old = cache.prompts[category]
        cache.prompts[category] = cache.momentum * old + (1 - cache.momentum) * mean if cache.seen[category] else mean
        cache.seen[category] = True

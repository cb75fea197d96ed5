"""FastInst's inference in eager PyTorch, written as in the released code: a rival in `benchmarks.programs`.

It runs on the parameters of a `sprompt.models.fastinst.FastInst`. Backbone, pixel decoder and the classifier of cells are plain
convolutions in both, so it calls those modules. It differs from this library in these points:

- queries are found in a sparse volume of all classes by max pooling;
- the grid of positions is resized for every picture;
- attention is nn.MultiheadAttention, which keeps the weights of all heads and returns their mean; masks are bools, one for each
  score, repeated for the heads;
- masks are thresholded logits of every query and pixel;
- the masks of all queries are resized to the padded input, and again to the picture, and each pair of a query and a class gets
  a copy of its mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.masks import Size
from sprompt.models.fastinst import FastInst
from sprompt.nn.dual_path import DualPathLayer, Head
from sprompt.nn.masked_decoder import CrossAttention, SelfAttention


class Released(nn.Module):
    """images (1, 3, H, W) -> class logits (Q, K + 1) and mask logits (Q, h, w) of the last head."""

    def __init__(self, model: FastInst) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(_Layer(layer) for layer in model.decoder.layers)  # type: ignore[arg-type]  # of DualPathLayers

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model, number = self.model, self.model.config.queries
        fine, middle, _ = model.pixel_decoder(model.backbone(images)[1:])
        index = chosen(model.proposal_predictor(middle), number)[:, None].expand(-1, middle.shape[1], -1)
        content, placed = (
            x.flatten(2).gather(2, index).permute(2, 0, 1) for x in (middle, resized(model.positions, middle.shape[2:]))
        )
        queries = torch.cat([content, model.auxiliary_content.weight[:, None]])
        query_positions = torch.cat([placed, model.auxiliary_positions.weight[:, None]])
        pixels, positions = (x.flatten(2).permute(2, 0, 1) for x in (fine, resized(model.positions, fine.shape[2:])))
        hidden, logits = predicted(model.decoder.heads[0], queries[:number], pixels, fine)  # type: ignore[arg-type]  # a Head
        for layer, head in zip(self.layers, list(model.decoder.heads)[1:], strict=True):
            blocked = F.pad(logits.flatten(2) < 0, (0, 0, 0, len(queries) - number))
            blocked = blocked[:, None].repeat(1, model.config.heads, 1, 1).flatten(0, 1)
            blocked[torch.where(blocked.sum(-1) == blocked.shape[-1])] = False
            queries, pixels = layer(queries, query_positions, pixels, positions, blocked)
            hidden, logits = predicted(head, queries[:number], pixels, fine)  # type: ignore[arg-type]  # a Head
        return model.decoder.classes(-1, hidden)[:, 0], logits[0]


class _Layer(nn.Module):
    """A DualPathLayer with nn.MultiheadAttention. Vectors are (N, B, C), as the release has them."""

    def __init__(self, own: DualPathLayer) -> None:
        super().__init__()
        self.own = own
        self.pixel_attn, self.query_attn, self.self_attn = map(
            multihead, (own.pixel_attn, own.query_attn, own.self_attn)
        )

    def forward(
        self, queries: Tensor, query_positions: Tensor, pixels: Tensor, positions: Tensor, blocked: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = self.own
        read = self.pixel_attn(pixels + positions, queries + query_positions, queries)[0]
        pixels = own.pixel_feedforward(own.pixel_attn_layer_norm(pixels + read))
        read = self.query_attn(queries + query_positions, pixels + positions, pixels, attn_mask=blocked)[0]
        queries = own.query_attn_layer_norm(queries + read)
        placed = queries + query_positions
        queries = own.self_attn_layer_norm(queries + self.self_attn(placed, placed, queries)[0])
        return own.query_feedforward(queries), pixels


def multihead(own: CrossAttention | SelfAttention) -> nn.MultiheadAttention:
    if isinstance(own, CrossAttention):
        weight, bias = own.in_proj_weight, own.in_proj_bias
    else:
        parts = own.q_proj, own.k_proj, own.v_proj
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    module = nn.MultiheadAttention(weight.shape[1], own.heads)
    tensors = {"in_proj_weight": weight, "in_proj_bias": bias}
    module.load_state_dict(tensors | {f"out_proj.{name}": p for name, p in own.out_proj.named_parameters()})
    return module.to(weight)


def chosen(proposals: Tensor, number: int) -> Tensor:
    """The cells that become queries, (B, number), of class logits (B, K + 1, h, w)."""
    best, label = proposals.softmax(1)[:, :-1].max(1, keepdim=True)
    volume = torch.zeros_like(proposals[:, :-1]).scatter_(1, label, best)
    peaks = (F.max_pool2d(volume, 3, stride=1, padding=1) == volume) & (volume >= 1e-6)
    return (best[:, 0] + peaks.any(1)).flatten(1).topk(number).indices


def resized(maps: Tensor, size: Any) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def predicted(head: Head, queries: Tensor, pixels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Layer-normed queries (Q, B, C) and mask logits (B, Q, h, w)."""
    hidden = head.layer_norm(queries)
    features = head.mask_features(pixels).permute(1, 2, 0).unflatten(2, like.shape[2:])
    return hidden, torch.einsum("qbc,bchw->bqhw", head.mask_predictor(hidden), features)


def results(
    classes: Tensor, logits: Tensor, padded: Size, view: Size, picture: Size
) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """RLEs, scores and classes of the best 100 pairs of one image."""
    from pycocotools import mask as coco

    logits = resized(resized(logits[None], padded)[..., : view[0], : view[1]], picture)[0]
    kinds = classes.shape[1] - 1
    scores, order = classes.softmax(1)[:, :-1].flatten().topk(min(100, len(classes) * kinds))
    logits = logits[order // kinds]
    masks = (logits > 0).float()
    scores = scores * (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    bytes_ = masks.to(torch.uint8).cpu().numpy()
    rles = [coco.encode(np.array(mask[:, :, None], order="F"))[0] for mask in bytes_]
    return rles, scores, order % kinds

"""A transformer decoder with masked attention: each layer reads a map only under the mask that it predicted last. Tensors have
transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.masks import BitMasks
from sprompt.nn.positions import sine_positions
from sprompt.ops import mask_attention, mask_bits


class Decoded(NamedTuple):
    """The predictions of a decoder: of the start queries, then of every layer."""

    hidden: list[Tensor]  # (B, Q, C), layer-normed
    embeddings: list[Tensor]  # (B, Q, C): their products with the mask features are mask logits
    last: Tensor  # (B, Q, C), the queries behind the last layer, without the layer norm of `hidden`


class SelfAttention(nn.Module):
    """Attention of queries to each other; positions are added to queries and keys, not to values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, positions: Tensor, sees: Tensor | None = None) -> Tensor:
        """x (B, Q, C); sees: bool (Q, Q), which queries each query attends to."""
        placed = x + positions
        query, key, value = (
            split_heads(p, self.heads) for p in (self.q_proj(placed), self.k_proj(placed), self.v_proj(x))
        )
        return self.out_proj(join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=sees)))


class CrossAttention(nn.Module):
    """Attention of one set of vectors to another, under masks or without them, in the parameters of nn.MultiheadAttention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, masks: BitMasks | None) -> Tensor:
        """x (B, Q, C), keys and values (B, S, C), masks (B, Q) of S pixels. A query with an empty mask attends everywhere, and so do all
        without masks."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            split_heads(F.linear(given, w, b), self.heads)
            for given, w, b in zip((x, keys, values), weights, biases, strict=True)
        )
        read = (
            F.scaled_dot_product_attention(query, key, value)
            if masks is None
            else mask_attention(query, key, value, masks)
        )
        return self.out_proj(join_heads(read))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and a feed-forward network, each with a residual and a layer norm behind it."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(channels, heads)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.cross_attn = CrossAttention(channels, heads)
        self.cross_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feedforward)
        self.fc2 = nn.Linear(feedforward, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, masks: BitMasks, sees: Tensor | None
    ) -> Tensor:
        x = self.cross_attn_layer_norm(x + self.cross_attn(x + positions, keys, values, masks))
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions, sees))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class Block(nn.Sequential):
    """A linear layer, and a ReLU unless it is the last."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.Identity() if last else nn.ReLU())


class MLP(nn.Sequential):
    """Three linear layers with ReLUs between them."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(*(Block(channels, outputs if k == 2 else channels, last=k == 2) for k in range(3)))


class MaskPredictor(nn.Module):
    """Queries -> mask embeddings, by three linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask_embedder = MLP(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mask_embedder(x)


class MaskedDecoder(nn.Module):
    """The layers of the decoder, one after the other; layer i reads the map i mod 3."""

    def __init__(self, channels: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, feedforward) for _ in range(layers))
        self.layernorm = nn.LayerNorm(channels)
        self.mask_predictor = MaskPredictor(channels)

    def forward(
        self, content: Tensor, positions: Tensor, maps: Sequence[Tensor], level_embed: Tensor, mask_features: Tensor, *,
        sees: Tensor | None = None, given: Mapping[int, BitMasks] | None = None,
    ) -> Decoded:  # fmt: skip
        """content and positions (B, Q, C), maps (B, C, h, w) in the order in which layers read them, level_embed (maps, C), mask
        features (B, C, H, W).

        `sees`, bool (Q, Q): the queries that each query attends to; None: all. `given`, {first query: masks (B, M) of any size}: these
        M queries read the pixels of their mask in every layer, instead of those of their last prediction. A cell of a map belongs to
        such a mask if one of its pixels does.

        The mask of a query at a level is the sign of its logits resized to the level. Resizing and the product are both linear, so the
        mask features are resized once for each level, and the logits of all queries at full resolution never exist.
        """
        with torch.no_grad():
            resized = [_resized(mask_features, m.shape[2:]) for m in maps]
        values = [m.flatten(2).mT + e for m, e in zip(maps, level_embed, strict=True)]
        keys = [
            v + sine_positions(m.shape[1], m.shape[2], m.shape[3], v).flatten(1).T
            for v, m in zip(values, maps, strict=True)
        ]
        fixed = [
            {first: masks.resize((m.shape[2], m.shape[3]), "any") for first, masks in (given or {}).items()}
            for m in maps
        ]
        x = content
        hidden = [self.layernorm(x)]
        embeddings = [self.mask_predictor(hidden[0])]
        for number, layer in enumerate(self.layers):
            level = number % len(maps)
            masks = _with_given(mask_bits(resized[level], embeddings[-1].detach()), fixed[level])
            x = layer(x, positions, keys[level], values[level], masks, sees)
            hidden.append(self.layernorm(x))
            embeddings.append(self.mask_predictor(hidden[-1]))
        return Decoded(hidden, embeddings, x)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w)."""
    # One channel each: before it resizes several to a small size, torch copies them to channels last on a CPU.
    single = maps.flatten(0, 1)[:, None]
    return F.interpolate(single, size, mode="bilinear", align_corners=False).reshape(*maps.shape[:2], *size)


def _with_given(masks: BitMasks, given: Mapping[int, BitMasks]) -> BitMasks:
    """Masks (B, Q), some of them replaced: see `MaskedDecoder.forward`."""
    if not given:
        return masks
    words = masks.words.clone()
    for first, others in given.items():
        words[:, first : first + others.shape[1]] = others.words
    return BitMasks(words, masks.size)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)

"""A transformer decoder of two paths: in each layer the pixels read the queries, then the queries read the pixels under their masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.masks import BitMasks, Size
from sprompt.nn.masked_decoder import MLP, Block, CrossAttention, SelfAttention
from sprompt.ops import mask_bits


class Predicted(NamedTuple):
    """The predictions of a head."""

    hidden: Tensor  # (B, Q, C), layer-normed: `DualPathDecoder.classes` makes class logits of them
    embeddings: Tensor  # (B, Q, C): their products with the features are mask logits
    features: Tensor  # (B, C, h, w)


class Decoded(NamedTuple):
    """The state of the decoder: at its start, then after every layer."""

    queries: list[Tensor]  # (B, N, C); the first Q of the N queries make predictions
    pixels: list[Tensor]  # (B, S, C), the S cells of the map
    query_positions: Tensor  # (B, N, C)
    pixel_positions: Tensor  # (S, C)
    predicted: list[Predicted]


class FeedForward(nn.Module):
    """A feed-forward network with a residual and a layer norm behind it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DualPathLayer(nn.Module):
    """Attention and feed-forward network of the pixels, then masked attention, self-attention and feed-forward network of the queries.
    Each has a residual and a layer norm behind it."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.pixel_attn = CrossAttention(channels, heads)
        self.pixel_attn_layer_norm = nn.LayerNorm(channels)
        self.pixel_feedforward = FeedForward(channels, feedforward)
        self.query_attn = CrossAttention(channels, heads)
        self.query_attn_layer_norm = nn.LayerNorm(channels)
        self.self_attn = SelfAttention(channels, heads)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.query_feedforward = FeedForward(channels, feedforward)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, queries: Tensor, query_positions: Tensor, pixels: Tensor, pixel_positions: Tensor, masks: BitMasks
    ) -> tuple[Tensor, Tensor]:
        """queries (B, N, C), pixels (B, S, C), masks (B, N) of S cells -> both, updated. Pixels read all queries. A query with an empty
        mask reads all pixels."""
        placed = queries + query_positions
        read = self.pixel_attn(pixels + pixel_positions, placed, queries, None)
        pixels = self.pixel_feedforward(self.pixel_attn_layer_norm(pixels + read))
        read = self.query_attn(placed, pixels + pixel_positions, pixels, masks)
        queries = self.query_attn_layer_norm(queries + read)
        queries = self.self_attn_layer_norm(queries + self.self_attn(queries, query_positions))
        return self.query_feedforward(queries), pixels


class Head(nn.Module):
    """Predictions from queries and pixels: classes, and masks as products of embeddings with features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)
        self.class_predictor = MLP(channels, classes)
        self.mask_predictor = MLP(channels, channels)
        self.mask_features = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, pixels: Tensor, size: Size) -> Predicted:
        """queries (B, Q, C), pixels (B, S, C) of a map of this size."""
        hidden = self.layer_norm(queries)
        # The product has the channels in front, as `mask_bits` and `mask_conv` read them.
        weight = self.mask_features.weight.expand(len(pixels), -1, -1)
        features = torch.baddbmm(self.mask_features.bias[:, None], weight, pixels.mT)
        return Predicted(hidden, self.mask_predictor(hidden), features.unflatten(2, size))

    def reset_classifier(self, classes: int) -> None:
        """Makes a fresh last layer for this number of class logits."""
        like = self.mask_features.weight
        self.class_predictor[2] = Block(like.shape[0], classes, last=True).to(like)


class DualPathDecoder(nn.Module):
    """The layers one after the other. A head of its own predicts from the start, and one from the result of every layer; the masks that it
    predicts are those of the next layer."""

    def __init__(self, channels: int, heads: int, feedforward: int, layers: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DualPathLayer(channels, heads, feedforward) for _ in range(layers))
        self.heads = nn.ModuleList(Head(channels, classes) for _ in range(layers + 1))

    def forward(
        self, queries: Tensor, query_positions: Tensor, pixels: Tensor, pixel_positions: Tensor, size: Size, predicting: int
    ) -> Decoded:  # fmt: skip
        """queries and their positions (B, N, C), pixels (B, S, C) of a map of this size, their positions (S, C). The first `predicting`
        queries make predictions; the others read everywhere, and are read."""
        decoded = Decoded([queries], [pixels], query_positions, pixel_positions, [])
        decoded.predicted.append(self.heads[0](queries[:, :predicting], pixels, size))
        for layer, head in zip(self.layers, self.heads[1:], strict=True):  # type: ignore[arg-type]  # a slice of a ModuleList is one
            _, embeddings, features = decoded.predicted[-1]
            seen = mask_bits(features.detach(), embeddings.detach())
            masks = BitMasks.cat([seen, everywhere(seen, queries.shape[1] - predicting)], 1)
            queries, pixels = layer(queries, query_positions, pixels, pixel_positions, masks)
            decoded.queries.append(queries)
            decoded.pixels.append(pixels)
            decoded.predicted.append(head(queries[:, :predicting], pixels, size))
        return decoded

    def classes(self, number: int, hidden: Tensor) -> Tensor:
        """Class logits (B, Q, classes) of head `number`, from its `Predicted.hidden`. The start has number 0."""
        return self.heads[number].class_predictor(hidden)  # type: ignore[operator, union-attr]  # a Head

    def reset_classifier(self, classes: int) -> None:
        for head in self.heads:
            head.reset_classifier(classes)  # type: ignore[operator]  # a Head

    def again(self, decoded: Decoded, masks: BitMasks) -> list[Predicted]:
        """The result of every layer sent through this layer once more, under masks (B, N) that are the same for all layers."""
        predicting, size = decoded.predicted[0].hidden.shape[1], masks.size
        found = []
        for layer, head, queries, pixels in zip(
            self.layers, self.heads[1:], decoded.queries[1:], decoded.pixels[1:], strict=True  # type: ignore[arg-type]  # a slice of a ModuleList
        ):  # fmt: skip
            queries, pixels = layer(queries, decoded.query_positions, pixels, decoded.pixel_positions, masks)
            found.append(head(queries[:, :predicting], pixels, size))
        return found


def everywhere(like: BitMasks, number: int) -> BitMasks:
    """Masks (B, number) of queries that attend everywhere, which empty masks mean. `like` (B, ...) gives size and device."""
    return BitMasks(like.words.new_zeros(len(like), number, like.words.shape[-1]), like.size)

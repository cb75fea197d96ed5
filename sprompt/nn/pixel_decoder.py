"""A pixel decoder with multi-scale deformable attention: backbone maps become maps of one width. Tensors have transformers' names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.positions import sine_positions
from sprompt.ops import deform_attn

LEVELS = 3  # strides 32, 16 and 8


class DeformableAttention(nn.Module):
    """Self-attention of the cells of several maps. A cell attends to a few points of each map, at offsets that it predicts."""

    def __init__(self, channels: int, heads: int, levels: int = LEVELS, points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._reset()

    def _reset(self) -> None:
        """At the start each head looks in its own direction, point t at a distance of t + 1 cells, all with equal weight."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """x (B, S, C): the cells of all maps, one map after the other. positions (S, C) are added to the queries. centres (S, 2): x, y of
        each cell in [0, 1]²."""
        batch, cells, channels = x.shape
        query = x + positions
        values = self.value_proj(x).view(batch, cells, self.heads, channels // self.heads)
        form = (batch, cells, self.heads, self.levels, self.points)
        weights = self.attention_weights(query).view(*form[:3], -1).softmax(-1).view(form)
        sizes = centres.new_tensor([[width, height] for height, width in shapes])
        offsets = self.sampling_offsets(query).view(*form, 2) / sizes[:, None]
        points = centres[:, None, None, None] + offsets
        return self.output_proj(deform_attn(values, shapes, points, weights))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual and a layer norm behind it."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(channels, heads)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feedforward)
        self.fc2 = nn.Linear(feedforward, channels)
        self.final_layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions, centres, shapes))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class _Encoder(nn.Module):
    def __init__(self, channels: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(channels, heads, feedforward) for _ in range(layers))


class PixelDecoder(nn.Module):
    """C2 to C5 -> [mask features of stride 4, and maps of strides 8, 16, 32], all of one width.

    The maps of strides 32, 16 and 8 attend to each other by deformable attention. The mask features add the finest of them, resized,
    to C2.
    """

    def __init__(self, inputs: Sequence[int], channels: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        groups = math.gcd(32, channels)  # 32 groups at every usual width
        self.level_embed = nn.Parameter(torch.randn(LEVELS, channels))
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(groups, channels)) for width in inputs[:0:-1]
        )
        self.encoder = _Encoder(channels, heads, feedforward, layers)
        self.mask_projection = nn.Conv2d(channels, channels, 1)
        self.adapter_1 = nn.Sequential(nn.Conv2d(inputs[0], channels, 1, bias=False), nn.GroupNorm(groups, channels))
        self.layer_1 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(groups, channels), nn.ReLU()
        )
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)  # type: ignore[index]  # a Sequential
            nn.init.zeros_(projection[0].bias)  # type: ignore[index]  # a Sequential

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        finest, *others = maps
        projected = [project(x) for project, x in zip(self.input_projections, others[::-1], strict=True)]
        shapes = [(x.shape[2], x.shape[3]) for x in projected]
        x = torch.cat([level.flatten(2).mT for level in projected], 1)
        positions = torch.cat(
            [sine_positions(x.shape[2], *s, x).flatten(1).T + e for s, e in zip(shapes, self.level_embed, strict=True)]
        )
        centres = torch.cat([cell_centres(shape, x.device, x.dtype) for shape in shapes])
        for layer in self.encoder.layers:
            x = layer(x, positions, centres, shapes)
        levels = x.split([h * w for h, w in shapes], 1)
        decoded = [level.mT.unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]
        lateral = self.adapter_1(finest)
        resized = F.interpolate(decoded[-1], lateral.shape[2:], mode="bilinear", align_corners=False)
        return [self.mask_projection(self.layer_1(lateral + resized)), *decoded[::-1]]


def cell_centres(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H·W, 2): x, y of the centre of every cell of a map, in [0, 1]²."""
    y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in size)
    return torch.stack([x.expand(size), y[:, None].expand(size)], 2).flatten(0, 1)

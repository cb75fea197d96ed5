"""Swin Transformer (version 1) without the classifier: an image to its maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.stages import Staged

_APART = (
    -100.0
)  # added to the score of two cells that only the shift brought together; the released networks have this value
_STD = 0.02  # of new weights
#: Bounds of the sizes, so that a file cannot ask for a network that no machine holds.
_WHOLE = {"width": (1, 512), "depths": (1, 64), "heads": (1, 256), "window": (1, 64)}


@dataclass(frozen=True)
class SwinConfig:
    """The defaults are Swin-T. Swin-S has depths 2 2 18 2. Swin-B has the same, width 128 and heads 4 8 16 32; Swin-L width 192 and heads
    6 12 24 48."""

    width: int = 96
    """Channels of the first stage; every later stage has twice as many as the one before."""
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    """Blocks of each stage. Every second block shifts its windows."""
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    """Heads of each stage's attention; they divide its channels."""
    window: int = 7
    """Side of the windows, in cells. Released networks have 7 or 12."""
    drop_path: float = 0.3
    """Probability that training leaves out a branch of the last block for an image; it grows from 0 at the first block."""

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            four = name in ("depths", "heads")
            if not (_four_whole(value, low, high) if four else _whole(value, low, high)):
                rule = f"be {'a tuple of four whole numbers' if four else 'a whole number'} from {low} to {high}"
                raise ValueError(f"SwinConfig: {name} must {rule}, got {value!r}")
        for stage, heads in enumerate(self.heads):
            if self.channels[stage] % heads:
                raise ValueError(
                    f"SwinConfig: heads must divide the channels of the stages, {self.channels}, got {self.heads}"
                )
        rate = self.drop_path
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"SwinConfig: drop_path must be a number from 0 to below 1, got {rate!r}")

    @property
    def channels(self) -> list[int]:
        """Widths of the stages."""
        return [self.width * scale for scale in (1, 2, 4, 8)]


class WindowAttention(nn.Module):
    """Self-attention of the cells of each window, with a learned bias for every offset between two cells."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=_STD)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """x (B, W, N, C): W windows of N cells. apart (W, N, N) is added to the scores; None adds nothing."""
        batch, windows, cells, channels = x.shape
        qkv = self.qkv(x).view(batch, windows, cells, 3, self.heads, channels // self.heads).permute(3, 0, 1, 4, 2, 5)
        bias = self._bias()
        if apart is None:
            query, key, value = qkv.flatten(1, 2)
        else:  # windows count as heads, so that the images of a batch share the sum of bias and `apart`
            query, key, value = qkv.flatten(2, 3)
            bias = (bias + apart[:, None]).flatten(0, 1)
        # in four dimensions: torch's fused kernel for CPUs takes no bias of three
        mixed = F.scaled_dot_product_attention(query, key, value, bias[None].to(query.dtype))
        mixed = mixed.view(batch, windows, self.heads, cells, -1)
        return self.proj(mixed.transpose(2, 3).flatten(3))

    def _bias(self) -> Tensor:
        """(heads, N, N): the bias of each pair of cells. The row of a pair in the table is (dy + w - 1) (2w - 1) + dx + w - 1 for a query
        that lies dy below and dx to the right of the key."""
        side, window = 2 * self.window - 1, self.window
        table = self.relative_position_bias_table.view(side, side, self.heads)
        # In the flipped table the keys of a query are a square. Axes: y, x of the query, heads, y, x of the key.
        pairs = table.flip(0, 1).unfold(0, window, 1).unfold(1, window, 1).flip(0, 1)
        return pairs.permute(2, 0, 1, 3, 4).reshape(self.heads, window * window, window * window)


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention in windows and a feed-forward network, each behind a layer norm and beside a residual."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop: float) -> None:
        super().__init__()
        self.window, self.shift, self.drop = window, shift, drop
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """x (B, H, W, C). apart: `shifted_apart` of this map."""
        x = x + self._kept(self._attended(self.norm1(x), apart))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _attended(self, x: Tensor, apart: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        down, right = padded(height, self.window), padded(width, self.window)
        x = F.pad(x, (0, 0, 0, right - width, 0, down - height))  # cells of padding are zero, and are attended to
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = self.attn(in_windows(x, self.window), apart if self.shift else None)
        x = x.view(-1, down // self.window, right // self.window, self.window, self.window, x.shape[-1])
        x = x.transpose(2, 3).reshape(-1, down, right, x.shape[-1])
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def _kept(self, x: Tensor) -> Tensor:
        """A branch with stochastic depth: training leaves it out for an image with probability `drop`, and scales it otherwise."""
        if not self.training or self.drop == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1, 1), self.drop)


class PatchMerging(nn.Module):
    """Four neighbouring cells become one cell of twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class PatchEmbedding(nn.Module):
    """An image (B, 3, H, W) to its cells (B, H / 4, W / 4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks at one stride; `downsample` leads to the next stage."""

    def __init__(self, channels: int, heads: int, window: int, drops: Sequence[float], last: bool) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.blocks = nn.ModuleList(
            Block(channels, heads, window, self.shift * (number % 2), drop) for number, drop in enumerate(drops)
        )
        self.downsample = None if last else PatchMerging(channels)

    def forward(self, x: Tensor) -> Tensor:
        apart = shifted_apart(x, self.window, self.shift)
        for block in self.blocks:
            x = block(x, apart)
        return x


class Swin(Staged):
    """Images (B, 3, H, W), normalised, H and W multiples of 32 -> [C2, C3, C4, C5], each after its layer norm.

    Tensors have the names of the official release, and `norm0` to `norm3` those of its detectors. Maps are padded to multiples of the
    window on the right and below. `frozen_stages`: see `Staged`; the stem is the patch embedding, and a stage has its norm and its
    downsampling.
    """

    def __init__(self, config: SwinConfig | None = None, *, frozen_stages: int = 1) -> None:
        super().__init__()
        self.config = config = SwinConfig() if config is None else config
        self.channels = config.channels
        self.patch_embed = PatchEmbedding(config.width)
        blocks = sum(config.depths)
        drops = [config.drop_path * number / max(blocks - 1, 1) for number in range(blocks)]
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            own, drops = drops[:depth], drops[depth:]
            self.layers.append(Stage(self.channels[stage], heads, config.window, own, last=stage == 3))
            setattr(self, f"norm{stage}", nn.LayerNorm(self.channels[stage]))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.freeze(frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(
                f"Swin: images must have sides that are multiples of 32, got {tuple(images.shape)}; pad them on the right and below"
            )
        x = self.patch_embed(images)
        maps = []
        for stage, norm in zip(cast("list[Stage]", list(self.layers)), self.norms(), strict=True):
            x = stage(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def norms(self) -> list[nn.LayerNorm]:
        """The norms of the four maps."""
        return [cast(nn.LayerNorm, getattr(self, f"norm{stage}")) for stage in range(4)]

    def parts(self) -> list[list[nn.Module]]:
        return [[self.patch_embed], *map(list, zip(self.layers, self.norms(), strict=True))]


def padded(size: int, window: int) -> int:
    """The smallest multiple of `window` that holds `size` cells."""
    return -(-size // window) * window


def in_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, cells, C), row by row. H and W are multiples of `window`."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels).transpose(2, 3)
    return x.reshape(batch, -1, window * window, channels)


def shifted_apart(x: Tensor, window: int, shift: int) -> Tensor:
    """(windows, N, N) for a map x (B, H, W, C) that is padded and then rolled up and left by `shift`: 0 for cells that were neighbours
    before, and `_APART` for cells of which one came around the edge of the map."""
    sizes = [padded(n, window) for n in x.shape[1:3]]
    down, right = (torch.arange(n, device=x.device) >= n - shift for n in sizes)  # what came around the edge
    part = (2 * down[:, None].int() + right.int())[None, :, :, None]
    cells = in_windows(part, window)[0, :, :, 0]
    return x.new_zeros(()).masked_fill(cells[:, :, None] != cells[:, None], _APART)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _four_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and all(_whole(one, low, high) for one in value)

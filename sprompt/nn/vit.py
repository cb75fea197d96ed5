"""Vision Transformer without the classifier: an image to one map of the stride of its patches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.nn.swin import Mlp

_STD = 0.02  # of new weights
#: Bounds of the sizes, so that a file cannot ask for a network that no machine holds.
_WHOLE = {"patch": (1, 64), "width": (1, 4096), "depth": (1, 128), "heads": (1, 128), "grid": (1, 256)}


@dataclass(frozen=True)
class VitConfig:
    """The defaults are ViT-B/16. ViT-S has width 384 and 6 heads; ViT-L width 1024, depth 24 and 16 heads."""

    patch: int = 16
    """Side of the patches in pixels, which is the stride of the map."""
    width: int = 768
    """Channels of the tokens and of the map."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Heads of the attention; they divide the width."""
    grid: int = 14
    """Side, in patches, of the square that has learned positions. They are resized to images of other sizes."""
    conv_stem: bool = False
    """Four convolutions of stride 2 in place of the patches; for patches of 16."""
    layer_scale: bool = False
    """A learned factor for each channel of every branch, as in DINOv2."""
    eps: float = 1e-6
    """Of the layer norms. Some files of transformers have 1e-12."""

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"VitConfig: {name} must be a whole number from {low} to {high}, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"VitConfig: heads must divide the width {self.width}, got {self.heads}")
        if self.conv_stem and (self.patch != 16 or self.width % 8):
            raise ValueError(
                "VitConfig: conv_stem must be False unless the patch is 16 and the width a multiple of 8, "
                f"got True with a patch of {self.patch} and a width of {self.width}"
            )
        if not isinstance(self.eps, float) or not 0 < self.eps <= 1e-3:
            raise ValueError(f"VitConfig: eps must be a number above 0 and at most 0.001, got {self.eps!r}")


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class LayerScale(nn.Module):
    """A factor for each channel. It starts at 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a layer norm and beside a residual."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=config.eps) for _ in range(2))
        self.attn = Attention(config.width, config.heads)
        self.mlp = Mlp(config.width, 4 * config.width)
        self.ls1, self.ls2 = (LayerScale(config.width) if config.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """An image (B, 3, H, W) to a vector of each patch, (B, D, H / patch, W / patch)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class ConvStem(nn.Module):
    """The same by four 3×3 convolutions of stride 2, each with a norm over the whole image and a GELU, and by one 1×1 convolution."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        widths = [3, *(config.width // part for part in (8, 4, 2, 1))]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width, eps=1e-6) for width in widths[1:])
        self.proj = nn.Conv2d(config.width, config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        return self.proj(x)


class Vit(nn.Module):
    """Images (B, 3, H, W), normalised, H and W multiples of the patch -> [map (B, D, H / patch, W / patch)] after the last layer norm.

    Tensors have timm's names. The class token takes part in every attention and is not in the map. Positions are resized as in
    `resized_positions` to images of another size than the learned square.
    """

    def __init__(self, config: VitConfig | None = None) -> None:
        super().__init__()
        self.config = config = VitConfig() if config is None else config
        self.strides, self.channels = (config.patch,), [config.width]
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.width))
        self.patch_embed = ConvStem(config) if config.conv_stem else PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        nn.init.trunc_normal_(self.cls_token, std=_STD)
        nn.init.trunc_normal_(self.pos_embed, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        patch = self.config.patch
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(
                f"Vit: images must have sides that are multiples of {patch}, got {tuple(images.shape)}; pad them on the right and below"
            )
        x = self.patch_embed(images)
        height, width = x.shape[-2:]
        positions = resized_positions(self.pos_embed, height, width)
        first = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = torch.cat((first, x.flatten(2).mT + positions[:, 1:]), 1)
        for block in self.blocks:
            x = block(x)
        return [self.norm(x[:, 1:]).mT.unflatten(2, (height, width))]


def resized_positions(table: Tensor, height: int, width: int) -> Tensor:
    """(1, 1 + g², D) -> (1, 1 + height · width, D): the square of positions by bicubic interpolation (a = -0.75) between the centres of
    cells, without antialiasing, as in the networks that files come from. The first position, of the class token, stays as it is."""
    side = round((table.shape[1] - 1) ** 0.5)
    if (height, width) == (side, side):
        return table
    square = table[:, 1:].mT.unflatten(2, (side, side))
    exact = square.to(torch.promote_types(square.dtype, torch.float32))
    resized = F.interpolate(exact, (height, width), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat((table[:, :1], resized.flatten(2).mT), 1)

"""The network of Mask Auto-Labeler: one object in the middle of a crop -> the logits of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad, relu

from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import ResNet
from sprompt.nn.stages import Staged
from sprompt.nn.vit import Vit

STRIDE = 16  # of the encoder's map
MASK_STRIDE = 4  # of the logits
#: Size classes of objects, by the area of their box in the picture: below 32² pixels, below 96², and the others. The bounds are those of
#: COCO's evaluation.
AREAS = (32**2, 96**2)
SIZE_CLASSES = ("small", "medium", "large")
#: The pixel head of a size class sees the encoder's map resized by this factor.
FACTORS = (0.5, 1.0, 2.0)


def size_class(area: float) -> int:
    """The size class of a box of this area in pixels: the number of bounds in `AREAS` that it reaches.

    >>> [size_class(area) for area in (1, 1023.5, 1024, 9215, 9216)]
    [0, 0, 1, 1, 2]
    """
    return sum(area >= bound for bound in AREAS)


class PixelHead(nn.Module):
    """A map (B, D, h, w) and a factor f -> a vector for every pixel of 2f times the resolution, (B, C, 2fh, 2fw), none of them negative."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for channels in (inputs, width, width))
        self.after = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor, factor: float) -> Tensor:
        first: Any  # a convolution, which a ModuleList does not say
        first, *rest = self.before
        features = relu(conv_of_resized(features, factor, first.weight, first.bias))
        for conv in rest:
            features = relu(conv(features))
        return relu(self.after(interpolate(features, scale_factor=2.0, mode="bilinear")))


def conv_of_resized(x: Tensor, factor: float, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d(interpolate(x, scale_factor=factor, mode="bilinear"), weight, bias, padding=1) with a weight (C, D, 3, 3).

    A resize treats all channels alike. So to enlarge a map, this mixes the channels of the small map, for each of the nine taps, and then
    resizes and shifts the nine results, along rows and along columns. With a factor of 2 the mixing is a quarter of the convolution's work.
    """
    if factor <= 1:
        return conv2d(
            interpolate(x, scale_factor=factor, mode="bilinear") if factor < 1 else x, weight, bias, padding=1
        )
    height, width = x.shape[2:]
    rows = _shifted_resizes(height, factor, x).transpose(0, 1).flatten(1)  # (h', 3h)
    found = bias[:, None, None]
    for taps, columns in zip(weight.unbind(3), _shifted_resizes(width, factor, x), strict=True):
        mixed = taps.mT.flatten(0, 1) @ x.flatten(2)  # (B, 3C, hw): the three rows of taps of an output lie together
        found = found + rows @ mixed.view(len(x), len(weight), 3 * height, width) @ columns.T
    return found


def _shifted_resizes(cells: int, factor: float, like: Tensor) -> Tensor:
    """(3, n, cells): the matrix of a bilinear resize of an axis to n cells, one cell further down, in place, and one up; 0 outside."""
    resize = interpolate(
        torch.eye(cells, dtype=like.dtype, device=like.device)[None], scale_factor=factor, mode="linear"
    )[0].T
    return pad(resize, (0, 0, 1, 1)).unfold(0, len(resize), 1).mT


class MaskLabeler(nn.Module):
    """Crops (B, 3, S, S), normalised -> mask logits (B, S/4, S/4) float32. S is a multiple of 32.

    The logit of a pixel is the product of the object's vector, from the mean over the encoder's map, and the pixel's vector. Small
    objects get pixel vectors of a coarse map, large objects those of a fine one; the logits of all are resized to S/4.

    Args:
        backbone: the encoder: a Vit with patches of 16, or a ResNet or an EfficientNet, whose stages behind the map of stride 16 neither
            run nor train.
        width: length C of the vectors.
    """

    def __init__(self, backbone: ResNet | EfficientNet | Vit, width: int = 256) -> None:
        super().__init__()
        if STRIDE not in backbone.strides:
            raise ValueError(f"MaskLabeler: backbone must have a map of stride {STRIDE}, got {backbone.strides}")
        self.backbone = backbone
        self._levels = backbone.strides.index(STRIDE) + 1
        if isinstance(backbone, Staged):
            for module in chain(*backbone.parts()[self._levels + 1 :]):
                module.requires_grad_(False)
        channels = backbone.channels[self._levels - 1]
        self.instance_head = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))
        self.pixel_head = PixelHead(channels, width)

    def forward(self, crops: Tensor, classes: Sequence[int]) -> Tensor:
        """`classes` are the size classes of the B objects. The pixel head runs once for each class among them."""
        size = crops.shape[-1]
        if crops.dim() != 4 or crops.shape[2] != size or size % 32 or len(classes) != len(crops):
            raise ValueError(
                "MaskLabeler: crops must have shape (B, 3, S, S), S a multiple of 32, and a size class each, got "
                f"{tuple(crops.shape)} and {len(classes)} classes"
            )
        features = self._encoded(crops)
        objects = self.instance_head(features.mean((2, 3)))  # (B, C)
        order: list[int] = []
        logits: list[Tensor] = []
        for kind in sorted(set(classes)):
            places = [place for place, own in enumerate(classes) if own == kind]
            order += places
            whole = len(places) == len(classes)
            logits.append(
                self._masks(features if whole else features[places], objects if whole else objects[places], kind, size)
            )
        if len(logits) < 2:
            return logits[0] if logits else crops.new_zeros(0, size // MASK_STRIDE, size // MASK_STRIDE).float()
        place_of = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(logits)[place_of]

    def _encoded(self, crops: Tensor) -> Tensor:
        """The encoder's map (B, D, S/16, S/16)."""
        if isinstance(self.backbone, Staged):
            return self.backbone(crops, self._levels)[-1]
        return self.backbone(crops)[-1]

    def _masks(self, features: Tensor, objects: Tensor, kind: int, size: int) -> Tensor:
        """The logits of objects of one size class."""
        logits = torch.einsum("bc,bchw->bhw", objects, self.pixel_head(features, FACTORS[kind])).float()
        with torch.autocast(logits.device.type, enabled=False):
            return interpolate(logits[:, None], size=(size // MASK_STRIDE,) * 2, mode="bilinear")[:, 0]

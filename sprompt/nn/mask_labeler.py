"""The network of Mask Auto-Labeler: one object in the middle of a crop -> the logits of its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from sprompt.nn.resnet import ResNet
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
    """A map (B, D, h, w) -> a vector for every pixel of twice the resolution: (B, C, 2h, 2w), none of them negative."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for channels in (inputs, width, width))
        self.after = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        for conv in self.before:
            features = relu(conv(features))
        return relu(self.after(interpolate(features, scale_factor=2.0, mode="bilinear")))


class MaskLabeler(nn.Module):
    """Crops (B, 3, S, S), normalised -> mask logits (B, S/4, S/4) float32. S is a multiple of 32.

    The logit of a pixel is the product of the object's vector, from the mean over the encoder's map, and the pixel's vector. Small
    objects get pixel vectors of a coarse map, large objects those of a fine one; the logits of all are resized to S/4.

    Args:
        backbone: the encoder: a Vit with patches of 16, or a ResNet, whose layers behind the map of stride 16 neither run nor train.
        width: length C of the vectors.
    """

    def __init__(self, backbone: ResNet | Vit, width: int = 256) -> None:
        super().__init__()
        if STRIDE not in backbone.strides:
            raise ValueError(f"MaskLabeler: backbone must have a map of stride {STRIDE}, got {backbone.strides}")
        self.backbone = backbone
        self._levels = backbone.strides.index(STRIDE) + 1
        if isinstance(backbone, ResNet):
            backbone.layer4.requires_grad_(False)
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
        if isinstance(self.backbone, ResNet):
            return self.backbone(crops, self._levels)[-1]
        return self.backbone(crops)[-1]

    def _masks(self, features: Tensor, objects: Tensor, kind: int, size: int) -> Tensor:
        """The logits of objects of one size class."""
        if FACTORS[kind] != 1:
            features = interpolate(features, scale_factor=FACTORS[kind], mode="bilinear")
        logits = torch.einsum("bc,bchw->bhw", objects, self.pixel_head(features)).float()
        with torch.autocast(logits.device.type, enabled=False):
            return interpolate(logits[:, None], size=(size // MASK_STRIDE,) * 2, mode="bilinear")[:, 0]

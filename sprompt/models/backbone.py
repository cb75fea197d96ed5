"""The settings of a model's backbone, and the network that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sprompt.nn import efficientnet
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import DEPTHS, ResNet, Variant
from sprompt.settings import check_sizes

Kind = Literal["resnet", efficientnet.Name]


@dataclass(frozen=True)
class BackboneConfig:
    """A part of the configuration of every model with one of these backbones. A model that takes more of them has its own `backbone`."""

    backbone: Kind = "resnet"
    """A ResNet, with the three settings that follow, or an EfficientNet-Lite, which has none."""
    depth: int = 50
    """Depth of the ResNet: 18, 34, 50 or 101."""
    backbone_width: int = 64
    """Channels of the ResNet's stem; 64 is the normal network."""
    backbone_variant: Variant = "plain"
    """"d" is ResNet-D, with a deep stem and means in its shortcuts; "d-dcn" has deformable convolutions too, and a depth of 50 or 101."""

    def check_backbone(self) -> None:
        """Raises ValueError for sizes that no ResNet has, or that no machine holds. For `__post_init__`."""
        if self.depth not in DEPTHS:
            raise ValueError(
                f"{type(self).__name__}: depth must be one of {', '.join(map(str, DEPTHS))}, got {self.depth!r}"
            )
        check_sizes(self, {"backbone_width": (1, 1024)})


def build_backbone(
    config: BackboneConfig, *, frozen_stages: int, train_batchnorm: bool = False
) -> ResNet | EfficientNet:
    """A new network with these settings, for the kinds of `BackboneConfig`."""
    if config.backbone == "resnet":
        return ResNet(
            config.depth, width=config.backbone_width, variant=config.backbone_variant, frozen_stages=frozen_stages,
            train_batchnorm=train_batchnorm,
        )  # fmt: skip
    return EfficientNet(config.backbone, frozen_stages=frozen_stages, train_batchnorm=train_batchnorm)

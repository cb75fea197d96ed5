"""Settings of Mask Auto-Labeler: its network, its crops, and its training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sprompt.models.backbone import BackboneConfig, Kind
from sprompt.nn.mask_labeler import STRIDE
from sprompt.nn.vit import VitConfig
from sprompt.ops.mean_field import LEAST
from sprompt.settings import check_choices, check_sizes


@dataclass(frozen=True)
class NetworkConfig(BackboneConfig):
    """Sizes of the network. The defaults are the paper's."""

    backbone: Literal["vit", Kind] = "vit"  # type: ignore[assignment]  # one kind more
    """The encoder: a Vision Transformer, with the settings of `vit`, a ResNet, with the settings `depth` and `backbone_…`, or an
    EfficientNet-Lite."""
    vit: VitConfig = field(default_factory=lambda: VitConfig(grid=32, conv_stem=True))
    """Sizes of the Vision Transformer; its patches have 16 pixels."""
    width: int = 256
    """Channels of the heads."""
    crop: int = 512
    """Side of the square that every object is resized to, in pixels; a multiple of 32. The side of a mask is a quarter of it."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        self.check_backbone()
        check_sizes(self, {"width": (1, 8192), "crop": (32, 4096)})
        if not isinstance(self.vit, VitConfig) or self.vit.patch != STRIDE:
            raise ValueError(f"NetworkConfig: vit must be a VitConfig with patches of {STRIDE}, got {self.vit!r}")
        if self.crop % 32:
            raise ValueError(f"NetworkConfig: crop must be a multiple of 32, got {self.crop}")


@dataclass(frozen=True)
class CropConfig:
    """The crops of training, and their random changes. The defaults are the paper's."""

    min_area: float = 2048.0
    """Objects are trained on if the area of their box exceeds this number of pixels."""
    expansion: float = 1.2
    """Largest margin on a side of a box, as a share of half of the box. The two sides of an axis share it at random, so the object
    is rarely in the middle of its crop."""
    flip: float = 0.5
    """Probability that a crop is mirrored left to right."""
    jitter: float = 0.5
    """Probability that brightness, contrast, saturation and hue of the student's crop are changed."""
    grey: float = 0.2
    """Probability that the student's crop loses its colours."""
    blur: float = 0.5
    """Probability that the student's crop is blurred."""
    together: int = 4
    """Number of boxes of a picture that follow each other in an epoch, at least 1. The picture is decoded once for them."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur"):
            _check(self, name, 0, 1)
        _check(self, "min_area", 0, math.inf)
        _check(self, "expansion", 0, 10)
        check_sizes(self, {"together": (1, 1 << 20)})


@dataclass(frozen=True)
class AutoLabelerConfig:
    """The losses and the teacher. The defaults are the paper's."""

    momentum: float = 0.996
    """Share of its weights that the teacher keeps in a step, from 0 to 1."""
    mil_weight: float = 4.0
    """Weight of the loss of the box: the mask must reach every row and column of its box, and none outside."""
    crf_weight: float = 0.5
    """Weight of the loss against the refined mask."""
    mil_ramp: int = 1000
    """Steps of the first epoch in which the weight of the box's loss rises linearly from 0; 0 starts with the full weight. From the
    second epoch on the weight is full."""
    crf_ramp: int = 4000
    """The same for the loss against the refined mask."""
    scale: float = 0.1
    """Difference of colours, in units of the normalised picture, at which neighbours have a weight of exp(−½) in the refinement."""
    iterations: int = 100
    """Iterations of the refinement."""
    low: float = 0.1
    """Lower bound of the probabilities in the refinement, from 1e-6 to ½."""
    high: float = 0.9
    """Upper bound of the probabilities in the refinement, from ½ to 1 − 1e-6."""

    def __post_init__(self) -> None:
        _check(self, "momentum", 0, 1)
        for name in ("mil_weight", "crf_weight"):
            _check(self, name, 0, math.inf)
        check_sizes(self, {"mil_ramp": (0, 1 << 40), "crf_ramp": (0, 1 << 40), "iterations": (0, 10_000)})
        _check(self, "scale", LEAST, 1 / LEAST)
        _check(self, "low", LEAST, 0.5)
        _check(self, "high", 0.5, 1 - LEAST)


@dataclass(frozen=True)
class LabelConfig:
    """How masks become labels. The defaults are the paper's, except `area`."""

    thresholds: tuple[float, float, float] = (0.1, 0.1, 0.1)
    """Probabilities above which a pixel is in the mask, for boxes below 32² pixels, below 96², and larger ones; from 0 to below 1."""
    area: Literal["mask", "box"] = "mask"
    """Whether the area of an annotation is the number of pixels of its mask, or width times height of its box, as the paper's code
    writes."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        if len(self.thresholds) != 3 or not all(0 <= value < 1 for value in self.thresholds):
            raise ValueError(f"LabelConfig: thresholds must be three numbers from 0 to below 1, got {self.thresholds}")


def _check(config: Any, name: str, low: float, high: float) -> None:
    """Raises ValueError unless a field is a number between its bounds, both included; infinity is none."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
        upper = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{type(config).__name__}: {name} must be at least {low:g}{upper}, got {value!r}")

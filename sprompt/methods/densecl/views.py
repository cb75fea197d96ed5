"""Two random views of a picture. DenseCL learns to tell them from views of other pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from sprompt.data.colour import blurred, grey, normalised, recoloured, uniform
from sprompt.data.sample import Sample


@dataclass(frozen=True)
class View:
    """Two views of one picture."""

    first: Tensor  # (3, S, S) float32, normalised
    second: Tensor
    name: str


@dataclass(frozen=True)
class Views:
    """Two views of each of B pictures."""

    first: Tensor  # (B, 3, S, S) float32, normalised; for the query encoder
    second: Tensor  # the same shape; for the key encoder
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Views:
        return Views(self.first.to(device, non_blocking=True), self.second.to(device, non_blocking=True), self.names)


def collate_views(views: Sequence[View]) -> Views:
    first, second = (
        torch.stack(part).contiguous(memory_format=torch.channels_last)
        for part in ([view.first for view in views], [view.second for view in views])
    )
    return Views(first, second, [view.name for view in views])


@dataclass(frozen=True)
class TwoViews:
    """Crops of random size and shape. Each is mirrored, recoloured, greyed and blurred at random, as in MoCo v2 and DenseCL."""

    size: int = 224
    """Side of a view in pixels, at least 32."""
    crop: tuple[float, float] = (0.2, 1.0)
    """Lower and upper bound of the share of the picture's area that a view shows, above 0 and at most 1."""
    jitter: float = 0.4
    """Strength of colour changes, from 0 to 1: brightness, contrast and saturation change by up to this factor, hue by a
    quarter of it of the colour circle. Of the views, 80 % are changed."""
    grey: float = 0.2
    """Share of views without colour, from 0 to 1."""
    blur: float = 0.5
    """Share of blurred views, from 0 to 1."""

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"size: a view must have at least 32 pixels a side, got {self.size}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop: must be two shares above 0 and up to 1, the smaller first, got {self.crop}")
        for name in ("jitter", "grey", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie between 0 and 1, got {getattr(self, name)}")

    def __call__(self, sample: Sample, generator: Generator) -> View:
        return View(self._view(sample.image, generator), self._view(sample.image, generator), sample.name)

    def _view(self, image: Tensor, generator: Generator) -> Tensor:
        top, left, height, width = self._crop(image.shape[1], image.shape[2], generator)
        crop = image[:, top : top + height, left : left + width].float() / 255
        view = interpolate(crop[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0].clamp(0, 1)
        if uniform(generator) < 0.5:
            view = view.flip(2)
        if self.jitter > 0 and uniform(generator) < 0.8:
            strength = self.jitter
            view = recoloured(view, (strength, strength, strength, strength / 4), generator)
        if uniform(generator) < self.grey:
            view = grey(view).expand(3, -1, -1)
        if uniform(generator) < self.blur:
            # 0.1 to 2 pixels is the sigma for views of 224 pixels
            view = blurred(view, uniform(generator, 0.1, 2.0) * self.size / 224)
        return normalised(view)

    def _crop(self, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part with an aspect ratio of 3:4 to 4:3.

        If no part fits in ten draws, it is a square of the shorter side.
        """
        for _ in range(10):
            area = height * width * uniform(generator, *self.crop)
            ratio = math.exp(uniform(generator, math.log(3 / 4), math.log(4 / 3)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                break
        else:
            h = w = min(height, width)
        top = int(uniform(generator) * (height - h + 1))
        return top, int(uniform(generator) * (width - w + 1)), h, w

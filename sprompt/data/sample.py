"""The types of the data path: a dataset reads a Sample, a transform changes it, and a model is trained on a Batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks, Size


@dataclass(frozen=True)
class Sample:
    """One picture with its masks. Transforms return a new Sample. `image`, `masks` and `seeds` share one pixel grid."""

    image: Tensor  # (3, H, W) uint8, RGB
    masks: BitMasks  # (G,) of size (H, W); G may be 0
    labels: Tensor  # (G,) int64, class index from 0
    image_id: int
    name: str  # the file, for messages
    size: Size  # (h, w) of the picture as `read_picture` gives it
    seeds: Tensor | None = None  # (G, 3) float32, the seed of each proposal: x, y in pixels of `image`, scale

    def kept(self, index: Tensor) -> Sample:
        """The sample with only the masks, labels and seeds at `index`: bool (G,) or int64 places."""
        seeds = None if self.seeds is None else self.seeds[index]
        return replace(self, masks=self.masks[index], labels=self.labels[index], seeds=seeds)


@dataclass(frozen=True)
class Batch:
    """B samples, padded on the right and below to one size. The first `counts` of an image's G masks are real."""

    images: Tensor  # (B, 3, H, W) float32, normalised, then padded with 0
    masks: BitMasks  # (B, G) of size (H, W); empty behind counts
    labels: Tensor  # (B, G) int64; 0 behind counts
    counts: Tensor  # (B,) int64
    sizes: list[Size]  # of each image before padding
    image_ids: list[int]
    names: list[str]
    original_sizes: list[Size]  # of each picture as `read_picture` gives it
    seeds: Tensor | None = None  # (B, G, 3) float32: x, y in pixels of `images`, scale; 0 behind counts

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str) -> Batch:
        names = ("images", "masks", "labels", "counts", "seeds")
        moved: dict[str, Any] = {
            n: v.to(device, non_blocking=True) for n in names if (v := getattr(self, n)) is not None
        }
        return replace(self, **moved)

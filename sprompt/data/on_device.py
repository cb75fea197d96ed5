"""Small sets of pictures that stay on the device. Each picture is read and resized once, as it is and mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sprompt.data.loader import Order
from sprompt.data.sample import Batch
from sprompt.data.transforms import Augment
from sprompt.masks import BitMasks, Size
from sprompt.normalisation import MEAN, STD
from sprompt.seeding import generator

_DIVISOR = 32  # the default of `collate`


class DevicePictures:
    """Every picture of a dataset, resized by `augment`, on a device: once as it is and once mirrored, about 6 bytes a pixel.

    Raises ValueError if `augment` has other random steps than the mirror.
    """

    def __init__(self, dataset: Any, augment: Augment, device: torch.device | str) -> None:
        low, high = augment.shorts
        resized = low != high or augment.scale is not None
        if resized or augment.crop is not None or (augment.rotate_probability and augment.rotate_degrees):
            raise ValueError(
                f"keep_pictures: must be False where pictures are cropped, rotated or resized at random, got {augment}; "
                "give one length of the shorter side, no scale, no crop and --augment.rotate-probability 0"
            )
        self.augment, self.device = augment, torch.device(device)
        ways, unused = [replace(augment, flip=0.0), replace(augment, flip=1.0)], torch.Generator()
        samples = [
            way(dataset[i], unused) for i in range(len(dataset)) for way in ways
        ]  # 2 i is picture i, 2 i + 1 mirrored
        self.about = [(s.image_id, s.name, s.size) for s in samples]
        self.sizes: list[Size] = [(s.image.shape[1], s.image.shape[2]) for s in samples]
        height, width = self.canvas = _rounded(self.sizes)
        self.images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8, device=self.device)
        for place, (s, (h, w)) in enumerate(zip(samples, self.sizes, strict=True)):
            self.images[place, :, :h, :w] = s.image.to(self.device)
        # the masks of all pictures in one row; the first is empty and fills up rows of pictures with fewer masks
        self.counts = [len(s.labels) for s in samples]
        self.starts = (1 + torch.tensor([0, *self.counts[:-1]]).cumsum(0)).tolist()
        words = [torch.zeros(1, (height * width + 31) // 32, dtype=torch.int32)]
        words += [s.masks.pad(0, width - w, 0, height - h).words for s, (h, w) in zip(samples, self.sizes, strict=True)]
        self.words = torch.cat(words).to(self.device)
        self.labels = torch.cat([torch.zeros(1, dtype=torch.int64), *(s.labels for s in samples)]).to(self.device)
        seeds = [s.seeds for s in samples if s.seeds is not None]
        self.seeds = torch.cat([torch.zeros(1, 3), *seeds]).to(self.device) if seeds else None

    def __len__(self) -> int:
        return len(self.sizes) // 2

    def batch(self, places: list[int]) -> Batch:
        """The batch that `collate` would make of these places: 2 i is picture i, 2 i + 1 its mirror image."""
        sizes, counts = [self.sizes[p] for p in places], [self.counts[p] for p in places]
        rows = torch.zeros(len(places), max(counts, default=0), dtype=torch.int64)
        for b, (place, count) in enumerate(zip(places, counts, strict=True)):
            rows[b, :count] = torch.arange(self.starts[place], self.starts[place] + count)
        rows, chosen = self._sent(rows), self._sent(torch.tensor(places, dtype=torch.int64))
        height, width = size = _rounded(sizes)
        masks = BitMasks(self.words[rows], self.canvas)
        if size != self.canvas:
            masks = masks.crop(0, 0, height, width)
        about = [self.about[p] for p in places]
        return Batch(
            images=self._normalised(self.images[chosen][:, :, :height, :width], sizes),
            masks=masks,
            labels=self.labels[rows],
            counts=self._sent(torch.tensor(counts, dtype=torch.int64)),
            sizes=sizes,
            image_ids=[image_id for image_id, _, _ in about],
            names=[name for _, name, _ in about],
            original_sizes=[original for _, _, original in about],
            seeds=None if self.seeds is None else self.seeds[rows],
        )

    def _normalised(self, images: Tensor, sizes: list[Size]) -> Tensor:
        mean, std = (self._sent(torch.tensor(v))[:, None, None] for v in (MEAN, STD))
        normal = (images - mean) / std
        height, width = images.shape[2:]
        if any(size != (height, width) for size in sizes):
            ends = self._sent(torch.tensor(sizes))[:, :, None]  # (B, 2, 1)
            inside = [torch.arange(n, device=self.device) < ends[:, axis] for axis, n in enumerate((height, width))]
            normal = torch.where((inside[0][:, :, None] & inside[1][:, None])[:, None], normal, 0)
        return normal

    def _sent(self, small: Tensor) -> Tensor:
        return small.to(self.device, non_blocking=True)


class DeviceBatches(Order):
    """The batches of `DevicePictures` pictures. They equal the batches of `Batches` with the same `augment` and `collate` bit for bit.

    Args:
        workers: ignored; it is here because `Batches` has it.
    """

    def __init__(self, kept: DevicePictures, *, workers: int = 0, **order: Any) -> None:
        super().__init__(len(kept), **order)
        self.kept = kept

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This process's part of the batches of an epoch, from `start_step` on."""
        for indices in self.own(epoch, start_step):
            mirrored = (self.kept.augment.mirrors(generator(self.seed, epoch, i)) for i in indices)
            yield self.kept.batch([2 * i + m for i, m in zip(indices, mirrored, strict=True)])


def _rounded(sizes: list[Size]) -> Size:
    height, width = (max((-(-s[i] // _DIVISOR) * _DIVISOR for s in sizes), default=_DIVISOR) for i in (0, 1))
    return height, width

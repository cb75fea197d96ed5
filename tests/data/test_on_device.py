"""Pictures that stay on the device give the same batches as pictures that are read every time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sprompt.data.coco import CocoDataset
from sprompt.data.loader import Batches
from sprompt.data.on_device import DeviceBatches, DevicePictures
from sprompt.data.sample import Batch, Sample
from sprompt.data.synthetic import write_scenes
from sprompt.data.transforms import Augment, collate
from sprompt.masks import BitMasks

AUGMENT = Augment(48, 80)


class Pictures:
    """Pictures of different sizes and numbers of masks. One has no mask, and one has a mask that a resize makes empty."""

    def __init__(self, seeds: bool) -> None:
        self.seeds = seeds

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        height, width, count = 60 + 10 * (index % 3), 50 + 30 * (index % 2), index % 4
        masks = torch.zeros(count, height, width)
        for i in range(count):
            masks[i, 5 * i : 5 * i + 20, 3 * i : 3 * i + 17] = 1
        if index == 5:
            masks[0] = 0
            masks[0, 1, 1] = 1
        return Sample(
            image=torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
            masks=BitMasks.from_dense(masks), labels=torch.arange(count), image_id=100 + index, name=f"{index}.png",
            size=(height, width), seeds=torch.rand(count, 3, generator=generator) if self.seeds else None,
        )  # fmt: skip


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("image_ids", "names", "sizes", "original_sizes"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("images", "labels", "counts", "seeds"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), name
    assert a.masks.size == b.masks.size and torch.equal(a.masks.words, b.masks.words)


@pytest.mark.parametrize("seeds", [True, False])
@pytest.mark.parametrize("augment", [AUGMENT, Augment(48, 80, flip=0.0), Augment(48, 64, flip=1.0, keep_ratio=False)])
@pytest.mark.parametrize("order", [{}, {"rank": 1, "world": 2, "whole": 2}, {"shuffle": False}])
def test_batches_are_those_that_are_read_anew(augment: Augment, order: dict[str, Any], seeds: bool) -> None:
    dataset = Pictures(seeds)
    anew = Batches(dataset, augment, collate, batch_size=4, seed=5, **order)
    kept = DeviceBatches(DevicePictures(dataset, augment, "cpu"), batch_size=4, seed=5, workers=3, **order)
    assert kept.steps == anew.steps
    for epoch, start in ((0, 0), (1, 0), (2, 1)):
        pairs = list(zip(kept.epoch(epoch, start), anew.epoch(epoch, start), strict=True))
        assert pairs
        for a, b in pairs:
            assert_same(a, b)


def test_scenes(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, size=(64, 64))
    dataset = CocoDataset(tmp_path / "images", tmp_path / "instances.json")
    make = partial(DeviceBatches, DevicePictures(dataset, AUGMENT, "cpu"))
    anew = Batches(dataset, AUGMENT, collate, batch_size=2, seed=1)
    for a, b in zip(make(batch_size=2, seed=1).epoch(4), anew.epoch(4), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    "augment",
    [
        Augment((48, 64), 80),
        Augment(48, 80, scale=(0.5, 2.0)),
        Augment(48, 80, crop=(32, 32)),
        Augment(48, 80, rotate_probability=1, rotate_degrees=9),
    ],
)
def test_only_mirroring_can_be_by_chance(augment: Augment) -> None:
    with pytest.raises(
        ValueError, match="keep_pictures: must be False where pictures are cropped, rotated or resized at random"
    ):
        DevicePictures(Pictures(False), augment, "cpu")


def test_no_pictures() -> None:
    with pytest.raises(ValueError, match="dataset must have items, got none"):
        DeviceBatches(DevicePictures([], AUGMENT, "cpu"), batch_size=1, seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    dataset = Pictures(True)
    kept = DeviceBatches(DevicePictures(dataset, AUGMENT, "cuda"), batch_size=4, seed=5)
    for a, b in zip(kept.epoch(0), Batches(dataset, AUGMENT, collate, batch_size=4, seed=5).epoch(0), strict=True):
        assert a.images.is_cuda and a.masks.words.is_cuda
        torch.testing.assert_close(a.images.cpu(), b.images)
        assert torch.equal(a.masks.words.cpu(), b.masks.words) and torch.equal(a.labels.cpu(), b.labels)

"""Crops of Mask Auto-Labeler against numbers by hand, numpy and Pillow."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sprompt.data.annotations import Picture
from sprompt.data.boxes import Box, BoxedPictures
from sprompt.data.pictures import png
from sprompt.methods.auto_labeler import samples
from sprompt.methods.auto_labeler.config import CropConfig
from sprompt.methods.auto_labeler.samples import (
    LABEL_MARGINS,
    BoxedObject,
    BoxedObjects,
    CropBatches,
    Cropped,
    Window,
    box_profiles,
    box_targets,
    cut,
    window_of,
)

PLAIN = CropConfig(flip=0, jitter=0, grey=0, blur=0)


def box(x1: float, y1: float, x2: float, y2: float, annotation: int = 0) -> Box:
    return Box(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), annotation)


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_windows_by_hand() -> None:
    # centre (20, 50), half sides 10 and 20
    assert window_of(box(10, 30, 30, 70), (0, 0, 0, 0)) == Window(10, 30, 31, 71)
    # left 20 - 10 · 1.3 = 7, upper 50 - 20 · 1.3 = 24, right 20 + 13 + 1 = 34, lower 50 + 26 + 1 = 77
    assert window_of(box(10, 30, 30, 70), LABEL_MARGINS) == Window(7, 24, 34, 77)
    # left 20 - 10 · 1.25 = 7.5, upper 50 - 20 · 2 = 10, right 20 + 10 · 1.05 + 1 = 31.5, lower 50 + 20 + 1 = 71
    assert window_of(box(10, 30, 30, 70), (0.25, 1.0, 0.05, 0.0)) == Window(7, 10, 32, 71)
    # a box in the corner leaves the picture: centre (2, 2), half 2
    assert window_of(box(0, 0, 4, 4), LABEL_MARGINS) == Window(-1, -1, 6, 6)


@pytest.mark.parametrize("window", [Window(-7, -3, 20, 12), Window(5, 4, 45, 33), Window(-33, -20, 70, 50)])
def test_the_picture_repeats_outside(window: Window) -> None:
    image = noise(20, 30)
    rows = np.arange(window.y1, window.y2)
    columns = np.arange(window.x1, window.x2)
    wrapped = image.numpy().take(rows, axis=1, mode="wrap").take(columns, axis=2, mode="wrap")
    want = Image.fromarray(wrapped.transpose(1, 2, 0).copy()).resize((64, 64), Image.BICUBIC)
    assert np.array_equal(cut(image, window, 64).numpy().transpose(1, 2, 0), np.array(want))


def test_wrapping_by_hand() -> None:
    """Column −k shows column W − k, and column W + k shows column k."""
    image = torch.arange(4, dtype=torch.uint8).expand(3, 4, 4)
    found = cut(image, Window(-2, 0, 6, 8), 8)
    assert found[0].tolist() == [[2, 3, 0, 1, 2, 3, 0, 1]] * 8


def literal_mask(own: Box, window: Window, size: tuple[int, int], side: int) -> np.ndarray:
    """The mask of a box: drawn in the picture, cut with zeros outside, resized by Pillow."""
    height, width = size
    big = 3 * max(size)
    canvas = np.zeros((height + 2 * big, width + 2 * big), np.uint8)
    whole = np.zeros(size, np.uint8)
    whole[int(own.y1) : int(own.y2) + 1, int(own.x1) : int(own.x2) + 1] = 1
    canvas[big : big + height, big : big + width] = whole
    part = canvas[big + window.y1 : big + window.y2, big + window.x1 : big + window.x2]
    return np.array(Image.fromarray(part.copy()).resize((side, side), Image.BICUBIC))


@pytest.mark.parametrize(
    ("own", "margins"),
    [
        (box(10.5, 30.2, 30.9, 57), (0.3, 0.3, 0.3, 0.3)),
        (box(0, 0, 80, 60), (0.9, 0.1, 0.2, 0.6)),
        (box(70, 40, 80, 60), (0, 0, 1.2, 1.2)),
        (box(3, 3, 5.5, 5.2), (0.3, 0.3, 0.3, 0.3)),
        (box(0, 20, 80, 22.5), (1.2, 0, 0, 1.2)),
    ],
)
def test_masks_of_boxes(own: Box, margins: tuple[float, ...]) -> None:
    window, size = window_of(own, margins), (60, 80)
    for side in (64, 128):
        profiles = box_profiles(own, window, size, side)
        want = literal_mask(own, window, size, side)
        assert want.any()
        assert np.array_equal(np.outer(*profiles.numpy()), want)
        # a quarter of the side: bilinear, without antialias, so two of four pixels count on each axis
        quarter = torch.nn.functional.interpolate(
            torch.from_numpy(want)[None, None].double(), size=side // 4, mode="bilinear"
        )
        target = box_targets(profiles[None])
        assert target.dtype == torch.float32 and torch.equal(target[0].double(), quarter[0, 0])


def test_targets_have_fractions_at_the_borders() -> None:
    rows, columns = torch.zeros(32), torch.ones(32)
    rows[10:] = 1  # pixel 2 of the target is between 9 and 10
    assert box_targets(torch.stack((rows, columns))[None])[0, :, 0].tolist() == [0, 0, 0.5, 1, 1, 1, 1, 1]


def test_margins_share_their_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """u = 1, 0.5, 0.25, 0.75 of 1.2 and gates 0.25, 0.5: left 1.2 · 0.25, upper 0.6 · 0.5, right 0.3 · 0.75, lower 0.9 · 0.5."""
    seen: list[Any] = []
    monkeypatch.setattr(samples, "window_of", lambda own, margins: seen.append(margins) or window_of(own, margins))
    draws = iter([1.0, 0.5, 0.25, 0.75, 0.25, 0.5])
    monkeypatch.setattr(samples, "uniform", lambda g, low=0.0, high=1.0: low + (high - low) * next(draws, 0.999))
    Cropped(PLAIN, 64)(BoxedObject(noise(60, 80), box(20, 20, 50, 50), "a"), torch.Generator())
    assert seen[0] == pytest.approx((0.3, 0.3, 0.225, 0.45))


def test_margins_have_the_mean_of_labelling() -> None:
    item = BoxedObject(noise(60, 80), box(20, 20, 50, 50), "a")
    seen = []
    original = samples.window_of
    try:
        samples.window_of = lambda own, margins: seen.append(margins) or original(own, margins)
        for seed in range(400):
            Cropped(PLAIN, 32)(item, torch.Generator().manual_seed(seed))
    finally:
        samples.window_of = original
    margins = np.array(seen)
    assert margins.min() >= 0 and margins.max() <= 1.2
    np.testing.assert_allclose(margins.mean(0), LABEL_MARGINS, atol=0.05)
    assert ((margins[:, 0] + margins[:, 2]) <= 1.2).all() and ((margins[:, 1] + margins[:, 3]) <= 1.2).all()


def test_a_flip_mirrors_image_and_mask_together() -> None:
    item = BoxedObject(noise(60, 80), box(5, 20, 70, 50), "a")
    plain, flipped = (
        Cropped(CropConfig(flip=flip, jitter=0, grey=0, blur=0), 64)(item, torch.Generator().manual_seed(3))
        for flip in (0, 1)
    )
    assert torch.equal(flipped.teacher, plain.teacher.flip(2)) and torch.equal(flipped.student, flipped.teacher)
    assert torch.equal(flipped.profiles[0], plain.profiles[0])
    assert torch.equal(flipped.profiles[1], plain.profiles[1].flip(0))
    assert not torch.equal(plain.profiles[1], plain.profiles[1].flip(0))


@pytest.mark.parametrize("change", ["jitter", "grey", "blur"])
def test_colours_change_for_the_student_only(change: str) -> None:
    item = BoxedObject(noise(60, 80), box(5, 20, 70, 50), "a")
    plain = Cropped(PLAIN, 64)(item, torch.Generator().manual_seed(1))
    settings = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0} | {change: 1.0}
    crop = Cropped(CropConfig(**settings), 64)(item, torch.Generator().manual_seed(1))
    assert torch.equal(crop.teacher, plain.teacher) and torch.equal(crop.profiles, plain.profiles)
    assert not torch.equal(crop.student, plain.student)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = crop.student * std[:, None, None] + mean[:, None, None]
    assert pixels.min() > -1e-3 and pixels.max() < 1 + 1e-3
    if change == "grey":
        assert torch.allclose(pixels[0], pixels[2], atol=1e-5)
    if change == "blur":
        assert pixels.std() < (plain.student * std[:, None, None]).std()


@pytest.fixture
def pictures(tmp_path: Path) -> BoxedPictures:
    """Three pictures with 5, 1 and 9 boxes that count, and one box in each that is too small."""
    number = 0
    boxes: list[list[Box]] = []
    for place, count in enumerate((5, 1, 9)):
        (tmp_path / f"{place}.png").write_bytes(png(noise(60, 80, place)))
        boxes.append([])
        for own in range(count):
            boxes[-1].append(box(own, own, own + 50, own + 45, number))
            number += 1
        boxes[-1].append(box(0, 0, 64, 32, number))  # exactly 2048
        number += 1
    listed = [Picture(10 + place, f"{place}.png", (60, 80)) for place in range(3)]
    return BoxedPictures(tmp_path, "boxes.json", listed, boxes, {}, [(1, "object")], [])


def batches(pictures: BoxedPictures, together: int, **order: Any) -> CropBatches:
    crops = Cropped(CropConfig(together=together), 32)
    return CropBatches(BoxedObjects(pictures, 2048), crops, seed=5, **{"batch_size": 5, **order})


def test_an_epoch_has_every_object_once_and_keeps_pictures_together(pictures: BoxedPictures) -> None:
    made = batches(pictures, 3)
    assert made.number == 15 and made.steps == 3
    orders = [made.order(epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(15))
        places = [made.dataset.objects[index][0] for index in order]
        runs = 1 + sum(a != b for a, b in pairwise(places))
        assert runs <= 6  # 2 + 1 + 3 runs of at most 3
    assert len({tuple(order) for order in orders}) == 4


def test_a_picture_is_decoded_once_for_its_run(pictures: BoxedPictures, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[int] = Counter()
    original = BoxedPictures.image
    monkeypatch.setattr(BoxedPictures, "image", lambda self, place: read.update([place]) or original(self, place))
    names = [name for batch in batches(pictures, 100).epoch(0) for name in batch.names]
    assert len(set(names)) == 15 and read == {0: 1, 1: 1, 2: 1}


def test_batches_do_not_depend_on_processes_and_restarts(pictures: BoxedPictures) -> None:
    whole = list(batches(pictures, 3, batch_size=6).epoch(2))
    assert [batch.epoch for batch in whole] == [2, 2, 2]
    assert whole[0].student.shape == (6, 3, 32, 32) and whole[0].boxes.shape == (6, 8, 8)
    assert whole[0].names[0].startswith(("0.png, annotation", "1.png, annotation", "2.png, annotation"))
    parts = [list(batches(pictures, 3, batch_size=6, rank=rank, world=2).epoch(2, 1)) for rank in (0, 1)]
    for one, first, second in zip(whole[1:], *parts, strict=True):
        for name in ("student", "teacher", "boxes"):
            assert torch.equal(getattr(one, name), torch.cat((getattr(first, name), getattr(second, name))))
        assert one.classes == first.classes + second.classes
    workers = list(batches(pictures, 3, batch_size=6, workers=2).epoch(2))
    assert all(torch.equal(a.student, b.student) for a, b in zip(whole, workers, strict=True))


def test_wrong_settings() -> None:
    for change, message in (
        ({"flip": 1.5}, "flip must be at least 0 and at most 1, got 1.5"),
        ({"expansion": float("nan")}, "expansion must be at least 0"),
        ({"together": 0}, "together must be a whole number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CropConfig(**change)

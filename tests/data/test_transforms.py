"""Transforms move picture, masks and seeds alike, compared with PIL, scipy and numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from sprompt.data.sample import Sample
from sprompt.data.transforms import Augment, _draws, collate, crop, flip, resize, resized_size, rotate
from sprompt.masks import BitMasks
from sprompt.normalisation import MEAN, STD
from sprompt.seeding import generator


def _sample(size: tuple[int, int] = (60, 90), masks: int = 3, seed: int = 0) -> Sample:
    """A soft picture, discs as masks, and their centres as seeds."""
    rng = np.random.default_rng(seed)
    h, w = size
    image = ndimage.gaussian_filter(rng.random((3, h, w)) * 255, (0, 2, 2))
    image = (image - image.min()) / (image.max() - image.min()) * 255
    x, y = rng.uniform(12, w - 12, masks), rng.uniform(12, h - 12, masks)
    rows, columns = np.mgrid[0:h, 0:w] + 0.5
    discs = (columns - x[:, None, None]) ** 2 + (rows - y[:, None, None]) ** 2 < 6**2
    return Sample(
        image=torch.from_numpy(image.astype(np.uint8)),
        masks=BitMasks.from_dense(torch.from_numpy(discs)),
        labels=torch.arange(masks),
        image_id=9,
        name="a.png",
        size=size,
        seeds=torch.from_numpy(np.stack((x, y, rng.integers(0, 3, masks)), 1).astype(np.float32)),
    )


@pytest.mark.parametrize(
    ("size", "short", "long", "result"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((375, 500), 800, 1333, (800, 1067)),
        ((100, 1000), 800, 1333, (133, 1333)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((300, 300), 300, 300, (300, 300)),
        ((333, 500), 800, 1333, (800, 1201)),
    ],
)
def test_resized_size(size: tuple[int, int], short: int, long: int, result: tuple[int, int]) -> None:
    assert resized_size(size, short, long) == result


@pytest.mark.parametrize("size", [(30, 45), (100, 150), (41, 77)])
def test_resize(size: tuple[int, int]) -> None:
    sample = _sample()
    out = resize(sample, size)
    pil = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    assert (out.image.permute(1, 2, 0).int() - torch.from_numpy(np.array(pil)).int()).abs().max() <= 1
    dense = F.interpolate(sample.masks.to_dense(torch.float64)[None], size=size, mode="bilinear")[0] > 0.5
    assert torch.equal(out.masks.to_dense(), dense)
    assert sample.seeds is not None and out.seeds is not None
    wanted = sample.seeds * torch.tensor([size[1] / 90, size[0] / 60, 1])
    assert torch.allclose(out.seeds, wanted) and out.size == (60, 90)


def test_flip_and_crop() -> None:
    sample = _sample()
    out = crop(flip(sample), 5, 7, 40, 50)
    assert torch.equal(out.image, sample.image.flip(2)[:, 5:45, 7:57])
    assert torch.equal(out.masks.to_dense(), sample.masks.to_dense().flip(2)[:, 5:45, 7:57])
    assert sample.seeds is not None and out.seeds is not None
    x, y, scale = sample.seeds.T
    assert torch.allclose(out.seeds, torch.stack((90 - x - 7, y - 5, scale), 1))


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, -1), (0, 0)])
def test_quarter_turns_are_exact(degrees: float, turns: int) -> None:
    sample = _sample((64, 64))
    out = rotate(sample, degrees)
    assert (out.image.int() - torch.rot90(sample.image, turns, (1, 2)).int()).abs().max() <= 1
    assert torch.equal(out.masks.to_dense(), torch.rot90(sample.masks.to_dense(), turns, (1, 2)))


@pytest.mark.parametrize("degrees", [7.5, -33.0])
def test_rotation_as_scipy_does_it(degrees: float) -> None:
    sample = _sample()
    out = rotate(sample, degrees)
    a = np.deg2rad(degrees)  # counter-clockwise with y down: the result's (row, column) comes from
    back = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]).T
    centre = np.array([29.5, 44.5])
    offset = centre - back @ centre

    def turned(plane: np.ndarray) -> np.ndarray:
        return ndimage.affine_transform(plane, back, offset, order=1, mode="grid-constant", cval=0.0)

    for c in range(3):
        wanted = turned(sample.image[c].numpy() - MEAN[c]) + MEAN[c]
        assert np.abs(out.image[c].numpy() - wanted).max() < 0.6
    for before, after in zip(sample.masks.to_dense().numpy(), out.masks.to_dense().numpy(), strict=True):
        soft = turned(before.astype(np.float64))
        clear = abs(soft - 0.5) > 1e-4
        assert ((soft > 0.5) == after)[clear].all()
    corner = out.image[:, 0, 0] if degrees > 0 else out.image[:, 0, -1]
    assert (corner - torch.tensor(MEAN)).abs().max() < 1, "corners take the mean colour"


def test_seeds_stay_in_their_masks() -> None:
    """A seed in the middle of a small blob is still in the blob after every transform, for all random draws."""
    augment = Augment((40, 90), 140, flip=0.5, rotate_probability=0.8, rotate_degrees=40, crop=(48, 48))
    inside = 0
    for draw in range(60):
        out = augment(_sample(seed=draw % 7), generator(0, draw))
        assert out.seeds is not None and len(out.seeds) == len(out.masks) == len(out.labels)
        height, width = out.masks.size
        assert (height, width) == tuple(out.image.shape[1:]) and max(height, width) <= 48
        for mask, (x, y, _) in zip(out.masks.to_dense(), out.seeds.tolist(), strict=True):
            assert mask.any()
            if 0 <= x < width and 0 <= y < height:
                assert mask[int(y), int(x)]
                inside += 1
    assert inside > 60


def test_lost_masks_go_with_label_and_seed() -> None:
    dense = torch.zeros(3, 40, 40)
    dense[0, :4, :4] = 1
    dense[1, 18:22, 18:22] = 1
    sample = replace(_sample((40, 40)), masks=BitMasks.from_dense(dense), labels=torch.tensor([5, 6, 7]))
    out = Augment(40, 40, flip=0, crop=(20, 20))(sample, generator(3))
    assert out.seeds is not None and sample.seeds is not None
    kept = out.labels.tolist()
    assert 7 not in kept and len(out.masks) == len(kept) == len(out.seeds)
    assert out.seeds[:, 2].tolist() == sample.seeds[[5, 6, 7].index(kept[0]) :, 2][: len(kept)].tolist()
    nothing = Augment(10, 10)(replace(sample, masks=BitMasks.from_dense(torch.zeros(3, 40, 40))), generator(0))
    assert len(nothing.masks) == 0 and nothing.masks.size == (10, 10) and nothing.labels.shape == (0,)


def test_what_is_drawn() -> None:
    sample = replace(_sample(), seeds=None)
    shorts = [min(Augment((30, 33), 100)(sample, generator(i)).masks.size) for i in range(200)]
    assert {s: 30 < shorts.count(s) < 70 for s in set(shorts)} == {30: True, 31: True, 32: True, 33: True}
    flips = [bool((Augment(60, 90)(sample, generator(i)).image != sample.image).any()) for i in range(200)]
    assert 70 < sum(flips) < 130
    again = Augment((30, 60), 100, rotate_probability=0.5, rotate_degrees=9, crop=(20, 20))
    a, b = again(sample, generator(1, 2)), again(sample, generator(1, 2))
    assert torch.equal(a.image, b.image) and torch.equal(a.masks.words, b.masks.words) and a.seeds is None
    never = Augment(60, 90, flip=0)(sample, generator(0))
    assert torch.equal(never.image, sample.image)


@pytest.mark.parametrize(
    ("size", "augment", "draw", "result"),
    [  # the official jitter: 1024 by 0.1 to 2 for the longer side
        ((480, 640), Augment(1024, 1024, scale=(0.1, 2.0)), 0.0, (77, 102)),  # 102.4 = 0.16 of 640; 76.8
        ((480, 640), Augment(1024, 1024, scale=(0.1, 2.0)), 1.0, (1536, 2048)),
        ((480, 640), Augment(1024, 1024, scale=(0.1, 2.0)), 0.5, (806, 1075)),  # 1.05: 1075.2, 806.4
        ((480, 640), Augment(800, 1333, scale=(0.5, 0.5)), 0.3, (400, 533)),  # the shorter side counts
        ((100, 1000), Augment(800, 1333, scale=(2.0, 2.0)), 0.3, (267, 2666)),  # the longer side counts
        ((100, 1000), Augment(1, 10, scale=(0.1, 0.1)), 0.3, (1, 1)),
        ((480, 640), Augment(600, 1000, scale=(0.5, 1.5), keep_ratio=False), 0.25, (450, 750)),
    ],
)
def test_jittered_size(size: tuple[int, int], augment: Augment, draw: float, result: tuple[int, int]) -> None:
    assert augment._resized(size, 0.0, draw) == result


def test_the_jitter_is_uniform_and_leaves_the_other_draws() -> None:
    sample = _sample((60, 90))
    plain, jittered = Augment(60, 90), Augment(60, 90, scale=(0.2, 1.8))
    sides = []
    for i in range(400):
        a, b = plain(sample, generator(i)), jittered(sample, generator(i))
        assert torch.equal(resize(a, b.masks.size).image, b.image), "mirrored alike"
        sides.append(b.masks.size[1] / 90)
    assert 0.2 <= min(sides) < 0.23 and 1.77 < max(sides) <= 1.8
    counts = np.histogram(sides, bins=4, range=(0.2, 1.8))[0]
    assert (abs(counts - 100) < 35).all(), counts  # four standard deviations
    six = torch.rand(6, generator=generator(7), dtype=torch.float64).tolist()
    assert _draws(generator(7))[:6] == six, "results of earlier versions"


def test_a_jittered_crop_with_masks_and_seeds() -> None:
    """A picture smaller than the crop stays smaller, and `collate` pads it."""
    sample = _sample((60, 90), masks=4)
    small = Augment(60, 90, flip=0, scale=(0.5, 0.5), crop=(64, 64))(sample, generator(0))
    assert small.masks.size == (30, 45) and torch.equal(small.image, resize(sample, (30, 45)).image)
    assert torch.equal(small.masks.words, resize(sample, (30, 45)).masks.words) and sample.seeds is not None
    assert small.seeds is not None and torch.allclose(small.seeds[:, :2], sample.seeds[:, :2] / 2)
    large = Augment(60, 90, flip=0, scale=(2, 2), crop=(64, 64))(sample, generator(0))
    assert large.masks.size == (64, 64) == tuple(large.image.shape[1:])
    batch = collate([small, large])
    assert batch.sizes == [(30, 45), (64, 64)] and batch.images.shape == (2, 3, 64, 64)
    assert not batch.images[0, :, 30:].any() and not batch.images[0, :, :, 45:].any()


@pytest.mark.parametrize(
    "bad",
    [
        {"short": 0},
        {"short": (9, 8)},
        {"long": 0},
        {"flip": 1.5},
        {"rotate_probability": -1},
        {"rotate_degrees": 200},
        {"crop": (0, 4)},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
        {"scale": (1.0, 11.0)},
        {"scale": (float("nan"), 1.0)},
    ],
)
def test_bad_augment(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"Augment: {next(iter(bad))}"):
        Augment(**{"short": 8, "long": 8, **bad})


def test_collate() -> None:
    a, b = _sample((60, 90), 2), _sample((33, 40), 3, seed=1)
    batch = collate([a, b])
    assert batch.images.shape == (2, 3, 64, 96) and batch.masks.size == (64, 96) and len(batch) == 2
    for i, sample in enumerate((a, b)):
        h, w = sample.masks.size
        wanted = (sample.image.double() - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD)[:, None, None]
        assert torch.allclose(batch.images[i, :, :h, :w].double(), wanted, atol=1e-5)
        assert not batch.images[i, :, h:].any() and not batch.images[i, :, :, w:].any()
        dense = batch.masks[i].to_dense()
        assert torch.equal(dense[: len(sample.masks), :h, :w], sample.masks.to_dense())
        assert dense.sum() == sample.masks.area().sum()
        assert batch.labels[i, : len(sample.masks)].tolist() == sample.labels.tolist()
        assert batch.seeds is not None and torch.equal(batch.seeds[i, : len(sample.masks)], sample.seeds)
    assert batch.counts.tolist() == [2, 3] and not batch.labels[0, 2:].any()
    assert batch.sizes == batch.original_sizes == [(60, 90), (33, 40)]
    assert batch.image_ids == [9, 9] and batch.names == ["a.png", "a.png"]


def test_collate_to_fixed_shapes() -> None:
    batch = collate([_sample(masks=4), _sample(masks=0)], pad_to=(64, 128), max_masks=3)
    assert batch.images.shape == (2, 3, 64, 128) and batch.masks.shape == (2, 3) and batch.counts.tolist() == [3, 0]
    assert batch.labels.tolist() == [[0, 1, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"pad_to=\(32, 128\), got 60x90 from a.png"):
        collate([_sample()], pad_to=(32, 128))


def test_collate_of_little() -> None:
    none = collate([])
    assert len(none) == 0 and none.images.shape == (0, 3, 32, 32) and none.masks.shape == (0, 0)
    bare = collate([replace(_sample(masks=0), seeds=None)])
    assert bare.masks.shape == (1, 0) and bare.seeds is None and bare.counts.tolist() == [0]
    with pytest.raises(ValueError, match="either all samples must have seeds"):
        collate([_sample(), replace(_sample(), seeds=None)])
    assert collate([_sample()], divisor=1).images.shape == (1, 3, 60, 90)

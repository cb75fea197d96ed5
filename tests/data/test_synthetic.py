"""Synthetic scenes: the same on every machine, masks of the visible parts, and files that pycocotools reads."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from sprompt.data.errors import DataError
from sprompt.data.synthetic import CLASSES, COLOURS, SHAPES, scene, write_scenes

_SIDE = (
    2 * 0.32 * np.tan(np.pi / 5)
)  # side of the star's pentagon; a tip of height side / 2 · tan 72° stands on each side
STAR = 5 * _SIDE * 0.32 / 2 + 5 * _SIDE**2 * np.tan(2 * np.pi / 5) / 4


def test_a_scene_is_the_same_on_every_machine() -> None:
    a = scene(3, 7, (96, 128))
    content = a.image.numpy().tobytes() + a.masks.numpy().tobytes() + bytes(a.labels.tolist())
    assert zlib.crc32(content) == 3184578734
    torch.rand(3)  # global random state must not matter
    b = scene(3, 7, (96, 128))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(scene(3, 8, (96, 128)).image, a.image)
    assert not torch.equal(scene(4, 7, (96, 128)).image, a.image)


def test_masks_are_what_is_seen() -> None:
    classes = set()
    counts = set()
    for index in range(40):
        image, masks, labels = scene(0, index, (80, 100))
        assert image.shape == (3, 80, 100) and image.dtype == torch.uint8
        assert masks.shape == (len(labels), 80, 100) and masks.dtype == torch.bool
        assert masks.sum(0).max() <= 1, "what is in front hides what is behind"
        assert (masks.flatten(1).sum(1) >= 12).all()
        classes |= set(labels.tolist())
        counts.add(len(labels))
    assert classes == set(range(len(CLASSES))) and counts <= set(range(1, 7)) and {2, 6} <= counts


def test_objects_differ_from_the_ground() -> None:
    """The mean colours of an object and of the ground differ, so that objects can be learned."""
    apart = []
    for index in range(20):
        image, masks, _ = scene(1, index)
        ground = image[:, ~masks.any(0)].double().mean(1)
        apart += [float((image[:, m].double().mean(1) - ground).abs().sum()) for m in masks]
    assert np.median(apart) > 150 and np.percentile(apart, 5) > 60


def test_likeness_gives_objects_the_looks_of_their_class() -> None:
    """With likeness 1 the mean colour of an object tells its class; with likeness 0 it does so only by chance."""
    for likeness, low, high in ((0.0, 0.05, 0.4), (1.0, 0.7, 1.0)):
        right = []
        for index in range(40):
            image, masks, labels = scene(2, index, (96, 96), likeness)
            for mask, label in zip(masks, labels.tolist(), strict=True):
                mean = image[:, mask].double().mean(1).numpy() / 255
                right.append(int(((np.array(COLOURS) - mean) ** 2).sum(1).argmin()) == label)
        assert low < np.mean(right) <= high, likeness
    a, b = scene(2, 0, (96, 96)), scene(2, 0, (96, 96), 1.0)
    assert torch.equal(a.labels[:1], b.labels[:1]) and not torch.equal(a.image, b.image)


@pytest.mark.parametrize(
    ("shape", "share"),  # of the square of side 2, by geometry
    [
        ("disc", np.pi * 0.9 / 4),
        ("square", 1.4**2 / 4),
        ("triangle", 3 * np.sqrt(3) / 4 / 4),
        ("star", STAR / 4),
        ("cross", (4 * 0.6 * 0.92 - 0.36) / 4),
        ("ring", np.pi * 0.65 / 4),
    ],
)
def test_areas_of_shapes(shape: str, share: float) -> None:
    grid = (np.arange(1000) + 0.5) / 500 - 1
    u, v = np.meshgrid(grid, grid)
    assert abs(SHAPES[shape](u, v).mean() - share) < 0.004


def test_files(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, seed=5, size=(48, 64))
    coco = COCO(str(tmp_path / "instances.json"))
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
    for index in range(3):
        image, masks, labels = scene(5, index, (48, 64))
        record = coco.loadImgs([index])[0]
        stored = np.asarray(Image.open(tmp_path / "images" / record["file_name"]))
        assert (stored == image.permute(1, 2, 0).numpy()).all() and (record["height"], record["width"]) == (48, 64)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
        assert [a["category_id"] - 1 for a in annotations] == labels.tolist()
        for mask, a in zip(masks.numpy(), annotations, strict=True):
            assert (coco.annToMask(a) == mask).all() and a["area"] == mask.sum() and a["iscrowd"] == 0
            ys, xs = np.nonzero(mask)
            assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    write_scenes(tmp_path, 2, size=(48, 48))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    write_scenes(tmp_path, 2, size=(48, 48))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")} == before
    (tmp_path / "images" / "000001.png").unlink()
    write_scenes(tmp_path, 2, size=(48, 48))  # as after a kill
    assert len(list((tmp_path / "images").iterdir())) == 2
    with pytest.raises(DataError, match=r"000000\.png: is another picture"):
        write_scenes(tmp_path, 2, seed=1, size=(48, 48))
    with pytest.raises(DataError, match=r"instances\.json: holds other labels"):
        write_scenes(tmp_path, 1, size=(48, 48))


def test_too_small() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        scene(0, 0, (16, 64))


def test_classes_and_labels(tmp_path: Path) -> None:
    """Objects have the classes asked for; the file has the labels asked for, under the same category ids."""
    write_scenes(tmp_path, 30, seed=6, size=(48, 64), classes=["ring", "disc", "star"], labelled=["star", "ring"])
    coco = COCO(str(tmp_path / "instances.json"))
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {4: "star", 6: "ring"}
    drawn = []
    for index in range(30):
        image, masks, labels = scene(6, index, (48, 64), classes=["ring", "disc", "star"])
        stored = np.asarray(Image.open(tmp_path / "images" / f"{index:06d}.png"))
        assert (stored == image.permute(1, 2, 0).numpy()).all()
        drawn += labels.tolist()
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
        expected = [(label + 1, mask) for label, mask in zip(labels.tolist(), masks.numpy(), strict=True) if label]
        assert [a["category_id"] for a in annotations] == [number for number, _ in expected]
        assert all((coco.annToMask(a) == m).all() for a, (_, m) in zip(annotations, expected, strict=True))
    assert set(drawn) == {0, 3, 5} and min(map(drawn.count, (0, 3, 5))) > len(drawn) / 5


def test_unknown_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes must be some of .*, got \['oval'\]"):
        scene(0, 0, classes=["oval"])
    with pytest.raises(ValueError, match=r"classes must be some of .*, got \[\]"):
        write_scenes(tmp_path, 1, labelled=[])

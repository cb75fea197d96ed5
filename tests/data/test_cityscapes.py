"""Cityscapes in miniature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sprompt.data.cityscapes import read_cityscapes
from sprompt.data.errors import DataError

H, W = 24, 40


def _write(root: Path, city: str, name: str, values: np.ndarray, split: str = "train") -> None:
    pictures, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (pictures, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (values.shape[1], values.shape[0])).save(pictures / f"{name}_leftImg8bit.png")
    Image.fromarray(values).save(labels / f"{name}_gtFine_instanceIds.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    first = np.full((H, W), 7, np.uint16)  # road
    first[2:9, 3:11] = 26000  # a car
    first[5:20, 9:15] = 26001  # another car in front of it
    first[:3, 30:] = 24  # a group of persons
    first[rng.random((H, W)) < 0.1] = 33012  # a bicycle of many parts
    first[20:, 20:30] = 29000  # a caravan, which is not one of the eight classes
    _write(tmp_path, "bonn", "bonn_000000_000019", first)
    _write(tmp_path, "aachen", "aachen_000001_000019", np.full((H, W), 23, np.uint16))  # sky
    return tmp_path


def test_instances(root: Path) -> None:
    dataset = read_cityscapes(root, "train")
    names = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert dataset.classes == names and dataset.category_ids == [24, 25, 26, 27, 28, 31, 32, 33]
    assert dataset.image_ids == [2] and "aachen" in dataset.problems[-1]  # the first picture in order has no object
    sample = dataset[0]
    path = root / "gtFine/train/bonn/bonn_000000_000019_gtFine_instanceIds.png"
    values = np.asarray(Image.open(path))
    assert [names[label] for label in sample.labels.tolist()] == ["car", "car", "bicycle"]
    for mask, value in zip(sample.masks.to_dense().numpy(), (26000, 26001, 33012), strict=True):
        assert (mask == (values == value)).all() and mask.any()


def test_groups_are_crowds(root: Path) -> None:
    truth = read_cityscapes(root, "train", keep_empty=True).ground_truth()
    assert [i["file_name"].split("/")[0] for i in truth["images"]] == ["aachen", "bonn"]
    crowd, *others = truth["annotations"]
    assert crowd["iscrowd"] == 1 and crowd["category_id"] == 24 and crowd["bbox"] == [30, 0, 10, 3]
    values = np.asarray(Image.open(root / "gtFine/train/bonn/bonn_000000_000019_gtFine_instanceIds.png"))
    assert [a["area"] for a in truth["annotations"]] == [(values == v).sum() for v in (24, 26000, 26001, 33012)]
    assert [a["iscrowd"] for a in others] == [0, 0, 0]


def test_an_instance_at_both_ends(tmp_path: Path) -> None:
    values = np.zeros((H, W), np.uint16)
    values[0, 0] = values[-1, -1] = 24001
    values[:, 5] = values[:, 6] = 25003
    _write(tmp_path, "a", "a", values)
    dense = read_cityscapes(tmp_path, "train")[0].masks.to_dense().numpy()
    assert (dense[0] == (values == 24001)).all() and (dense[1] == (values == 25003)).all()


def test_broken(root: Path) -> None:
    with pytest.raises(DataError, match=r"leftImg8bit/test: must have pictures CITY/\*_leftImg8bit\.png"):
        read_cityscapes(root, "test")
    labels = root / "gtFine/train/bonn/bonn_000000_000019_gtFine_instanceIds.png"
    Image.new("RGB", (W, H)).save(labels)
    with pytest.raises(DataError, match=r"instanceIds\.png: must have one number of 16 bits a pixel, got 3"):
        read_cityscapes(root, "train")
    Image.new("L", (W, H + 1)).save(labels)
    with pytest.raises(DataError, match=r"instanceIds\.png: must have the size of .*leftImg8bit\.png, got 25x40"):
        read_cityscapes(root, "train")
    labels.write_bytes(b"no")
    with pytest.raises(DataError, match=r"instanceIds\.png: is not a picture"):
        read_cityscapes(root, "train")
    labels.unlink()
    with pytest.raises(DataError, match=r"instanceIds\.png: no such file"):
        read_cityscapes(root, "train")

"""Usual faults of users' COCO files: boxes without masks, classes that share a name, pictures that EXIF turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.engine.evaluators.coco import coco_metrics

SIZES = [(20, 30), (33, 17), (8, 8)]
TRIANGLE = [[0, 0, 6, 0, 6, 6]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (h, w) in enumerate(SIZES):
        Image.new("RGB", (w, h)).save(tmp_path / f"{i}.png")
    return tmp_path


def _opened(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None, **options: Any) -> CocoDataset:
    """Two objects in each picture, changed."""
    images = [{"id": 100 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    annotations = [
        {
            "id": 11 + i,
            "image_id": 100 + i // 2,
            "category_id": (7, 3, 90)[i % 3],
            "segmentation": TRIANGLE,
            "bbox": [0, 0, 6, 6],
        }
        for i in range(6)
    ]
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "owl"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    change(data)
    (folder / "a.json").write_text(json.dumps(data))
    return CocoDataset(folder, folder / "a.json", **options)


def test_labels_of_an_unturned_picture_are_refused(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (17, 33)).save(folder / "1.png", exif=exif)  # stored as the file says, shown turned
    Image.new("RGB", (8, 8)).save(folder / "2.png", exif=exif)
    dataset = _opened(folder)
    said = r"1\.png: must have the 33x17 pixels that .*a\.json says, got 17x33 after its EXIF orientation is applied; the labels"
    with pytest.raises(DataError, match=said):
        dataset[1]
    assert dataset[2].size == (8, 8)
    Image.new("RGB", (33, 17)).save(folder / "1.png", exif=exif)
    assert dataset[1].size == (33, 17)


def test_boxes_without_masks(folder: Path) -> None:
    def boxed(places: list[int]) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            for place in places:
                data["annotations"][place]["segmentation"] = []
            del data["annotations"][places[0]]["segmentation"]

        return change

    some = _opened(folder, boxed([0, 3]))
    said = "2 annotations with a box but without a mask are left out (annotation ids 11, 14)"
    assert some.problems[0] == f"{folder / 'a.json'}: {said}" and some.image_ids == [100, 101, 102]
    (folder / "list.txt").write_text("2.png\n")
    for keep in (False, True):
        with pytest.raises(DataError, match=r"must have masks, got only boxes \(annotations: 6\); export"):
            _opened(folder, boxed([0, 1, 2, 3, 4, 5]), keep_empty=keep)
        with pytest.raises(DataError, match=r"got only boxes \(annotations: 2\)"):
            _opened(folder, boxed([4, 5]), keep_empty=keep, only=folder / "list.txt")

    def nothing(data: dict[str, Any]) -> None:
        for annotation in data["annotations"]:
            del annotation["segmentation"], annotation["bbox"]

    assert "6 annotations without a mask are left out" in _opened(folder, nothing, keep_empty=True).problems[0]


def test_categories_of_one_name_are_told_apart(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        names = {7: "cat", 3: "cat", 90: "cat (3)"}
        for category in data["categories"]:
            category["name"] = names[category["id"]]

    dataset = _opened(folder, change, keep_empty=True)
    assert dataset.classes == ["cat (3) (3)", "cat (7)", "cat (3) (90)"] and dataset.category_ids == [3, 7, 90]
    assert "3 categories share a name and are called cat (3) (3), cat (7), cat (3) (90)" in dataset.problems[0]
    assert _opened(folder, change, categories=["cat (7)"]).category_ids == [7]
    with pytest.raises(DataError, match=r"must be some of cat \(3\) \(3\), cat \(7\), .* got cat;"):
        _opened(folder, change, categories=["cat"])
    truth = dataset.ground_truth()
    assert list(coco_metrics(truth, [])["per_class"]) == dataset.classes

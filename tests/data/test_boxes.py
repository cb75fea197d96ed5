"""Boxes of COCO files: only boxes are read, and every box that cannot be used is counted and named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt.data import boxes as rules
from sprompt.data.boxes import Box, BoxedPictures, read_boxes
from sprompt.data.errors import DataError
from sprompt.data.pictures import png

PICTURES = [
    {"id": 7, "file_name": "a.png", "height": 60, "width": 80},
    {"id": 3, "file_name": "b.png", "height": 20, "width": 30},
]
CATEGORIES = [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for picture in PICTURES:
        size = (picture["height"], picture["width"])
        (tmp_path / str(picture["file_name"])).write_bytes(png(torch.full((3, *size), 90, dtype=torch.uint8)))
    return tmp_path


def read(folder: Path, *annotations: dict[str, Any]) -> BoxedPictures:
    full = [{"id": place, "image_id": 7, "category_id": 1} | own for place, own in enumerate(annotations)]
    text = json.dumps({"images": PICTURES, "annotations": full, "categories": CATEGORIES})
    return read_boxes(folder, json.loads(text), "boxes.json")


def test_boxes_by_picture(folder: Path) -> None:
    found = read(folder, {"bbox": [1.5, 2, 10, 20]}, {"bbox": [0, 0, 4, 5], "image_id": 3}, {"bbox": [70, 50, 10, 10]})
    assert found.boxes == [[Box(1.5, 2, 11.5, 22, 200, 0), Box(70, 50, 80, 60, 100, 2)], [Box(0, 0, 4, 5, 20, 1)]]
    assert found.categories == [(1, "dog"), (2, "cat")] and found.problems == []
    assert found.image(1).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (None, rules.NO_BOX),
        ([1, 2, 3], rules.NO_BOX),
        ([1, 2, 3, "4"], rules.NO_BOX),
        ([1, 2, 3, True], rules.NO_BOX),
        ([math.nan, 2, 10, 10], rules.NO_BOX),
        ([1, 2, math.inf, 10], rules.NO_BOX),
        ([10**400, 2, 10, 10], rules.NO_BOX),
        ([1, 2, 2, 10], rules.SMALL),
        ([1, 2, 10, 1.9], rules.SMALL),
        ([1, 2, -10, 10], rules.SMALL),
        ([1, 2, 0, 0], rules.SMALL),
        ([-8, 2, 9.5, 10], rules.SMALL),  # 1.5 pixels of it are inside
        ([80, 2, 10, 10], rules.OUTSIDE),
        ([-20, 2, 10, 10], rules.OUTSIDE),
        ([1, 60.5, 10, 10], rules.OUTSIDE),
        ([1e308, 1e308, 1e308, 1e308], rules.OUTSIDE),
    ],
)
def test_boxes_that_cannot_be_used_are_named(folder: Path, box: Any, why: str) -> None:
    found = read(folder, {"bbox": [1, 1, 9, 9]}, {"bbox": box}, {"bbox": box})
    assert found.boxes[0] == [Box(1, 1, 10, 10, 81, 0)]
    assert found.unusable[why] == [1, 2]
    assert found.problems == [f"boxes.json: 2 annotations {why} are left out (annotation ids 1, 2)"]


def test_boxes_are_clipped_to_their_picture(folder: Path) -> None:
    found = read(folder, {"bbox": [-5, -5, 20, 10]}, {"bbox": [70, 55, 1e300, 1e300]}, {"bbox": [-1e9, -1e9, 2e9, 2e9]})
    assert found.boxes[0] == [Box(0, 0, 15, 5, 75, 0), Box(70, 55, 80, 60, 50, 1), Box(0, 0, 80, 60, 4800, 2)]


def test_a_box_inside_keeps_its_stated_size(folder: Path) -> None:
    """0.1 + 3 has a rounding error; the sides and the area must not."""
    assert read(folder, {"bbox": [0.1, 0.7, 32, 32]}).boxes[0][0].area == 1024
    assert read(folder, {"bbox": [0.1, 0.7, 2, 32]}).unusable[rules.SMALL] == [0]


def test_crowds_and_annotations_without_a_picture(folder: Path) -> None:
    found = read(folder, {"bbox": [1, 1, 9, 9], "iscrowd": 1}, {"bbox": [1, 1, 9, 9], "image_id": 99})
    assert found.boxes == [[], []]
    assert found.unusable[rules.CROWD] == [0] and found.unusable[rules.HOMELESS] == [1]


@pytest.mark.parametrize(
    "segmentation", [None, [], "garbage", [[1, 2]], {"counts": "???", "size": [-1, 10**30]}, [[math.nan] * 8]]
)
def test_segmentations_are_never_read(folder: Path, segmentation: Any) -> None:
    with_one = read(folder, {"bbox": [1, 1, 9, 9], "segmentation": segmentation, "area": "x"})
    assert with_one.boxes == read(folder, {"bbox": [1, 1, 9, 9]}).boxes and with_one.problems == []


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (
            [{"id": 5, "bbox": [1, 1, 9, 9]}, {"id": 5, "bbox": [1, 1, 9, 9]}],
            "ids of annotations must be unique, got twice 5",
        ),
        ([{"category_id": 9, "bbox": [1, 1, 9, 9]}], "categories of annotations must be in the list"),
        ([{"image_id": "7", "bbox": [1, 1, 9, 9]}], "must have a whole number as image_id"),
    ],
)
def test_files_that_are_refused(folder: Path, annotations: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(folder, *annotations)


def test_missing_pictures_are_refused_if_they_have_boxes(folder: Path) -> None:
    (folder / "b.png").unlink()
    assert read(folder, {"bbox": [1, 1, 9, 9]}).boxes[1] == []
    with pytest.raises(DataError, match=r"1 of 2 are missing: b.png"):
        read(folder, {"bbox": [1, 1, 9, 9]}, {"bbox": [1, 1, 9, 9], "image_id": 3})


def test_a_picture_of_another_size_is_refused(folder: Path) -> None:
    (folder / "a.png").write_bytes(png(torch.zeros(3, 61, 80, dtype=torch.uint8)))
    with pytest.raises(DataError, match=r"must have the 60x80 pixels that boxes\.json says, got 61x80"):
        read(folder, {"bbox": [1, 1, 9, 9]}).image(0)

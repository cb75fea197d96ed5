"""Parts of a dataset: their sizes, their pictures, and lists for another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.subsets import by_fraction, from_list, sample


def _dataset(folder: Path, number: int = 20, keep_empty: bool = False) -> CocoDataset:
    """Every fourth picture has no annotation; ids are not places."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    images = [{"id": 1000 - i, "file_name": "a.png", "height": 8, "width": 8} for i in range(number)]
    annotations = [
        {"id": i + 1, "image_id": 1000 - i, "category_id": 1, "area": 25, "segmentation": [[1, 1, 6, 1, 6, 6, 1, 6]]}
        for i in range(number)
        if i % 4
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    return CocoDataset.from_dict(folder, data, "boxes.json", keep_empty=keep_empty)


@pytest.mark.parametrize(
    ("total", "fraction", "number"),
    [(118287, 0.1, 11828), (118287, 0.05, 5914), (100, 0.29, 29), (100, 1, 100), (10, 0.1, 1), (1000, 0.001, 1)],
)
def test_how_many(total: int, fraction: float, number: int) -> None:
    drawn = sample(total, fraction, 3)
    assert len(drawn) == len(set(drawn)) == number and drawn == sorted(drawn)
    assert drawn[0] >= 0 and drawn[-1] < total


def test_which() -> None:
    assert sample(1000, 0.1, 1) == sample(1000, 0.1, 1) != sample(1000, 0.1, 2)
    assert set(sample(1000, 0.05, 1)) < set(sample(1000, 0.1, 1))
    assert 400 < sum(sample(1000, 0.1, 1)) / 100 < 600


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
        sample(10, fraction)


def test_too_small_fraction() -> None:
    with pytest.raises(ValueError, match=r"0\.05 of 10 pictures must be at least one"):
        sample(10, 0.05)


def test_fraction_is_of_the_file(tmp_path: Path) -> None:
    """The fraction is of all pictures of the file, as in the paper, not of the pictures with masks."""
    drawn = sample(20, 0.5, 4)
    part = by_fraction(_dataset(tmp_path), 0.5, 4)
    assert part.positions == [p for p in drawn if p % 4] and len(part) < 10
    assert by_fraction(_dataset(tmp_path, keep_empty=True), 0.5, 4).positions == drawn


def test_lists_hold_places(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(json.dumps({"10.0": {"1": [9, 4, 2, 17]}, "5.0": {"3": [1]}}))
    dataset = _dataset(tmp_path)
    assert from_list(dataset, path).image_ids == [998, 991, 983]  # 4 has no mask
    assert from_list(dataset, path, percent="5.0", run="3").image_ids == [999]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"5.0": {"1": [1]}}, r"must have the percentage '10\.0', got 5\.0"),
        ({"10.0": {"2": [1]}}, "must have the run '1', got 2"),
        ([1, 2], "must have the percentage"),
        ({"10.0": {"1": [1, 20]}}, r"different places below 20, the pictures of boxes\.json, got 20"),
        ({"10.0": {"1": [-1]}}, "got -1"),
        ({"10.0": {"1": [3, 3]}}, "got one of them twice"),
        ({"10.0": {"1": [1.5]}}, "must be a list of whole numbers"),
        ({"10.0": {"1": 5}}, "must be a list of whole numbers"),
    ],
)
def test_bad_lists(tmp_path: Path, table: Any, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=message) as caught:
        from_list(_dataset(tmp_path), path)
    assert str(caught.value).startswith(str(path))

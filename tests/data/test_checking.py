"""The check of a dataset finds every broken picture and mask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sprompt.data import checking
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.transforms import Augment

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]  # 10 x 10 pixels


def _made(folder: Path, number: int = 5, colour: int = 0, **changes: Any) -> CocoDataset:
    """`number` different pictures of 20 x 40 pixels, each with one square; `changes` are segmentations by picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(number):
        Image.new("RGB", (40, 20), (colour, i, 7)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 20, "width": 40})
        segmentation = changes.get(f"mask{i}", SQUARE)
        if segmentation is not None:
            annotations.append(
                {"id": 10 + i, "image_id": i, "category_id": 1 + i % 2, "area": 100, "segmentation": segmentation}
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "owl"}]
    data = {"images": images, "annotations": annotations + changes.get("more", []), "categories": categories}
    (folder / "labels.json").write_text(json.dumps(data))
    return CocoDataset(folder / "images", folder / "labels.json", keep_empty=True)


def _texts(findings: list[checking.Finding]) -> dict[str, bool]:
    return {finding.text: finding.spoils for finding in findings}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_good_set(tmp_path: Path, workers: int) -> None:
    dataset = _made(tmp_path)
    told: list[tuple[int, int]] = []
    seen = checking.read_all(dataset, workers=workers, progress=lambda done, of: told.append((done, of)))
    assert [(one.name, one.size, one.labels, one.areas) for one in seen] == [
        (str(tmp_path / f"images/{i}.png"), (20, 40), [i % 2], [100]) for i in range(5)
    ]
    assert len({one.digest for one in seen}) == 5 and not any(one.faults for one in seen)
    assert told == [(i + 1, 5) for i in range(5)]
    assert _texts(checking.of_labels(dataset, seen)) == {"classes without an object: 1": False}
    assert checking.by_class(dataset, seen) == {"cat": (3, 3), "dog": (2, 2), "owl": (0, 0)}
    checking.refuse_broken(dataset, "val", seen)


def test_every_fault_is_found_and_named(tmp_path: Path) -> None:
    crowd = {"id": 90, "image_id": 3, "category_id": 1, "iscrowd": 1, "area": 9, "segmentation": [[0, 0, 1, "x", 9, 9]]}
    outside = [[50, 2, 60, 2, 60, 12]]  # near the picture, but not in it
    dataset = _made(tmp_path, 7, mask2=outside, mask5=None, more=[crowd])
    (tmp_path / "images/0.png").write_bytes(b"cut off")
    whole = (tmp_path / "images/6.png").read_bytes()
    (tmp_path / "images/6.png").write_bytes(whole[: len(whole) - 30])  # its header is whole
    Image.new("RGB", (41, 20)).save(tmp_path / "images/1.png")
    shutil.copy(tmp_path / "images/3.png", tmp_path / "images/4.png")
    seen = checking.read_all(dataset, workers=0)
    assert [len(one.faults) for one in seen] == [1, 1, 0, 1, 0, 0, 1]
    assert "0.png: is not a picture" in str(seen[0].unreadable) and "6.png: is a broken picture" in str(
        seen[6].unreadable
    )
    assert "1.png: must have the 20x40 pixels" in str(seen[1].misfit) and seen[1].size == (20, 41)
    assert "labels.json: annotation 90: polygons must be" in seen[3].broken[0] and seen[3].areas == [100]
    assert seen[2].empty == [12] and seen[2].areas == [] and seen[5].labels == []
    assert _texts(checking.of_labels(dataset, seen)) == {
        "pictures that cannot be read: 2": True,
        "pictures of another size than their record: 1": True,
        "masks that cannot be decoded: 1": True,
        "groups of pictures with the same content: 1": False,
        f"{tmp_path}/labels.json: 1 annotation of crowds is left out (annotation id 90)": False,
        "masks without a pixel in their picture (they are left out): 1 (annotation ids 12)": False,
        "pictures without an object: 2": False,
        "classes without an object: 1": False,
    }
    with pytest.raises(
        DataError, match=r"--val: every picture and mask must be readable, got 4 of .*0\.png.*and 1 more$"
    ):
        checking.refuse_broken(dataset, "val", seen)


def test_data_and_val_together(tmp_path: Path) -> None:
    data, val = _made(tmp_path / "data"), _made(tmp_path / "val", 3, colour=9, mask1=None)
    shutil.copy(tmp_path / "data/images/4.png", tmp_path / "val/images/0.png")
    seen, seen_val = (checking.read_all(one, workers=0) for one in (data, val))
    every = checking.of_both(data, seen, val, seen_val)
    assert [(finding.text.split(":")[0], finding.spoils) for finding in every] == [
        ("classes of data without an object in val, so that their AP cannot be measured", False),
        ("pictures of val with the content of a picture of data, so that the AP will be too high", True),
    ]
    assert every[0].names == ["dog"] and every[1].names == [
        f"{tmp_path}/val/images/0.png = {tmp_path}/data/images/4.png"
    ]
    val.classes = ["cat", "owl", "dog"]
    assert checking.of_both(data, seen, val, seen_val)[0].text.endswith("but their order differs")
    val.classes = ["cat", "dog", "eel"]
    assert checking.of_both(data, seen, val, seen_val)[0].text.endswith("but only one of them has owl, eel")


def test_sizes_and_queries(tmp_path: Path) -> None:
    more = [{"id": 50, "image_id": 1, "category_id": 1, "area": 9, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}]
    seen = checking.read_all(_made(tmp_path, more=more), workers=0)
    text = checking.sizes(seen, Augment(10, 1000))
    assert "median 1, at most 2" in text and "6 small (below 1024 pixels), 0 medium, 0 large" in text
    assert "(short side 10, long side at most 1000): 4 pixels, in" in text and "images/1.png" in text
    assert checking.crowded(seen, 2) is None
    assert "1, where a query finds at most one object: 1 (" in str(checking.crowded(seen, 1))


def test_pictures_without_labels(tmp_path: Path) -> None:
    _made(tmp_path)
    (tmp_path / "images/1.png").write_bytes(b"")
    shutil.copy(tmp_path / "images/3.png", tmp_path / "images/4.png")
    seen = checking.read_all(PictureFolder(tmp_path / "images"))
    every = checking.of_pictures(seen)
    assert [finding.text for finding in every] == [
        "pictures that cannot be read: 1",
        "groups of pictures with the same content: 1",
    ]
    assert every[1].names == [f"{tmp_path}/images/3.png = {tmp_path}/images/4.png"]

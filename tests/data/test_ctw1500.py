"""CTW1500 in miniature: the three forms of a text region; every other line is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sprompt.data.ctw1500 import read_ctw1500
from sprompt.data.errors import DataError

H, W = 60, 100
# fourteen corners around an arc: seven above from the left, seven below from the right
ARC = [10, 30, 20, 20, 30, 14, 40, 12, 50, 14, 60, 20, 70, 30, 62, 38, 54, 30, 47, 26, 40, 24, 33, 26, 26, 30, 18, 38]
BOX = [5, 40, 30, 40, 30, 55, 5, 55]


def _folders(tmp_path: Path, labels: dict[str, str]) -> tuple[Path, Path]:
    images, folder = tmp_path / "images", tmp_path / "labels"
    images.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    for name, text in labels.items():
        (folder / name).write_text(text, encoding="utf-8")
        Image.new("RGB", (W, H)).save(images / f"{Path(name).stem[-4:]}.jpg")
    return images, folder


def _text(values: list[int]) -> str:
    return ",".join(map(str, values))


def _offsets(values: list[int]) -> str:
    """The line of a polygon in the first release."""
    xs, ys = values[::2], values[1::2]
    box = [min(xs), min(ys), max(xs), max(ys)]
    return _text(box + [v - box[i % 2] for i, v in enumerate(values)])


XML = """<?xml version="1.0"?><Annotations><image file="1003.jpg">
<box height="26" left="10" top="12" width="60"><label>AT, &amp; ÄÖ</label><segs>{}</segs><pts x="1" y="2" /></box>
<box height="15" left="5" top="40" width="25"><label /><segs>{},</segs></box></image></Annotations>"""


def _truth(values: list[int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in values]], H, W))).astype(bool)


def test_three_ways_to_write_the_same(tmp_path: Path) -> None:
    images, labels = _folders(
        tmp_path,
        {
            "0001.txt": f"{_offsets(ARC)}\n\n",
            "0001002.txt": f"{_text(ARC)},####Wörter, und mehr\r\n{_text(BOX)}, ####\r\n",
            "1003.xml": XML.format(_text(ARC), _text(BOX)),
        },
    )
    dataset = read_ctw1500(images, labels)
    assert dataset.classes == ["text"] and dataset.image_ids == [1, 2, 3] and not dataset.problems
    arc, box = _truth(ARC), _truth(BOX)
    for i, wanted in enumerate([[arc], [arc, box], [arc, box]]):
        sample = dataset[i]
        assert (sample.masks.to_dense().numpy() == np.stack(wanted)).all() and not sample.labels.any()
    areas = [a["area"] for a in dataset.ground_truth()["annotations"]]
    assert areas == [arc.sum(), arc.sum(), box.sum(), arc.sum(), box.sum()]


def test_pictures_without_text(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, {"0001.txt": "", "0002.txt": f"{_text(BOX)},####"})
    assert read_ctw1500(images, labels).image_ids == [2]
    assert read_ctw1500(images, labels, keep_empty=True).image_ids == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("0001.txt", f"{_offsets(ARC)}\n{_text(ARC)}\n", r"0001\.txt: line 2: must have 32 numbers, .* got 28"),
        ("0001.txt", "1,2,3,4,####no", r"line 1: must have x,y of at least 3 corners before ####, got 4"),
        ("0001.txt", "1,2,3,4,5,6,7,####no", "got 7 numbers"),
        ("0001.txt", "1,2,x,4,5,6,####no", "line 1: must have whole numbers between commas, got '1,2,x,4,5,6'"),
        ("0001.txt", "1,2,,4,5,6,####no", "whole numbers between commas"),
        ("0001.txt", "####no", "got 0 numbers"),
        ("1001.xml", "<Annotations><image>", r"1001\.xml: must be XML, but"),
        ("1001.xml", "<a><box><segs>1,2,3,4</segs></box></a>", "box 1: must have x,y of at least 3 corners in <segs>, got 4"),
        ("1001.xml", "<a><box><label>no</label></box></a>", "box 1: .* got 0 numbers"),
        ("1001.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "got entities of its own"),
    ],
)  # fmt: skip
def test_other_lines_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    images, labels = _folders(tmp_path, {name: text})
    with pytest.raises(DataError, match=message) as caught:
        read_ctw1500(images, labels)
    assert str(caught.value).startswith(str(labels / name))


def test_far_corners(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, {"0001.txt": f"1,2,3,4,5,{10**300},####no"})
    with pytest.raises(DataError, match=r"annotation 1: corners must lie in or near the picture"):
        read_ctw1500(images, labels)


def test_missing(tmp_path: Path) -> None:
    images, labels = _folders(tmp_path, {"0001.txt": ""})
    Image.new("RGB", (W, H)).save(images / "0009.jpg")
    with pytest.raises(DataError, match=r"0009\.jpg, but there is no 0009\.txt, 0009\.xml, 0000009\.txt"):
        read_ctw1500(images, labels)
    with pytest.raises(DataError, match="must be a folder of pictures"):
        read_ctw1500(tmp_path / "none", labels)
    with pytest.raises(DataError, match="must hold pictures"):
        read_ctw1500(labels, labels)
    (labels / "0001.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_ctw1500(images, labels)

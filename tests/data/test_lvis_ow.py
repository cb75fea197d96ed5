"""LVIS-OW from small files of the same form: which pictures and labels go where, ids, duplicates, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprompt import cli
from sprompt.data import lvis
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.lvis_ow import MANY_INSTANCES, TRAIN, VAL, build

PERSON, DOG = 793, 378  # of COCO's classes 1 and 18
BANNER = 50  # known for its number of instances
SEEN, UNSEEN = 1, 13
FREQUENCIES = {PERSON: "f", DOG: "f", BANNER: "f", SEEN: "c", 2: "f", UNSEEN: "r", 17: "r"}


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def label(own: int, image: int, category: int, x: int = 0, y: int = 0, side: int = 20) -> dict[str, Any]:
    return {
        "id": own, "image_id": image, "category_id": category, "area": side * side, "bbox": [x, y, side, side],
        "segmentation": square(x, y, side),
    }  # fmt: skip


def picture(own: int, folder: str = "train2017", **lists: list[int]) -> dict[str, Any]:
    url = f"http://images.cocodataset.org/{folder}/{own:012}.jpg"
    return {"id": own, "height": 64, "width": 80, "coco_url": url, **lists}


def files(folder: Path) -> dict[str, Path]:
    """Picture 1: labels of every group of categories but unseen ones. Picture 2: an unseen object too. Picture 3: nothing
    known. LVIS and COCO share one person of picture 1, whose masks differ a little."""
    categories = [{"id": i, "name": f"name {i}", "frequency": f, "synset": "a.n.01"} for i, f in FREQUENCIES.items()]
    neg = {"neg_category_ids": [UNSEEN, DOG], "not_exhaustive_category_ids": [SEEN]}
    train = {
        "info": {}, "annotations": [
            label(5, 1, PERSON), label(6, 1, PERSON, 50), label(7, 1, BANNER, 30, 30), label(8, 1, SEEN, 5, 5),
            label(9, 2, PERSON), label(10, 2, UNSEEN), label(11, 2, SEEN), label(90, 3, SEEN), label(12, 1, DOG, 30, 0),
        ],
        "categories": categories, "images": [picture(1, **neg), picture(2, **neg), picture(3)], "licenses": [],
    }  # fmt: skip
    val = {
        "categories": categories, "images": [picture(11, "val2017", **neg), picture(12)],
        "annotations": [label(1, 11, UNSEEN), label(2, 11, PERSON), label(3, 12, SEEN)],
    }  # fmt: skip
    coco = {
        "images": [{"id": i, "height": 64, "width": 80, "file_name": f"{i:012}.jpg"} for i in (1, 2, 3, 99)],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 58, "name": "hot dog"}],
        "annotations": [
            label(100, 1, 1, 2, 0), label(101, 1, 1, 0, 40) | {"iscrowd": 1}, label(102, 2, 1), label(103, 3, 18),
            label(104, 99, 1), label(105, 3, 58), label(106, 1, 18, 30, 15), label(107, 3, 1) | {"segmentation": []},
        ],
    }  # fmt: skip
    paths = {}
    for name, content in {"lvis_train": train, "lvis_val": val, "coco_train": coco}.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return paths


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def ids(content: dict[str, Any], key: str = "annotations") -> list[int]:
    return [record["id"] for record in content[key]]


def test_pictures_and_labels_go_where_they_should(tmp_path: Path) -> None:
    built = build(**files(tmp_path), out=tmp_path / "out")
    train, val = read(tmp_path / "out" / TRAIN), read(tmp_path / "out" / VAL)
    assert ids(train, "images") == [1, 3] and ids(val, "images") == [11, 12, 2]
    assert ids(train, "categories") == [BANNER, DOG, PERSON], "the known ones"
    assert ids(val, "categories") == sorted(FREQUENCIES)
    # The person 5 of LVIS is COCO's 100: IoU 18/22. The dogs 12 and 106 overlap by 5 rows of 20: IoU 1/7.
    assert ids(train) == [6, 7, 12, 190, 193, 196], "of LVIS, then of COCO behind 90, the last id of LVIS-train"
    assert [a["category_id"] for a in train["annotations"]] == [PERSON, BANNER, DOG, PERSON, DOG, DOG]
    assert ids(val) == [1, 2, 3, 2_000_009, 2_000_010, 2_000_011], "all labels of picture 2, none of COCO"
    first = train["images"][0]
    assert first["neg_category_ids"] == [UNSEEN, DOG] and first["not_exhaustive_category_ids"] == [SEEN]
    assert first["file_name"] == "train2017/000000000001.jpg"
    assert val["images"][0]["file_name"] == "val2017/000000000011.jpg"
    assert val["categories"][0]["frequency"] == "c"
    assert built.pictures == {"train": 2, "val": 3} and built.moved == 1
    assert (built.from_coco, built.duplicates) == (3, 1)
    assert built.objects == {"train": {"known": 6}, "val": {"known": 2, "seen": 2, "unseen": 2}}
    assert built.categories == {"known": 3, "seen": 2, "unseen": 2}


def test_no_unseen_object_and_no_unknown_label_is_in_training(tmp_path: Path) -> None:
    paths = files(tmp_path)
    build(**paths, out=tmp_path)
    train = read(tmp_path / TRAIN)
    unseen = {a["image_id"] for a in read(paths["lvis_train"])["annotations"] if FREQUENCIES[a["category_id"]] == "r"}
    assert not unseen & set(ids(train, "images"))
    assert {a["category_id"] for a in train["annotations"]} <= {PERSON, DOG, *MANY_INSTANCES}
    assert {a["image_id"] for a in train["annotations"]} <= set(ids(train, "images"))


@pytest.mark.parametrize(("duplicates", "of_lvis"), [("overlap", [6, 7, 12]), ("class", [7]), ("keep", [5, 6, 7, 12])])
def test_duplicates(duplicates: Any, of_lvis: list[int], tmp_path: Path) -> None:
    built = build(**files(tmp_path), out=tmp_path, duplicates=duplicates)
    assert ids(read(tmp_path / TRAIN)) == [*of_lvis, 190, 193, 196]
    assert built.duplicates == 4 - len(of_lvis)


def test_the_files_are_data_sets(tmp_path: Path) -> None:
    build(**files(tmp_path), out=tmp_path)
    for name, folder in ((TRAIN, "train2017"), (VAL, "val2017"), (VAL, "train2017")):
        for own in ids(read(tmp_path / name), "images"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{own:012}.jpg").touch()
    train, val = (CocoDataset(tmp_path, tmp_path / name, keep_empty=True) for name in (TRAIN, VAL))
    assert train.classes == [f"name {i}" for i in (BANNER, DOG, PERSON)] and train.mask_counts == [5, 1]
    assert {c["frequency"] for c in val.ground_truth()["categories"]} == {"r", "c", "f"}
    # A file of LVIS itself works too.
    whole = CocoDataset(tmp_path, tmp_path / "lvis_val.json", keep_empty=True)
    assert whole.path(0) == tmp_path / "val2017/000000000011.jpg"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = files(tmp_path)
    line = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    assert cli.main(["lvis-ow", *line, "--out", str(tmp_path / "out"), "--duplicates", "class"]) == 0
    said = capsys.readouterr().out
    assert "1 pictures with objects of unseen categories moved" in said
    assert "3 labels of LVIS of the same objects are left out" in said
    assert "LVIS v1 has 123 known, 743 seen, 337 unseen categories" in said
    assert (tmp_path / "out" / TRAIN).is_file() and (tmp_path / "out" / VAL).is_file()
    assert cli.main(["lvis-ow", *line[:2], "--coco-train", str(tmp_path / "none.json")]) == 1
    assert "--coco-train: there is no file" in capsys.readouterr().err


def changed(paths: dict[str, Path], name: str, change: Any) -> None:
    content = read(paths[name])
    change(content)
    paths[name].write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lvis_train", lambda c: c["categories"][0].pop("frequency"), "category 793 must have a frequency, got none"),
        ("lvis_train", lambda c: c["categories"][0].update(frequency="r"), "category 793, which LVIS-OW knows, must have"),
        ("lvis_train", lambda c: c["annotations"][0].update(category_id=4), "annotation 5 must have a category of LVIS-train, got"),
        ("lvis_train", lambda c: c["annotations"][0].pop("image_id"), "annotation 5 must have a whole number as image_id"),
        ("lvis_train", lambda c: c["images"][0].pop("coco_url"), "picture 1 must have a file_name"),
        ("lvis_train", lambda c: c["images"][0].update(coco_url="../../passwd/.."), "must lie below the folder"),
        ("lvis_train", lambda c: c["images"][0].update(neg_category_ids="all"), "picture 1: neg_category_ids must be a list"),
        ("lvis_train", lambda c: c.pop("annotations"), "must have an array annotations"),
        ("lvis_val", lambda c: c["images"][0].update(id=2), "must have other pictures than .*, got picture 2 in both"),
        ("lvis_val", lambda c: c["annotations"][0].update(category_id=4), "annotation 1 must have a category of LVIS-train"),
        ("coco_train", lambda c: c["annotations"].clear(), "must have objects on pictures of .*; is it COCO train2017"),
        ("coco_train", lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1, 1, 1e9, 2]]), "annotation 100: corners must lie"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_leave_nothing(name: str, change: Any, message: str, tmp_path: Path) -> None:
    paths = files(tmp_path)
    changed(paths, name, change)
    with pytest.raises(DataError, match=message):
        build(**paths, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")), "a file was left"


def test_what_is_missing_is_empty(tmp_path: Path) -> None:
    paths = files(tmp_path)
    (last,) = (p for p in lvis.read_pictures(paths["lvis_train"]) if p["id"] == 3)
    assert last["neg_category_ids"] == last["not_exhaustive_category_ids"] == []
    assert [c["id"] for c in lvis.read_categories(paths["lvis_train"])] == sorted(FREQUENCIES)

"""Train and val of a COCO file: their sizes, their pictures, and that no entry is lost; folders of links."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.study.split import link_pictures, split

KINDS = {"bright": 10, "dark": 5, "rare": 1}


def _content() -> dict[str, Any]:
    """Sixteen pictures with unordered ids far apart; most have two annotations."""
    kinds = [kind for kind, number in KINDS.items() for _ in range(number)]
    images = [
        {"id": 7 * (i * 5 % 16) + 3, "file_name": f"{kind}/{i}.png", "height": 8, "width": 8, "kind": kind, "extra": i}
        for i, kind in enumerate(kinds)
    ]
    annotations = [
        {
            "id": 100 - n,
            "image_id": image["id"],
            "category_id": 4,
            "iscrowd": 0,
            "segmentation": [[1, 1, 6, 1, 6, 6]],
            "x": n,
        }
        for n, image in enumerate(images[2:] + images[2:])
    ]
    return {
        "info": {"year": 2018, "by": "ä"}, "licenses": [{"id": 1}], "more": [1.5], "images": images, "annotations": annotations,
        "categories": [{"id": 4, "name": "cell", "supercategory": "s"}, {"id": 9, "name": "none"}],
    }  # fmt: skip


def _file(folder: Path, content: dict[str, Any], name: str = "all.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _ids(path: Path) -> set[int]:
    return {image["id"] for image in _read(path)["images"]}


def _by_id(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: r["id"])


def test_nothing_is_lost(tmp_path: Path) -> None:
    content = _content()
    train, val = split(_file(tmp_path, content), tmp_path / "out", val_share=0.25, seed=2)
    assert (train, val) == (tmp_path / "out/train.json", tmp_path / "out/val.json")
    parts = [_read(train), _read(val)]
    assert [len(p["images"]) for p in parts] == [12, 4]
    for part in parts:
        there = {i["id"] for i in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= there
        assert {k: v for k, v in part.items() if k not in ("images", "annotations")} == {
            k: v for k, v in content.items() if k not in ("images", "annotations")
        }
    for key in ("images", "annotations"):
        assert _by_id(parts[0][key] + parts[1][key]) == _by_id(content[key])


@pytest.mark.parametrize(
    ("share", "numbers"),
    # floor(share n + 1/2) of 10, 5 and 1 pictures; the last two cases would leave one side without pictures
    [(0.1, (1, 1, 0)), (0.3, (3, 2, 0)), (0.25, (3, 1, 0)), (0.5, (5, 3, 1)), (0.01, (1, 0, 0)), (0.99, (9, 5, 1))],
)
def test_how_many_of_each_kind(tmp_path: Path, share: float, numbers: tuple[int, int, int]) -> None:
    _, val = split(_file(tmp_path, _content()), tmp_path / "out", val_share=share, within="kind")
    counted = Counter(image["kind"] for image in _read(val)["images"])
    assert tuple(counted[kind] for kind in KINDS) == numbers


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.29, 5), (0.28125, 5), (0.28, 4), (0.99, 15)])
def test_how_many(tmp_path: Path, share: float, number: int) -> None:
    """0.28125 of 16 is 4.5."""
    train, val = split(_file(tmp_path, _content()), tmp_path / "out", val_share=share)
    assert len(_ids(val)) == number and len(_ids(train)) == 16 - number


@pytest.mark.parametrize("within", [None, "kind"])
def test_which(tmp_path: Path, within: str | None) -> None:
    content = _content()
    path = _file(tmp_path, content)
    turned = {
        **content,
        "images": content["images"][::-1],
        "annotations": content["annotations"][5:] + content["annotations"][:5],
    }

    def val(name: str, **options: Any) -> Path:
        return split(options.pop("path", path), tmp_path / name, within=within, **options)[1]

    first = val("a", val_share=0.3, seed=1)
    assert first.read_bytes() == val("b", val_share=0.3, seed=1).read_bytes()
    again = val("c", val_share=0.3, seed=1, path=_file(tmp_path, turned, "turned.json"))
    assert first.read_bytes() == again.read_bytes()
    assert first.with_name("train.json").read_bytes() == again.with_name("train.json").read_bytes()
    assert len({frozenset(_ids(val(f"s{s}", val_share=0.3, seed=s))) for s in range(8)}) > 4
    assert _ids(val("d", val_share=0.1, seed=1)) < _ids(first) < _ids(val("e", val_share=0.6, seed=1))


def test_every_picture_may_be_drawn(tmp_path: Path) -> None:
    path = _file(tmp_path, _content())
    drawn = Counter(i for s in range(60) for i in _ids(split(path, tmp_path / str(s), val_share=0.5, seed=s)[1]))
    assert len(drawn) == 16 and min(drawn.values()) > 12 and max(drawn.values()) < 48


def test_the_parts_are_datasets(tmp_path: Path) -> None:
    content = _content()
    for image in content["images"]:
        (tmp_path / image["file_name"]).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / image["file_name"])
    train, val = split(_file(tmp_path, content), tmp_path / "out", val_share=0.25)
    read = [CocoDataset(tmp_path, path, keep_empty=True) for path in (train, val)]
    assert [len(d) for d in read] == [12, 4] and read[0].classes == read[1].classes == ["cell", "none"]
    assert read[0].problems == read[1].problems == []


def test_again_writes_nothing_and_replaces_nothing(tmp_path: Path) -> None:
    path = _file(tmp_path, _content())
    train, val = split(path, tmp_path / "out", val_share=0.25)
    before = [p.stat() for p in (train, val)]
    split(path, tmp_path / "out", val_share=0.25)
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [
        (p.stat().st_ino, p.stat().st_mtime_ns) for p in (train, val)
    ]
    with pytest.raises(DataError, match=r"train\.json: is there already, with other content"):
        split(path, tmp_path / "out", val_share=0.5)
    text = val.read_bytes()
    val.unlink()
    split(path, tmp_path / "out", val_share=0.25)  # the state after a kill between the two files
    assert val.read_bytes() == text
    train.unlink()
    val.write_bytes(text.replace(b"2018", b"2019"))  # same length
    with pytest.raises(DataError, match=r"val\.json: is there already"):
        split(path, tmp_path / "out", val_share=0.25)
    assert os.listdir(tmp_path / "out") == ["val.json"]  # neither was written, and no temporary file is left


def test_what_cannot_be_split(tmp_path: Path) -> None:
    content = _content()
    path = _file(tmp_path, content)
    for share in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="val_share must lie between 0 and 1"):
            split(path, tmp_path / "out", val_share=share)
    for value in ("gone", None):
        own = content["images"][6]
        own["kind"] = value
        if value == "gone":
            del own["kind"]
        with pytest.raises(DataError, match=rf"picture {own['id']} \({own['file_name']}\) must have a value of 'kind'"):
            split(_file(tmp_path, content), tmp_path / "out", val_share=0.5, within="kind")
    with pytest.raises(DataError, match="must have two pictures to be split, got 1"):
        split(_file(tmp_path, {**content, "images": content["images"][:1]}), tmp_path / "out", val_share=0.5)
    assert not (tmp_path / "out").exists()


# -- links
def _pictures(folder: Path, names: list[str]) -> Path:
    """Pictures of different grey values below folder/pictures, and a COCO file of them."""
    for grey, name in enumerate([*names, "left/out.png"]):
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (grey, grey, grey)).save(folder / "pictures" / name)
    images = [{"id": i, "file_name": name, "height": 4, "width": 6} for i, name in enumerate(names)]
    return _file(folder, {"images": images, "annotations": [], "categories": []})


@pytest.mark.parametrize("can_link", [True, False])
def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool) -> None:
    path = _pictures(tmp_path, ["b.png", "x/y/c.png", "x/a.png"])
    if not can_link:

        def refuse(*_: Any) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.chdir(tmp_path)  # a link to a relative path would be broken
    out = link_pictures(Path("pictures"), path, Path("deep/er/links"))
    assert out == Path("deep/er/links")
    folder = PictureFolder(out)
    assert folder.file_names == ["b.png", "x/a.png", "x/y/c.png"] and folder.problems == []
    assert [int(sample.image.unique()) for sample in folder] == [0, 2, 1]
    assert (out / "b.png").is_symlink() == can_link
    before = (out / "b.png").lstat()
    link_pictures(tmp_path / "pictures", path, out)
    assert (out / "b.png").lstat().st_mtime_ns == before.st_mtime_ns
    (out / "b.png").unlink()  # as after a kill
    assert len(PictureFolder(link_pictures(Path("pictures"), path, out))) == 3


@pytest.mark.parametrize("name", ["../pictures/b.png", "x/../../b.png", "/etc/hostname", "x\\..\\..\\b.png"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = _pictures(tmp_path, ["b.png"])
    content = _read(path)
    content["images"][0]["file_name"] = name
    with pytest.raises(DataError, match="picture 0 must lie below the folder of the pictures"):
        link_pictures(tmp_path / "pictures", _file(tmp_path, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    """A picture of val in a folder of train would be a leak."""
    path = _pictures(tmp_path, ["b.png", "x/a.png"])
    images, out = tmp_path / "pictures", tmp_path / "out"
    link_pictures(images, path, out)
    (out / "x/more.png").symlink_to(images / "left/out.png")
    with pytest.raises(DataError, match=r"must hold pictures of .* only, got 1 others: x/more\.png"):
        link_pictures(images, path, out)
    (out / "x/more.png").unlink()
    (out / "left").symlink_to(images / "left")
    with pytest.raises(DataError, match="got 1 others: left"):
        link_pictures(images, path, out)
    (out / "left").unlink()
    (out / "b.png").unlink()
    (out / "b.png").symlink_to(images / "left/out.png")
    with pytest.raises(DataError, match=r"b\.png: must be the picture"):
        link_pictures(images, path, out)
    (out / "b.png").unlink()
    (out / "b.png").write_bytes((images / "left/out.png").read_bytes())
    with pytest.raises(DataError, match=r"b\.png: must be the picture"):
        link_pictures(images, path, out)
    (images / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 are missing: b\.png"):
        link_pictures(images, path, out)

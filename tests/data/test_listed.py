"""Lists of pictures: which names they may hold, and what a folder and a COCO file limited to one are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.listed import list_of, read_list
from sprompt.data.subsets import by_fraction, from_list

NAMES = ["#1.png", "a.png", "b.png", "sub/c.png", "sub/d.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / name)
    images = [{"id": 10 + i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(NAMES)]
    annotations = [
        {"id": i + 1, "image_id": 10 + i, "category_id": 1 + i % 2, "segmentation": [[0, 0, 5, 0, 5, 5]], "area": 12}
        for i in range(4)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "labels.json").write_text(json.dumps(data))
    return tmp_path


def _list(folder: Path, text: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


LIST = "\ufeff# train\n\nsub/d.png\r\n  a.png  \n./#1.png\n# b.png\nsub//d.png\n"


def test_a_folder_limited_to_a_list(folder: Path) -> None:
    (folder / "images" / "notes.txt").write_text("")
    pictures = PictureFolder(folder / "images", only=_list(folder, LIST))
    assert pictures.file_names == ["#1.png", "a.png", "sub/d.png"] and pictures.image_ids == [0, 1, 2]
    assert len(pictures) == 3 and pictures[2].name == str(folder / "images/sub/d.png") and pictures.problems == []


def test_a_coco_file_limited_to_a_list(folder: Path) -> None:
    path = _list(folder, LIST)
    (folder / "images" / "b.png").unlink()  # is not asked for
    dataset = CocoDataset(folder / "images", folder / "labels.json", only=path, keep_empty=True)
    assert dataset.image_ids == [10, 11, 14] and dataset.classes == ["cat", "dog"] and dataset.total == 3
    assert [a["image_id"] for a in dataset.ground_truth()["annotations"]] == [10, 11]
    assert [dataset[i].labels.tolist() for i in range(3)] == [[0], [1], []]
    assert CocoDataset(folder / "images", folder / "labels.json", only=path).image_ids == [10, 11]
    assert set(by_fraction(dataset, 0.67).image_ids) < {10, 11, 14}
    with pytest.raises(ValueError, match="another list limits them"):
        from_list(dataset, folder / "places.json")


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "sub/../../a.png", "c:/a.png", "..\\a.png"])
def test_names_that_leave_the_folder(folder: Path, name: str) -> None:
    path = _list(folder, f"a.png\n\n{name}\n")
    for opened in (
        lambda: PictureFolder(folder / "images", only=path),
        lambda: CocoDataset(folder / "images", folder / "labels.json", only=path),
    ):
        with pytest.raises(DataError, match=r"list\.txt: line 3 must name a picture below the folder"):
            opened()


def test_names_that_are_not_there(folder: Path) -> None:
    path = _list(folder, "a.png\nno.png\n#\nsub/a.png\nsub\n")
    said = r"got 3 others: 'no\.png' \(line 2\), 'sub/a\.png' \(line 4\), 'sub' \(line 5\);"
    with pytest.raises(DataError, match=rf"list\.txt: names must be of pictures in {folder}/images, {said}"):
        PictureFolder(folder / "images", only=path)
    with pytest.raises(DataError, match=rf"must be of pictures in {folder}/labels\.json, {said}"):
        CocoDataset(folder / "images", folder / "labels.json", only=path)
    with pytest.raises(DataError, match=r"got 2 others: 'b\.txt' \(line 1\), 'sub/c\.png' \(line 2\);"):
        PictureFolder(folder / "images", only=_list(folder, "b.txt\nsub/c.png"), recursive=False)
    with pytest.raises(DataError, match=r"must name a picture of .*, got none"):
        PictureFolder(folder / "images", only=_list(folder, "# nothing\n"))
    with pytest.raises(DataError, match="no such file"):
        PictureFolder(folder / "images", only=folder / "nowhere.txt")


def test_written_lists_are_read(folder: Path) -> None:
    names = [*NAMES, "ü.png", "\udcff.png"]
    text = list_of(names).encode(errors="surrogateescape")
    assert text.startswith(b"./#1.png\na.png\n")
    assert read_list(_list(folder, text), names, "here") == set(names)
    for name in (" a.png", "a.png\t", "a\n.png"):
        with pytest.raises(DataError, match="must have no line break"):
            list_of([name])

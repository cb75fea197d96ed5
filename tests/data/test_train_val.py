"""Train and val of a COCO file: no picture is lost, shares come out right, and rare classes are in both parts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sprompt.commands.split import Split
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.split import Part, split

TRIANGLE = [[0, 0, 5, 0, 5, 5]]


def _content(shown: list[list[int]], **keys: list[Any]) -> dict[str, Any]:
    """Pictures with objects of these categories, ids far apart and not in order; `keys` are values of every picture's record."""
    order = [7 * (5 * i % len(shown)) + 3 if len(shown) % 5 else 7 * i + 3 for i in range(len(shown))]
    images = [
        {
            "id": own,
            "file_name": f"{i}.png",
            "height": 8,
            "width": 8,
            **{key: values[i] for key, values in keys.items()},
        }
        for i, own in enumerate(order)
    ]
    annotations = [
        {"id": 1000 * order[i] + n, "image_id": order[i], "category_id": c, "segmentation": TRIANGLE, "area": 12}
        for i, cs in enumerate(shown)
        for n, c in enumerate(cs)
    ]
    number = max((c for cs in shown for c in cs), default=1)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": f"c{c}"} for c in range(1, number + 1)],
    }


def _file(folder: Path, content: dict[str, Any], name: str = "all.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _check(content: dict[str, Any], parts: tuple[Part, Part]) -> None:
    """Asserts the properties of every split."""
    files = [_read(part.file) for part in parts]
    for key in ("images", "annotations"):
        assert sorted((r for f in files for r in f[key]), key=lambda r: r["id"]) == sorted(
            content[key], key=lambda r: r["id"]
        )
    for part, file in zip(parts, files, strict=True):
        own = {image["id"] for image in file["images"]}
        assert own and {a["image_id"] for a in file["annotations"]} <= own
        lines = [line for line in part.names.read_text().splitlines() if not line.startswith("# ")]
        assert lines == [image["file_name"] for image in file["images"]] and len(lines) == part.images
        objects = Counter(a["category_id"] for a in file["annotations"])
        pictures = Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in file["annotations"]})
        assert part.objects == {f"c{c['id']}": objects[c["id"]] for c in content["categories"]}
        assert part.pictures == {f"c{c['id']}": pictures[c["id"]] for c in content["categories"]}


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_one_class_a_picture(tmp_path: Path, share: float) -> None:
    counts = {1: 200, 2: 41, 3: 10, 4: 3, 5: 2, 6: 1}
    content = _content([[c] for c, n in counts.items() for _ in range(n)] + [[]] * 43)
    parts = split(_file(tmp_path, content), tmp_path / "out", val_share=share, seed=3)
    _check(content, parts)
    for c, n in counts.items():
        train, val = (part.pictures[f"c{c}"] for part in parts)
        assert abs(val - share * n) <= 1 and (n < 2 or min(train, val) >= 1), c
    assert abs(parts[1].images - 300 * share) <= 3
    assert parts[share < 0.5].pictures["c6"] == 0 if share != 0.5 else True


@pytest.mark.parametrize(
    ("seed", "number", "most"), [*((seed, 150, 5) for seed in range(20)), *((seed, 40, 8) for seed in (4, 9, 28, 43))]
)
def test_several_classes_a_picture(tmp_path: Path, seed: int, number: int, most: int) -> None:
    """Like photographs: many rare classes, which stand in pictures together. In the last four the first pass leaves some out."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 61)
    shown = [rng.choice(60, rng.integers(0, most + 1), p=weights / weights.sum()) + 1 for _ in range(number)]
    content = _content([list(map(int, cs)) for cs in shown])
    parts = split(_file(tmp_path, content), tmp_path / "out", seed=seed)
    _check(content, parts)
    assert 0.2 * number <= parts[1].images <= (0.25 if number == 150 else 0.4) * number
    for c, n in Counter(c for cs in shown for c in set(cs.tolist())).items():
        assert n < 2 or min(part.pictures[f"c{c}"] for part in parts) >= 1, (c, n)


def test_pictures_of_a_video_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    videos = [int(v) for v in rng.integers(0, 30, 300)]
    shown = [[1] if v % 10 else [1, 2 + v // 10] for v in videos]  # classes 2, 3 and 4 are in a video each
    shown[0] = [5]
    shown[next(i for i, v in enumerate(videos) if v != videos[0])] = [5]
    content = _content(shown, video=[f"v{v}" for v in videos])
    parts = split(_file(tmp_path, content), tmp_path / "out", together="video")
    _check(content, parts)
    train, val = ({image["video"] for image in _read(part.file)["images"]} for part in parts)
    assert not train & val and len(train | val) == 30 and 45 <= parts[1].images <= 75
    assert all(part.pictures["c5"] == 1 for part in parts)
    with pytest.raises(DataError, match=r"must have a value of 'film', got none"):
        split(tmp_path / "all.json", tmp_path / "out", together="film")
    one = _content([[1], [1]], video=["a", "a"])
    with pytest.raises(DataError, match="must have two pictures with different values of 'video'"):
        split(_file(tmp_path, one), tmp_path / "two", together="video")
    with pytest.raises(DataError, match="must have two pictures to be split"):
        split(_file(tmp_path, _content([[1]])), tmp_path / "two")
    with pytest.raises(ValueError, match="val_share must lie between 0 and 1"):
        split(tmp_path / "all.json", tmp_path / "two", val_share=1.0)


def test_which(tmp_path: Path) -> None:
    content = _content([[1 + i % 3] for i in range(41)])
    turned = {**content, "images": content["images"][::-1], "annotations": content["annotations"][::-1]}

    def val(content: dict[str, Any], seed: int) -> frozenset[int]:
        return frozenset(
            i["id"] for i in _read(split(_file(tmp_path, content), tmp_path / "out", seed=seed)[1].file)["images"]
        )

    assert val(content, 1) == val(turned, 1)
    assert len({val(content, seed) for seed in range(8)}) > 4


def test_crowds_and_other_contents(tmp_path: Path) -> None:
    content = _content([[1], [1], [2], [2], [1, 2]])
    content["annotations"][0]["iscrowd"] = 1
    content |= {"info": {"year": 2018}, "licenses": [{"id": 1}]}
    train, val = split(_file(tmp_path, content), tmp_path / "out", val_share=0.4)
    assert train.objects["c1"] + val.objects["c1"] == 2
    for part in (train, val):
        file = _read(part.file)
        assert file["licenses"] == [{"id": 1}] and file["info"]["year"] == 2018
        about = {"by": "sprompt split", "of": "all.json", "val_share": 0.4, "seed": 0, "together": None}
        assert file["info"]["split"] == {"part": part.file.stem, **about}


def test_what_is_overwritten(tmp_path: Path) -> None:
    path, out = _file(tmp_path, _content([[1]] * 9)), tmp_path / "out"
    train, val = split(path, out)
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in out.iterdir()}
    assert {f.name for f in before} == {"train.json", "val.json", "train.txt", "val.txt"}
    split(path, out)
    assert before == {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in out.iterdir()}  # equal files stay
    content = val.file.read_bytes()
    split(path, out, seed=5)
    assert val.file.read_bytes() != content  # a file of a split is replaced
    for file in (train.file, val.names):
        kept = {f: f.read_bytes() for f in out.iterdir()}
        for foreign in (b"{}", b"mine", b'{"info": {"split": 5}}', b"[1]"):
            file.write_bytes(foreign)
            with pytest.raises(DataError, match=f"{file.name}: is there already and was not made by a split"):
                split(path, out, seed=6)
            assert {f: f.read_bytes() for f in out.iterdir()} == kept | {file: foreign}
        file.write_bytes(kept[file])
    with pytest.raises(DataError, match=r"train\.json: is the file to be split"):
        split(train.file, out)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = _content([[1]] * 8 + [[2]])
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / image["file_name"])
    Split(_file(tmp_path, content), tmp_path / "out", val_share=0.25).run()
    said = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in said.splitlines()]
    assert (
        ["c1", "6", "2", "6", "2"] in rows
        and ["c2", "1", "0", "1", "0"] in rows
        and ["all", "7", "2", "7", "2"] in rows
    )
    assert "classes in one part only: c2" in said and f"{tmp_path}/out/val.json" in said.replace("\n", "")
    train = CocoDataset(tmp_path / "images", tmp_path / "out/train.json")
    val = CocoDataset(tmp_path / "images", tmp_path / "all.json", only=tmp_path / "out/val.txt")
    pictures = PictureFolder(tmp_path / "images", only=tmp_path / "out/train.txt")
    assert (len(train), len(val), len(pictures)) == (7, 2, 7) and not set(train.image_ids) & set(val.image_ids)
    with pytest.raises(ValueError, match="--annotations: there is no file"):
        Split(tmp_path / "nowhere.json").run()

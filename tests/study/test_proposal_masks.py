"""Masks of other pictures and true masks as proposals. Seeds are compared with an independent formula, overlaps with
pycocotools."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.seeds import SeedGrid
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt.config import ProposalConfig
from sprompt.study.masks import agreement, seed_addresses, shuffled, truth

RECORD = {**ProposalConfig(short=96, long=160, level="C4").record(), "backbone": "abc123"}


def _blob(size: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """A box or an ellipse at a random place."""
    h, w = size
    y, x = draw.uniform(0, h), draw.uniform(0, w)
    a, b = draw.uniform(2, h / 3), draw.uniform(2, w / 3)
    rows, columns = np.mgrid[:h, :w] + 0.5
    far = np.maximum(np.abs(rows - y) / a, np.abs(columns - x) / b)
    return (far < 1) if draw.random() < 0.5 else ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _content(
    pictures: list[tuple[str, tuple[int, int], list[np.ndarray]]], first: int = 0, **info: Any
) -> dict[str, Any]:
    """The content of a COCO file of the named pictures with their masks."""
    images = [
        {"id": i, "file_name": name, "height": size[0], "width": size[1]}
        for i, (name, size, _) in enumerate(pictures, start=first)
    ]
    annotations = [
        {
            "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(mask.sum()), "segmentation": _rle(mask),
            "score": round(0.9 - 0.01 * k, 6), "seed": [0, 0, 0],
        }
        for i, (_, _, masks) in enumerate(pictures, start=first) for k, mask in enumerate(masks)
    ]  # fmt: skip
    return {
        "info": info, "images": images, "annotations": [{"id": n, **a} for n, a in enumerate(annotations, start=1)],
        "categories": [{"id": 1, "name": "object"}],
    }  # fmt: skip


def _file(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def _proposals(folder: Path, sizes: list[tuple[int, int]], record: dict[str, Any] | None = None) -> Path:
    """Two to four masks on each picture; the last picture has none."""
    draw = np.random.default_rng(5)
    pictures = []
    for i, size in enumerate(sizes):
        Image.new("RGB", (size[1], size[0])).save(folder / f"{i}.png")
        number = 0 if i == len(sizes) - 1 else 2 + i % 3
        pictures.append((f"{i}.png", size, [_blob(size, draw) for _ in range(number)]))
    return _file(
        folder / "proposals.json", _content(pictures, proposals=record or RECORD, skipped=[], work={"unit": 16})
    )


def _masks(path: Path) -> dict[str, list[np.ndarray]]:
    """Masks of every picture of a file, by pycocotools."""
    data = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    found: dict[str, list[np.ndarray]] = {name: [] for name in names.values()}
    for a in data["annotations"]:
        found[names[a["image_id"]]].append(coco_mask.decode(a["segmentation"]).astype(bool))
    return found


def _point(seed: list[int], size: tuple[int, int], record: dict[str, Any]) -> tuple[float, float]:
    """(y, x) of the centre of a seed's cell, in pixels of the picture, by the definition of the format."""
    short, long = record["short"], record["long"]
    ratio = min(short / min(size), long / max(size))
    view = [math.floor(side * ratio + 0.5) for side in size]
    if record["seeds"] == "pyramid":
        cell = [record["stride"] * 2 ** seed[0]] * 2
    else:
        divisor = record.get("divisor", 32)
        cell = [math.ceil(side / divisor) * divisor / n for side, n in zip(view, record["seeds"], strict=True)]
    y, x = ((seed[1 + i] + 0.5) * cell[i] * size[i] / view[i] for i in range(2))
    return y, x


def _inside(mask: np.ndarray, point: tuple[float, float]) -> bool:
    y, x = (math.floor(p) for p in point)
    return 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and bool(mask[y, x])


def _expected_seed(mask: np.ndarray, record: dict[str, Any]) -> list[int]:
    """By trying every cell."""
    ys, xs = np.nonzero(mask)
    middle = (ys.mean() + 0.5, xs.mean() + 0.5)
    cells = [[0, r, c] for r in range(40) for c in range(40)]
    points = {tuple(cell): _point(cell, mask.shape, record) for cell in cells}  # type: ignore[arg-type]  # three numbers each
    there = {cell: p for cell, p in points.items() if _inside(mask, p)}
    if there:
        return list(min(there, key=lambda cell: (math.dist(there[cell], middle), cell)))
    y, x = min(zip(ys + 0.5, xs + 0.5, strict=True), key=lambda p: (math.dist(p, middle), p))
    # Cells are equal boxes on a lattice, so the cell that holds a pixel is the cell with the nearest centre along each axis.
    # For a pixel on a border it is the later cell.
    picture = [(c, p) for c, p in points.items() if p[0] < mask.shape[0] and p[1] < mask.shape[1]]
    nearest = (min(picture, key=lambda q: (round(abs(q[1][i] - v), 6), -q[0][1 + i]))[0] for i, v in enumerate((y, x)))
    return [0, *(cell[1 + i] for i, cell in enumerate(nearest))]


RECORDS = [
    RECORD, {**RECORD, "stride": 32, "level": "C5"}, {**RECORD, "seeds": [5, 7]},
    {**RECORD, "stride": 14, "level": "C5", "divisor": 14}, {**RECORD, "stride": 14, "level": "C5", "divisor": 14, "seeds": [5, 7]},
]  # fmt: skip
SIZES = [(60, 80), (60, 80), (60, 80), (120, 70), (60, 80), (90, 90), (60, 80), (31, 200), (60, 80)]


# -- seeds
@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['stride']}-{r['seeds']}")
@pytest.mark.parametrize("size", [(60, 80), (97, 51), (31, 200)])
def test_seeds(record: dict[str, Any], size: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    masks = [m for m in (_blob(size, draw) for _ in range(40)) if m.any()]
    for place in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):  # single pixels, last ones too
        masks.append(np.zeros(size, bool))
        masks[-1][place] = True
    ring = np.ones(size, bool)
    ring[8:-8, 8:-8] = False
    masks.append(ring)  # the centroid of a ring lies outside of it
    grid = SeedGrid.parse(record, "here")
    seeds = seed_addresses(BitMasks.from_dense(torch.from_numpy(np.stack(masks))), grid).tolist()
    assert seeds == [_expected_seed(mask, record) for mask in masks]
    reachable = [_inside(m, _point(s, size, record)) for m, s in zip(masks, seeds, strict=True)]
    assert sum(reachable) > 10 and not all(reachable)  # the masks use both rules
    points = grid.points(seeds, size, "here")
    for (y, x), point in zip((_point(s, size, record) for s in seeds), points.tolist(), strict=True):
        assert point == pytest.approx([x, y, 0]) and point[0] < size[1] and point[1] < size[0]


def test_seeds_of_a_stretched_and_of_a_tiny_picture() -> None:
    """Without keep_ratio the view is 160 x 96 pixels. A view smaller than half a cell still has one cell."""
    record = {**RECORD, "keep_ratio": False}
    mask = torch.zeros(1, 50, 40, dtype=torch.bool)
    mask[0, 20:30, 30:40] = True
    # (25, 35) of 50 x 40 is (48, 140) of 96 x 160: rows 2 and 3 are as near, column 8.25
    assert seed_addresses(BitMasks.from_dense(mask), SeedGrid.parse(record, "here")).tolist() == [[0, 2, 8]]
    thin = BitMasks.from_dense(torch.ones(1, 2, 400, dtype=torch.bool))  # its view is 1 x 160
    assert seed_addresses(thin, SeedGrid.parse(RECORD, "here")).tolist() == [[0, 0, 4]]
    assert seed_addresses(thin[:0], SeedGrid.parse(RECORD, "here")).shape == (0, 3)


# -- masks of other pictures
def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_masks_go_round(tmp_path: Path) -> None:
    """At equal sizes all masks are kept, no picture keeps its own, and the order is one circle."""
    path = _proposals(tmp_path, [(60, 80)] * 12)
    before = _masks(path)
    circles = set()
    for seed in range(6):
        after = _masks(shuffled(path, tmp_path / f"s{seed}.json", seed))
        assert list(after) == list(before) and after["11.png"] == []
        donor = {n: [m for m in before if _same(after[n], before[m])] for n in before if before[n]}
        assert all(len(d) == 1 for d in donor.values())
        name, steps = donor["0.png"][0], ["0.png"]
        while name != "0.png":
            steps.append(name)
            (name,) = donor[name]
        assert len(steps) == 11
        circles.add(tuple(steps))
    assert len(circles) == 6


def test_masks_of_another_size(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    out = shuffled(path, tmp_path / "out.json", 1)
    before, after = _masks(path), _masks(out)
    changed = 0
    for name, size in zip(after, SIZES, strict=True):
        assert all(m.shape == size and m.any() for m in after[name])
        if not after[name]:
            assert not before[name]
            continue
        fits = []
        for other, masks in before.items():
            if other != name and len(masks) == len(after[name]):
                fits.append(
                    np.mean([_overlap(_nearest(m, size), got) for m, got in zip(masks, after[name], strict=True)])
                )
                changed += fits[-1] > 0.7 and masks[0].shape != size
        assert max(fits) > 0.7
    assert changed > 2


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, mask.shape, strict=True))
    return mask[rows][:, columns]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def test_masks_that_vanish(tmp_path: Path) -> None:
    """A speck of a large picture has no pixel in a small one; it is removed with its score."""
    speck, half = np.zeros((80, 80), bool), np.zeros((80, 80), bool)
    speck[0, 0] = half[:, 40:] = True
    pictures = [("large.png", (80, 80), [speck, half]), ("small.png", (8, 8), [np.ones((8, 8), bool)])]
    path = _file(tmp_path / "p.json", _content(pictures, proposals=RECORD))
    data = json.loads(shuffled(path, tmp_path / "out.json").read_text())
    assert [(a["id"], a["image_id"], a["area"], a["score"], a["bbox"]) for a in data["annotations"]] == [
        (1, 0, 6400, 0.9, [0, 0, 80, 80]),
        (2, 1, 32, 0.89, [4, 0, 4, 8]),
    ]


# -- true masks
def _labels(path: Path) -> dict[str, Any]:
    """Labels of some pictures of SIZES, in another order, with other ids and categories. One picture is not in SIZES."""
    draw = np.random.default_rng(9)
    names = ["4.png", "./0.png", "3.png", "8.png", "strange.png", "5.png"]
    sizes = [SIZES[int(n.strip("./png"))] if n != "strange.png" else (60, 80) for n in names]
    content = _content(
        [(n, s, [] if n == "5.png" else [_blob(s, draw) for _ in range(3)]) for n, s in zip(names, sizes, strict=True)],
        50,
    )
    content["categories"] = [{"id": 3, "name": "b"}, {"id": 1, "name": "a"}]
    for place, a in enumerate(content["annotations"]):
        del a["seed"], a["score"]
        a["category_id"] = 1 + 2 * (place % 2)
    # the first picture has a mask, a crowd and an unreadable mask; the second has a polygon
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][2]["segmentation"] = [[1e9, 0, 1, 0, 1, 1]]
    content["annotations"][3]["segmentation"] = [[10, 10, 30, 10, 30, 20, 10, 20]]
    return content


def test_true_masks(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    content = _labels(path)
    out = truth(_file(tmp_path / "labels.json", content), path, tmp_path / "truth.json")
    data, after = json.loads(out.read_text()), _masks(out)
    assert [(i["id"], i["file_name"]) for i in data["images"]] == [
        (i, f"{i}.png") for i in (0, 3, 4, 5)
    ]  # picture 8 has no proposals
    assert {n: len(m) for n, m in after.items()} == {"0.png": 3, "3.png": 3, "4.png": 1, "5.png": 0}
    assert data["info"] == {"proposals": RECORD, "skipped": [], "work": {"unit": 16}, "truth": True, "left_out": [3]}
    ids = {image["file_name"].removeprefix("./"): image["id"] for image in content["images"]}
    for name, masks in after.items():
        own = [a for a in content["annotations"] if a["image_id"] == ids[name] and a["id"] not in (2, 3, 4)]
        true = [coco_mask.decode(a["segmentation"]).astype(bool) for a in own]
        assert _same(masks[1:] if name == "0.png" else masks, true)
    assert after["0.png"][0][10:20, 10:30].all() and after["0.png"][0].sum() == 200
    for a in data["annotations"]:
        assert (a["category_id"], a["iscrowd"], a["score"]) == (1, 0, 1.0)


# -- both
@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['stride']}-{r['seeds']}")
@pytest.mark.parametrize("kind", ["shuffled", "truth"])
def test_pre_training_reads_them(tmp_path: Path, kind: str, record: dict[str, Any]) -> None:
    path = _proposals(tmp_path, SIZES, record)

    def make(name: str) -> Path:
        if kind == "shuffled":
            return shuffled(path, tmp_path / name, 3)
        return truth(_file(tmp_path / "labels.json", _labels(path)), path, tmp_path / name)

    out = make("out.json")
    dataset = CocoDataset(tmp_path, out, class_agnostic=True)
    assert dataset.has_seeds and dataset.classes == ["object"] and dataset.info[kind] is True
    assert dataset.info["proposals"] == record and ProposalConfig.from_record(dataset.info["proposals"])
    assert len(dataset) == (8 if kind == "shuffled" else 3)
    data = json.loads(out.read_text())
    by_image = defaultdict(list)
    for a in data["annotations"]:
        by_image[a["image_id"]].append(a)
    hit = total = 0
    for sample in dataset:
        assert sample.seeds is not None and len(sample.seeds) == len(sample.masks) > 0
        for a, mask, (x, y, scale) in zip(
            by_image[sample.image_id], sample.masks.to_dense(), sample.seeds, strict=True
        ):
            assert _point(a["seed"], sample.size, record) == pytest.approx((float(y), float(x))) and scale == 0
            assert a["seed"] == _expected_seed(mask.numpy(), record)
            assert a["area"] == mask.sum() and a["bbox"][2] > 0
            hit += _inside(mask.numpy(), (float(y), float(x)))
            total += 1
    assert total >= 7 and hit > 0.4 * total
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))

    stat = out.stat()
    make("out.json")
    assert (stat.st_ino, stat.st_mtime_ns) == (out.stat().st_ino, out.stat().st_mtime_ns)
    assert make("again.json").read_bytes() == out.read_bytes()
    out.write_text("other")
    with pytest.raises(DataError, match=r"out\.json: is there already"):
        make("out.json")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    plain = _file(tmp_path / "plain.json", _content([("0.png", (60, 80), [])]))
    out = tmp_path / "out.json"
    for call in (lambda: shuffled(plain, out), lambda: truth(plain, plain, out)):
        with pytest.raises(DataError, match="must be a file of sprompt propose"):
            call()
    alone = _file(tmp_path / "alone.json", _content([("0.png", (6, 8), [np.ones((6, 8), bool)])], proposals=RECORD))
    with pytest.raises(DataError, match="must have masks on two pictures to be shuffled, got 1"):
        shuffled(alone, out)
    for name, size, message in (
        ("x.png", (60, 80), "got none; do file names"),
        ("0.png", (60, 81), "must have the size"),
    ):
        labels = _file(tmp_path / "labels.json", _content([(name, size, [])]))
        with pytest.raises(DataError, match=message):
            truth(labels, path, out)
    twice = _file(tmp_path / "twice.json", _content([("0.png", (60, 80), []), ("0.png", (60, 80), [])]))
    for call in (lambda: truth(twice, path, out), lambda: agreement(path, twice)):
        with pytest.raises(DataError, match=r"file names must be unique, got '0\.png' twice"):
            call()
    assert not out.exists()


# -- agreement
def _by_pycocotools(path: Path, labels: dict[str, Any]) -> tuple[float, float]:
    own = json.loads(path.read_text())
    right: list[bool] = []
    found: list[bool] = []
    names = {image["file_name"]: image["id"] for image in own["images"]}
    for image in labels["images"]:
        name = image["file_name"].removeprefix("./")
        if name in names:
            masks = [a["segmentation"] for a in own["annotations"] if a["image_id"] == names[name]]
            true = [
                coco_mask.merge(coco_mask.frPyObjects(s, image["height"], image["width"])) if isinstance(s, list) else s
                for s in (
                    a["segmentation"] for a in labels["annotations"]
                    if a["image_id"] == image["id"] and not a["iscrowd"] and a["segmentation"] != [[1e9, 0, 1, 0, 1, 1]]
                )
            ]  # fmt: skip
            iou = np.zeros((len(masks), len(true)))
            if masks and true:
                iou[:] = coco_mask.iou(masks, true, [0] * len(true))
            right += (iou >= 0.5).any(1).tolist()
            found += (iou >= 0.5).any(0).tolist()
    return float(np.mean(right)), float(np.mean(found))


def test_agreement(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    content = _labels(path)
    own = json.loads(path.read_text())
    # true masks: some of the proposals, each moved farther than the one before, and other masks
    draw = np.random.default_rng(1)
    for a in content["annotations"]:
        name = next(i["file_name"] for i in content["images"] if i["id"] == a["image_id"]).removeprefix("./")
        masks = [p for p in own["annotations"] if f"{p['image_id']}.png" == name]
        if masks and isinstance(a["segmentation"], dict):
            mask = coco_mask.decode(masks[a["id"] % len(masks)]["segmentation"])
            a["segmentation"] = _rle(np.roll(mask, int(draw.integers(0, 9)), 1))
    got = agreement(path, _file(tmp_path / "labels.json", content))
    precision, recall = _by_pycocotools(path, content)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    assert got == {
        "pictures": 8, "masks": len(own["annotations"]),
        "precision": pytest.approx(precision), "recall": pytest.approx(recall),
    }  # fmt: skip


def test_agreement_at_a_half(tmp_path: Path) -> None:
    """An IoU of 6 / 12 counts, 6 / 13 does not. The crowd is not an object to find; the picture without masks has an object."""

    def strip(pixels: int) -> np.ndarray:
        mask = np.zeros((1, 40), bool)
        mask[0, :pixels] = True
        return mask

    size = (1, 40)
    path = _file(tmp_path / "p.json", _content([("a.png", size, [strip(6)]), ("b.png", size, [])], proposals=RECORD))
    labels = _content([("a.png", size, [strip(12), strip(13), strip(6)]), ("b.png", size, [strip(3)])])
    labels["annotations"][2]["iscrowd"] = 1
    expected = {"pictures": 1, "masks": 1, "precision": 1.0, "recall": pytest.approx(1 / 3)}
    assert agreement(path, _file(tmp_path / "labels.json", labels)) == expected
    labels["annotations"][0]["iscrowd"] = 1
    expected |= {"precision": 0.0, "recall": 0.0}
    assert agreement(path, _file(tmp_path / "labels.json", labels)) == expected


def test_agreement_where_no_truth_is_known(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    masks = len(json.loads(path.read_text())["annotations"])
    other = _file(tmp_path / "labels.json", _content([("x.png", (60, 80), [np.ones((60, 80), bool)])]))
    for labels in (None, other):
        assert agreement(path, labels) == {"pictures": 8, "masks": masks, "precision": None, "recall": None}


def test_truth_agrees_with_itself(tmp_path: Path) -> None:
    path = _proposals(tmp_path, SIZES)
    labels = _file(tmp_path / "labels.json", _labels(path))
    got = agreement(truth(labels, path, tmp_path / "truth.json"), labels)
    assert got == {"pictures": 3, "masks": 7, "precision": 1.0, "recall": 1.0}

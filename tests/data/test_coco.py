"""COCO files: masks equal pycocotools', and every broken file is refused or reported by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError

SIZES = [(20, 30), (33, 17), (8, 8), (40, 40)]
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "owl"}]  # not in order


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, by hand."""
    flat = mask.ravel(order="F").astype(int).tolist()
    counts, last = [0], 0
    for value in flat:
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def _data() -> dict[str, Any]:
    """Four pictures; polygons of one and two parts, both kinds of run lengths, a crowd, and a picture without annotations."""
    rng = np.random.default_rng(0)
    blobs = [rng.random(s) < 0.4 for s in SIZES]
    segmentations: list[tuple[int, int, int, Any]] = [
        (0, 7, 0, [[2.5, 3.5, 20.2, 4.0, 15.0, 17.9]]),
        (0, 3, 0, [[3, 13, 9, 4], [1, 1, 6, 1, 6, 6, 1, 6], [10.0, 10.0, 29.0, 10.5, 29.0, 19.0]]),
        (0, 90, 1, _runs(blobs[0])),
        (1, 90, 0, _rle(blobs[1])),
        (1, 3, 0, _runs(blobs[1])),
        (2, 7, 0, _rle(blobs[2])),
    ]
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "height": h, "width": w, "license": 1}
        for i, (h, w) in enumerate(SIZES)
    ]
    annotations = []
    for i, (image, category, crowd, segmentation) in enumerate(segmentations):
        h, w = SIZES[image]
        if isinstance(segmentation, list):
            rle = coco_mask.merge(coco_mask.frPyObjects([p for p in segmentation if len(p) >= 6], h, w))
        else:
            rle = (
                coco_mask.frPyObjects(segmentation, h, w) if isinstance(segmentation["counts"], list) else segmentation
            )
        area, box = float(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
        annotations.append(
            {"id": 11 + i, "image_id": 100 + image, "category_id": category, "iscrowd": crowd, "area": area,
             "bbox": box, "segmentation": segmentation}
        )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": deepcopy(CATEGORIES)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for i, (h, w) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.json").write_text(json.dumps(_data()))
    return tmp_path


def _opened(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any) -> CocoDataset:
    data = _data()
    if change is not None:
        change(data)
    (folder / "changed.json").write_text(json.dumps(data))
    return CocoDataset(folder, folder / "changed.json", **options)


def _truth(annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask by pycocotools, without parts of four numbers: it reads them as boxes."""
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects([p for p in segmentation if len(p) >= 6], *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(segmentation).astype(bool)


def test_samples_are_what_pycocotools_reads(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json", keep_empty=True)
    assert dataset.classes == ["dog", "cat", "owl"] and dataset.category_ids == [3, 7, 90]
    assert dataset.image_ids == [100, 101, 102, 103] and len(dataset) == dataset.total == 4
    data = _data()
    for i, size in enumerate(SIZES):
        sample = dataset[i]
        own = [a for a in data["annotations"] if a["image_id"] == 100 + i and not a["iscrowd"]]
        assert sample.image_id == 100 + i and sample.size == size and sample.masks.size == size
        assert sample.name == str(folder / f"{i}.png") and sample.seeds is None
        assert (sample.image.permute(1, 2, 0).numpy() == np.asarray(Image.open(folder / f"{i}.png"))).all()
        assert sample.labels.tolist() == [[3, 7, 90].index(a["category_id"]) for a in own]
        assert sample.labels.dtype == torch.int64 and len(sample.masks) == len(own)
        for mask, annotation in zip(sample.masks.to_dense().numpy(), own, strict=True):
            assert (mask == _truth(annotation, size)).all()
    assert dataset.problems == [f"{folder / 'a.json'}: 1 annotation of crowds is left out (annotation id 13)"]


def test_mask_counts_are_those_of_the_samples(folder: Path) -> None:
    for keep in (False, True):
        dataset = CocoDataset(folder, folder / "a.json", keep_empty=keep)
        assert dataset.mask_counts == [len(dataset[i].masks) for i in range(len(dataset))]
    assert 0 in dataset.mask_counts and len(set(dataset.mask_counts)) > 1


def test_pictures_without_masks_go_or_stay(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json")
    assert dataset.image_ids == [100, 101, 102]
    assert dataset.problems[-1].endswith("1 pictures without masks are left out: 3.png")
    assert len(CocoDataset(folder, folder / "a.json", keep_empty=True)[3].masks) == 0


def test_categories(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json", categories=["owl", "dog"])
    assert dataset.classes == ["dog", "owl"] and dataset.category_ids == [3, 90]
    assert dataset.image_ids == [100, 101]  # in 102 is a cat only, in 100 the owl is a crowd
    assert [dataset[i].labels.tolist() for i in range(2)] == [[0], [1, 0]]
    with pytest.raises(DataError, match=r"categories must be some of dog, cat, owl, got cow;"):
        CocoDataset(folder, folder / "a.json", categories=["cow", "dog"])
    with pytest.raises(DataError, match="got none"):
        CocoDataset(folder, folder / "a.json", categories=[])


def test_class_agnostic(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json", class_agnostic=True)
    assert dataset.classes == ["object"] and dataset.category_ids == [1]
    assert dataset[0].labels.tolist() == [0, 0]
    truth = dataset.ground_truth()
    assert {a["category_id"] for a in truth["annotations"]} == {1}
    assert truth["categories"] == [{"id": 1, "name": "object"}]


def test_subsets_and_pickles(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json")
    part = dataset.subset([2, 0])
    assert part.image_ids == [102, 100] and part.positions == [2, 0] and part.classes == dataset.classes
    assert part.subset([1]).image_ids == [100] and dataset.image_ids == [100, 101, 102]
    assert dataset.at_positions([3, 1]).image_ids == [101]  # 3 has no mask
    assert "3.png" in dataset.at_positions([3, 1]).problems[-1]
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again[0].masks.words, part[0].masks.words) and again.image_ids == part.image_ids


def _judge(truth: dict[str, Any], results: list[dict[str, Any]]) -> np.ndarray:
    coco = COCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(deepcopy(results)), "segm")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats


def test_ground_truth_judges_as_the_file_does(folder: Path) -> None:
    def clean(data: dict[str, Any]) -> None:
        data["annotations"][1]["segmentation"].pop(0)  # pycocotools would read the short part as a box

    dataset = _opened(folder, clean, keep_empty=True)
    file = json.loads((folder / "changed.json").read_text())
    rng = np.random.default_rng(2)
    results = []
    for i, size in enumerate(SIZES):
        for annotation in file["annotations"]:
            if annotation["image_id"] == 100 + i:
                noisy = _truth(annotation, size) ^ (rng.random(size) < 0.1)
                results.append(
                    {"image_id": 100 + i, "category_id": annotation["category_id"], "score": float(rng.random()),
                     "segmentation": _rle(noisy)}
                )  # fmt: skip
    ours, theirs = _judge(dataset.ground_truth(), results), _judge(file, results)
    assert (ours == theirs).all() and 0 < ours[0] < 1
    truth = dataset.ground_truth()
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1, 0, 0, 0]
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [a["file_id"] for a in truth["annotations"]] == [a["id"] for a in file["annotations"]]
    assert [i["id"] for i in dataset.subset([1]).ground_truth()["images"]] == [101]
    assert len(dataset.subset([1]).ground_truth()["annotations"]) == 2


def test_ground_truth_measures_what_the_file_does_not_say(folder: Path) -> None:
    def silent(data: dict[str, Any]) -> None:
        for a in data["annotations"]:
            del a["area"], a["bbox"]

    for ours, theirs in zip(_opened(folder, silent).ground_truth()["annotations"], _data()["annotations"], strict=True):
        assert (ours["area"], ours["bbox"]) == (theirs["area"], theirs["bbox"])
        json.dumps(ours)


# -- broken files
def _set(place: str, index: int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data[place][index].update(values)


def _drop(place: str, index: int, key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data[place][index].pop(key)


REFUSED = [
    (_set("images", 1, id=100), "ids of pictures must be unique, got twice 100"),
    (_set("annotations", 1, id=11), "ids of annotations must be unique, got twice 11"),
    (_set("categories", 1, id=7), "ids of categories must be unique, got twice 7"),
    (_set("annotations", 3, category_id=4), "must be in the list of categories, got others in annotations 14;"),
    (_set("annotations", 2, id="13"), "annotation at place 2 must have a whole number as id, got '13'"),
    (_drop("annotations", 2, "image_id"), "annotation 13 must have a whole number as image_id, got none"),
    (_set("annotations", 2, iscrowd="no"), "annotation 13: iscrowd must be 0 or 1, got 'no'"),
    (_set("annotations", 3, segmentation={"size": [17, 33], "counts": "13"}), r"\[height, width\].* annotations 14;"),
    (_set("images", 0, height=0), "picture 100 must have between 1 and .* pixels, got 0x30"),
    (_set("images", 0, height=1 << 20, width=1 << 20), "picture 100 must have between 1 and .* pixels"),
    (_set("images", 0, width=30.0), "picture 100 must have a whole number as width, got 30.0"),
    (_set("images", 0, file_name=None), "picture 100 must have a file_name, got None"),
    (_set("images", 0, file_name="../0.png"), "picture 100 must lie below the folder of the pictures, got '../0.png'"),
    (_set("images", 0, file_name="/etc/0.png"), "picture 100 must lie below the folder"),
    (_set("images", 0, file_name="c:/0.png"), "picture 100 must lie below the folder"),
    (_set("images", 0, file_name="a\\..\\..\\0.png"), "picture 100 must lie below the folder"),
    (_set("images", 2, file_name="not.png"), "1 of 3 are missing: not.png;"),
    (_set("images", 2, file_name="sub/2.png"), "sub: must be the folder of the pictures"),
    (_set("categories", 0, name=5), "category at place 0 must have an id and a name"),
    (lambda d: d.update(images={}), "must be a COCO file"),
    (lambda d: d.update(annotations="no"), "annotations must be a list, got a text"),
    (lambda d: d.update(images=[5]), "picture at place 0 must be an object, got a number"),
    (lambda d: d["annotations"].insert(0, None), "annotation at place 0 must be an object, got nothing"),
    (lambda d: d.update(annotations=[]), "must have a picture with a mask of these categories, got none"),
    (lambda d: d.update(images=[], annotations=[]), "must have pictures, got none"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_refused_when_opened(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _opened(folder, change)
    assert str(folder) in str(caught.value)


REFUSED_WHEN_READ = [
    ({"counts": "13", "size": [33, 17]}, "annotation 14: its run lengths"),
    ({"counts": "~~~", "size": [33, 17]}, "annotation 14: its run lengths"),
    ({"counts": [5, -1], "size": [33, 17]}, "annotation 14: its run lengths"),
    ([[0, 0, 5, 0, 5, 5, 1]], "annotation 14: polygons must be lists of numbers"),
    ([[0, 0, 5, 0, "a", 5]], "annotation 14: polygons must be lists of numbers"),
    ([[0, 0, 5, 0, float("nan"), 5]], "annotation 14: corners must lie in or near"),
    ([[0, 0, 5, 0, 67, 5]], "annotation 14: corners must lie in or near the picture of 33x17"),
    ([[0, -34, 5, 0, 6, 5]], "annotation 14: corners must lie in or near the picture of 33x17"),
    ([[0, 0, 5, 0, 1e12, 5]], "annotation 14: corners must lie in or near the picture of 33x17"),
]


@pytest.mark.parametrize(("segmentation", "message"), REFUSED_WHEN_READ)
def test_refused_when_read(folder: Path, segmentation: Any, message: str) -> None:
    dataset = _opened(folder, _set("annotations", 3, segmentation=segmentation, area=100))
    assert len(dataset[0].masks) == 2  # the other pictures can be read
    with pytest.raises(DataError, match=message):
        dataset[1]


def test_pictures_that_do_not_fit(folder: Path) -> None:
    dataset = CocoDataset(folder, folder / "a.json")
    Image.new("RGB", (33, 17)).save(folder / "1.png")  # turned
    with pytest.raises(DataError, match=r"1\.png: must have the 33x17 pixels that .* says, got 17x33"):
        dataset[1]
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png: is a broken picture"):
        dataset[2]


def test_left_out_and_said(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        size = list(SIZES[0])
        extra: list[dict[str, Any]] = [
            {"image_id": 555, "segmentation": [[0, 0, 5, 0, 5, 5]], "area": 12},
            {"image_id": 100, "segmentation": [], "area": 12},
            {"image_id": 100, "area": 12},
            {"image_id": 100, "segmentation": [[1, 2, 3, 4]], "area": 4},
            {"image_id": 100, "segmentation": {"size": size, "counts": [600]}, "area": 0},
            {"image_id": 100, "segmentation": {"size": size, "counts": [600]}},
            {"image_id": 100, "segmentation": [[3.0, 3.0, 3.0, 3.0, 3.0, 3.0]], "area": 0.5},
            {
                "image_id": 100,
                "segmentation": {"size": size, "counts": [600]},
                "area": 99,
            },  # a wrong area, found when read
        ]
        data["annotations"] += [{"id": 50 + i, "category_id": 3, **e} for i, e in enumerate(extra)]

    dataset = _opened(folder, change)
    assert [p.split(": ", 1)[1] for p in dataset.problems] == [
        "1 annotation of pictures that are not in the file is left out (annotation id 50)",
        "3 annotations without a mask are left out (annotation ids 51, 52, 53)",
        "1 annotation of crowds is left out (annotation id 13)",
        "3 annotations whose mask has no pixel are left out (annotation ids 54, 55, 56)",
        "1 pictures without masks are left out: 3.png",
    ]
    assert dataset[0].labels.tolist() == [1, 0] and (dataset[0].masks.area() > 0).all()
    assert dataset.lost == dataset.problems[:2]
    judged = {a["file_id"] for a in dataset.ground_truth()["annotations"]}
    assert {13, 54, 55, 56} <= judged and not judged & {50, 51, 52, 53}


def test_bad_paths(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        CocoDataset(folder, folder / "b.json")
    with pytest.raises(DataError, match="nowhere: must be the folder of the pictures in"):
        CocoDataset(folder / "nowhere", folder / "a.json")
    (folder / "list.json").write_text("[1]")
    with pytest.raises(DataError, match=r"must be a COCO file, .* got a list"):
        CocoDataset(folder, folder / "list.json")


# -- proposals
def _proposals(seeds: Any, addresses: list[Any], short: int = 80, long: int = 133) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        info = {"version": 1, "short": short, "long": long, "stride": 32, "seeds": seeds, "level": "C5"}
        data["info"] = {"proposals": info}
        data["categories"] = [{"id": 1, "name": "object"}]
        data["annotations"] = [
            {**a, "category_id": 1, "seed": s, "iscrowd": 0}
            for a, s in zip(data["annotations"], addresses, strict=False)
        ]

    return change


def test_seeds_of_the_pyramid(folder: Path) -> None:
    # picture 0 is 20 × 30, seen at 80 × 120: a cell of scale s is 32 · 2^s pixels of the view, 8 · 2^s of the picture
    dataset = _opened(folder, _proposals("pyramid", [[0, 0, 0], [0, 2, 3], [1, 0, 1]]))
    assert dataset.classes == ["object"] and dataset.has_seeds
    seeds = dataset[0].seeds
    assert seeds is not None and seeds.dtype == torch.float32
    assert seeds.tolist() == [[4.0, 4.0, 0.0], [28.0, 20.0, 0.0], [24.0, 8.0, 1.0]]


def test_seeds_of_a_grid(folder: Path) -> None:
    # the padded view is 96 × 128; 3 × 2 cells of 32 × 64 pixels of the view
    seeds = _opened(folder, _proposals([3, 2], [[0, 0, 0], [0, 2, 1], [0, 1, 0]]))[0].seeds
    assert seeds is not None and seeds.tolist() == [[8.0, 4.0, 0.0], [24.0, 20.0, 0.0], [8.0, 12.0, 0.0]]


@pytest.mark.parametrize(
    "address", [None, [0, 1], [0, 0.5, 0], [0, 3, 0], [0, 0, 4], [-1, 0, 0], [99, 0, 0], [0, -1, 0]]
)
def test_bad_seeds(folder: Path, address: Any) -> None:
    dataset = _opened(folder, _proposals("pyramid", [[0, 0, 0], address, [0, 0, 0]]))
    with pytest.raises(DataError, match=r"picture 100: seed must"):
        dataset[0]


@pytest.mark.parametrize(
    "change",
    [_proposals("other", []), _proposals([0, 2], []), _proposals("pyramid", [], short=0),
     lambda d: d.update(info={"proposals": {"version": 2}}), lambda d: d.update(info={"proposals": None})],
)  # fmt: skip
def test_bad_proposal_info(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(DataError, match=r"info\.proposals must"):
        _opened(folder, change)

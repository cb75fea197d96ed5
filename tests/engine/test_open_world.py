"""Open-world recall equals loops over the protocol and pycocotools, exactly, and values by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import open_world_literal as literal
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from sprompt.data import lvis_ow
from sprompt.data.errors import DataError
from sprompt.engine.evaluators.open_world import MERGED, NUMBERS, OpenWorld, OpenWorldConfig, read_groups
from sprompt.engine.evaluators.recall import LEVELS, RANGES, count

CATEGORIES = (1, 2, 5, 9, 40)  # no object has category 40


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def label(image: int, category: int, mask: np.ndarray, area: float | None = None, crowd: int = 0) -> dict[str, Any]:
    return {
        "image_id": image, "category_id": category, "iscrowd": crowd, "area": float(mask.sum()) if area is None else area,
        "segmentation": rle(mask), "bbox": coco_mask.toBbox(rle(mask)).tolist(), "mask": mask,
    }  # fmt: skip


def detection(image: int, score: float, mask: np.ndarray, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "score": score, "segmentation": rle(mask), "mask": mask}


Case = tuple[dict[str, Any], list[dict[str, Any]]]


def case(images: dict[int, tuple[int, int]], labels: list[dict[str, Any]], results: list[dict[str, Any]]) -> Case:
    for number, own in enumerate(labels, 1):
        own["id"] = number
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in images.items()],
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORIES],
        "annotations": labels,
    }
    return truth, results


def box(size: tuple[int, int], x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def random_case(seed: int, crowds: float = 0.0) -> Case:
    """Boxes on a coarse grid, so that many IoUs are equal to each other and to thresholds; scores of five values. Some objects
    have two categories, some are there twice, some state an area at the border of a range, or none. One picture has no
    objects, one no detections, one more than 100."""
    g = np.random.default_rng(seed)
    images = {int(i): (int(g.integers(90, 130)), int(g.integers(90, 130))) for i in (7, 3, 11, 5, 2)}
    labels, results = [], []
    for image, size in images.items():
        made = []
        for _ in range(0 if image == 11 else g.integers(1, 14)):
            x, y = g.integers(0, 6, 2) * 10
            w, h = g.choice([1, 2, 3, 4, 10], 2) * 10
            mask = box(size, x, y, w, h)
            category = int(g.choice(CATEGORIES[:4]))
            area = None if g.random() < 0.6 else float(g.choice([0, -1, 1024, 9216, 1e10, 1e11, 500.5]))
            made.append(mask)
            labels.append(label(image, category, mask, area, crowd=int(g.random() < crowds)))
            if g.random() < 0.3:  # the same object under a second name, or twice
                labels.append(label(image, int(g.choice(CATEGORIES[:4])), mask))
        for k in range(0 if image == 3 else 160 if image == 5 else g.integers(1, 30)):
            x, y = g.integers(0, 6, 2) * 10
            mask = box(size, x, y, *(g.choice([1, 2, 3, 4, 10], 2) * 10))
            if made and g.random() < 0.7:
                mask = made[g.integers(len(made))].copy()
                mask[: g.integers(0, 30), :] = False
            score = float(g.choice([0.1, 0.2, 0.3, 0.4, 0.5]))
            results.append(detection(image, score, mask, int(g.choice([1, 77]))))
            if k % 5 == 0:
                results.append(results[-1] | {"score": 0.3})
    g.shuffle(labels)  # type: ignore[arg-type]  # a list
    return case(images, labels, results)


def measured(truth: dict[str, Any], results: list[dict[str, Any]], groups: Path | None = None) -> dict[str, Any]:
    return OpenWorld(OpenWorldConfig(groups)).metrics(truth, results, class_agnostic=False)


def loops(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    pictures = [image["id"] for image in truth["images"]]
    return literal.counts(pictures, truth["annotations"], results, [c["id"] for c in truth["categories"]])


@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_the_loops(seed: int) -> None:
    truth, results = random_case(seed)
    expected = loops(truth, results)
    found = count(truth, results, {own: row for row, own in enumerate(CATEGORIES)})
    for row, own in enumerate(expected.values()):
        assert found.found[row].tolist() == own["found"]
        assert found.objects[row].tolist() == own["objects"]
        assert (found.pictures[row], found.hits[row]) == (own["pictures"], own["hits"])
    assert 0 < found.found[:-1, 0].sum() < 10 * found.objects[:-1, 0].sum()
    merged = [a | {"category_id": 1} for a in truth["annotations"]]
    (pooled,) = literal.counts([image["id"] for image in truth["images"]], merged, results, [1]).values()
    assert found.found[-1].tolist() == pooled["found"] and found.objects[-1].tolist() == pooled["objects"]
    assert (found.pictures[-1], found.hits[-1]) == (pooled["pictures"], pooled["hits"])


def test_numbers_of_groups_are_means_over_categories(tmp_path: Path) -> None:
    truth, results = random_case(1)
    (tmp_path / "groups.json").write_text('{"first": [1, 5, 40], "second": [2, 1000], "none of them": [40]}')
    with pytest.raises(DataError, match="a category must be in one group, once, got category 40"):
        measured(truth, results, tmp_path / "groups.json")
    (tmp_path / "groups.json").write_text('{"first": [1, 5], "second": [2, 1000], "empty": [40]}')
    metrics = measured(truth, results, tmp_path / "groups.json")
    every = loops(truth, results)
    rows = {"first": [1, 5], "second": [2], "empty": [40]}
    for own, numbers in [(CATEGORIES, metrics), *((ids, metrics["groups"][name]) for name, ids in rows.items())]:
        for name in NUMBERS:
            assert numbers[name] == pytest.approx(literal.average_recall([every[c] for c in own], name), abs=1e-14)
        assert numbers["hit_rate"] == pytest.approx(literal.hit_rate([every[c] for c in own]), abs=1e-14)
        assert numbers["categories"] == sum(every[c]["pictures"] > 0 for c in own)
    assert metrics["groups"]["empty"] == dict.fromkeys((*NUMBERS, "hit_rate"), -1) | {"categories": 0}
    assert metrics["per_category"]["class 5"]["group"] == "first"
    assert metrics["per_category"]["class 9"]["group"] is None and "class 40" not in metrics["per_category"]
    assert metrics["per_category"]["class 1"]["objects"] == every[1]["objects"][0]


def judged(truth: dict[str, Any], results: list[dict[str, Any]], categories: list[int]) -> COCOeval:
    """pycocotools on these categories, 100 results a picture and category. Results without boxes have the area of the mask."""
    images, own = truth["images"], [{k: v for k, v in a.items() if k != "mask"} for a in truth["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy(
            {
                "info": {},
                "images": images,
                "annotations": own,
                "categories": [{"id": c, "name": ""} for c in categories],
            }
        )
        ground.createIndex()
        found = ground.loadRes([{k: v for k, v in r.items() if k != "mask"} for r in results])
        evaluation = COCOeval(ground, found, "segm")
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("seed", range(4, 7))
def test_recalls_equal_pycocotools_with_every_detection_in_every_category(seed: int) -> None:
    truth, results = random_case(seed)
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] > 0]
    evaluation = judged(truth, [r | {"category_id": c} for c in CATEGORIES for r in results], list(CATEGORIES))
    assert evaluation.params.iouThrs.tolist() == LEVELS.tolist()
    assert [tuple(r) for r in evaluation.params.areaRng] == [(0, 1e10), (0, 1024), (1024, 9216), (9216, 1e10)]
    expected = evaluation.eval["recall"][..., 0].transpose(1, 2, 0)  # (T, C, A) -> (C, A, T)
    found = count(truth, results, {own: row for row, own in enumerate(CATEGORIES)})
    assert np.array_equal(found.recall()[:-1], expected)


@pytest.mark.parametrize("seed", range(7, 10))
@pytest.mark.parametrize("crowds", [0.0, 0.3])
def test_the_merged_protocol_equals_pycocotools(seed: int, crowds: float) -> None:
    truth, results = random_case(seed, crowds)
    truth["annotations"] = [a for a in truth["annotations"] if 0 < a["area"] <= 1e10]
    metrics = measured(truth, results)["merged"]
    one = truth | {"annotations": [a | {"category_id": 1} for a in truth["annotations"]]}
    evaluation = judged(one, [r | {"category_id": 1} for r in results], [1])
    precision, recall = evaluation.eval["precision"][:, :, 0, 0, 0], evaluation.eval["recall"][:, 0, :, 0]
    found = count(truth, results, {own: row for row, own in enumerate(CATEGORIES)})
    assert np.array_equal(found.precision(evaluation.params.recThrs), precision)
    assert np.array_equal(found.recall()[-1], recall.T)
    assert [metrics[n] for n in MERGED] == pytest.approx(
        [precision.mean(), precision[0].mean(), precision[5].mean(), *(r.mean() for r in recall.T)], abs=1e-14
    )
    assert 0 < metrics["AP"] < 1


SIZE = (200, 200)


def by_hand() -> Case:
    """Picture 1: an object that is a 2 and a 5, and a 1. Picture 2: a 2. One mask for the first object, exact; one covers 7/10
    of the object of category 1; nothing in picture 2 but a miss."""
    double, single = box(SIZE, 0, 0, 50, 50), box(SIZE, 100, 100, 10, 10)
    labels = [label(1, 2, double), label(1, 1, single), label(1, 5, double), label(2, 2, box(SIZE, 0, 0, 100, 100))]
    part = box(SIZE, 100, 100, 10, 7)
    results = [detection(1, 0.2, part), detection(1, 0.9, double), detection(2, 0.5, box(SIZE, 100, 100, 90, 90))]
    return case({1: SIZE, 2: SIZE}, labels, results)


def test_by_hand() -> None:
    metrics = measured(*by_hand())
    each = metrics["per_category"]
    assert each["class 2"]["AR100"] == pytest.approx(0.5), "one of two objects, at every IoU"
    assert each["class 5"]["AR100"] == pytest.approx(1.0), "the detection serves both categories"
    assert each["class 1"]["AR100"] == pytest.approx(0.5), "IoU 0.7 reaches 0.5, 0.55, 0.6, 0.65 and 0.7"
    assert metrics["AR100"] == pytest.approx(2 / 3)
    assert metrics["hit_rate"] == pytest.approx((0.5 + 1 + 1) / 3) and metrics["categories"] == 3
    assert metrics["ARs"] == pytest.approx(0.5)  # category 1
    assert metrics["ARm"] == pytest.approx(1.0)  # both names of the object of 50 x 50
    assert metrics["ARl"] == 0  # category 2 in picture 2
    # Merged: an object that is there twice is found once.
    assert metrics["merged"]["AR100"] == pytest.approx((5 * 2 / 4 + 5 * 1 / 4) / 10)
    # By score: hit, miss, part. At IoUs up to 0.7: precision 1 up to recall 1/4, then 2/3 up to 1/2.
    assert metrics["merged"]["AP50"] == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    assert metrics["merged"]["AP75"] == pytest.approx(26 / 101)


def test_perfect_masks_find_everything() -> None:
    """Also in category 1, and for an object of every range."""
    labels = [
        label(1, c, box(SIZE, 40 * k, 40 * k, w, w)) for k, (c, w) in enumerate([(1, 9), (2, 32), (5, 96), (1, 40)])
    ]
    results = [detection(1, 0.5, a["mask"]) for a in labels]
    metrics = measured(*case({1: SIZE}, labels, results))
    numbers = [metrics[n] for n in NUMBERS] + [metrics["hit_rate"]] + [metrics["merged"][n] for n in MERGED]
    assert numbers == pytest.approx([1] * len(numbers))
    assert all(own["AR100"] == 1 for own in metrics["per_category"].values())


def test_what_has_no_influence() -> None:
    """Categories and boxes of results, copies of results, and the order of pictures and of categories."""
    truth, results = random_case(2)
    results = [r for r in results if r["image_id"] != 5]  # their copies would pass 100
    metrics = measured(truth, results)
    recalls = {n: metrics[n] for n in (*NUMBERS, "hit_rate")}
    other = [r | {"category_id": 12345, "bbox": [1, 0, 1, 1]} for r in results]
    assert measured(truth, other) == metrics
    assert (
        measured(truth | {"images": truth["images"][::-1], "categories": truth["categories"][::-1]}, results) == metrics
    )
    assert {n: measured(truth, results + results)[n] for n in recalls} == recalls
    assert set(truth["annotations"][0]) == set(random_case(2)[0]["annotations"][0]), "annotations were changed"


def test_the_hundred_best_count() -> None:
    exact, wrong = box(SIZE, 0, 0, 50, 50), box(SIZE, 100, 100, 50, 50)
    labels = [label(1, 2, exact)]
    for misses, score, recall in ((99, 0.1, 1), (100, 0.1, 0), (150, 0.9, 1), (100, 0.5, 0)):
        results = [detection(1, 0.5, wrong)] * misses + [detection(1, score, exact)]
        assert measured(*case({1: SIZE}, labels, results))["AR100"] == recall
    assert measured(*case({1: SIZE}, labels, results[::-1]))["AR100"] == 1, "the first of equal scores is better"


def test_no_detections_and_no_objects() -> None:
    truth, results = by_hand()
    metrics = measured(truth, [])
    assert [metrics[n] for n in NUMBERS] == [0] * 4 and metrics["hit_rate"] == 0
    assert [metrics["merged"][n] for n in MERGED] == [0] * 7
    metrics = measured(truth | {"annotations": []}, results)
    assert [metrics[n] for n in NUMBERS] == [-1] * 4 and metrics["per_category"] == {}
    assert [metrics["merged"][n] for n in MERGED] == [-1] * 7


# -- groups


def test_the_groups_of_lvis_ow() -> None:
    """The sizes, with frequencies as in LVIS v1: 405 of f, 461 of c, 337 of r."""
    others = [own for own in range(1, 1204) if own not in lvis_ow.KNOWN]
    frequency = dict.fromkeys(lvis_ow.KNOWN, "f") | dict(zip(others, "f" * 282 + "c" * 461 + "r" * 337, strict=True))
    groups = lvis_ow.groups(frequency, "file")
    assert (
        {name: len(ids) for name, ids in groups.items()} == {"known": 123, "seen": 743, "unseen": 337} == lvis_ow.SIZES
    )
    assert sorted(own for ids in groups.values() for own in ids) == list(range(1, 1204))
    assert (
        len(lvis_ow.COCO_TO_LVIS) == len(set(lvis_ow.COCO_TO_LVIS.values())) == 79 and len(lvis_ow.MANY_INSTANCES) == 44
    )
    with pytest.raises(DataError, match=r"file: category 3, .* must have the frequency f, got r; are these"):
        lvis_ow.groups({3: "r"}, "file")
    with pytest.raises(DataError, match="file: the frequency of category 7 must be f, c or r, got 'often'"):
        lvis_ow.groups({7: "often"}, "file")


def test_frequencies_make_the_groups() -> None:
    images, results = {1: SIZE}, [detection(1, 0.5, box(SIZE, 0, 0, 50, 50))]
    labels = [label(1, own, box(SIZE, 0, 0, 50, w)) for own, w in ((3, 50), (1, 30), (2, 10))]
    truth, results = case(images, labels, results)
    truth["categories"] = [{"id": i, "name": str(i), "frequency": f} for i, f in ((3, "f"), (1, "c"), (2, "r"))]
    metrics = measured(truth, results)
    assert {n: round(own["AR100"], 9) for n, own in metrics["groups"].items()} == {"known": 1, "seen": 0.3, "unseen": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"must be an object of groups, \{name: \[category ids\]\}"),
        ('{"a": [1, "2"]}', "must be an object of groups"),
        ('{"a": [1, 2], "b": [2]}', "must be in one group, once, got category 2"),
        ('{"a": [1], "b": [2000]}', "group b must have categories of the annotations"),
        ('{"a": ', "must be JSON"),
    ],
)
def test_groups_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_groups(tmp_path / "groups.json", list(CATEGORIES))


# -- results and the table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "record 1: image_id must be an id of the ground truth, got 5"),
        (
            {"segmentation": {"size": [3, 3], "counts": "9"}},
            r"record 1: the mask must have the size \[200, 200\] of picture 1",
        ),
        ({"segmentation": None}, "record 1 must be a COCO result, got KeyError: 'segmentation'"),
        ({"score": None}, "record 1 must be a COCO result, got TypeError"),
        ({"segmentation": {"size": [200, 200], "counts": "ooo"}}, "results of picture 1, from record 0 on: rle_decode"),
    ],
)
def test_results_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    truth, results = by_hand()
    results[1] |= change
    with pytest.raises(DataError, match=message):
        measured(truth, results)


def test_metrics_are_json_and_the_table_shows_them() -> None:
    truth, results = by_hand()
    truth["categories"] = [c | {"frequency": "r" if c["id"] == 2 else "c"} for c in truth["categories"]]
    truth["categories"] = [c for c in truth["categories"] if c["id"] not in lvis_ow.KNOWN]
    judge = OpenWorld(OpenWorldConfig())
    metrics = json.loads(json.dumps(judge.metrics(truth, results, class_agnostic=False)))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(judge.table(metrics))
    lines = [line.split() for line in console.export_text().splitlines()]
    rows = {line[1]: line for line in lines if len(line) > 8}
    assert [cell for cell in rows["all"] if cell != "│"][1:] == ["66.7", "50.0", "100.0", "0.0", "83.3", "–", "3"]
    assert [cell for cell in rows["unseen"] if cell != "│"][1:] == ["50.0", "–", "100.0", "0.0", "50.0", "–", "1"]
    assert "known" in rows and "37.5" in rows["merged"]
    assert len(RANGES) == len(NUMBERS) == 4


def test_a_broken_label_has_its_id_of_the_file() -> None:
    """The ground truth of a data set numbers the annotations anew."""
    truth, results = by_hand()
    truth["annotations"][1] |= {"file_id": 9000, "segmentation": [[-9999, 0, 5, 0, 5, 5]]}
    with pytest.raises(DataError, match="annotation 9000 of the labels: corners must lie in or near the picture"):
        measured(truth, results)

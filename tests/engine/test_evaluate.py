"""Metrics equal those of pycocotools and faster-coco-eval, and values computed by hand for small cases."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from sprompt.data.errors import DataError
from sprompt.engine.evaluators.coco import NUMBERS, coco_metrics, metrics_table

SIDE = 160


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def disc(generator: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    cy, cx = generator.uniform(0, SIDE, 2)
    return np.hypot(y - cy, x - cx) < generator.choice([8, 25, 60]) * generator.uniform(0.7, 1.3)


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of all sizes, some of them crowds. Results that hit, miss, come twice or have the wrong class."""
    g = np.random.default_rng(seed)
    images = [{"id": 10 + i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(8)]
    categories = [{"id": c, "name": f"class {c}"} for c in (3, 7, 9)]
    annotations, results = [], []
    for image in images:
        for _ in range(g.integers(0, 6)):
            mask = disc(g)
            segmentation = rle(mask)
            annotations.append({
                "id": len(annotations) + 1, "image_id": image["id"], "category_id": int(g.choice([3, 7])),
                "iscrowd": int(g.random() < 0.15),
                "area": float(mask.sum()), "bbox": coco_mask.toBbox(segmentation).tolist(), "segmentation": segmentation,
            })  # fmt: skip
            for _ in range(g.integers(0, 4)):
                moved = np.roll(mask, g.integers(-4, 5, 2), (0, 1)) if g.random() < 0.8 else disc(g)
                category = annotations[-1]["category_id"] if g.random() < 0.7 else int(g.choice([3, 7, 9]))
                segmentation = rle(moved)
                results.append({
                    "image_id": image["id"], "category_id": category, "score": float(np.round(g.random(), 1)),  # with ties
                    "segmentation": segmentation, "bbox": coco_mask.toBbox(segmentation).tolist(),
                })  # fmt: skip
    return {"images": images, "categories": categories, "annotations": annotations}, results


def directly(truth: dict[str, Any], results: list[dict[str, Any]], kind: str, pooled: bool) -> list[float]:
    """The twelve numbers that COCOeval itself prints."""
    import copy

    other = "bbox" if kind == "segm" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy({"info": {}, **truth})
        ground.createIndex()
        found = ground.loadRes([{k: v for k, v in copy.deepcopy(r).items() if k != other} for r in results])
        evaluation = COCOeval(ground, found, kind)
        evaluation.params.useCats = 0 if pooled else 1
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize("engine", ["pycocotools", "faster"])
@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("pooled", [False, True])
def test_random_results_have_the_numbers_of_pycocotools(engine: Any, kind: Any, pooled: bool) -> None:
    for seed in range(3):
        truth, results = random_case(seed)
        ours = coco_metrics(truth, results, kind=kind, class_agnostic=pooled, engine=engine)
        expected = directly(truth, results, kind, pooled)
        np.testing.assert_allclose([ours[name] for name in NUMBERS], expected, rtol=0, atol=1e-12)
        assert 0.05 < ours["AP"] < 0.95
        if not pooled:
            assert ours["per_class"]["class 9"] == -1
            there = [v for v in ours["per_class"].values() if v >= 0]
            assert np.mean(there) == pytest.approx(ours["AP"])
    assert set(truth["annotations"][0]) == set(random_case(2)[0]["annotations"][0]), (
        "the caller's annotations were changed"
    )


def box_case() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two objects of 40×40. One result is exact. A result with a higher score covers half of the other object (IoU 0.5). One
    result hits nothing."""
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [],
    }
    for number, (x, y) in enumerate([(0, 0), (80, 80)], 1):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + 40, x : x + 40] = True
        truth["annotations"].append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "area": 1600,
                "bbox": [x, y, 40, 40],
                "segmentation": rle(mask),
            }
        )
    results = []
    for score, (x, y, w, h) in [(0.9, (0, 0, 40, 20)), (0.8, (80, 80, 40, 40)), (0.7, (120, 0, 40, 40))]:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + h, x : x + w] = True
        results.append(
            {"image_id": 1, "category_id": 1, "score": score, "bbox": [x, y, w, h], "segmentation": rle(mask)}
        )
    return truth, results


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_by_hand(kind: Any) -> None:
    """At IoU 0.5 the first two results find both objects: AP is 1. At higher IoUs the second result is the first hit, with
    precision 1/2, and the recall ends at 1/2. Then 51 of the 101 recall levels have precision 1/2. The mean over ten IoUs is
    (1 + 9 · 51/202) / 10."""
    truth, results = box_case()
    metrics = coco_metrics(truth, results, kind=kind)
    assert metrics["AP50"] == pytest.approx(1)
    assert metrics["AP75"] == pytest.approx(51 / 202)
    assert metrics["AP"] == pytest.approx((1 + 9 * 51 / 202) / 10)
    assert metrics["AR100"] == pytest.approx((1 + 9 * 0.5) / 10)
    assert metrics["AR1"] == pytest.approx(0.05)  # the first result alone: one of two objects, at one IoU of ten
    assert metrics["APs"] == metrics["APl"] == -1
    assert metrics["APm"] == pytest.approx((1 + 9 * 51 / 101) / 10)  # a miss that is itself small does not count
    assert metrics["per_class"] == {"object": metrics["AP"]}


def test_classes_count_unless_they_are_pooled() -> None:
    truth, results = box_case()
    truth["categories"].append({"id": 2, "name": "other"})
    for result in results:
        result["category_id"] = 2
    assert coco_metrics(truth, results)["AP"] == 0
    assert coco_metrics(truth, results, class_agnostic=True)["AP50"] == pytest.approx(1)


@pytest.mark.parametrize("engine", ["pycocotools", "faster"])
def test_no_results_are_zeros(engine: Any) -> None:
    truth, _ = box_case()
    metrics = coco_metrics(truth, [], engine=engine)
    assert [metrics[n] for n in ("AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm")] == [0] * 8
    truth["annotations"] = []
    assert coco_metrics(truth, [], engine=engine)["AP"] == -1


def test_boxes_come_from_masks_where_there_are_none() -> None:
    truth, results = random_case(1)
    with_boxes = coco_metrics(truth, results, kind="bbox")
    assert (
        coco_metrics(truth, [{k: v for k, v in r.items() if k != "bbox"} for r in results], kind="bbox") == with_boxes
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "record 1: image_id must be an id of the ground truth, got 5"),
        ({"category_id": 4}, "record 1: category_id must be an id of the ground truth, got 4"),
        ({"segmentation": {"size": [3, 3], "counts": "9"}}, r"record 1: the mask must have the size \[160, 160\]"),
        ({"segmentation": None}, "record 1 must be a COCO result, got KeyError: 'segmentation'"),
        ({"score": None}, "record 1 must be a COCO result, got TypeError"),
    ],
)
def test_results_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    truth, results = box_case()
    results[1] |= change
    with pytest.raises(DataError, match=message):
        coco_metrics(truth, results)


def test_table() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(metrics_table({"masks": coco_metrics(*box_case())}))
    text = console.export_text()
    assert "masks" in text and "100.0" in text and "25.2" in text and "–" in text


def test_masks_that_are_not_are_refused_not_believed() -> None:
    """Run lengths beyond the picture are refused. The decoder of pycocotools would accept them, with any time and memory
    they need."""
    truth = {
        "images": [{"id": 7, "file_name": "a", "height": 10, "width": 10}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    for counts in ("PPYo0", "ooooooo", "0`o1", "é"):
        record = {"image_id": 7, "category_id": 1, "score": 0.5, "segmentation": {"size": [10, 10], "counts": counts}}
        with pytest.raises(DataError, match="results of picture 7, from record 0 on: rle_decode"):
            coco_metrics(truth, [record])


@pytest.mark.parametrize("crowd", [0, 1])
def test_polygons_far_outside_a_picture_do_not_reach_pycocotools(crowd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = random_case(0)
    corners = {
        "near": [-5.0, 3.0, 90.0, 4.0, 80.0, 165.0],
        "far": [0.0, 0.0, 1e9, 0.0, 1e9, 5.0],
        "nan": [0, 0, float("nan"), 1, 2, 2],
    }
    truth["annotations"][0] |= {"iscrowd": crowd, "segmentation": [corners["near"]]}
    assert coco_metrics(truth, results)["AP"] >= 0

    def no_metrics(*arguments: Any) -> None:
        raise AssertionError("pycocotools was called")

    monkeypatch.setattr(COCO, "createIndex", no_metrics)
    for name in ("far", "nan"):
        truth["annotations"][0]["segmentation"] = [corners["near"], corners[name]]
        with pytest.raises(
            DataError, match=r"labels: annotation 1: corners must lie in or near the picture of 160x160"
        ):
            coco_metrics(truth, results)

"""Found, false and missed masks, compared with COCO's own evaluation."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sprompt.masks import BitMasks
from sprompt.report.compare import Compared, above, best_threshold, compare
from sprompt.report.records import Instance

SIZE = (40, 50)


def scene(rng: np.random.Generator, labels: int, predictions: int) -> tuple[list[Any], list[Any]]:
    """Labels are blocks, predictions are moved blocks. Some labels are crowds, and there are two classes."""
    places = [(*rng.integers(0, 25, 2), *rng.integers(6, 20, 2)) for _ in range(labels)]

    def mask(x: int, y: int, w: int, h: int) -> np.ndarray:
        out = np.zeros(SIZE, bool)
        out[max(y, 0) : y + h, max(x, 0) : x + w] = True
        return out

    truth = [(mask(*p), int(rng.integers(1, 3)), bool(rng.random() < 0.25)) for p in places]
    guesses = []
    for _ in range(predictions):
        x, y, w, h = places[rng.integers(labels)] if labels and rng.random() < 0.8 else (*rng.integers(0, 25, 2), 8, 8)
        move = rng.integers(-3, 4, 2)
        guesses.append(
            (mask(x + move[0], y + move[1], w, h), int(rng.integers(1, 3)), float(rng.permutation(1000)[0]) / 1000)
        )
    return truth, guesses


def rle(mask: np.ndarray) -> dict[str, Any]:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))  # type: ignore[no-any-return]  # pycocotools has no types


def by_coco(truth: list[Any], guesses: list[Any]) -> list[int]:
    """(P,) by decreasing score: the matched label of each guess, -1 for none, -2 for ignored."""
    data = COCO()
    data.dataset = {
        "info": {}, "images": [{"id": 1, "height": SIZE[0], "width": SIZE[1]}], "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": c, "iscrowd": int(crowd), "segmentation": rle(m),
             "area": float(m.sum()), "bbox": [0, 0, 1, 1]}
            for i, (m, c, crowd) in enumerate(truth)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
        results = data.loadRes(
            [{"image_id": 1, "category_id": c, "segmentation": rle(m), "score": s} for m, c, s in guesses]
        )
        run = COCOeval(data, results, "segm")
        run.params.iouThrs, run.params.areaRng, run.params.areaRngLbl = np.array([0.5]), [[0, 1e10]], ["all"]
        run.evaluate()
    found = {}
    for image in filter(None, run.evalImgs):
        for own, match, ignored in zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            found[own] = -2 if ignored else int(match) - 1
    order = sorted(range(len(guesses)), key=lambda i: -guesses[i][2])
    return [found[i + 1] for i in order]


def ours(truth: list[Any], guesses: list[Any]) -> Compared:
    def masks(items: list[Any]) -> BitMasks:
        return BitMasks.from_dense(torch.from_numpy(np.array([m for m, *_ in items]).reshape(-1, *SIZE)))

    predictions = [Instance(None, c, s) for _, c, s in guesses]
    return compare(masks(guesses), predictions, masks(truth), [Instance(None, c, crowd=crowd) for _, c, crowd in truth])


@pytest.mark.parametrize("seed", range(25))
def test_matches_are_those_of_coco(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, guesses = scene(rng, int(rng.integers(1, 7)), int(rng.integers(1, 12)))
    compared = ours(truth, guesses)
    assert compared.found == by_coco(truth, guesses)
    true, false, missed = compared.counts
    assert true == sum(f >= 0 for f in compared.found) and false == compared.found.count(-1)
    assert true + missed == sum(not crowd for *_, crowd in truth)


def test_the_cases_above_come_up() -> None:
    """The random scenes contain all cases, so the comparison with COCO covers them."""
    seen: set[int] = set()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        seen |= {min(f, 0) for f in ours(*scene(rng, int(rng.integers(1, 7)), int(rng.integers(1, 12)))).found}
    assert seen == {0, -1, -2}


def test_nothing_predicted_or_nothing_labelled() -> None:
    truth, guesses = scene(np.random.default_rng(0), 3, 4)
    truth = [(m, c, False) for m, c, _ in truth]
    assert (
        ours(truth, []).counts == (0, 0, 3)
        and ours([], guesses).counts == (0, 4, 0)
        and ours([], []).counts == (0, 0, 0)
    )
    assert best_threshold([]) == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_the_threshold_has_the_best_f1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, 4, 8) for _ in range(3)]
    compared = [ours(*s) for s in scenes]

    def f1(threshold: float) -> float:
        kept = [ours(t, [g for g in guesses if g[2] >= threshold]).counts for t, guesses in scenes]
        true, false, missed = (sum(c) for c in zip(*kept, strict=True))
        return 2 * true / max(1, 2 * true + false + missed)

    chosen = best_threshold(compared)
    assert f1(chosen) == pytest.approx(max(f1(g[2]) for _, guesses in scenes for g in guesses))
    for whole, (truth, guesses) in zip(compared, scenes, strict=True):  # a cut-off prediction counts like a missing one
        cut, again = above(whole, chosen), ours(truth, [g for g in guesses if g[2] >= chosen])
        assert (cut.found, cut.ious, len(cut.masks)) == (again.found, again.ious, len(again.masks))

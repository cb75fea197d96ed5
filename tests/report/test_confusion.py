"""The confusion table equals a table made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from sprompt.report.confusion import Counts, count, section, tabulate, worst
from sprompt.report.page import tag
from sprompt.report.records import read_records

CAT, DOG, OWL = 3, 5, 9
SIZE = (20, 60)
CATEGORIES = [{"id": OWL, "name": "owl"}, {"id": CAT, "name": "cat"}, {"id": DOG, "name": "<dog>"}]


def dump(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def block(x1: int, x2: int) -> dict[str, Any]:
    """Run lengths of some columns."""
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[:, x1:x2] = 1
    return {"size": list(SIZE), "counts": coco.encode(mask)["counts"].decode()}


def _disk(folder: Path) -> tuple[Path, Path]:
    """Two pictures of six places, 10 x 20 pixels each; a mask `shift`ed by s pixels has IoU (10 - s) / (10 + s) with its label."""

    def one(picture: int, place: int, category: int, shift: int = 0, **more: Any) -> dict[str, Any]:
        mask = block(10 * place + shift, min(10 * place + 10 + shift, 60))
        return {"image_id": picture, "category_id": category, "segmentation": mask, **more}

    labels = [
        one(1, 0, CAT), one(1, 1, CAT), one(1, 2, DOG), one(1, 3, DOG), one(1, 4, OWL), one(1, 5, DOG, iscrowd=1),
        one(2, 0, DOG), one(2, 3, CAT),
    ]  # fmt: skip
    found = [
        one(1, 0, CAT, score=0.9),  # right
        one(1, 0, DOG, score=0.8),  # the label is taken: nothing there
        one(1, 1, DOG, 3, score=0.7),  # IoU 7/13: cat taken for dog
        one(1, 2, DOG, 4, score=0.9),  # IoU 6/14: nothing there, and the dog is missed
        one(1, 3, CAT, score=0.3),  # dog taken for cat
        one(1, 4, OWL, score=0.29),  # below the score: the owl is missed
        one(1, 5, CAT, score=0.9),  # in a crowd: does not count
        one(2, 0, CAT, score=0.5),  # dog taken for cat
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)]
    data = {"images": images, "annotations": [{"id": i, **a} for i, a in enumerate(labels)], "categories": CATEGORIES}
    return dump(folder / "labels.json", data), dump(folder / "results.json", found)


BY_HAND = {
    (CAT, CAT): 1, (None, DOG): 2, (CAT, DOG): 1, (DOG, None): 1, (DOG, CAT): 2, (OWL, None): 1, (CAT, None): 1,
}  # fmt: skip


def test_counts(tmp_path: Path) -> None:
    labels, results = _disk(tmp_path)
    truth = read_records(labels)
    found = read_records(results, like=truth)
    assert count(truth, found) == BY_HAND and found.problems == []
    for entry in found.entries.values():
        entry.instances.reverse()  # their order does not matter, their scores do
    assert count(truth, found) == BY_HAND


def test_unreadable_masks_are_noted(tmp_path: Path) -> None:
    labels, results = _disk(tmp_path)
    data = json.loads(labels.read_text())
    del data["images"][1]["height"]
    data["annotations"][0]["segmentation"]["size"] = [5, 5]
    truth = read_records(dump(labels, data))
    found = read_records(results, like=truth)
    counts = count(truth, found)
    assert counts[DOG, CAT] == 1 and counts[CAT, CAT] == 0 and "4 masks cannot be read" in found.problems[-1]


def test_the_table() -> None:
    table = tabulate(Counts(BY_HAND), {CAT: "cat", DOG: "dog", OWL: "owl"})
    assert table.rows == ["cat", "dog", "owl", "nothing there"] and table.columns == ["cat", "dog", "owl", "missed"]
    assert table.cells == [[1, 1, 0, 1], [2, 0, 0, 1], [0, 0, 0, 1], [0, 2, 0, 0]] and table.left_out == 0
    assert worst(Counts(BY_HAND)) == [(DOG, CAT, 2, 3), (CAT, DOG, 1, 3)]


def test_rare_classes_are_left_out_and_said() -> None:
    table = tabulate(Counts(BY_HAND) + Counts({(None, 77): 4}), {CAT: "cat", DOG: "dog", OWL: "owl"}, most=2)
    assert table.rows == ["cat", "dog", "others", "nothing there"] and table.left_out == 2
    assert table.cells == [[1, 1, 0, 1], [2, 0, 0, 1], [0, 0, 0, 1], [0, 2, 4, 0]]
    rng = np.random.default_rng(0)
    many = Counts({(int(a), int(b)): 1 for a, b in rng.integers(0, 50, (400, 2))})
    large = tabulate(many, {})
    assert len(large.rows) == 32 and large.left_out == 20 and np.sum(large.cells) == sum(many.values())


def test_the_section(tmp_path: Path) -> None:
    made = section(*_disk(tmp_path))
    assert made is not None and made.title == "Confusion of classes" and made.note == "7 labels"
    text = str(made.body)
    said = "Most often confused: <dog> taken for cat (2 of 3 labels); cat taken for <dog> (1 of 3 labels)."
    assert tag("p", said) in text and "left out" not in text
    assert text.count('scope="col"') == 4 and text.count('scope="row"') == 4 and "<caption>" in text
    assert text.count('class="n hit"') == 3 and "--s:37%" in text  # 55 % of two of three
    labels, results = tmp_path / "labels.json", tmp_path / "results.json"
    assert section(None, results) is None
    data = json.loads(labels.read_text())
    assert section(dump(labels, data | {"categories": CATEGORIES[:1]}), results) is None
    (nothing := section(dump(labels, data), dump(results, [])))
    assert nothing is not None and "No object was taken for an object of another class." in nothing.body


@pytest.mark.parametrize("order", [1, -1])
def test_better_scores_choose_first(tmp_path: Path, order: int) -> None:
    labels, results = _disk(tmp_path)
    both = json.loads(results.read_text())[:2][::order]
    truth = read_records(labels)
    counts = count(truth, read_records(dump(results, both), like=truth))
    assert counts[CAT, CAT] == 1 and counts[None, DOG] == 1

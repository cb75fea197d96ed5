"""Predictions side by side: which are drawn, and their counts, on pictures made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sprompt.data.draw import FALSE, TRUE
from sprompt.study.figures import draw_predictions
from sprompt.study.page import write_page
from sprompt.study.predictions import Side, side_by_side

SIDE = 40


def square(x: int, y: int, size: int = 10) -> list[list[int]]:
    return [[x, y, x + size, y, x + size, y + size, x, y + size]]


def found(image: int, category: int, score: float, x: int, y: int) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "score": score, "segmentation": square(x, y)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, dict[str, Path]]:
    """Three grey pictures. The first has objects of class 1 at (5, 5) and of class 2 at (25, 25), the second has an object of
    class 1 at (5, 5), the third has none."""
    for i in (1, 2, 3):
        Image.fromarray(np.full((SIDE, SIDE, 3), 128, np.uint8)).save(tmp_path / f"{i}.png")
    objects = [(1, 1, 5, 5), (1, 2, 25, 25), (2, 1, 5, 5)]
    labels = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "segmentation": square(x, y), "area": 100, "bbox": [x, y, 10, 10], "iscrowd": 0}
            for n, (i, c, x, y) in enumerate(objects, 1)
        ],
    }  # fmt: skip
    models = {
        # three right predictions, and a false one with a lower score: the best F1 leaves it out
        "good": [found(1, 1, 0.9, 5, 5), found(1, 2, 0.8, 25, 25), found(2, 1, 0.7, 5, 5), found(2, 1, 0.1, 25, 25)],
        # a wrong class with a higher score than the right prediction: the best F1 has both
        "bad": [found(1, 2, 0.9, 5, 5), found(2, 1, 0.6, 5, 5)],
        "none": [],
    }
    paths = {}
    for name, results in {"labels": labels, **models}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
        paths[name] = tmp_path / f"{name}.json"
    return tmp_path, paths.pop("labels"), paths


def test_counts_are_those_of_the_best_score(files: tuple[Path, Path, dict[str, Path]]) -> None:
    sides = side_by_side(*files, limit=9)
    assert [side.name for side in sides] == ["1.png", "2.png"]  # the third picture has no label
    counts = [{model: counts for model, (_, counts) in side.found.items()} for side in sides]
    assert counts == [
        {"good": (2, 0, 0), "bad": (0, 1, 2), "none": (0, 0, 2)},
        {"good": (1, 0, 0), "bad": (1, 0, 0), "none": (0, 0, 1)},
    ]
    assert [side.name for side in side_by_side(*files, limit=1)] == ["1.png"]


def at(picture: Image.Image, x: int, y: int) -> np.ndarray:
    """Mean colour inside of the square at x, y."""
    scale = picture.width / SIDE
    inside = picture.crop(
        (round((x + 3) * scale), round((y + 3) * scale), round((x + 7) * scale), round((y + 7) * scale))
    )
    return np.asarray(inside, float).mean((0, 1))


def nearer(colour: np.ndarray, to: tuple[int, int, int], than: tuple[int, int, int]) -> bool:
    return float(np.linalg.norm(colour - to)) < float(np.linalg.norm(colour - than))


def test_what_is_drawn(files: tuple[Path, Path, dict[str, Path]]) -> None:
    first, second = side_by_side(*files, limit=9)
    grey = (128, 128, 128)
    assert nearer(at(first.labels, 5, 5), TRUE, FALSE) and nearer(at(first.labels, 25, 25), TRUE, FALSE)
    assert nearer(at(first.found["bad"][0], 5, 5), FALSE, TRUE)  # a prediction of another class
    assert np.allclose(at(first.found["bad"][0], 25, 25), grey, atol=3)  # no prediction there
    assert nearer(at(second.found["bad"][0], 5, 5), TRUE, FALSE)
    assert np.allclose(at(second.found["good"][0], 25, 25), grey, atol=3)  # the score of its prediction is too low


def test_broken_pictures_are_left_out(files: tuple[Path, Path, dict[str, Path]]) -> None:
    (files[0] / "1.png").write_bytes(b"broken")
    (side,) = side_by_side(*files, limit=9)
    assert side.name == "2.png" and side.found["good"][1] == (1, 0, 0)


def test_page_and_picture(files: tuple[Path, Path, dict[str, Path]], tmp_path: Path) -> None:
    images, labels, models = files
    sides: list[Side] = side_by_side(images, labels, {"pseudo": models["bad"], "prompts": models["good"]}, limit=9)
    text = write_page(tmp_path / "page", {}, sides=sides).read_text()
    assert 'id="predictions"' in text and "prompts, cosine assignment: 2 found, 0 false, 0 missed" in text
    assert "pseudo-labels: 0 found, 1 false, 2 missed" in text
    stored = {path.name for path in (tmp_path / "page" / "pictures").iterdir()}
    assert {f"found-00{n}.jpg" for n in range(4)} | {"labels-000.jpg", "labels-001.jpg"} <= stored
    assert draw_predictions(sides, tmp_path / "predictions.jpg") and not draw_predictions([], tmp_path / "none.png")
    with Image.open(tmp_path / "predictions.jpg") as picture:
        assert picture.width > picture.height and not (tmp_path / "none.png").exists()
    write_page(tmp_path / "page", {})
    assert not any((tmp_path / "page" / "pictures").iterdir())

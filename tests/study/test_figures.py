"""Pictures of a study: they are written, they show differences, and they are left out if there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sprompt.study.figures import draw_curves, draw_maps


def results(*, pseudo: float, seeds: int = 2, fractions: tuple[float, ...] = (0.05,)) -> dict[str, Any]:
    cells = [
        {"variant": variant, "fraction": fraction, "seed": seed, "metrics": {"AP": ap},
         "curve": [[4, ap / 2 + 0.01 * seed, ap], [8, ap + 0.01 * seed, ap]]}
        for variant, ap in (("pseudo", pseudo), ("prompts", 0.3))
        for fraction in fractions for seed in range(seeds)
    ]  # fmt: skip
    return {"cells": cells}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_curves(tmp_path: Path) -> None:
    a, b, many = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "many.png"
    assert draw_curves(results(pseudo=0.2), a) and draw_curves(results(pseudo=0.1), b)
    assert pixels(a).shape == pixels(b).shape and (pixels(a) != pixels(b)).any()
    assert draw_curves(results(pseudo=0.2, seeds=1, fractions=(0.05, 0.1, 0.2)), many)
    assert pixels(many).shape[0] > pixels(a).shape[0], "a panel for each question and share"


def test_maps(tmp_path: Path) -> None:
    local, wide = np.zeros((10, 20, 20)), np.ones((10, 20, 20))
    local[:, 3:5, 3:5] = 1
    assert draw_maps({"pseudo": local, "prompts": wide}, tmp_path / "maps.png")
    assert draw_maps({"pseudo": local[:2]}, tmp_path / "few.png")
    assert pixels(tmp_path / "maps.png").shape[0] > pixels(tmp_path / "few.png").shape[0]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw_curves({}, tmp_path / "curves.png")
    assert not draw_curves({"cells": [{"variant": "prompts", "fraction": 0.05, "seed": 0}]}, tmp_path / "curves.png")
    assert not draw_maps({}, tmp_path / "maps.png")
    assert not any(tmp_path.iterdir())

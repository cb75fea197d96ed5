"""The page of `sprompt view` shows the right runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sprompt.commands.view import View


@pytest.fixture
def runs(disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """An evaluate run with labels, and a predict run whose results are for pictures in another order."""
    monkeypatch.setattr(View, "_activation", lambda *_: None)  # needs a model
    settings = {
        "evaluate": {"data": {"images": str(disk.images), "annotations": str(disk.labels)}},
        "predict": {"images": str(disk.images), "checkpoint": "model.safetensors"},
    }
    made = {}
    for name, config in settings.items():
        made[name] = tmp_path / "made" / name
        made[name].mkdir(parents=True)
        (made[name] / "config.yaml").write_text(json.dumps({"command": name, **config}))
        shutil.copy(disk.predictions, made[name] / "predictions.json")
    categories = [{"id": 3, "name": "lynx"}, {"id": 5, "name": "wolf"}]
    images = [{"id": i, "file_name": f"p{name}.png"} for i, name in ((1, 7), (2, 2), (3, 3))]
    (made["predict"] / "pictures.json").write_text(json.dumps({"images": images, "categories": categories}))
    return made


@pytest.mark.parametrize("order", [("evaluate", "predict"), ("predict", "evaluate")])
def test_a_predict_run_leaves_the_comparison_with_labels(
    runs: dict[str, Path], tmp_path: Path, order: tuple[str, ...]
) -> None:
    View(tuple(runs[name] for name in order), out=tmp_path / "site").run()
    page = (tmp_path / "site" / "index.html").read_text()
    for part in (
        'id="predictions"',
        "Predictions against labels",
        'id="confusion"',
        'id="found"',
        "dog missed",
        "lynx 0.90",
    ):
        assert part in page, part
    assert "evaluate/predictions.json" in page and "predict/predictions.json" in page


def test_a_predict_run_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    View((runs["predict"],), out=tmp_path / "site").run()
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'id="predictions"' in page and 'id="found"' not in page and "lynx 0.90" in page and "p7.png" in page


def test_a_run_that_was_measured_without_classes_is_shown_without(runs: dict[str, Path], tmp_path: Path) -> None:
    """All results are cats, as those of a model of one class. One of them lies on a dog."""
    found = {}
    for pooled in (False, True):
        (runs["evaluate"] / "metrics.json").write_text(json.dumps({"AP": 0.5, "class_agnostic": pooled}))
        View((runs["evaluate"],), out=tmp_path / "site").run()
        page = (tmp_path / "site" / "index.html").read_text()
        assert ('id="confusion"' in page) != pooled and ("dog missed" in page) != pooled
        assert ("classes are pooled" in page) == pooled
        found[pooled] = int(page.split("</b>found")[0].rsplit(">", 1)[1])
    assert found == {False: 2, True: 3}

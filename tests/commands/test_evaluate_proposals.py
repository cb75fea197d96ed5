"""`sprompt evaluate --results` measures the masks of `sprompt propose`."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from sprompt import cli
from sprompt.data.synthetic import write_scenes


def evaluate(folder: Path, options: str) -> int:
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json"
    return cli.main(shlex.split(f"evaluate {data} --results {folder}/proposals.json --out {folder}/run {options}"))


def proposals(folder: Path, known: set[str]) -> dict[str, Any]:
    """The true masks of some pictures as proposals, under ids of their own, and a picture that has no labels."""
    truth = json.loads((folder / "instances.json").read_text())
    names = [*reversed([image["file_name"] for image in truth["images"]]), "unknown.png"]
    own = {name: number for number, name in enumerate(names)}
    masks = [
        {"image_id": own[name], "segmentation": a["segmentation"], "score": 0.5, "category_id": 1}
        for a in truth["annotations"]
        if (name := truth["images"][a["image_id"]]["file_name"]) in known
    ]
    masks.append({**masks[0], "image_id": own["unknown.png"]})
    return {"images": [{"id": own[name], "file_name": name} for name in names], "annotations": masks}


@pytest.mark.parametrize("options", ["--evaluator open-world", "--class-agnostic True"])
def test_masks_are_found_by_the_names_of_pictures(tmp_path: Path, options: str) -> None:
    write_scenes(tmp_path, 6, seed=0, size=(64, 64))
    truth = json.loads((tmp_path / "instances.json").read_text())
    known = {"000001.png", "000002.png", "000005.png"}
    (tmp_path / "proposals.json").write_text(json.dumps(proposals(tmp_path, known)))
    assert evaluate(tmp_path, options) == 0
    found = sum(truth["images"][a["image_id"]]["file_name"] in known for a in truth["annotations"])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    recall = metrics["merged"]["AR100"] if "merged" in metrics else metrics["AR100"]
    assert 0 < found < len(truth["annotations"]) and metrics["results"] == found
    assert recall == pytest.approx(found / len(truth["annotations"]))


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path, 2, seed=0, size=(64, 64))
    good = proposals(tmp_path, {"000000.png"})
    for content, options, problem in (
        (good, "", "proposals have no classes; give --class-agnostic True, or --evaluator open-world"),
        ({"images": [], "annotations": []}, "--class-agnostic True", "must hold pictures of the labels, got none"),
        ({"pictures": []}, "--class-agnostic True", "got a file without 'images'"),
        ("nothing", "--class-agnostic True", "must hold a list of COCO results, got a str"),
    ):
        (tmp_path / "proposals.json").write_text(json.dumps(content))
        assert evaluate(tmp_path, options) == 1
        assert problem in capsys.readouterr().err

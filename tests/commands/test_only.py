"""--only: a list of pictures as a limit, in every command that reads pictures."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from sprompt import cli
from sprompt.data.synthetic import write_scenes
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.saved import save_model
from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import save_backbone

NAMES = ["000001.png", "000004.png"]


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path, 6, seed=0, size=(64, 64))
    (tmp_path / "list.txt").write_text("# two of six\n" + "\n".join(NAMES))
    torch.manual_seed(0)
    save_backbone(tmp_path / "backbone.safetensors", ResNet(18, width=8))
    config = KNetConfig(depth=18, backbone_width=8, channels=16, kernels=4, heads=2, feedforward=32, num_classes=6)
    names = [c["name"] for c in json.loads((tmp_path / "instances.json").read_text())["categories"]]
    save_model(tmp_path / "model.safetensors", KNet(config), names, {"short": 64, "long": 64})
    return tmp_path


def test_propose(folder: Path) -> None:
    line = f"propose --images {folder}/images --backbone {folder}/backbone.safetensors --out {folder}/p.json --cpu True"
    assert sprompt(f"{line} --only {folder}/list.txt --proposals.short 64 --proposals.long 64") == 0
    assert [image["file_name"] for image in json.loads((folder / "p.json").read_text())["images"]] == NAMES


def test_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"predict --images {folder}/images --checkpoint {folder}/model.safetensors --out {folder}/p --test.workers 0 --cpu True"
    assert sprompt(f"{line} --only {folder}/list.txt") == 0
    assert [image["file_name"] for image in json.loads((folder / "p/pictures.json").read_text())["images"]] == NAMES
    assert " pictures a second (reading " in capsys.readouterr().out


def test_predict_with_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the six classes share a name in the file, so the model knows them by name and id."""
    labels = json.loads((folder / "instances.json").read_text())
    ids = [90, 3, 17, 4, 55, 8]
    labels["images"] = [i | {"id": 1000 - i["id"]} for i in labels["images"] if i["file_name"] in NAMES]
    labels["categories"] = [{"id": own, "name": "cat" if own in (3, 90) else f"dog {own}"} for own in ids]
    (folder / "ids.json").write_text(json.dumps(labels))
    names = [f"cat ({own})" if own in (3, 90) else f"dog {own}" for own in sorted(ids)]
    config = KNetConfig(depth=18, backbone_width=8, channels=16, kernels=4, heads=2, feedforward=32, num_classes=6)
    save_model(folder / "model.safetensors", KNet(config), names, {"short": 64, "long": 64})
    line = f"predict --images {folder}/images --checkpoint {folder}/model.safetensors --out {folder}/p --test.workers 0 --cpu True"
    assert sprompt(f"{line} --ids {folder}/ids.json") == 1
    assert "must have every file_name, but lacks 4, such as 000000.png; --only LIST" in capsys.readouterr().err
    assert sprompt(f"{line} --ids {folder}/ids.json --only {folder}/list.txt") == 0
    listing = json.loads((folder / "p/pictures.json").read_text())
    assert {i["file_name"]: i["id"] for i in listing["images"]} == {"000001.png": 999, "000004.png": 996}
    assert [(c["id"], c["name"]) for c in listing["categories"]] == list(zip(sorted(ids), names, strict=True))


def test_pictures_that_cannot_be_read_are_not_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / NAMES[0]).write_bytes(b"hello")
    line = f"propose --images {folder}/images --backbone {folder}/backbone.safetensors --out {folder}/p.json --cpu True"
    assert sprompt(f"{line} --only {folder}/list.txt --proposals.short 64 --proposals.long 64") == 0
    assert "masks in 1 pictures: " in capsys.readouterr().out
    line = f"predict --images {folder}/images --checkpoint {folder}/model.safetensors --out {folder}/p --test.workers 0 --cpu True"
    assert sprompt(f"{line} --only {folder}/list.txt --draw True") == 0
    said = capsys.readouterr()
    assert ", in 1 pictures, are in" in said.out and "draw: 2/2" in said.err


def test_backbone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = (
        "--densecl.depth 18 --densecl.width 4 --densecl.queue 16 --views.size 32 --train.epochs 1 --train.batch-size 2"
    )
    line = f"backbone --images {folder}/images --out {folder}/b --only {folder}/list.txt --train.workers 0 --cpu True"
    assert sprompt(f"{line} {small}") == 0
    said = capsys.readouterr().out
    assert "2 pictures in" in said and "after 1 steps" in said


def test_labelled_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json --data.only {folder}/list.txt"
    assert sprompt(f"check {data}") == 0
    assert "data: 2 pictures" in capsys.readouterr().out
    (folder / "images/000002.png").unlink()  # is not asked for
    line = f"evaluate {data} --checkpoint {folder}/model.safetensors --out {folder}/e --test.workers 0 --cpu True"
    assert sprompt(line) == 0
    found = json.loads((folder / "e/predictions.json").read_text())
    assert {record["image_id"] for record in found} <= {1, 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "propose --images {0}/images --backbone {0}/backbone.safetensors --only {0}/none.txt",
            "--only: there is no file",
        ),
        (
            "predict --images {0}/images --checkpoint {0}/model.safetensors --only {0}/other.txt",
            "names must be of pictures in",
        ),
        (
            "check --data.images {0} --data.annotations {0} --data.format ctw1500 --data.only {0}/list.txt",
            "--data.only: needs --data.format coco, got ctw1500",
        ),
    ],
)
def test_what_is_refused(folder: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.txt").write_text("9.png\n")
    assert sprompt(line.format(folder)) == 1
    assert message in capsys.readouterr().err

"""`sprompt demo --images`: from a folder of pictures to a gallery."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sprompt import cli
from sprompt.commands import demo
from sprompt.data.synthetic import scene
from sprompt.nn.efficientnet import EfficientNet
from tests.commands.test_imagenet import install


def photographs(folder: Path, number: int) -> Path:
    folder.mkdir()
    for index in range(number):
        image = scene(1, index, (64, 96)).image
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg")
    return folder


def test_pictures_become_a_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = photographs(tmp_path / "my photos", 7), tmp_path / "my demo"
    (weights,) = install(tmp_path / "packages")
    torch.manual_seed(0)
    tensors = (
        EfficientNet().state_dict()
    )  # features of new weights hardly differ between places, so that no mask would pass
    torch.save({name: 3 * tensor if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}, weights)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(demo, "_STEPS", 2)
    line = ["demo", "--images", str(images), "--pictures", "3", "--out", str(out)]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "3 of the 7 pictures" in said and f"open {out / 'view' / 'index.html'}" in said
    assert (out / "pictures.txt").read_text() == "0.jpg\n2.jpg\n4.jpg\n"
    proposals = json.loads((out / "proposals.json").read_text())
    assert [image["file_name"] for image in proposals["images"]] == ["0.jpg", "2.jpg", "4.jpg"]
    assert (out / "pretrain/model.safetensors").is_file() and (out / "predict/predictions.json").is_file()
    page = (out / "view/index.html").read_text()
    assert "Proposals" in page and "Predictions" in page
    model = (out / "pretrain/model.safetensors").read_bytes()
    assert cli.main(line) == 0  # goes on where it stopped, which is the end
    assert (out / "pretrain/model.safetensors").read_bytes() == model


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = photographs(tmp_path / "photos", 1), tmp_path / "demo"
    for options, problem in (
        (["--images", str(tmp_path / "none")], f"--images: there is no folder {tmp_path}/none"),
        (["--images", str(images), "--pictures", "0"], "--pictures: must be at least 1, got 0"),
        (["--images", str(images), "--backbone", str(tmp_path / "no.pth")], "--backbone: there is no file"),
    ):
        assert cli.main(["demo", "--out", str(out), *options]) == 1
        assert problem in capsys.readouterr().err
    assert not out.exists()

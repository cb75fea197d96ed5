"""`sprompt propose` with a ViT: the picture is padded to multiples of its patches, and its only map is searched."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sprompt import cli
from sprompt.data.coco import CocoDataset
from sprompt.data.pictures import png, read_picture
from sprompt.nn.vit import Vit, VitConfig
from sprompt.nn.weights import save_backbone


@pytest.mark.parametrize("patch", [14, 16])
def test_a_vit(patch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    backbone = Vit(VitConfig(patch=patch, width=16, depth=2, heads=2, grid=3)).eval()
    save_backbone(tmp_path / "vit.safetensors", backbone)
    images = tmp_path / "images"
    images.mkdir()
    sizes = [(90, 122), (122, 90), (90, 122)]  # no multiples of the patch; with `short` 90 the view is the picture
    for number, size in enumerate(sizes):
        coarse = torch.rand(1, 3, 3, 4)
        picture = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 1)
        (images / f"{number}.png").write_bytes(png((255 * picture).to(torch.uint8)))
    line = (
        f"propose --images {images} --backbone {tmp_path}/vit.safetensors --out {tmp_path}/p.json --cpu True --vectors True "
        "--proposals.short 90 --proposals.long 122 --proposals.min-score 0 --proposals.centre 0 --proposals.max-width 2"
    )
    assert cli.main(shlex.split(f"{line} --proposals.level C4")) != 0
    assert "level must be C5 for a backbone with one map, got C4" in capsys.readouterr().err
    assert cli.main(shlex.split(line)) == 0
    file = json.loads((tmp_path / "p.json").read_text())
    made = file["info"]["proposals"]
    assert (made["level"], made["stride"], made["divisor"]) == ("C5", patch, patch)

    vectors = load_file(tmp_path / "p.vectors.safetensors")["vectors"].float()
    assert len(vectors) == len(file["annotations"]) > 5
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    compared = 0
    for number, (height, width) in enumerate(sizes):
        rows, columns = -(-height // patch), -(-width // patch)
        padded = torch.zeros(1, 3, rows * patch, columns * patch)
        padded[0, :, :height, :width] = (read_picture(images / f"{number}.png") / 255 - mean) / std
        with torch.no_grad():
            (wanted,) = backbone(padded)
        assert wanted.shape[2:] == (rows, columns)
        for vector, a in zip(vectors, file["annotations"], strict=True):
            scale, row, column = a["seed"]
            if a["image_id"] == number and scale == 0:
                torch.testing.assert_close(vector, wanted[0, :, row, column], rtol=2e-3, atol=2e-3)  # float16
                compared += 1
    assert compared > 2

    dataset = CocoDataset(images, tmp_path / "p.json", class_agnostic=True)
    for number, sample in enumerate(dataset):
        own = [a["seed"] for a in file["annotations"] if a["image_id"] == number]
        points = [[(c + 0.5) * patch * 2**s, (r + 0.5) * patch * 2**s, s] for s, r, c in own]
        assert sample.masks.size == sizes[number]
        torch.testing.assert_close(sample.seeds, torch.tensor(points, dtype=torch.float32))

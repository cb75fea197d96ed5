"""From boxes to a model: labeler, label and finetune at the smallest size, and what the commands say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt import cli
from sprompt.commands.label import Label
from sprompt.commands.labeler import Labeler
from sprompt.commands.parsing import parse
from sprompt.data.synthetic import write_scenes
from sprompt.nn.resnet import ResNet
from sprompt.nn.tensor_files import read_tensors
from sprompt.nn.vit import Vit, VitConfig
from sprompt.nn.weights import save_backbone

RESNET = "--network.backbone resnet --network.depth 18 --network.backbone-width 8 --network.width 8 --network.crop 32"
VIT = "--network.vit.width 64 --network.vit.depth 1 --network.vit.heads 1 --network.vit.grid 2 --network.width 8 --network.crop 32"
SMALL = (
    "--crops.min-area 100 --losses.iterations 3 --train.epochs 2 --train.batch-size 6 --train.workers 0 --train.log-steps 1 "
    "--train.learning-rate 0.01 --cpu True"
)


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    write_scenes(folder, 6, seed=0, size=(64, 64))
    truth = json.loads((folder / "instances.json").read_text())
    for name, value in (("garbage", "not a mask"), ("boxes", None)):
        changed: dict[str, Any] = json.loads(json.dumps(truth))
        for annotation in changed["annotations"]:
            del annotation["segmentation"], annotation["area"]
            if value is not None:
                annotation["segmentation"] = value
        (folder / f"{name}.json").write_text(json.dumps(changed))
    torch.manual_seed(0)
    save_backbone(folder / "resnet.safetensors", ResNet(18, width=8))
    save_backbone(folder / "vit.safetensors", Vit(VitConfig(width=64, depth=1, heads=1, grid=3)))
    return folder


@pytest.fixture(scope="module")
def chain(folder: Path) -> Path:
    data = f"--images {folder}/images --annotations {folder}/boxes.json"
    assert (
        sprompt(f"labeler {data} --backbone {folder}/resnet.safetensors --out {folder}/labeler {RESNET} {SMALL}") == 0
    )
    assert sprompt(f"label {data} --checkpoint {folder}/labeler --out {folder}/labels.json --cpu True") == 0
    return folder


def test_the_chain(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phase 2 trains on the labelled file as on any other."""
    log = [json.loads(line) for line in (chain / "labeler/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, len(log) + 1)) and {"mil", "crf", "lr"} <= log[0].keys()
    assert log[0]["lr"] == 0
    labels = json.loads((chain / "labels.json").read_text())
    assert (
        labels["annotations"] and labels["categories"] == json.loads((chain / "boxes.json").read_text())["categories"]
    )
    finetune = (
        f"finetune --data.images {chain}/images --data.annotations {chain}/labels.json --out {chain}/fine --model.depth 18 "
        "--model.backbone-width 8 --model.channels 16 --model.kernels 8 --model.heads 2 --model.feedforward 32 --augment.short 64 "
        "--augment.long 64 --train.epochs 1 --train.batch-size 3 --train.workers 0 --train.warmup-steps 0 --cpu True"
    )
    assert sprompt(finetune) == 0
    assert (chain / "fine/model.safetensors").is_file()
    view = f"view --images {chain}/images --predictions {chain}/labels.json --labels {chain}/instances.json --out {chain}/view"
    assert sprompt(view) == 0
    assert 'id="predictions"' in (chain / "view/index.html").read_text()


def test_a_second_start_has_nothing_to_do(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (chain / "labeler/labeler.safetensors").read_bytes(), (chain / "labels.json").read_bytes()
    assert sprompt(f"labeler --config {chain}/labeler/config.yaml") == 0
    data = f"--images {chain}/images --annotations {chain}/boxes.json"
    assert sprompt(f"label {data} --checkpoint {chain}/labeler --out {chain}/labels.json --cpu True") == 0
    assert (chain / "labeler/labeler.safetensors").read_bytes() == before[0]
    assert (chain / "labels.json").read_bytes() == before[1]
    assert "all steps are done" in capsys.readouterr().err
    other = f"labeler --config {chain}/labeler/config.yaml --losses.momentum 0.5"
    assert sprompt(other) == 1
    assert "losses.momentum (was 0.996, now 0.5)" in capsys.readouterr().err


def test_masks_are_never_read(chain: Path, tmp_path: Path) -> None:
    """A file with garbage as masks, one with true masks and one without any give the same weights."""
    want, _ = read_tensors(chain / "labeler/labeler.safetensors")
    for name in ("garbage", "instances"):
        data = f"--images {chain}/images --annotations {chain}/{name}.json"
        out = tmp_path / name
        assert sprompt(f"labeler {data} --backbone {chain}/resnet.safetensors --out {out} {RESNET} {SMALL}") == 0
        found, _ = read_tensors(out / "labeler.safetensors")
        assert all(torch.equal(found[key], value) for key, value in want.items())
        assert sprompt(f"label {data} --checkpoint {out} --out {out}.json --cpu True") == 0
    masks = [
        [a["segmentation"] for a in json.loads(path.read_text())["annotations"]]
        for path in (chain / "labels.json", tmp_path / "garbage.json", tmp_path / "instances.json")
    ]
    assert masks[0] == masks[1] == masks[2]


def test_a_vit_from_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stem is new, its positions are resized, and its other weights are those of the file."""
    data = f"--images {folder}/images --annotations {folder}/boxes.json"
    line = f"labeler {data} --backbone {folder}/vit.safetensors --out {tmp_path}/run {VIT} {SMALL} --train.max-steps 1"
    assert sprompt(line) == 0
    said = capsys.readouterr().out
    assert "positions resized from 3x3 to 2x2" in said and "stem starts anew" in said
    trained, _ = read_tensors(tmp_path / "run/labeler.safetensors")
    given, _ = read_tensors(folder / "vit.safetensors")
    name = "blocks.0.attn.qkv.weight"  # the rate is 0 in the first step
    assert torch.equal(trained[f"backbone.{name}"], given[name])
    assert sprompt(f"label {data} --checkpoint {tmp_path}/run --out {tmp_path}/labels.json --cpu True") == 0


def test_shares_and_comparison(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--images {chain}/images --annotations {chain}/instances.json --checkpoint {chain}/labeler --cpu True"
    line = f"label {data} --out {tmp_path}/labels.json --compare True"
    assert sprompt(f"{line} --shard 1/2") == 0  # six pictures are one unit, so this share is empty
    assert "share 1 of 2 is done" in capsys.readouterr().out
    assert sprompt(f"{line} --shard 0/2") == 0
    said = capsys.readouterr().out
    count = len(json.loads((chain / "instances.json").read_text())["annotations"])
    assert f"{count} boxes in 6 pictures" in said and "objects a second by part: " in said
    for part in ("decode", "crop", "encoder and heads", "paste", "run lengths"):
        assert f"{part} " in said
    assert "labels with true masks" in said and "boxes below 32² pixels" in said
    assert sprompt(f"{line} --shard 2/2") == 1
    assert "--shard: must be index/count" in capsys.readouterr().err
    assert sprompt(line.replace("instances.json", "boxes.json").replace("labels.json", "other.json")) == 1
    assert "--compare: needs masks in" in capsys.readouterr().err


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--images {folder}/images --annotations {folder}/boxes.json"
    assert sprompt(f"labeler {data} --out {tmp_path}/a {RESNET} {SMALL} --crops.min-area 1e6") == 1
    assert "must hold a box of more than 1e+06 pixels, got none" in capsys.readouterr().err
    assert sprompt(f"label {data} --checkpoint {tmp_path} --out {tmp_path}/b.json") == 1
    assert "holds no labeler.safetensors" in capsys.readouterr().err
    assert sprompt(f"label {data} --checkpoint {folder}/resnet.safetensors --out {tmp_path}/b.json") == 1
    assert "must be a file of `sprompt labeler`" in capsys.readouterr().err
    assert sprompt(f"labeler {data} --backbone {folder}/vit.safetensors --out {tmp_path}/a {RESNET} {SMALL}") == 1
    assert "must hold a ResNet" in capsys.readouterr().err


def test_boxes_that_cannot_be_used_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((folder / "boxes.json").read_text())
    first, second, third, fourth = content["annotations"][:4]
    first["bbox"], second["bbox"], third["bbox"] = [float("nan")] * 4, [500, 500, 9, 9], [3, 3, 1, 30]
    fourth["iscrowd"] = 1
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    data = f"--images {folder}/images --annotations {tmp_path}/boxes.json"
    assert sprompt(f"labeler {data} --out {tmp_path}/run {RESNET} {SMALL} --train.max-steps 1") == 0
    said = capsys.readouterr().out
    for why in (
        "without a box of four finite numbers",
        "outside of its picture",
        "not wider and higher than 2",
        "of crowds",
    ):
        assert said.count(why) == 1, why
    line = f"label {data} --checkpoint {tmp_path}/run --out {tmp_path}/labels.json --cpu True"
    assert sprompt(line) == 0
    said = capsys.readouterr().out
    assert "boxes.json: 1 annotation of crowds stays as it is (annotation id " in said
    assert "of crowds is left out" not in said and "outside of its picture is left out" in said


def test_the_paper_preset_is_the_default_and_the_paper() -> None:
    given = ["--images", "a", "--annotations", "b"]
    paper = parse("labeler", ["--preset", "paper", *given])
    assert paper == Labeler(Path("a"), Path("b"))
    assert parse("label", ["--preset", "paper", *given, "--checkpoint", "c"]) == Label(Path("a"), Path("b"), Path("c"))
    t = paper.train
    assert (t.epochs, t.batch_size, t.betas, t.weight_decay, t.clip) == (10, 32, (0.9, 0.9), 5e-4, None)
    assert t.learning_rate == pytest.approx(1.5e-6 * 8 * 4)
    assert (paper.network.crop, paper.network.vit.grid, paper.network.width) == (512, 32, 256)
    assert (paper.losses.momentum, paper.losses.mil_weight, paper.losses.crf_weight) == (0.996, 4, 0.5)
    tiny = parse("labeler", ["--preset", "tiny", *given])
    assert tiny.cpu and tiny.network.crop == 96 and tiny.train.schedule == "epoch_cosine"

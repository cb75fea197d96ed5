"""Every model of the library through the commands, at the smallest size; on the GPU where there is one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sprompt import cli
from sprompt.data.synthetic import write_scenes
from sprompt.models.saved import load_model
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import ResNet
from sprompt.nn.swin import Swin, SwinConfig
from sprompt.nn.weights import save_backbone

RESNET = "--model.depth 18 --model.backbone-width 8"
SWIN = (
    "--model.backbone swin --model.swin.width 8 --model.swin.depths 1 2 1 1 --model.swin.heads 1 2 2 2 --model.swin.window 4 "
    "--model.swin.drop-path 0.1"
)
MASK2FORMER = (
    "--model mask2former --model.channels 16 --model.queries 8 --model.heads 2 --model.encoder-layers 1 --model.encoder-feedforward 32 "
    "--model.decoder-layers 3 --model.decoder-feedforward 32 --model.points 64"
)
FASTINST = (
    "--model fastinst --model.channels 16 --model.queries 8 --model.auxiliary-queries 2 --model.heads 2 --model.decoder-layers 2 "
    "--model.decoder-feedforward 32 --model.points 64"
)
QUERYINST = (
    "--model queryinst --model.channels 16 --model.queries 8 --model.heads 2 --model.stages 2 --model.dynamic-channels 4 "
    "--model.feedforward 32"
)
KNET = "--model knet --model.channels 16 --model.kernels 8 --model.heads 2 --model.stages 2 --model.feedforward 32"
#: The smallest network of each model, and its backbone. tests/test_cli.py has K-Net with a ResNet.
NETWORKS = {
    "mask2former": (f"{MASK2FORMER} {RESNET}", lambda: ResNet(18, width=8)),
    "fastinst": (
        f"{FASTINST} --model.depth 50 --model.backbone-width 8 --model.backbone-variant d-dcn",
        lambda: ResNet(50, width=8, variant="d-dcn"),
    ),
    "queryinst": (f"{QUERYINST} {RESNET}", lambda: ResNet(18, width=8)),
    "knet, efficientnet-lite0": (f"{KNET} --model.backbone efficientnet-lite0", EfficientNet),
    "mask2former, swin": (f"{MASK2FORMER} {SWIN}", lambda: Swin(SwinConfig(8, (1, 2, 1, 1), (1, 2, 2, 2), 4))),
}
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --train.log-steps 1 --train.warmup-steps 0"
TEST = "--test.short 64 --test.long 64 --test.workers 0 --test.batch-size 4"
LABELS = "--data.images {0}/scenes/images --data.annotations {0}/scenes/instances.json"


def sprompt(folder: Path, line: str) -> None:
    assert cli.main(shlex.split(line.format(folder))) == 0, line


@pytest.mark.parametrize(("network", "backbone"), NETWORKS.values(), ids=NETWORKS)
def test_the_chain(
    network: str,
    backbone: Callable[[], ResNet | Swin | EfficientNet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scenes(tmp_path / "scenes", 6, seed=0, size=(64, 64))
    torch.manual_seed(0)
    save_backbone(tmp_path / "backbone.safetensors", backbone())
    sprompt(
        tmp_path,
        "propose --images {0}/scenes/images --backbone {0}/backbone.safetensors --out {0}/proposals.json "
        "--proposals.level C3 --proposals.short 128 --proposals.long 128 --proposals.min-score 0.3",
    )
    sprompt(
        tmp_path,
        f"pretrain {network} --images {{0}}/scenes/images --proposals {{0}}/proposals.json --backbone {{0}}/backbone.safetensors "
        f"--out {{0}}/pre --train.epochs 1 {SMALL}",
    )
    log = [json.loads(line) for line in (tmp_path / "pre/log.jsonl").read_text().splitlines()]
    assert all(0 < line["kernel"] < 20 for line in log if "kernel" in line) and "monitor/prompts_used" in log[0]
    labels = f"{LABELS} {LABELS.replace('data.', 'val.')}"
    finetune = f"finetune {labels} --checkpoint {{0}}/pre --out {{0}}/fine --train.epochs 2 {SMALL} {TEST}"
    option, value = ("--model.swin.window", 9) if "mask2former" in network else ("--model.heads", 1)
    assert cli.main(shlex.split(f"{finetune} {option} {value}".format(tmp_path))) != 0
    assert f"{option}: is {value}, but the model of --checkpoint has" in capsys.readouterr().err
    sprompt(tmp_path, finetune)
    assert f"name: {shlex.split(network)[1]}" in (tmp_path / "fine/config.yaml").read_text()
    trained = (tmp_path / "fine/model.safetensors").read_bytes()
    sprompt(tmp_path, "finetune --config {0}/fine/config.yaml")  # goes on, and has nothing to do
    assert (tmp_path / "fine/model.safetensors").read_bytes() == trained
    sprompt(tmp_path, f"evaluate --checkpoint {{0}}/fine {LABELS} --out {{0}}/eval {TEST}")
    evaluated, tested = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("eval", "fine"))
    assert evaluated == tested
    sprompt(
        tmp_path,
        f"predict --checkpoint {{0}}/fine --images {{0}}/scenes/images --out {{0}}/predicted {TEST}",
    )
    sprompt(tmp_path, "view {0}/pre {0}/fine --out {0}/view --limit 2")
    page = (tmp_path / "view/index.html").read_text()
    for section in ("proposals", "prompts", "predictions", "kernels"):
        assert f'id="{section}"' in page


def test_segprompt_after_its_baseline(tmp_path: Path) -> None:
    """The model of the class-agnostic preset, taught on by prompts; a run that was stopped goes on with the same bits."""
    write_scenes(tmp_path / "scenes", 6, seed=0, size=(64, 64))
    common = f"{LABELS} {MASK2FORMER} {RESNET} {SMALL} {TEST} --train.epochs 2"
    sprompt(
        tmp_path,
        f"finetune --preset class-agnostic-tiny {common} {LABELS.replace('data.', 'val.')} --out {{0}}/agnostic",
    )
    assert json.loads((tmp_path / "agnostic/metrics.json").read_text())["class_agnostic"]
    taught = (
        f"finetune --preset segprompt-tiny {common} --checkpoint {{0}}/agnostic --method.categories 3 --method.copies 2 "
        "--method.instances 2"
    )
    sprompt(tmp_path, f"{taught} --out {{0}}/straight")
    sprompt(tmp_path, f"{taught} --out {{0}}/stopped --train.max-steps 1")
    sprompt(tmp_path, f"{taught} --out {{0}}/stopped")
    first, second = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("straight", "stopped"))
    assert first == second != (tmp_path / "agnostic/model.safetensors").read_bytes()
    assert load_model(tmp_path / "straight/model.safetensors")[1]["classes"] == ["object"]
    log = [json.loads(line) for line in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
    assert {f"{g}/{t}" for g in ("prompt", "extract") for t in ("class", "mask", "dice")} <= set(log[0])
    sprompt(
        tmp_path,
        f"evaluate --checkpoint {{0}}/straight {LABELS} --class-agnostic True --out {{0}}/eval {TEST}",
    )

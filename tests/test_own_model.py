"""A user's own model, taken from docs/adding_a_model.md, works in every command when it is named on the command line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sprompt.data.synthetic import write_scenes
from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import save_backbone

sys.path.insert(0, str(Path(__file__).parent / "methods"))
from tiny_queries import MODEL

OWN = "--model own_model:TinyQueries"
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --train.log-steps 1 --cpu True --train.warmup-steps 0"
TEST = "--test.short 64 --test.long 64 --test.workers 0 --test.batch-size 4 --cpu True"
LABELS = "--data.images scenes/images --data.annotations scenes/instances.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own_model.py, scenes and a backbone, in which the chain of commands has run."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_model.py").write_text(MODEL)
    write_scenes(folder / "scenes", 6, seed=0, size=(64, 64))
    torch.manual_seed(0)
    save_backbone(folder / "backbone.safetensors", ResNet(18, width=8))
    for line in (
        "propose --images scenes/images --backbone backbone.safetensors --cpu True --proposals.level C3 --proposals.short 128 "
        "--proposals.long 128 --proposals.min-score 0.3",
        f"pretrain {OWN} --model.queries 12 --images scenes/images --proposals proposals.json --backbone backbone.safetensors "
        f"--out pre --train.epochs 1 {SMALL}",
        f"finetune {OWN} {LABELS} {LABELS.replace('data.', 'val.')} --checkpoint pre --out fine --train.epochs 1 {SMALL} "
        f"{TEST.replace('--cpu True', '')}",
        f"evaluate {OWN} --checkpoint fine {LABELS} --out eval {TEST}",
        f"predict {OWN} --checkpoint fine --images scenes/images --out predicted --draw True {TEST}",
        f"view {OWN} pre fine eval predicted --limit 2 --cpu True",
    ):
        status, said = sprompt(folder, line)
        assert status == 0, f"{line}\n{said}"
    return folder


def sprompt(folder: Path, line: str) -> tuple[int, str]:
    """Runs a command in the folder, in its own process. Returns its exit status and its output."""
    done = subprocess.run(
        [sys.executable, "-m", "sprompt.cli", *shlex.split(line)], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_files_carry_the_name_and_the_settings(folder: Path) -> None:
    for run in ("pre", "fine"):
        config = (folder / run / "config.yaml").read_text()
        assert "name: own_model:TinyQueries" in config and "queries: 12" in config
    number = len(json.loads((folder / "scenes/instances.json").read_text())["categories"])
    assert f"num_classes: {number}\n" in (folder / "fine/config.yaml").read_text()


def test_every_command_did_its_work(folder: Path) -> None:
    evaluated, tested = (json.loads((folder / run / "metrics.json").read_text()) for run in ("eval", "fine"))
    assert evaluated == tested
    assert len(list((folder / "predicted/drawn").glob("*.jpg"))) == 6
    page = (folder / "view/index.html").read_text()
    for section in ("proposals", "prompts", "predictions", "kernels"):
        assert f'id="{section}"' in page


def test_started_again_a_run_goes_on(folder: Path) -> None:
    before = (folder / "fine/model.safetensors").read_bytes()
    status, said = sprompt(folder, f"finetune {OWN} --config fine/config.yaml")
    assert status == 0, said
    assert (folder / "fine/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"evaluate --checkpoint fine {LABELS}",
            "own_model:TinyQueries is a model of your own, which no file may import",
        ),
        (
            "finetune --config fine/config.yaml",
            "which no file may import; name it yourself: --model own_model:TinyQueries",
        ),
        (f"evaluate --model own_model:Nothing --checkpoint fine {LABELS}", "own_model has no class Nothing"),
        (f"evaluate --model nowhere:Model --checkpoint fine {LABELS}", "--model: nowhere cannot be imported"),
        (f"evaluate --model own_model:nn --checkpoint fine {LABELS}", "must have an attribute Config"),
        (f"evaluate --model fine {LABELS}", "got fine; a trained model is given by --checkpoint"),
        (
            f"finetune {OWN} --checkpoint fine --model.queries 9 {LABELS}",
            "--model.queries: is 9, but the model of --checkpoint has 12",
        ),
    ],
)
def test_what_is_refused(folder: Path, line: str, message: str) -> None:
    status, said = sprompt(folder, line)
    assert status == 1 and message in said and "Traceback" not in said, said


def test_help_shows_the_settings_of_the_model(folder: Path) -> None:
    status, said = sprompt(folder, f"pretrain {OWN} --help")
    assert status == 0 and "--model.queries" in said and "--model.kernels" not in said and "num-classes" not in said

"""Messages that a user must understand without the source at hand."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import os
import shlex
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt import cli
from sprompt.commands import parsing
from sprompt.commands.run_folder import backbone_file
from sprompt.data.synthetic import write_scenes
from sprompt.nn.resnet import ResNet
from sprompt.nn.vit import Vit, VitConfig
from sprompt.nn.weights import save_backbone
from sprompt.registry import Named

NETWORK = "--model.depth 18 --model.backbone-width 8 --model.channels 16 --model.kernels 8 --model.heads 2 --model.feedforward 32"
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --cpu True"


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scenes, and a run folder `run` with a backbone."""
    write_scenes(tmp_path, 6, seed=0, size=(64, 64))
    torch.manual_seed(0)
    save_backbone(tmp_path / "run/backbone.safetensors", ResNet(18, width=8))
    return tmp_path


def test_advice_about_another_backbone_names_the_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json"
    assert sprompt(f"finetune {data} --backbone {folder}/run --out {folder}/f --cpu True") == 1
    said = capsys.readouterr().err
    assert "width 8: --model.depth 18 --model.backbone-width 8 (depth=18, width=8 in Python)" in said
    assert sprompt(f"backbone --images {folder}/images --init {folder}/run --out {folder}/b --cpu True") == 1
    assert "width 8: --densecl.width 8 (width=8 in Python)" in capsys.readouterr().err


def test_a_run_folder_is_a_backbone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--proposals.short 64 --proposals.long 64 --proposals.level C3 --proposals.min-score 0.1 --cpu True"
    assert sprompt(f"propose --images {folder}/images --backbone {folder}/run --out {folder}/p.json {small}") == 0
    line = f"pretrain --images {folder}/images --proposals {folder}/p.json --out {folder}/pre --train.epochs 1 {NETWORK} {SMALL}"
    assert sprompt(f"{line} --backbone {folder}/run") == 0
    assert backbone_file(folder / "pre", "backbone") == folder / "pre/model.safetensors"
    small = "--proposals.short 32 --proposals.long 32 --cpu True"
    assert sprompt(f"propose --images {folder}/images --backbone {folder}/pre --out {folder}/q.json {small}") == 0
    capsys.readouterr()
    assert sprompt(f"propose --images {folder}/images --backbone {folder}/images --out {folder}/r.json") == 1
    assert "images holds no backbone.safetensors and no model.safetensors" in capsys.readouterr().err


def test_a_start_from_random_weights_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json --train.max-steps 1"
    said = "training starts from random weights: neither --checkpoint nor --backbone is given"
    for start, wanted in (("", True), (f"--backbone {folder}/run", False)):
        assert sprompt(f"finetune {data} {start} --out {folder}/f{wanted} {NETWORK} {SMALL}") == 0
        assert (said in capsys.readouterr().out) == wanted


def test_labels_that_an_evaluation_lacks_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = json.loads((folder / "instances.json").read_text())
    boxed, crowd = labels["annotations"][:2]
    boxed["segmentation"], crowd["iscrowd"] = [], 1
    (folder / "val.json").write_text(json.dumps(labels))
    (folder / "results.json").write_text("[]")
    data = f"images {folder}/images --{{0}}.annotations {folder}/val.json"
    lines = (
        f"evaluate --results {folder}/results.json --data.{data.format('data')} --out {folder}/e",
        f"finetune --data.images {folder}/images --data.annotations {folder}/instances.json --val.{data.format('val')} "
        f"--out {folder}/f --train.max-steps 1 {NETWORK} {SMALL}",
    )
    for line in lines:
        assert sprompt(line) == 0
        said = capsys.readouterr().out
        lost = f"  {folder}/val.json: 1 annotation with a box but without a mask is left out (annotation id {boxed['id']})\n"
        assert lost in said and "of crowds" not in said


def test_only_kernel_supervision_needs_the_backbone_of_the_proposals(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proposals of a ViT, whose map has a stride of its own, and a model with a ResNet."""
    save_backbone(folder / "vit.safetensors", Vit(VitConfig(patch=16, width=16, depth=1, heads=2, grid=3)))
    search = (
        "--proposals.short 64 --proposals.long 64 --proposals.min-score 0 --proposals.centre 0 --proposals.max-width 2"
    )
    made = f"propose --images {folder}/images --backbone {folder}/vit.safetensors --out {folder}/p.json --cpu True {search}"
    assert sprompt(made) == 0
    line = f"pretrain --images {folder}/images --proposals {folder}/p.json --backbone {folder}/run --train.epochs 1 {NETWORK} {SMALL}"
    capsys.readouterr()
    assert sprompt(f"{line} --out {folder}/supervised-kernels") == 1
    assert "--backbone: kernel supervision needs the backbone that" in capsys.readouterr().err
    assert not (folder / "supervised-kernels").exists()
    ways = ["--method.kernel-weight 0", "--method.kernel-weight 0 --method.assign none", "--method supervised"]
    for number, way in enumerate(ways):
        assert sprompt(f"{line} --out {folder}/{number} {way}") == 0, capsys.readouterr().err
        assert (folder / f"{number}/model.safetensors").is_file()


def test_the_same_backbone_by_file_and_by_folder_is_the_same_run(folder: Path) -> None:
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json"
    line = f"finetune {data} --out {folder}/f {NETWORK} {SMALL}"
    assert sprompt(f"{line} --train.epochs 1 --backbone {folder}/run") == 0
    assert sprompt(f"{line} --train.epochs 2 --backbone {folder}/run/backbone.safetensors") == 0


def test_view_names_a_folder_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sprompt(f"view {folder}/nowhere") == 1
    assert capsys.readouterr().err == f"sprompt view: {folder}/nowhere: there is no such run folder; check the path\n"


def test_propose_that_goes_on_does_not_count_what_was_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sprompt.data.folder import PictureFolder
    from sprompt.methods.saliency_prompt import ProposalConfig, generate

    told: list[tuple[int, int]] = []
    config = ProposalConfig(short=64, long=64)

    def work(stop: bool) -> None:
        def progress(done: int, total: int) -> None:
            told.append((done, total))
            if stop:
                raise KeyboardInterrupt

        backbone = ResNet(18, width=4)
        torch.nn.init.constant_(backbone.conv1.weight, 0.1)
        torch.manual_seed(0)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        generate(PictureFolder(folder / "images"), backbone, config, folder / "p.json", unit=2, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        work(stop=True)
    work(stop=False)
    assert told == [(2, 6), (2, 6), (4, 6), (6, 6)]


def test_warnings_are_one_line(folder: Path) -> None:
    """pytest catches warnings, so the command runs in a process of its own. With one thread it does not warn of a busy machine."""
    data = f"--data.images {folder}/images --data.annotations {folder}/instances.json"
    line = f"finetune {data} --out {folder}/f --train.epochs 2 --train.drops 1 2 5 {NETWORK} {SMALL}"
    done = subprocess.run(
        [sys.executable, "-m", "sprompt.cli", *shlex.split(line)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    warned = [text for text in done.stderr.splitlines() if "warn" in text.lower() or ".py" in text]
    assert len(warned) == 2 and warned[0].startswith("warning: warmup_steps: should be well below the 4 steps")
    assert warned[1] == (
        "warning: drops: should lie before the end of the training after 2 epochs, got 2, 5: the learning rate never drops there; "
        "give --train.drops that fit --train.epochs"
    )


def _documented(kind: type) -> set[str]:
    """Fields of a dataclass with a text below them, of its bases too."""
    found = set()
    for base in kind.__mro__:
        if dataclasses.is_dataclass(base):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]  # a class
            for statement, text in itertools.pairwise(body):
                if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(statement.target, ast.Name) and ast.literal_eval(text.value).strip()
                    found.add(statement.target.id)
    return found


def _settings(kind: type, before: str = "") -> Iterator[tuple[str, bool]]:
    """Every setting of a command by its dotted name, and whether it has a text."""
    hints: dict[str, Any] = typing.get_type_hints(kind)
    documented = _documented(kind)
    for field in dataclasses.fields(kind):
        yield before + field.name, field.name in documented
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) or (isinstance(inner, type) and issubclass(inner, Named)):
            named = (
                [inner.registry.get(name).Config for name in inner.registry.names()] if issubclass(inner, Named) else []
            )
            for own in named or [inner]:
                yield from _settings(own, f"{before}{field.name}.")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "env"])
def test_every_option_has_a_text(name: str) -> None:
    assert [setting for setting, has_text in _settings(parsing.command(name)) if not has_text] == []

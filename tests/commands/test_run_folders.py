"""Run folders: on a full disk, with unreadable pictures, and read from another working directory."""

from __future__ import annotations

import errno
import json
import resource
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sprompt import cli, machine
from sprompt.commands import parsing
from sprompt.commands.evaluate import Evaluate
from sprompt.commands.labelled_data import LabelledData
from sprompt.data.synthetic import write_scenes
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.saved import save_model

NETWORK = "--model.depth 18 --model.backbone-width 8 --model.channels 16 --model.kernels 8 --model.heads 2 --model.feedforward 32"
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --cpu True"


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", 6, seed=0, size=(64, 64))
    return tmp_path


def saved(folder: Path) -> Path:
    """A model that nobody trained."""
    torch.manual_seed(0)
    config = KNetConfig(depth=18, backbone_width=8, channels=16, kernels=4, heads=2, feedforward=32, num_classes=6)
    categories = json.loads((folder / "scenes/instances.json").read_text())["categories"]
    path = folder / "model.safetensors"
    save_model(path, KNet(config), [c["name"] for c in categories], {"short": 64, "long": 64})
    return path


@contextmanager
def files_of_at_most(bytes: int) -> Iterator[None]:
    """A write beyond this size fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {folder}/scenes/images --data.annotations {folder}/scenes/instances.json"
    line = f"finetune {data} --out {folder}/run {NETWORK} {SMALL} --train.epochs"
    assert sprompt(f"{line} 1") == 0
    capsys.readouterr()
    with files_of_at_most(200_000):
        assert sprompt(f"{line} 2") == 1
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sprompt finetune:")]
    assert len(said) == 1 and "step-00000004: this checkpoint cannot be written (" in said[0]
    assert "free disk space, then start the same command again" in said[0]
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert sprompt(f"{line} 2") == 0
    assert "goes on at step 2 of 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("propose --images {0}/scenes/images --backbone {0}/none --out {0}/scenes", "file, got the folder"),
        (
            "label --images {0}/scenes/images --annotations {1} --checkpoint {0}/none --out {0}/scenes",
            "file, got the folder",
        ),
        ("split --annotations {1} --out {1}", "folder, got the file"),
        ("lvis-ow --lvis-train {1} --lvis-val {1} --coco-train {1} --out {1}", "folder, got the file"),
        ("predict --images {0}/scenes/images --checkpoint {0}/model.safetensors --out {1}", "folder, got the file"),
        ("demo --out {1}", "folder, got the file"),
    ],
    ids=lambda text: text.split()[0],
)
def test_out_of_the_wrong_kind(folder: Path, line: str, got: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder)
    labels = folder / "scenes/instances.json"
    before = labels.read_bytes()
    assert sprompt(line.format(folder, labels)) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith(f"sprompt {line.split()[0]}: --out: must be a {got} {folder}/scenes") and said.count("\n") == 1
    )
    assert labels.read_bytes() == before


def test_a_model_that_cannot_be_written(folder: Path) -> None:
    with files_of_at_most(10_000), pytest.raises(OSError, match=r"model\.safetensors: cannot be written \("):
        saved(folder)
    assert [path.name for path in folder.iterdir()] == ["scenes"]


def test_a_full_disk_is_one_line_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parsing, "parse", full)
    assert sprompt("demo") == 1
    said = capsys.readouterr().err
    assert (
        said == "sprompt demo: [Errno 28] No space left on device; free disk space, then start the same command again\n"
    )


def test_pictures_that_cannot_be_read_are_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(folder)
    (folder / "scenes/images/000002.png").write_bytes(b"cut off")
    line = f"predict --images {folder}/scenes/images --checkpoint {model} --out {folder}/p --test.workers 0 --cpu True"
    assert sprompt(line) == 0
    images = json.loads((folder / "p/pictures.json").read_text())["images"]
    assert len(images) == 6 and ["problem" in image for image in images] == [i == 2 for i in range(6)]
    assert "000002.png: is not a picture" in images[2]["problem"]
    assert ", in 5 pictures, are in " in capsys.readouterr().out


def test_view_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(folder)
    data = "--data.images scenes/images --data.annotations scenes/instances.json"
    monkeypatch.chdir(folder)
    assert sprompt(f"evaluate {data} --checkpoint model.safetensors --out e --test.workers 0 --cpu True") == 0
    config = yaml.safe_load((folder / "e/config.yaml").read_text())
    assert config["folder"] == str(folder) and config["data"]["images"] == "scenes/images"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    capsys.readouterr()
    assert sprompt("view ../e --limit 2 --cpu True") == 0
    page = Path("view/index.html").read_text()
    assert 'id="predictions"' in page and 'id="kernels"' in page and str(folder) + "<" not in page
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "computing the mean mask of each kernel"
    assert [text for text in said if text.startswith("section: ")] == [
        f"section: {name}" for name in ("predictions", "confusion", "metrics", "kernels", "runs")
    ]


def test_paths_of_a_run_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists from the working directory stays; so does one that exists nowhere."""
    data = LabelledData(Path("scenes/images"), Path("nowhere.json"))
    monkeypatch.chdir(folder)
    text = parsing.record(Evaluate(data, out=Path("runs/evaluate")))
    (folder / "config.yaml").write_text(yaml.safe_dump(text))
    assert parsing.read_record(Path("config.yaml"))[1].data == data
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    read = parsing.read_record(folder / "config.yaml")[1]
    assert read.data == LabelledData(folder / "scenes/images", Path("nowhere.json")) and read.out == Path(
        "runs/evaluate"
    )
    (folder / "other/scenes/images").mkdir(parents=True)
    assert parsing.read_record(folder / "config.yaml")[1].data == data
    assert parsing.parse("evaluate", ["--config", str(folder / "config.yaml")]).data == data


def test_a_busy_machine_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (4.0, 9.0, 9.0))
    assert machine.busy() is None
    monkeypatch.setattr("os.getloadavg", lambda: (5.25, 0.0, 0.0))
    data = f"--data.images {folder}/scenes/images --data.annotations {folder}/scenes/instances.json"
    line = f"finetune {data} --out {folder}/run {NETWORK} {SMALL} --train.epochs 1"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.warns(RuntimeWarning, match=r"its load is 5\.2 on 4 cores; .*OMP_NUM_THREADS=1"):
            assert sprompt(line) == 0
    finally:
        torch.set_num_threads(threads)

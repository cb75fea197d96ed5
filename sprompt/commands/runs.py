"""Run folders: what a command leaves behind, and where the next one finds it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sprompt.cli import record
from sprompt.files import atomic_write
from sprompt.models.files import load_model, save_model
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.knet.checkpoint import import_checkpoint
from sprompt.nn.files import read_metadata
from sprompt.settings import to_yaml

MODEL = "model.safetensors"
METRICS = "metrics.json"
PREDICTIONS = "predictions.json"


def first() -> bool:
    """Whether this is the first process of a launcher's, or the only one; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def begin(out: Path, settings: Any) -> None:
    """Makes the run folder and writes config.yaml into it, by the first process."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    if first():
        atomic_write(out / "config.yaml", to_yaml(record(settings)))


def model_file(path: Path) -> Path:
    """The model of a run folder, or the file itself."""
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path}: holds no {MODEL}; has its training finished? (start the same command again to go on)"
            if path.is_dir()
            else f"{path}: there is no such file"
        )
    return file


def open_model(path: Path, config: KNetConfig) -> tuple[KNet, list[str], str]:
    """The model of a run folder or file, the names of its classes, and a sentence about it; `config` is for files of the official
    release, which do not say what network they hold."""
    file = model_file(path)
    if file.suffix == ".safetensors" and is_model(file):
        model, about = load_model(file)
        return model, about["classes"], f"{file}: {about['model']} of {len(about['classes'])} classes"
    model = KNet(config)
    said = import_checkpoint(model, file)
    return model.eval(), [str(number) for number in range(config.num_classes)], said


def is_model(file: Path) -> bool:
    """Whether a safetensors file was written by `save`."""
    return "model" in json.loads(read_metadata(file).get("sprompt", "{}"))


def existing(path: Path, option: str, *, folder: bool) -> Path:
    """The path, if it is there and of the right kind."""
    if not path.exists():
        raise ValueError(f"--{option}: there is no {'folder' if folder else 'file'} {path}")
    if path.is_dir() != folder:
        raise ValueError(f"--{option}: must be a {'folder' if folder else 'file'}, got {path}")
    return path


def save(out: Path, model: nn.Module, classes: Sequence[str]) -> None:
    """Writes the trained model, by the first process."""
    if first():
        save_model(out / MODEL, model, classes)
    say(f"the model is in {out / MODEL}")


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    atomic_write(out / METRICS, json.dumps(metrics, indent=1) + "\n")


def say(message: str) -> None:
    """A line for the person who waits, from the first process only."""
    if first():
        print(message, flush=True)

"""Run folders: what a command leaves behind, and where the next one finds it."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import nn

from sprompt.cli import record
from sprompt.data.coco import CocoDataset
from sprompt.data.loader import Batches
from sprompt.data.resident import Kept, Resident
from sprompt.data.transforms import Augment, collate
from sprompt.engine.processes import processes
from sprompt.files import atomic_write
from sprompt.models.files import load_model, save_model
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.knet.checkpoint import import_checkpoint
from sprompt.nn.files import read_metadata
from sprompt.settings import read_yaml, to_yaml

CONFIG = "config.yaml"
MODEL = "model.safetensors"
METRICS = "metrics.json"
PREDICTIONS = "predictions.json"


def first() -> bool:
    """Whether this is the first process of a launcher's, or the only one; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def begin(out: Path, settings: Any) -> str:
    """Makes the run folder; what its config.yaml shall hold. Refuses the folder of another command."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: must be a folder, got the file {out}")
    text = record(settings)
    if (out / CONFIG).is_file():
        there = read_yaml(out / CONFIG).get("command", text["command"])
        if there != text["command"]:
            raise ValueError(
                f"--out: {out} is the folder of a run of {there}; choose another, its files would be replaced"
            )
    out.mkdir(parents=True, exist_ok=True)
    return to_yaml(text)


def keep(out: Path, text: str) -> None:
    """Writes config.yaml, by the first process."""
    if first():
        atomic_write(out / CONFIG, text)


def batches(dataset: Any, augment: Augment, *, keep: bool, cpu: bool) -> Callable[..., Any]:
    """What `train` makes its batches with. `keep`: of pictures that stay on the device, else of those read anew."""
    if not keep:
        return partial(Batches, dataset, augment, collate)
    device = processes(cpu).device
    say(f"reading {len(dataset)} pictures, which stay on {device}")
    return partial(Resident, Kept(dataset, augment, device))


def say_if_crowded(dataset: CocoDataset, kernels: int) -> None:
    """A warning where pictures have more masks than a model can find: one with each kernel."""
    counts = dataset.mask_counts
    if crowded := sum(count > kernels for count in counts):
        say(
            f"  {crowded} pictures have more masks, up to {max(counts)}, than the model has kernels, {kernels}, and each finds at "
            "most one; --model.kernels of the first training sets them"
        )


def listing(names: Sequence[str]) -> str:
    """How many pictures, and a digest of their names."""
    text = "\n".join(names).encode(errors="surrogateescape")
    return f"{len(names)} {hashlib.sha256(text).hexdigest()[:32]}"


def digest(path: Path | None) -> str | None:
    """Of a file's content, by which a resumed run knows its inputs."""
    if path is None:
        return None
    if path.is_dir():
        return listing([f"{file.name} {file.stat().st_size}" for file in sorted(path.iterdir()) if file.is_file()])
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()[:32] if hasattr(hashlib, "file_digest") else _hashed(file)
        )


def _hashed(file: BinaryIO) -> str:
    """The same under Python 3.10."""
    own = hashlib.sha256()
    while block := file.read(1 << 20):
        own.update(block)
    return own.hexdigest()[:32]


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


class Opened(NamedTuple):
    model: KNet
    classes: list[str] | None  # None: the file does not tell, as those of the official release
    size: tuple[int, int]  # short and long side of the pictures that it was trained on
    said: str  # a sentence about it


def open_model(path: Path, config: KNetConfig) -> Opened:
    """The model of a run folder or file; `config` is for files of the official release, which do not say what network they hold."""
    file = model_file(path)
    if file.suffix == ".safetensors" and is_model(file):
        model, about = load_model(file)
        size = (about["extra"].get("short", 800), about["extra"].get("long", 1333))
        return Opened(model, about["classes"], size, f"{file}: {about['model']} of {len(about['classes'])} classes")
    model = KNet(config)
    said = import_checkpoint(model, file)
    return Opened(model.eval(), None, (800, 1333), said)


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


def save(out: Path, model: nn.Module, classes: Sequence[str], augment: Augment) -> None:
    """Writes the trained model, with the size of the pictures that it knows, by the first process."""
    if first():
        save_model(out / MODEL, model, classes, {"short": augment.shorts[1], "long": augment.long})
    say(f"the model is in {out / MODEL}")


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    atomic_write(out / METRICS, json.dumps(metrics, indent=1) + "\n")


def say(message: str) -> None:
    """A line for the person who waits, from the first process only."""
    if first():
        print(message, flush=True)

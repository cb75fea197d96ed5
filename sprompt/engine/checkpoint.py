"""Checkpoints. A checkpoint is a folder that gets its name only when it is complete. A damaged checkpoint is never loaded.

checkpoints/step-00000500/task.safetensors         the task's state_dict
                          optimiser.safetensors    the optimiser's state, by parameter
                          state.json               step, configuration, versions, size and checksum of the other two files
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sprompt.atomic import atomic_write, sync_folder
from sprompt.data.reading import read_json

FORMAT = 1
MAX_STATE = 64 << 20  # upper bound of the size of state.json, bytes
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """All checkpoints of a run are damaged."""


class Saved(NamedTuple):
    path: Path
    step: int
    task: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. Only the newest `keep` checkpoints are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, the newest first."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, task: dict[str, Tensor], optimiser: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Writes a checkpoint. It gets its name when all its data are on the disk. Then the oldest checkpoints are removed.
        Raises OSError if the checkpoint cannot be written, for example because the disk is full. The older checkpoints then
        stay."""
        final = self.path(step)
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            self._write(temporary, step, task, optimiser, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"{final}: this checkpoint cannot be written ({error}); free disk space, then start the same command again; it "
                "goes on from the last checkpoint"
            ) from error
        for newer in self.steps():
            if newer >= step:  # it must be damaged; otherwise the run would have gone on from it
                shutil.rmtree(self.path(newer))
        os.rename(temporary, final)
        sync_folder(self.folder)
        for old in self.steps()[self.keep :]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    def _write(
        self, folder: Path, step: int, task: dict[str, Tensor], optimiser: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = {}
        for name, tensors in (("task", task), ("optimiser", optimiser)):
            path = folder / f"{name}.safetensors"
            safetensors.torch.save_file(_storable(tensors), path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[path.name] = _fingerprint(path)
        record = {"format": FORMAT, "step": step, **state, "files": files}
        atomic_write(folder / "state.json", json.dumps(record, indent=1), sync=True)

    def clean(self) -> None:
        """Removes incomplete checkpoints of a killed process."""
        for path in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Saved | None:
        """The newest checkpoint that is whole; None if there are no checkpoints. Warns about each damaged checkpoint, with
        the reason. Raises CheckpointError if all checkpoints are damaged."""
        steps = self.steps()
        for step in steps:
            path = self.path(step)
            try:
                return self._read(path, step)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                reason = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, TypeError)) else error
                warnings.warn(f"{path}: is damaged ({reason}); trying the older one", RuntimeWarning, stacklevel=2)
        if steps:
            raise CheckpointError(
                f"{self.folder}: must hold a checkpoint that is whole, got {len(steps)} damaged; move the folder away to start anew"
            )
        return None

    def _read(self, path: Path, step: int) -> Saved:
        state = read_json(path / "state.json", MAX_STATE)
        if state["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {state['format']!r}")
        if state["step"] != step:
            raise ValueError(f"step must be the number in the folder's name, got {state['step']!r}")
        tensors = []
        for name in ("task", "optimiser"):
            file = path / f"{name}.safetensors"
            if _fingerprint(file) != state["files"][file.name]:
                raise ValueError(f"size and checksum of {file.name} must be those in state.json, got others")
            tensors.append(safetensors.torch.load_file(file))
        return Saved(path, step, tensors[0], tensors[1], state)


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU. No two of them share memory."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file, read in pieces."""
    size = checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": size, "crc32": checksum}

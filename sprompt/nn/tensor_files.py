"""Files of tensors. Reading is bounded and runs no code from the file; a file is written whole or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sprompt.atomic import replacing

_MAX_HEADER = 16 << 20  # bytes of names and shapes in a safetensors file; a network of 1000 tensors has 0.1 MB

_MAX_CONFIG = 1 << 24  # bytes of a config.json; that of a network with 20 000 classes has 1 MB
_KEYS = ("state_dict", "model", "teacher")  # under the first of them a file of torch.save may hold its tensors

_CONVERT = (
    "if you trust where it comes from, convert it once:\n"
    "    import torch; from safetensors.torch import save_file; held = torch.load({path!r}, 'cpu', weights_only=False)\n"
    "    held = next((held[key] for key in {keys} if key in held), held)\n"
    "    save_file({{k: v.contiguous().clone() for k, v in held.items()}}, {target!r})\n"
    "and give the new file instead"
)


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and the file's metadata.

    Reads safetensors, and files of torch.save that hold a dict of tensors, bare or under "state_dict", "model" or "teacher". The
    metadata of a safetensors file are its own; the metadata of a file of torch.save are the strings beside that key.
    Raises ValueError for any other file; the message says what to do.
    """
    path = _existing(path)
    with open(path, "rb") as raw:
        start = raw.read(4)
    if path.suffix != ".safetensors" and start and start != b"PK\x03\x04" and start[:1] != b"\x80":
        raise ValueError(
            f"{path}: must be a file of torch.save or safetensors, got something else; is it the right file?"
        )
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        try:
            with safe_open(path, "pt") as file:
                # Copies are aligned in memory. Views of the file need not be, and products with them may have other bits.
                return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: must be a whole safetensors file, got {error}; fetch or write it again"
            ) from None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0][:200]
        convert = _CONVERT.format(path=str(path), keys=_KEYS, target=str(path.with_suffix(".safetensors")))
        raise ValueError(
            f"{path}: must hold tensors and plain values, got objects that only running code from the file can make; {convert}\n"
            f"(torch says: {first})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: must be a whole file of torch.save, got {first}; fetch or write it again") from None
    about: dict[str, str] = {}
    for key in _KEYS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            about = {str(name): value for name, value in held.items() if isinstance(value, str)}
            held = held[key]
            break
    if not isinstance(held, Mapping) or not any(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{path}: must hold tensors by name, got {type(held).__name__} without any; save a state_dict")
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}, about


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file; its tensors are not read."""
    path = _existing(path)
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
        raise ValueError(
            f"{path}: must be a whole safetensors file, got a header of {length} bytes in a file of {path.stat().st_size}; "
            "fetch or write it again"
        )
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: must be a whole safetensors file, got {error}; fetch or write it again") from None


def read_config(path: Path | str) -> dict[str, Any] | None:
    """The content of the config.json in the folder of a file of tensors, where transformers puts it; None if there is none."""
    path = Path(path).parent / "config.json"
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_CONFIG:
        raise ValueError(
            f"{path}: must have at most {_MAX_CONFIG >> 20} MiB, got {path.stat().st_size} bytes; is it the right file?"
        )
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path}: must be a JSON object, got {held!r:.40}")
    return held


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors. Raises OSError if the file cannot be written, as on a full disk."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(held, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}); free disk space and start again") from error
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise ValueError(f"{path}: must be a file of weights, got {got}; check the path")
    return path

"""Saved models: safetensors files that also hold the name of the model, its configuration and its classes. `load_model`
needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sprompt.models.fit import check_fit
from sprompt.models.registry import MODELS, ModelConfig
from sprompt.nn.tensor_files import read_metadata, read_tensors, write_tensors
from sprompt.settings import from_plain

_FORMAT = 1


def save_model(
    path: Path | str,
    model: nn.Module,
    classes: Sequence[str],
    extra: Mapping[str, Any] | None = None,
    *,
    half: bool = False,
) -> None:
    """Writes a model with the names of its classes. The file is written whole or not at all.

    Args:
        extra: any values that JSON can hold; `load_model` returns them.
        half: write float32 tensors as float16, which halves the file. `load_model` gives float32 again.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise TypeError(f"save_model: model must have a config derived from ModelConfig, got {type(model).__name__}")
    name = MODELS.name(type(config))
    if len(classes) != config.num_classes:
        raise ValueError(
            f"save_model: classes must have {config.num_classes} names, one for each output of the model, got {len(classes)}; "
            "reset_classifier gives the model another number of classes"
        )
    about = {
        "format": _FORMAT,
        "model": name,
        "config": asdict(config),
        "classes": list(classes),
        "extra": dict(extra or {}),
    }
    tensors = model.state_dict()
    if half:
        tensors = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"sprompt": json.dumps(about)})


def read_info(path: Path | str) -> dict[str, Any]:
    """The checked description in a model's file: {"format", "model", "config", "classes", "extra"}. The tensors are not
    read."""
    try:
        about = json.loads(read_metadata(path).get("sprompt", "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: must say in JSON which model it holds, got {error}; write it again") from None
    if not isinstance(about, dict) or "model" not in about:
        raise ValueError(
            f"{path}: must be a model saved by this library, got tensors without a description of their model; import an "
            "official K-Net file, or load a backbone into a model"
        )
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: format must be {_FORMAT}, got {about.get('format')!r}; is this version too old for it?"
        )
    classes, config = about.get("classes"), _config(path, about)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: classes must be a list of names, got {classes!r:.80}; write it again")
    if len(classes) != config.num_classes:
        raise ValueError(
            f"{path}: must name as many classes as the model has, {config.num_classes}, got {len(classes)}; write it again"
        )
    if not isinstance(about.setdefault("extra", {}), dict):
        raise ValueError(f"{path}: extra must be an object, got {about['extra']!r:.80}; write it again")
    return about


def load_model(path: Path | str) -> tuple[Any, dict[str, Any]]:
    """The model of a file, on the CPU and in eval mode, and its description from `read_info`.

    Nothing in the file is ever executed or imported. `MODELS` must already know a model from outside of this library.
    """
    info = read_info(path)
    tensors, _ = read_tensors(path)
    with torch.device("meta"):  # takes no memory, whatever sizes the file claims
        model = MODELS.get(info["model"])(_config(path, info))
    wanted = model.state_dict()
    for name in tensors.keys() & wanted.keys():
        if (tensors[name].dtype, wanted[name].dtype) == (torch.float16, torch.float32):  # saved with `half`
            tensors[name] = tensors[name].float()
    check_fit(path, tensors, wanted)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), info


def _config(path: Path | str, about: Mapping[str, Any]) -> Any:
    try:
        kind = MODELS.get(str(about["model"])).Config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    values = about.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config must have the fields of {kind.__name__}, got {type(values).__name__}")
    try:
        return from_plain(
            kind, values, where="config"
        )  # a file of an older version lacks fields, which have their default
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_saved_model(path: Path) -> bool:
    """Whether `save_model` wrote this file."""
    if path.suffix != ".safetensors":
        return False
    try:
        about = json.loads(read_metadata(path).get("sprompt", "null"))
    except (json.JSONDecodeError, RecursionError):
        return True  # read_info then raises an error that names the fault
    return isinstance(about, dict) and "model" in about


def saved_name(path: Path) -> str | None:
    """The name of the model in a run folder or in a file of `save_model`. None for any other path. The name is not checked."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not (file.is_file() and file.suffix == ".safetensors"):
        return None
    try:
        about = json.loads(read_metadata(file).get("sprompt", "null"))
    except (ValueError, RecursionError):
        return None
    name = about.get("model") if isinstance(about, dict) else None
    return name if isinstance(name, str) else None

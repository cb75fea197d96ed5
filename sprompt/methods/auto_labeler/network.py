"""The network of Mask Auto-Labeler from its settings, and in files that hold both."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sprompt.methods.auto_labeler.config import NetworkConfig
from sprompt.models.backbone import build_backbone
from sprompt.models.fit import check_fit
from sprompt.nn.mask_labeler import MaskLabeler
from sprompt.nn.tensor_files import read_metadata, read_tensors, write_tensors
from sprompt.nn.vit import Vit
from sprompt.settings import from_plain

_FORMAT = 1


def build_network(config: NetworkConfig) -> MaskLabeler:
    """A new network, from torch's global random numbers."""
    backbone = Vit(config.vit) if config.backbone == "vit" else build_backbone(config, frozen_stages=-1)
    return MaskLabeler(backbone, config.width)


def save_network(path: Path | str, network: MaskLabeler, config: NetworkConfig) -> None:
    """Writes a network with its settings, whole or not at all."""
    about = {"format": _FORMAT, "labeler": asdict(config)}
    write_tensors(path, network.state_dict(), {"sprompt": json.dumps(about)})


def load_network(path: Path | str) -> tuple[MaskLabeler, NetworkConfig]:
    """The network of a file of `save_network`, on the CPU and in eval mode. Raises ValueError for any other file. Nothing in the file is
    executed or imported."""
    config = _config(path, read_metadata(path).get("sprompt", "null"))
    tensors, _ = read_tensors(path)
    with torch.device("meta"):  # takes no memory, whatever sizes the file claims
        network = build_network(config)
    check_fit(path, tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return network.eval(), config


def _config(path: Path | str, text: str) -> NetworkConfig:
    try:
        about: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: must say in JSON which network it holds, got {error}; write it again") from None
    if not isinstance(about, dict) or not isinstance(about.get("labeler"), dict):
        raise ValueError(
            f"{path}: must be a file of `sprompt labeler`, got tensors of something else; is it the right file?"
        )
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: format must be {_FORMAT}, got {about.get('format')!r}; is this version too old for it?"
        )
    try:
        return from_plain(NetworkConfig, about["labeler"], where="labeler")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

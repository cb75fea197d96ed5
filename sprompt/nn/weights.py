"""Weights of a ResNet in files. Checkpoints of other projects are recognised by the names of their tensors; files of this
library have metadata that say what they hold."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprompt.nn.resnet import DEPTHS, BasicBlock, ResNet
from sprompt.nn.tensor_files import read_tensors, write_tensors

#: Prefixes of the backbone's tensors in a file; the first with a stem counts. A full DenseCL checkpoint holds two backbones.
PREFIXES = ("", "backbone.", "module.backbone.", "module.encoder_q.", "module.")
_OWN = re.compile(r"(conv1|bn1|layer\d+)\.")


OPTIONS = ("--model.depth", "--model.backbone-width")  # of the commands that load a backbone into a model


def load_backbone(resnet: ResNet, path: Path | str, options: tuple[str, str] = OPTIONS) -> str:
    """Copies the backbone of a checkpoint into `resnet`. Returns a sentence that names the loaded and the unused tensors.

    Reads the files of torchvision, MoCo v2, DenseCL (whole or extracted), SwAV, K-Net and of this library, as .pth or
    safetensors. Raises ValueError if a tensor is missing, has another shape, is not finite, or belongs to a larger network;
    then `resnet` is unchanged. No code from the file is ever executed. `options` are the command line's names of depth and width, for
    messages.
    """
    return _load(resnet, path, *_read(path), options)


def _load(
    resnet: ResNet, path: Path | str, tensors: Mapping[str, Tensor], about: Mapping[str, Any], options: tuple[str, str] = OPTIONS
) -> str:  # fmt: skip
    prefix = _prefix(tensors, path)
    held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    held = {name: tensor for name, tensor in held.items() if _OWN.match(name)}
    wanted = resnet.state_dict()
    _check_fit(path, held, wanted, resnet, options)
    for name, tensor in held.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path}: tensors must be finite, got NaN or infinity in {prefix}{name}; the file is damaged"
            )
    resnet.load_state_dict({**wanted, **held})

    rest = [name for name in tensors if not (name.startswith(prefix) and name.removeprefix(prefix) in held)]
    sentence = f"{path}: {len(held)} tensors of a ResNet-{resnet.depth}"
    if resnet.width != 64:
        sentence += f" of width {resnet.width}"
    sentence += f" from {_format(tensors, prefix, about)}"
    return sentence + (f"; left out: {_summary(rest)}" if rest else "")


def open_backbone(path: Path | str, *, frozen_stages: int = 4) -> ResNet:
    """The ResNet of a file, in eval mode. Depth and width follow from the tensors. Reads the same files as `load_backbone`."""
    tensors, about = _read(path)
    prefix = _prefix(tensors, path)
    depth, width = _architecture(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
    if depth is None or width is None:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"{path}: must hold a ResNet of depth {known}, got blocks or widths of another network")
    resnet = ResNet(depth, width=width, frozen_stages=frozen_stages)
    _load(resnet, path, tensors, about)
    return resnet.eval()


def save_backbone(path: Path | str, resnet: ResNet, dtype: torch.dtype = torch.float32) -> None:
    """Writes a ResNet as safetensors with its depth and width, whole or not at all; float16 files have half the size."""
    tensors = {}
    for name, tensor in resnet.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.detach().to("cpu", dtype).contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"save_backbone: tensors must be finite in {dtype}, got NaN or infinity in {name}")
            tensors[name] = tensor
    about = json.dumps({"backbone": {"depth": resnet.depth, "width": resnet.width}})
    write_tensors(path, tensors, {"sprompt": about})


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors by name, and its metadata."""
    tensors, metadata = read_tensors(path)
    if "sprompt" not in metadata:
        return tensors, dict(metadata)
    try:
        about = json.loads(metadata["sprompt"])
    except (ValueError, RecursionError):
        about = None
    return tensors, about if isinstance(about, dict) else {}


def _prefix(tensors: Mapping[str, Tensor], path: Path | str) -> str:
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in tensors and f"{prefix}layer1.0.conv1.weight" in tensors:
            return prefix
    names = ", ".join(list(tensors)[:5]) or "no tensors at all"
    raise ValueError(
        f"{path}: must hold a ResNet (conv1.weight, layer1.0.conv1.weight, ... , bare or behind "
        f"{', '.join(PREFIXES[1:])}), got {names}{', ...' if len(tensors) > 5 else ''}"
    )


def _format(tensors: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any]) -> str:
    """The kind of the file, in words."""
    first = {name.split(".")[0] for name in tensors}
    if "backbone" in about:
        return "a backbone of this library"
    if "model" in about:
        return "a trained model of this library"
    if prefix == "module.encoder_q.":
        return "a MoCo v2 checkpoint"
    if any(name.startswith(("module.projection_head", "module.prototypes")) for name in tensors):
        return "a SwAV checkpoint"
    if about.get("author") == "DenseCL" or {"queue2", "encoder_q"} & first:
        return "a DenseCL checkpoint" + ("" if prefix else ", extracted")
    if {"rpn_head", "roi_head"} <= first:
        return "a K-Net checkpoint"
    if prefix == "" and "fc" in first:
        return "a torchvision checkpoint"
    return f"a checkpoint with names behind {prefix!r}" if prefix else "a checkpoint with torchvision's names"


def _check_fit(
    path: Path | str, held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], resnet: ResNet, options: tuple[str, str]
) -> None:
    """Raises ValueError unless the file has exactly the wanted tensors: an extra one means that the network is larger."""
    missing = [name for name in wanted if name not in held and not name.endswith("num_batches_tracked")]
    extra = [name for name in held if name not in wanted]
    both = [name for name in wanted if name in held]
    shapes = [name for name in both if held[name].shape != wanted[name].shape]
    if not missing and not extra and not shapes:
        return
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing ({_some(missing)})")
    if extra:
        faults.append(f"{len(extra)} too many ({_some(extra)})")
    if shapes:
        name = shapes[0]
        got, must = (tuple(tensors[name].shape) for tensors in (held, wanted))
        faults.append(f"{len(shapes)} of another shape ({name} is {got}, must be {must})")
    depth, width = _architecture(held)
    advice = "is it the right file?"
    if depth is not None and width is not None and (depth, width) != (resnet.depth, resnet.width):
        other = [
            (option, name, value)
            for option, name, value, own in zip(
                options, ("depth", "width"), (depth, width), (resnet.depth, resnet.width), strict=True
            )
            if value != own
        ]
        given = " ".join(f"{option} {value}" for option, _, value in other)
        in_python = ", ".join(f"{name}={value}" for _, name, value in other)
        what = f"a ResNet-{depth}" if width == resnet.width else f"a ResNet-{depth} of width {width}"
        advice = f"the file holds {what}: {given} ({in_python} in Python)"
    raise ValueError(
        f"{path}: must hold the tensors of a ResNet-{resnet.depth} of width {resnet.width}, got {'; '.join(faults)}; {advice}"
    )


def _architecture(held: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Depth and width of the network of these tensors; None where no known network fits."""
    blocks = {match.groups() for name in held if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    counts = tuple(Counter(layer for layer, _ in blocks)[str(layer)] for layer in (1, 2, 3, 4))
    basic = "layer1.0.conv3.weight" not in held
    stem = held.get("conv1.weight")
    width = int(stem.shape[0]) if stem is not None and stem.ndim == 4 and 0 < stem.shape[0] <= 1024 else None
    for depth, (block, wanted) in DEPTHS.items():
        if wanted == counts and (block is BasicBlock) == basic:
            return depth, width
    return None, width


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _summary(names: list[str]) -> str:
    """Number of tensors of each module: "module.encoder_k (320), module.queue"."""
    groups = Counter(".".join(name.split(".")[: 2 if name.startswith("module.") else 1]) for name in names)
    return ", ".join(group if count == 1 else f"{group} ({count})" for group, count in groups.items())

"""Weights of a backbone in files: a ResNet, an EfficientNet-Lite, a Swin or a ViT. Checkpoints of other projects are recognised by the
names of their tensors; files of this library have metadata that say what they hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprompt.nn import efficientnet_files, resnet_files, swin_files, vit_files
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import ResNet
from sprompt.nn.swin import Swin
from sprompt.nn.tensor_files import read_config, read_tensors, write_tensors
from sprompt.nn.vit import Vit

Backbone = ResNet | EfficientNet | Swin | Vit
_FILES = {ResNet: resnet_files, EfficientNet: efficientnet_files, Swin: swin_files, Vit: vit_files}
#: Of the commands that load a backbone into a model.
OPTIONS = ("--model.backbone", "--model.depth", "--model.backbone-width", "--model.backbone-variant")


def load_backbone(network: Backbone, path: Path | str, options: tuple[str, str, str, str] = OPTIONS) -> str:
    """Copies the backbone of a checkpoint into `network`. Returns a sentence that names the loaded and the unused tensors.

    Reads files of this library, as .pth or safetensors; for a ResNet also those of torchvision, timm, MoCo v2, DenseCL (whole or
    extracted), SwAV and K-Net; for an EfficientNet-Lite those of timm and efficientnet_pytorch; for a Swin those of its release, of
    transformers and of Mask2Former; for a ViT those of MAE, DeiT, DINO, DINOv2, timm and transformers. The file of a classifier lacks the
    norms of a Swin's maps, which start anew, and the offsets of deformable convolutions, which start at 0. Positions of a ViT are resized
    to the grid of `network`; its convolutional stem keeps its values if the file has patches.

    Raises ValueError if another tensor is missing, has another shape, is not finite, or belongs to a larger network; then `network` is
    unchanged. No code from the file is ever executed. `options` are the command line's names of the kind of the backbone and of a
    ResNet's depth, width and variant, for messages.
    """
    given, said = _fitting(network, path, *_read(path), options)
    network.load_state_dict({**network.state_dict(), **given})
    return said


def open_backbone(path: Path | str, *, frozen_stages: int = 4) -> Backbone:
    """The backbone of a file, in eval mode. Reads the same files as `load_backbone`.

    Its sizes follow from the tensors. The heads and the eps of a ViT follow from the file of this library or from the config.json beside a
    file of transformers; in other files a head has 64 channels (80 in ViT-H) and eps is 1e-6. A ViT is frozen as a whole, unless
    `frozen_stages` is -1.
    """
    tensors, about = _read(path)
    files = next((files for files in _FILES.values() if files.find(tensors)), None)
    if files is None:
        expected = " or ".join(files.EXPECTED for files in _FILES.values())
        raise ValueError(f"{path}: must hold {expected}, got {_first(tensors)}")
    held = files.find(tensors)[1]
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            claimed = files.opened(held, about, frozen_stages)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    given, _ = _fitting(claimed, path, tensors, about, OPTIONS)
    network = files.opened(held, about, frozen_stages)
    network.load_state_dict({**network.state_dict(), **given})
    return network.eval()


def save_backbone(path: Path | str, network: Backbone, dtype: torch.dtype = torch.float32) -> None:
    """Writes a backbone as safetensors with its sizes, whole or not at all; float16 files have half the size."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.detach().to("cpu", dtype).contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"save_backbone: tensors must be finite in {dtype}, got NaN or infinity in {name}")
            tensors[name] = tensor
    write_tensors(path, tensors, {"sprompt": json.dumps({"backbone": _sizes(network)})})


def _sizes(network: Backbone) -> dict[str, Any]:
    if isinstance(network, ResNet):
        return {"depth": network.depth, "width": network.width, "variant": network.variant}
    return {"name": network.name} if isinstance(network, EfficientNet) else asdict(network.config)


def _fitting(
    network: Backbone, path: Path | str, tensors: Mapping[str, Tensor], about: Mapping[str, Any],
    options: tuple[str, str, str, str],
) -> tuple[dict[str, Tensor], str]:  # fmt: skip
    """The tensors of a file that a network takes, and a sentence about them. Raises ValueError if they do not fit."""
    wanted = network.state_dict()
    constants: dict[str, Tensor] = {}  # tensors that the file may hold, and that the network makes itself
    fresh: dict[str, Tensor] = {}  # tensors that the file lacks
    changes: list[str] = []
    files = next(files for kind, files in _FILES.items() if isinstance(network, kind))
    found = files.find(tensors)
    if found is None:
        other = next((other for other in _FILES.values() if other.find(tensors)), None)
        hint = f"; the file holds {other.EXPECTED.split(' (')[0]}" if other else ""
        if (lite := efficientnet_files.find(tensors)) is not None:
            hint = f"; {efficientnet_files.advice(lite[1], None, options[0])}"
        raise ValueError(f"{path}: must hold {files.EXPECTED}, got {_first(tensors)}{hint}")
    prefix, held, rest = found
    if isinstance(network, Vit):
        title, advice = vit_files.title(network.config), vit_files.advice(held, about, network.config)
        try:
            held, fresh, changes = vit_files.adapted(held, wanted, about, network.config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    elif isinstance(network, Swin):
        constants, fresh = swin_files.constants(held, network.config), swin_files.fresh_norms(held, wanted)
        changes = ["the norms of its maps start anew"] if fresh else []
        title, advice = swin_files.title(network.config), swin_files.advice(held, network.config)
    elif isinstance(network, EfficientNet):
        title, advice = network.name, efficientnet_files.advice(held, network.name, options[0])
    else:
        fresh = resnet_files.fresh_offsets(held, wanted)
        changes = ["its offsets start at 0"] if fresh else []
        title = resnet_files.title(network.depth, network.width, network.variant)
        advice = resnet_files.advice(held, network, options[1:])
    _check_fit(path, held | fresh, wanted | constants, title, advice)
    given = {name: tensor for name, tensor in held.items() if name not in constants}
    for name, tensor in given.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path}: tensors must be finite, got NaN or infinity in {prefix}{name}; the file is damaged"
            )
    kind = f"a {'backbone' if 'backbone' in about else 'trained model'} of this library"
    origin = kind if {"backbone", "model"} & about.keys() else files.origin(tensors, prefix, about)
    said = f"{path}: {len(given)} tensors of {title} from {origin}"
    changes += [f"left out: {_summary(rest)}"] if rest else []
    return given | fresh, "; ".join([said, *changes])


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors by name, and its metadata; for a ViT of transformers also "config", the config.json beside it."""
    tensors, metadata = read_tensors(path)
    if "sprompt" not in metadata:
        config = read_config(path) if vit_files.of_transformers(tensors) else None
        return tensors, metadata | ({"config": config} if config else {})
    try:
        about = json.loads(metadata["sprompt"])
    except (ValueError, RecursionError):
        about = None
    return tensors, about if isinstance(about, dict) else {}


def _check_fit(
    path: Path | str, held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], title: str, advice: str
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
    raise ValueError(f"{path}: must hold the tensors of {title}, got {'; '.join(faults)}; {advice}")


def _first(tensors: Mapping[str, Tensor]) -> str:
    return (", ".join(list(tensors)[:5]) or "no tensors at all") + (", ..." if len(tensors) > 5 else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _summary(names: list[str]) -> str:
    """Number of tensors of each module: "module.encoder_k (320), module.queue"."""
    groups = Counter(".".join(name.split(".")[: 2 if name.startswith("module.") else 1]) for name in names)
    return ", ".join(group if count == 1 else f"{group} ({count})" for group, count in groups.items())

"""A ResNet in files: the names of its tensors in other projects, and its sizes. Our names are torchvision's and timm's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.nn.resnet import DEPTHS, BasicBlock, ResNet, Variant

#: Prefixes of the backbone's tensors in a file; the first with a stem counts. A full DenseCL checkpoint holds two backbones.
PREFIXES = ("", "backbone.", "module.backbone.", "module.encoder_q.", "module.")
EXPECTED = f"a ResNet (conv1.weight, layer1.0.conv1.weight, ... , bare or behind {', '.join(PREFIXES[1:])})"
_OWN = re.compile(r"(conv1|bn1|layer\d+)\.")
_OFFSETS = ".conv2_offset."  # the convolutions that move the taps of deformable ones


def find(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]] | None:
    """The prefix of a ResNet's tensors in a file, these tensors by our names, and the names of the others; None if there is no ResNet."""
    for prefix in PREFIXES:
        stem = f"{prefix}conv1.weight" in tensors or f"{prefix}conv1.0.weight" in tensors
        if stem and f"{prefix}layer1.0.conv1.weight" in tensors:
            behind = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            held = {name: tensor for name, tensor in behind.items() if _OWN.match(name)}
            return prefix, held, [n for n in tensors if not (n.startswith(prefix) and n.removeprefix(prefix) in held)]
    return None


def origin(tensors: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any]) -> str:
    """The kind of a file of another project, in words."""
    first = {name.split(".")[0] for name in tensors}
    if prefix == "module.encoder_q.":
        return "a MoCo v2 checkpoint"
    if any(name.startswith(("module.projection_head", "module.prototypes")) for name in tensors):
        return "a SwAV checkpoint"
    if about.get("author") == "DenseCL" or {"queue2", "encoder_q"} & first:
        return "a DenseCL checkpoint" + ("" if prefix else ", extracted")
    if {"rpn_head", "roi_head"} <= first:
        return "a K-Net checkpoint"
    if prefix == "" and "fc" in first:
        return f"a {'timm' if 'conv1.0.weight' in tensors else 'torchvision'} checkpoint"
    return f"a checkpoint with names behind {prefix!r}" if prefix else "a checkpoint with torchvision's names"


class Sizes(NamedTuple):
    """The arguments of a ResNet. None where no known network fits."""

    depth: int | None
    width: int | None
    variant: Variant


def opened(held: Mapping[str, Tensor], about: Mapping[str, Any], frozen_stages: int) -> ResNet:
    """A new network of the sizes of these tensors. Raises ValueError if no known network fits."""
    depth, width, variant = _sizes(held)
    if depth is None or width is None:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"must hold a ResNet of depth {known}, got blocks or widths of another network")
    return ResNet(depth, width=width, variant=variant, frozen_stages=frozen_stages)


def fresh_offsets(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Offsets of deformable convolutions, 0 as at their start, for the tensors of a ResNet-D without any; otherwise nothing."""
    if _sizes(held).variant != "d":
        return {}
    return {name: torch.zeros_like(tensor) for name, tensor in wanted.items() if _OFFSETS in name}


def title(depth: int, width: int, variant: Variant) -> str:
    """A network in words."""
    words = f"a ResNet-{depth}" + ("" if variant == "plain" else "-D") + ("" if width == 64 else f" of width {width}")
    return words + (" with deformable convolutions" if variant == "d-dcn" else "")


def advice(held: Mapping[str, Tensor], network: ResNet, options: tuple[str, str, str]) -> str:
    """The options that make a network of a file's sizes, if `network` has other sizes."""
    depth, width, variant = _sizes(held)
    own = Sizes(network.depth, network.width, network.variant)
    if (variant, own.variant) == ("d", "d-dcn"):  # such a file is taken, see `fresh_offsets`
        variant = "d-dcn"
    if depth is None or width is None or (depth, width, variant) == own:
        return "is it the right file?"
    other = [
        (option, name, value)
        for option, name, value, have in zip(options, Sizes._fields, (depth, width, variant), own, strict=True)
        if value != have
    ]
    given = " ".join(f"{option} {value}" for option, _, value in other)
    in_python = ", ".join(f"{name}={value!r}" for _, name, value in other)
    what = title(depth, 64 if width == network.width else width, variant)
    return f"the file holds {what}: {given} ({in_python} in Python)"


def _sizes(held: Mapping[str, Tensor]) -> Sizes:
    """The sizes of the network of these tensors."""
    blocks = {match.groups() for name in held if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    counts = tuple(Counter(layer for layer, _ in blocks)[str(layer)] for layer in (1, 2, 3, 4))
    basic = "layer1.0.conv3.weight" not in held
    variant: Variant = "plain"
    if "conv1.0.weight" in held:
        variant = "d-dcn" if any(_OFFSETS in name for name in held) else "d"
    stem = held.get("conv1.weight" if variant == "plain" else "conv1.6.weight")
    width = int(stem.shape[0]) if stem is not None and stem.ndim == 4 and 0 < stem.shape[0] <= 1024 else None
    for depth, (block, wanted) in DEPTHS.items():
        if wanted == counts and (block is BasicBlock) == basic:
            return Sizes(depth, width, variant)
    return Sizes(None, width, variant)

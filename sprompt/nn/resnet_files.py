"""A ResNet in files: the names of its tensors in other projects, and its sizes. Our names are torchvision's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sprompt.nn.resnet import DEPTHS, BasicBlock, ResNet

#: Prefixes of the backbone's tensors in a file; the first with a stem counts. A full DenseCL checkpoint holds two backbones.
PREFIXES = ("", "backbone.", "module.backbone.", "module.encoder_q.", "module.")
EXPECTED = f"a ResNet (conv1.weight, layer1.0.conv1.weight, ... , bare or behind {', '.join(PREFIXES[1:])})"
_OWN = re.compile(r"(conv1|bn1|layer\d+)\.")


def find(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]] | None:
    """The prefix of a ResNet's tensors in a file, these tensors by our names, and the names of the others; None if there is no ResNet."""
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in tensors and f"{prefix}layer1.0.conv1.weight" in tensors:
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
        return "a torchvision checkpoint"
    return f"a checkpoint with names behind {prefix!r}" if prefix else "a checkpoint with torchvision's names"


def opened(held: Mapping[str, Tensor], about: Mapping[str, Any], frozen_stages: int) -> ResNet:
    """A new network of the sizes of these tensors. Raises ValueError if no known network fits."""
    depth, width = _sizes(held)
    if depth is None or width is None:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"must hold a ResNet of depth {known}, got blocks or widths of another network")
    return ResNet(depth, width=width, frozen_stages=frozen_stages)


def title(depth: int, width: int) -> str:
    """A network in words."""
    return f"a ResNet-{depth}" + ("" if width == 64 else f" of width {width}")


def advice(held: Mapping[str, Tensor], network: ResNet, options: tuple[str, str]) -> str:
    """The options that make a network of a file's sizes, if `network` has other sizes."""
    depth, width = _sizes(held)
    if depth is None or width is None or (depth, width) == (network.depth, network.width):
        return "is it the right file?"
    other = [
        (option, name, value)
        for option, name, value, own in zip(
            options, ("depth", "width"), (depth, width), (network.depth, network.width), strict=True
        )
        if value != own
    ]
    given = " ".join(f"{option} {value}" for option, _, value in other)
    in_python = ", ".join(f"{name}={value}" for _, name, value in other)
    what = f"a ResNet-{depth}" if width == network.width else f"a ResNet-{depth} of width {width}"
    return f"the file holds {what}: {given} ({in_python} in Python)"


def _sizes(held: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
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

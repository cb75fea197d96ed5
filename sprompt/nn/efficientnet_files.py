"""An EfficientNet-Lite in files: the names of its tensors in other projects, and which network they make. Our names are timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sprompt.nn.efficientnet import SCALES, EfficientNet, Name, groups

#: Prefixes of the backbone's tensors in a file; the first with a stem and a block counts.
PREFIXES = ("", "backbone.", "module.")
EXPECTED = (
    "an EfficientNet-Lite (conv_stem.weight, blocks.0.0.conv_dw.weight, ... , or _conv_stem.weight, _blocks.0._depthwise_conv.weight, "
    f"... , bare or behind {', '.join(PREFIXES[1:])})"
)
_OWN = re.compile(r"(conv_stem|bn1|_?blocks\.\d+)\.")  # a block of another network too, so that it is one too many
_FIRST = {
    "blocks.0.0.conv_dw.weight",
    "_blocks.0._depthwise_conv.weight",
}  # the last where no network has as many blocks
_FLAT = re.compile(r"_blocks\.([0-9]{1,3})\.(\w+)\.(\w+)")
#: The names of efficientnet_pytorch -> ours: outside of the blocks, in a block without an expansion, and in the other blocks.
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def find(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]] | None:
    """The prefix of the network's tensors in a file, these tensors by our names, and the names of the others; None if there is none."""
    for prefix in PREFIXES:
        behind = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        ours = _from_flat(list(behind)) if "_conv_stem.weight" in behind else {name: name for name in behind}
        held = {own: tensors[behind[name]] for name, own in ours.items() if _OWN.match(own)}
        if "conv_stem.weight" in held and held.keys() & _FIRST:
            taken = {behind[name] for name, own in ours.items() if own in held}
            return prefix, held, [name for name in tensors if name not in taken]
    return None


def origin(tensors: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any]) -> str:
    """The kind of a file of another project, in words."""
    names = "efficientnet_pytorch" if f"{prefix}_conv_stem.weight" in tensors else "timm"
    return f"a checkpoint with the names of {names}" + (f" behind {prefix!r}" if prefix else "")


def opened(held: Mapping[str, Tensor], about: Mapping[str, Any], frozen_stages: int) -> EfficientNet:
    """A new network of the sizes of these tensors. Raises ValueError if no known network fits."""
    name = _name(held)
    if name is None:
        raise ValueError(f"must hold {' or '.join(SCALES)}, got blocks or widths of another network")
    return EfficientNet(name, frozen_stages=frozen_stages)


def advice(held: Mapping[str, Tensor], own: Name | None, option: str) -> str:
    """The option that makes the network of a file, if the network at hand is another one: `own`, or one of another kind."""
    name = _name(held)
    return "is it the right file?" if name in (None, own) else f"the file holds {name}: {option} {name}"


def _name(held: Mapping[str, Tensor]) -> Name | None:
    """The network with these blocks and with their last width; None if there is none."""
    blocks = {match[0] for name in held if (match := re.match(r"blocks\.\d+\.\d+\.", name))}
    last = held.get("blocks.6.0.bn3.weight")
    for name in SCALES:
        width = groups(name)[-1].channels
        if blocks == {f"{place}." for place in _places(name)} and last is not None and last.shape == (width,):
            return name
    return None


def _places(name: Name) -> list[str]:
    """The blocks of a network by our names, in order."""
    return [f"blocks.{place}.{block}" for place, group in enumerate(groups(name)) for block in range(group.blocks)]


def _from_flat(names: list[str]) -> dict[str, str]:
    """Names of efficientnet_pytorch, whose blocks have one number each, -> ours. Names that have no other place stay as they are."""
    count = len({match[1] for name in names if (match := _FLAT.fullmatch(name))})
    places = next((places for scale in SCALES if len(places := _places(scale)) == count), [])
    found = {}
    for name in names:
        module, _, rest = name.partition(".")
        found[name] = f"{_OUTSIDE[module]}.{rest}" if module in _OUTSIDE else name
        if (match := _FLAT.fullmatch(name)) and int(match[1]) < len(places):
            inside = _INVERTED if int(match[1]) else _SEPARABLE
            if match[2] in inside:
                found[name] = f"{places[int(match[1])]}.{inside[match[2]]}.{match[3]}"
    return found

"""A Swin in files: the names of its tensors in other projects, and its sizes. Our names are those of the official release."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sprompt.nn.swin import Swin, SwinConfig

#: Prefixes of the backbone's tensors in a file; the first with a patch embedding counts. The last one is in transformers' Mask2Former.
PREFIXES = ("", "backbone.", "module.", "model.pixel_level_module.encoder.")
EXPECTED = (
    "a Swin (patch_embed.proj.weight, layers.0.blocks.0.norm1.weight, ... , or transformers' names, bare or behind "
    f"{', '.join(PREFIXES[1:])})"
)
#: Tensors behind the prefix that belong to a classifier: its last norm and itself, in the release and in transformers.
_CLASSIFIER = re.compile(r"(norm|head|layernorm|classifier)\.")
_IN_BLOCK = re.compile(r"(layers\.(\d+)\.blocks\.(\d+)\.)(.*?)(\.weight|\.bias|)")

#: Our modules -> transformers' modules.
_OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    **{f"norm{stage}": f"hidden_states_norms.stage{stage + 1}" for stage in range(4)},
}
#: The same inside of a block. transformers' files have the first name; its modules have the last since version 5.
_BLOCK = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.relative_position_bias_table": (
        "attention.self.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    "attn.relative_position_index": (
        "attention.self.relative_position_index",
        "attention.relative_position_bias.relative_position_index",
    ),
    "attn.q": ("attention.self.query", "attention.q_proj"),
    "attn.k": ("attention.self.key", "attention.k_proj"),
    "attn.v": ("attention.self.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
_OUTSIDE_OURS = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_BLOCK_OURS = {name: ours for ours, theirs in _BLOCK.items() for name in theirs}


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Swin of transformers by our names: query, key and value become one. Other names stay as they are."""
    return joined({_ours(name): tensor for name, tensor in tensors.items()})


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each attention (attn.q, attn.k, attn.v) as one tensor (attn.qkv), where all three are there and fit."""
    found = dict(tensors)
    for query in [name for name in found if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        thirds = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if found.keys() >= set(thirds) and len({found[third].shape for third in thirds}) == 1:
            found[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(third) for third in thirds])
    return found


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> by the names in files of transformers' SwinBackbone, with query, key and value apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[_theirs(name.replace(".qkv.", f".{part}."))] = third.clone()
        else:
            found[_theirs(name)] = tensor
    return found


def find(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]] | None:
    """The prefix of a Swin's tensors in a file, these tensors by our names, and the names of the others; None if there is no Swin."""
    for prefix in PREFIXES:
        behind = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        ours = from_transformers(behind)
        if "patch_embed.proj.weight" in ours and "layers.0.blocks.0.norm1.weight" in ours:
            rest = [name for name in tensors if not name.startswith(prefix)]
            rest += [name for name in ours if _CLASSIFIER.match(name)]
            return prefix, {name: tensor for name, tensor in ours.items() if not _CLASSIFIER.match(name)}, rest
    return None


def origin(tensors: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any]) -> str:
    """The kind of a file of another project, in words."""
    if any("embeddings.patch_embeddings." in name for name in tensors):
        return "a file of transformers"
    if any(name.startswith("sem_seg_head.") for name in tensors):
        return "a Mask2Former checkpoint"
    return f"a checkpoint with names behind {prefix!r}" if prefix else "a checkpoint with the names of Swin's release"


def opened(held: Mapping[str, Tensor], about: Mapping[str, Any], frozen_stages: int) -> Swin:
    """A new network of the sizes of these tensors. Raises ValueError if they are no sizes of a Swin."""
    config = _sizes(held)
    if config is None:
        raise ValueError("must hold a Swin with four stages, got blocks, heads or windows of another network")
    return Swin(config, frozen_stages=frozen_stages)


def fresh_norms(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New norms of the maps, for the tensors of a classifier, which has none of them; otherwise nothing."""
    norms = {name: tensor for name, tensor in wanted.items() if re.match(r"norm[0-3]\.", name)}
    if norms.keys() & held.keys():
        return {}
    return {name: torch.full(tensor.shape, float(name.endswith("weight"))) for name, tensor in norms.items()}


def constants(held: Mapping[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:
    """Tensors that files may hold beside parameters: the index of a window's pairs, and the mask of shifted windows at the picture size of
    the release. Both follow from sizes. The result has those that are in `held`, by name, as tensors of the right shape without memory."""
    cells, found = config.window**2, {}
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            index = f"layers.{stage}.blocks.{block}.attn.relative_position_index"
            mask = f"layers.{stage}.blocks.{block}.attn_mask"
            if index in held:
                found[index] = torch.empty(cells, cells, dtype=torch.int64, device="meta")
            if mask in held:
                found[mask] = torch.empty(*held[mask].shape[:1], cells, cells, device="meta")
    return found


def title(config: SwinConfig) -> str:
    """A network in words."""
    depths, heads = (" ".join(map(str, four)) for four in (config.depths, config.heads))
    return f"a Swin of width {config.width}, depths {depths}, heads {heads} and window {config.window}"


def advice(held: Mapping[str, Tensor], config: SwinConfig) -> str:
    """The options that make a network of a file's sizes, if `config` has other sizes."""
    found = _sizes(held)
    own = asdict(config)
    other = {name: v for name, v in asdict(found or config).items() if name != "drop_path" and v != own[name]}
    if found is None or not other:
        return "is it the right file?"
    values = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in other.items()}
    given = " ".join(f"--model.swin.{name} {value}" for name, value in values.items())
    in_python = ", ".join(f"{name}={value}" for name, value in other.items())
    return f"the file holds {title(found)}: {given} ({in_python} in Python)"


def _sizes(held: Mapping[str, Tensor]) -> SwinConfig | None:
    """The sizes of the network of these tensors; None where no network fits."""
    blocks = {match.group(2, 3) for name in held if (match := _IN_BLOCK.fullmatch(name))}
    depths = Counter(stage for stage, _ in blocks)
    names = [f"layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in range(4)]
    tables = [held[name].shape for name in names if name in held and held[name].ndim == 2]
    stem = held.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4 or len(tables) != 4:
        return None
    one, two, three, four = (int(columns) for _, columns in tables)
    window = (math.isqrt(int(tables[0][0])) + 1) // 2
    try:
        return SwinConfig(
            int(stem.shape[0]), (depths["0"], depths["1"], depths["2"], depths["3"]), (one, two, three, four), window
        )
    except ValueError:
        return None


def _ours(name: str) -> str:
    """Our name of a tensor of transformers; any other name as it is."""
    name = name.removeprefix("swin.")
    inside = name.removeprefix("encoder.")
    if inside != name and (match := _IN_BLOCK.fullmatch(inside)):
        return f"{match[1]}{_BLOCK_OURS[match[4]]}{match[5]}" if match[4] in _BLOCK_OURS else name
    if re.match(r"layers\.\d+\.downsample\.", inside):
        return inside
    module, dot, parameter = name.rpartition(".")
    return f"{_OUTSIDE_OURS[module]}{dot}{parameter}" if module in _OUTSIDE_OURS else name


def _theirs(name: str) -> str:
    """The name in transformers' files of one of our tensors."""
    if match := _IN_BLOCK.fullmatch(name):
        return f"encoder.{match[1]}{_BLOCK[match[4]][0]}{match[5]}"
    if name.startswith("layers."):
        return f"encoder.{name}"
    module, dot, parameter = name.rpartition(".")
    return f"{_OUTSIDE[module]}{dot}{parameter}"

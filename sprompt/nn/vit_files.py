"""A ViT in files: the names of its tensors in other projects, and its sizes. Our names are timm's, which MAE, DeiT and DINO have too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sprompt.nn.swin_files import joined
from sprompt.nn.vit import Vit, VitConfig, resized_positions

#: Prefixes of the backbone's tensors in a file; the first with a class token and a block counts. The last two are transformers'.
PREFIXES = ("", "module.", "backbone.", "module.backbone.", "vit.", "dinov2.")
EXPECTED = (
    "a ViT (cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight, ... , or transformers' names, bare or behind "
    f"{', '.join(PREFIXES[1:])})"
)
#: Tensors behind the prefix that a backbone does not need: heads, decoders of MAE, the token of masked patches.
_LEFT_OUT = re.compile(
    r"(head|classifier|pooler|decoder)\.|decoder_(embed|blocks|norm|pred)\.|decoder_pos_embed$|mask_token$"
)
_IN_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.*)\.(weight|bias|lambda1)")

#: transformers' names -> ours.
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
#: The same for modules inside of a block. Files of a ViT have neither _proj nor mlp; its modules have them since version 5.
_BLOCK = {
    "layernorm_before": "norm1", "layernorm_after": "norm2", "norm1": "norm1", "norm2": "norm2",
    "attention.attention.query": "attn.q", "attention.attention.key": "attn.k", "attention.attention.value": "attn.v",
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1", "layer_scale2": "ls2",
}  # fmt: skip
_TYPES = ("vit", "vit_mae", "dinov2")  # model_type of a config.json
_HEAD = 64  # channels of a head in all released networks but one
_OTHER_HEADS = {1280: 16}  # width -> heads of ViT-H


def of_transformers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the names of a ViT of transformers."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors) and any(
        name.endswith("embeddings.cls_token") for name in tensors
    )


def find(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]] | None:
    """The prefix of a ViT's tensors in a file, these tensors by our names, and the names of the others; None if there is no ViT."""
    for prefix in PREFIXES:
        behind = {_ours(n.removeprefix(prefix)): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
        if "cls_token" in behind and "blocks.0.norm1.weight" in behind:
            rest = [name for name in tensors if not name.startswith(prefix)]
            rest += [name for name in behind if _LEFT_OUT.match(name)]
            return prefix, joined({name: tensor for name, tensor in behind.items() if not _LEFT_OUT.match(name)}), rest
    return None


def origin(tensors: Mapping[str, Tensor], prefix: str, about: Mapping[str, Any]) -> str:
    """The kind of a file of another project, in words."""
    if of_transformers(tensors):
        return "a file of transformers"
    if any(name.startswith(f"{prefix}decoder_pred.") for name in tensors):
        return "an MAE checkpoint"
    if prefix.endswith("backbone.") and any(name.startswith(prefix.replace("backbone.", "head.")) for name in tensors):
        return "a DINO checkpoint"
    return f"a checkpoint with names behind {prefix!r}" if prefix else "a checkpoint with timm's names"


def opened(held: Mapping[str, Tensor], about: Mapping[str, Any], frozen_stages: int) -> Vit:
    """A new network of the sizes of these tensors; -1 trains it, any other number of stages freezes the whole of it. Raises ValueError
    if they are no sizes of a ViT."""
    return Vit(_sizes(held, about)).requires_grad_(frozen_stages < 0)


def adapted(
    held: Mapping[str, Tensor], wanted: Mapping[str, Tensor], about: Mapping[str, Any], config: VitConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """A file's tensors for a network of these sizes, the tensors that the network keeps, and what has changed, in words.

    Positions are resized to the network's grid. A convolutional stem keeps its values if the file has patches. Raises ValueError if the
    file says that it has another number of heads. If it says none, and the network's is not the usual one, the words say so.
    """
    heads = _said(about).get("num_attention_heads")
    if heads not in (None, config.heads):
        raise ValueError(f"must hold {title(config)}, got {heads} heads; VitConfig(heads={heads}) has as many")
    given, kept, changes = dict(held), {}, []
    usual = _usual_heads(config.width)
    if heads is None and usual not in (None, config.heads):
        changes.append(
            f"the file does not say its number of heads, released networks of width {config.width} have {usual}"
        )
    table = held.get("pos_embed")
    grid = None if table is None else _grid(table)
    if table is not None and grid is not None and grid != config.grid:
        given["pos_embed"] = resized_positions(table, config.grid, config.grid)
        changes.append(f"positions resized from {grid}x{grid} to {config.grid}x{config.grid}")
    if config.conv_stem and not _has_stem(held):
        given = {name: tensor for name, tensor in given.items() if not name.startswith("patch_embed.")}
        kept = {name: tensor for name, tensor in wanted.items() if name.startswith("patch_embed.")}
        changes.append("the convolutional stem starts anew")
    return given, kept, changes


def title(config: VitConfig) -> str:
    """A network in words."""
    patches = "a convolutional stem" if config.conv_stem else f"patches of {config.patch}"
    scale = ", layer scale" if config.layer_scale else ""
    return f"a ViT of width {config.width}, depth {config.depth}, {config.heads} heads{scale} and {patches}"


def advice(held: Mapping[str, Tensor], about: Mapping[str, Any], config: VitConfig) -> str:
    """The settings that make a network of a file's sizes, if `config` has other sizes."""
    try:
        found = _sizes(held, about)
    except ValueError:
        return "is it the right file?"
    own = asdict(config) | {"grid": found.grid, "eps": found.eps}  # those two fit any file
    if "num_attention_heads" not in _said(about):
        own["heads"] = found.heads
    if config.conv_stem and not found.conv_stem:  # `adapted` keeps the stem
        own |= {"conv_stem": False, "patch": found.patch}
    other = ", ".join(f"{name}={value}" for name, value in asdict(found).items() if value != own[name])
    return f"the file holds {title(found)}: VitConfig({other}) in Python" if other else "is it the right file?"


def _sizes(held: Mapping[str, Tensor], about: Mapping[str, Any]) -> VitConfig:
    """The sizes of the network of these tensors. Heads and eps are no sizes of tensors: the file says them, or the heads have 64 channels.
    Raises ValueError where no network fits."""
    patches, table = held.get("patch_embed.proj.weight"), held.get("pos_embed")
    grid = None if table is None else _grid(table)
    if patches is None or patches.ndim != 4 or grid is None:
        raise ValueError(
            "must hold a ViT with an embedding of patches, a class token and a square of positions, got "
            f"{_shape(patches)} for patch_embed.proj.weight and {_shape(table)} for pos_embed"
        )
    width, stem, said = int(patches.shape[0]), _has_stem(held), _said(about)
    heads = said.get("num_attention_heads", _usual_heads(width))
    if heads is None:
        raise ValueError(
            f"must say its number of heads unless its width is a multiple of {_HEAD}, got a ViT of width {width}; put the config.json of "
            "transformers beside the file, or write it by save_backbone"
        )
    return VitConfig(
        patch=16 if stem else int(patches.shape[-1]),
        width=width,
        depth=len({name.split(".")[1] for name in held if name.startswith("blocks.")}),
        heads=heads,
        grid=grid,
        conv_stem=stem,
        layer_scale="blocks.0.ls1.gamma" in held,
        eps=said.get("layer_norm_eps", VitConfig.eps),
    )


def _usual_heads(width: int) -> int | None:
    """The heads of released networks of this width; None where none is known."""
    return None if width % _HEAD else _OTHER_HEADS.get(width, width // _HEAD)


def _said(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its heads and eps, in transformers' words: a file of ours, or the config.json beside one of transformers."""
    own, config = about.get("backbone"), about.get("config")
    if isinstance(own, dict):
        said = {"num_attention_heads": own.get("heads"), "layer_norm_eps": own.get("eps")}
        return {name: value for name, value in said.items() if value is not None}
    if not isinstance(config, dict):
        return {}
    if config.get("model_type") not in _TYPES:
        raise ValueError(
            f"must have model_type {', '.join(_TYPES)} in the config.json beside it, got {config.get('model_type')!r}"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"must have hidden_act 'gelu' in the config.json beside it, got {config['hidden_act']!r}")
    # Values that transformers leaves out are its defaults.
    defaults = {"num_attention_heads": 12, "layer_norm_eps": 1e-6 if config["model_type"] == "dinov2" else 1e-12}
    return {name: config.get(name, default) for name, default in defaults.items()}


def _grid(table: Tensor) -> int | None:
    """Side of the square of positions; None if there is no square behind the position of the class token."""
    side = math.isqrt(max(int(table.shape[1]) - 1, 0)) if table.ndim == 3 else 0
    return side if side and table.shape[1] == 1 + side**2 else None


def _has_stem(held: Mapping[str, Tensor]) -> bool:
    return "patch_embed.convs.0.weight" in held


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))


def _ours(name: str) -> str:
    """Our name of a tensor of transformers; any other name as it is."""
    if match := _IN_BLOCK.fullmatch(name):
        block, module, parameter = match.groups()
        if module in _BLOCK:
            return f"blocks.{block}.{_BLOCK[module]}.{'gamma' if parameter == 'lambda1' else parameter}"
    return _OUTSIDE.get(name, name)

"""Import and export of Mask2Former files: those of transformers, and those of the official release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sprompt.models.detectron2_names import released_name
from sprompt.models.fit import check_fit
from sprompt.models.mask2former.config import Mask2FormerConfig
from sprompt.nn import swin_files
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import DEPTHS, Bottleneck, ResNet
from sprompt.nn.swin import Swin, SwinConfig
from sprompt.nn.tensor_files import read_config, read_tensors, write_tensors

if TYPE_CHECKING:
    from sprompt.models.mask2former.model import Mask2Former

#: Our parts, and where transformers has them.
_PARTS = {
    "backbone.": "model.pixel_level_module.encoder.",
    "pixel_decoder.": "model.pixel_level_module.decoder.",
    "transformer_module.": "model.transformer_module.",
    "class_predictor.": "class_predictor.",
}
#: torchvision's names of a ResNet -> transformers'. The first pattern that fits counts.
_RESNET = (
    (r"conv1\.", "embedder.embedder.convolution."),
    (r"bn1\.", "embedder.embedder.normalization."),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", r"encoder.stages.{0}.layers.{1}.shortcut.convolution."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", r"encoder.stages.{0}.layers.{1}.shortcut.normalization."),
    (r"layer(\d)\.(\d+)\.conv(\d)\.", r"encoder.stages.{0}.layers.{1}.layer.{2}.convolution."),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", r"encoder.stages.{0}.layers.{1}.layer.{2}.normalization."),
)
#: What the config.json of a Swin must say where it says anything.
_SWIN_FIXED = {
    "patch_size": 4, "num_channels": 3, "mlp_ratio": 4, "qkv_bias": True, "hidden_act": "gelu", "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_PREDICTOR, _PIXELS = "sem_seg_head.predictor.", "sem_seg_head.pixel_decoder."
_LAYER = "transformer_module.decoder.layers."
#: The release's names -> ours, but for the backbone. It names a Swin as we do.
_RELEASE = (
    (re.escape(_PIXELS) + r"input_proj\.", "pixel_decoder.input_projections."),
    (re.escape(_PIXELS) + r"transformer\.level_embed", "pixel_decoder.level_embed"),
    (
        re.escape(_PIXELS) + r"transformer\.encoder\.layers\.(\d+)\.self_attn\.",
        r"pixel_decoder.encoder.layers.{0}.self_attn.",
    ),
    (
        re.escape(_PIXELS) + r"transformer\.encoder\.layers\.(\d+)\.norm1\.",
        r"pixel_decoder.encoder.layers.{0}.self_attn_layer_norm.",
    ),
    (
        re.escape(_PIXELS) + r"transformer\.encoder\.layers\.(\d+)\.norm2\.",
        r"pixel_decoder.encoder.layers.{0}.final_layer_norm.",
    ),
    (
        re.escape(_PIXELS) + r"transformer\.encoder\.layers\.(\d+)\.linear(\d)\.",
        r"pixel_decoder.encoder.layers.{0}.fc{1}.",
    ),
    (re.escape(_PIXELS) + r"mask_features\.", "pixel_decoder.mask_projection."),
    (re.escape(_PIXELS) + r"(adapter|layer)_1\.norm\.", r"pixel_decoder.{0}_1.1."),
    (re.escape(_PIXELS) + r"(adapter|layer)_1\.", r"pixel_decoder.{0}_1.0."),
    (re.escape(_PREDICTOR) + r"(query_feat|static_query)\.", "transformer_module.queries_features."),
    (re.escape(_PREDICTOR) + r"query_embed\.", "transformer_module.queries_embedder."),
    (re.escape(_PREDICTOR) + r"level_embed\.", "transformer_module.level_embed."),
    (re.escape(_PREDICTOR) + r"decoder_norm\.", "transformer_module.decoder.layernorm."),
    (re.escape(_PREDICTOR) + r"class_embed\.", "class_predictor."),
    (
        re.escape(_PREDICTOR) + r"mask_embed\.layers\.(\d)\.",
        r"transformer_module.decoder.mask_predictor.mask_embedder.{0}.0.",
    ),
    (re.escape(_PREDICTOR) + r"transformer_self_attention_layers\.(\d+)\.self_attn\.", _LAYER + "{0}.self_attn."),
    (re.escape(_PREDICTOR) + r"transformer_self_attention_layers\.(\d+)\.norm\.", _LAYER + "{0}.self_attn_layer_norm."),
    (
        re.escape(_PREDICTOR) + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.",
        _LAYER + "{0}.cross_attn.",
    ),
    (
        re.escape(_PREDICTOR) + r"transformer_cross_attention_layers\.(\d+)\.norm\.",
        _LAYER + "{0}.cross_attn_layer_norm.",
    ),
    (re.escape(_PREDICTOR) + r"transformer_ffn_layers\.(\d+)\.linear(\d)\.", _LAYER + "{0}.fc{1}."),
    (re.escape(_PREDICTOR) + r"transformer_ffn_layers\.(\d+)\.norm\.", _LAYER + "{0}.final_layer_norm."),
)


def import_checkpoint(model: Mask2Former, path: Path | str) -> str:
    """Copies a file of transformers' Mask2Former or of the official release into a model. Returns a sentence about it.

    The import is strict: the file must have every tensor of the model, with its shape, and no other tensor but the loss's class
    weights and, for a Swin, its last norm and the indices of its windows. If the file has another number of classes, the classifier
    starts anew. Batch norm's step counters may be missing. If the file does not fit, it raises ValueError and does not change the model.
    """
    held, _ = read_tensors(path)
    held = {
        name: t.float() if t.is_floating_point() else t for name, t in held.items() if name != "criterion.empty_weight"
    }
    official = any(name.startswith("sem_seg_head.") for name in held)
    wanted = model.state_dict()
    tensors = _from_release(held, model) if official else _from_transformers(held, model)
    tensors = {n: t for n, t in wanted.items() if n.endswith(".num_batches_tracked")} | tensors
    said = f"{path}: {len(held)} tensors of {'the release of Mask2Former' if official else 'Mask2Former, as transformers names them'}"
    classes = len(tensors.get("class_predictor.bias", wanted["class_predictor.bias"])) - 1
    own = len(wanted["class_predictor.bias"]) - 1
    fresh = classes != own
    if fresh:
        for name in ("class_predictor.weight", "class_predictor.bias"):
            if name in tensors and tensors[name].shape[1:] == wanted[name].shape[1:]:
                tensors[name] = wanted[name]
        said += f"; the classifier starts anew, as the file has {classes} classes and the model {own}"
    constants = _constants(tensors, model)
    check_fit(path, tensors, wanted | constants)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in constants})
    if fresh:
        model.reset_classifier(own)
    return said


def export_checkpoint(model: Mask2Former, path: Path | str) -> None:
    """Writes a model as safetensors with transformers' names. For `from_pretrained` of transformers put a config.json beside it.
    Raises ValueError for a ResNet-D or an EfficientNet-Lite, which transformers does not have."""
    if isinstance(model.backbone, EfficientNet):
        raise ValueError(f"export_checkpoint: the backbone must be a ResNet or a Swin, got {model.config.backbone}")
    if isinstance(model.backbone, ResNet) and model.backbone.variant != "plain":
        raise ValueError(f"export_checkpoint: the ResNet must be plain for transformers, got {model.backbone.variant}")
    weight = torch.ones(model.num_classes + 1)
    weight[-1] = model.config.no_object
    write_tensors(path, _to_transformers(model) | {"criterion.empty_weight": weight}, {"format": "pt"})


def released_config(path: Path, config: Mask2FormerConfig) -> Mask2FormerConfig:
    """The sizes of a file of transformers, by the config.json beside it; `config` where there is none. Loss weights stay as in `config`."""
    about = path.parent / "config.json"
    held = read_config(path)
    if held is None:
        return config
    if held.get("model_type") != "mask2former":
        raise ValueError(f"{about}: model_type must be mask2former, got {held.get('model_type')!r}")
    backbone = held.get("backbone_config") or {}
    kind = backbone.get("model_type") if isinstance(backbone, dict) else None
    if kind not in ("resnet", "swin"):
        raise ValueError(
            f"{about}: the backbone must be a ResNet or a Swin, got {kind!r}; other backbones are not served"
        )
    sizes = _resnet_sizes(about, backbone) if kind == "resnet" else {"swin": _swin_sizes(about, backbone)}
    labels = held.get("id2label")
    return replace(
        config, backbone=kind, **sizes, channels=held.get("hidden_dim", 256),
        queries=held.get("num_queries", 100), heads=held.get("num_attention_heads", 8),
        encoder_layers=held.get("encoder_layers", 6), encoder_feedforward=held.get("encoder_feedforward_dim", 1024),
        decoder_layers=held.get("decoder_layers", 10) - 1, decoder_feedforward=held.get("dim_feedforward", 2048),
        points=held.get("train_num_points", 12544), num_classes=len(labels) if isinstance(labels, dict) else config.num_classes,
    )  # fmt: skip


def to_transformers(name: str) -> str:
    """transformers' name of one of our tensors, which is not of a Swin."""
    for part, theirs in _PARTS.items():
        if name.startswith(part):
            rest = name.removeprefix(part)
            return theirs + (_renamed(rest, _RESNET) if part == "backbone." else rest)
    return name


def _to_transformers(model: Mask2Former) -> dict[str, Tensor]:
    """The model's tensors by the names of transformers' files."""
    state = model.state_dict()
    if not isinstance(model.backbone, Swin):
        return {to_transformers(name): tensor for name, tensor in state.items()}
    swin = swin_files.to_transformers(model.backbone.state_dict())
    return {_PARTS["backbone."] + name: tensor for name, tensor in swin.items()} | {
        to_transformers(name): tensor for name, tensor in state.items() if not name.startswith("backbone.")
    }


def _from_transformers(tensors: Mapping[str, Tensor], model: Mask2Former) -> dict[str, Tensor]:
    """Tensors of a file of transformers by our names. Names that the model does not have stay as they are."""
    ours = {to_transformers(name): name for name in model.state_dict()}
    if not isinstance(model.backbone, Swin):
        return {ours.get(name, name): tensor for name, tensor in tensors.items()}
    part = _PARTS["backbone."]
    swin = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
    return {"backbone." + name: tensor for name, tensor in swin_files.from_transformers(swin).items()} | {
        ours.get(name, name): tensor for name, tensor in tensors.items() if not name.startswith(part)
    }


def _constants(tensors: Mapping[str, Tensor], model: Mask2Former) -> dict[str, Tensor]:
    """Tensors that a file may hold beside the parameters of a Swin, by our names: those of `swin_files.constants`, and the last norm, which
    files of version 5 of transformers have and no map passes."""
    if not isinstance(model.backbone, Swin):
        return {}
    part = "backbone."
    swin = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
    norm = {
        n: torch.empty(model.backbone.channels[-1], device="meta")
        for n in ("layernorm.weight", "layernorm.bias")
        if n in swin
    }
    return {part + name: tensor for name, tensor in (swin_files.constants(swin, model.backbone.config) | norm).items()}


def _resnet_sizes(about: Path, held: Mapping[str, Any]) -> dict[str, Any]:
    """Depth and width of a ResNet, by its part of a config.json."""
    counts, bottleneck = tuple(held.get("depths", ())), held.get("layer_type", "bottleneck") == "bottleneck"
    depth = next(
        (d for d, (block, own) in DEPTHS.items() if own == counts and (block is Bottleneck) == bottleneck), None
    )
    if depth is None:
        raise ValueError(f"{about}: the ResNet must be of depth {', '.join(map(str, DEPTHS))}, got stages of {counts}")
    return {"depth": depth, "backbone_width": held.get("embedding_size", 64), "backbone_variant": "plain"}


def _swin_sizes(about: Path, held: Mapping[str, Any]) -> SwinConfig:
    """The sizes of a Swin, by its part of a config.json. Raises ValueError for variants of the network that the release does not have."""
    for name, value in _SWIN_FIXED.items():
        if held.get(name, value) != value:
            raise ValueError(
                f"{about}: {name} of the Swin must be {value!r}, got {held[name]!r}; such a Swin is not served"
            )
    depths, heads = (held.get(n, d) for n, d in (("depths", (2, 2, 6, 2)), ("num_heads", (3, 6, 12, 24))))
    try:
        return SwinConfig(
            held.get("embed_dim", 96),
            tuple(depths),
            tuple(heads),
            held.get("window_size", 7),
            held.get("drop_path_rate", 0.1),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{about}: {error}") from None


def _from_release(tensors: Mapping[str, Tensor], model: Mask2Former) -> dict[str, Tensor]:
    """Our names of the release's tensors. Its self-attention holds query, key and value in one tensor."""
    found: dict[str, Tensor] = {}
    resnet = {} if isinstance(model.backbone, Swin) else {released_name(name): name for name in model.state_dict()}
    for name, tensor in tensors.items():
        own = resnet.get(name) or _renamed(name, _RELEASE)
        if match := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", own):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{match[1]}.{part}_proj.{match[2]}"] = third.clone()
        else:
            found[own] = tensor
    return found


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The name by the first rule that fits its beginning. transformers counts the stages and convolutions of a ResNet from 0."""
    for pattern, target in rules:
        if match := re.match(pattern, name):
            groups = list(match.groups())
            if "stages" in target:
                groups[0] = str(int(groups[0]) - 1)
                groups[2:] = [str(int(g) - 1) for g in groups[2:]]
            return target.format(*groups) + name[match.end() :]
    return name

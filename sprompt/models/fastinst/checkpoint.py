"""Import and export of the files of FastInst's official release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sprompt.atomic import replacing
from sprompt.models.detectron2_names import released_name
from sprompt.models.fit import check_fit
from sprompt.nn.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from sprompt.models.fastinst.model import FastInst

_HEAD = "sem_seg_head."
#: Our names -> the release's behind "sem_seg_head.", but for the backbone. "{+0}" is the first number, plus 1.
_RULES = (
    (r"pixel_decoder\.lateral\.(\d)\.gn\.", "pixel_decoder.adapter_{+0}.norm."),
    (r"pixel_decoder\.lateral\.(\d)\.conv\.", "pixel_decoder.adapter_{+0}."),
    (r"pixel_decoder\.output\.(\d)\.gn\.", "pixel_decoder.layer_{+0}.norm."),
    (r"pixel_decoder\.output\.(\d)\.conv\.", "pixel_decoder.layer_{+0}."),
    (r"pixel_decoder\.pooling\.pooled\.(\d)\.conv\.", "pixel_decoder.ppm.stages.{0}.1."),
    (r"pixel_decoder\.pooling\.mix\.conv\.", "pixel_decoder.ppm.bottleneck."),
    (r"positions$", "predictor.meta_pos_embed"),
    (r"auxiliary_content\.", "predictor.empty_query_features."),
    (r"auxiliary_positions\.", "predictor.empty_query_pos_embed."),
    (r"proposal_predictor\.", "predictor.query_proposal.conv_proposal_cls_logits."),
    (r"decoder\.layers\.(\d+)\.pixel_attn\.", "predictor.transformer_mask_cross_attention_layers.{0}.multihead_attn."),
    (r"decoder\.layers\.(\d+)\.pixel_attn_layer_norm\.", "predictor.transformer_mask_cross_attention_layers.{0}.norm."),
    (r"decoder\.layers\.(\d+)\.pixel_feedforward\.fc(\d)\.", "predictor.transformer_mask_ffn_layers.{0}.linear{1}."),
    (r"decoder\.layers\.(\d+)\.pixel_feedforward\.layer_norm\.", "predictor.transformer_mask_ffn_layers.{0}.norm."),
    (r"decoder\.layers\.(\d+)\.query_attn\.", "predictor.transformer_query_cross_attention_layers.{0}.multihead_attn."),
    (
        r"decoder\.layers\.(\d+)\.query_attn_layer_norm\.",
        "predictor.transformer_query_cross_attention_layers.{0}.norm.",
    ),
    (r"decoder\.layers\.(\d+)\.self_attn\.", "predictor.transformer_query_self_attention_layers.{0}.self_attn."),
    (r"decoder\.layers\.(\d+)\.self_attn_layer_norm\.", "predictor.transformer_query_self_attention_layers.{0}.norm."),
    (r"decoder\.layers\.(\d+)\.query_feedforward\.fc(\d)\.", "predictor.transformer_query_ffn_layers.{0}.linear{1}."),
    (r"decoder\.layers\.(\d+)\.query_feedforward\.layer_norm\.", "predictor.transformer_query_ffn_layers.{0}.norm."),
    (r"decoder\.heads\.(\d+)\.layer_norm\.", "predictor.decoder_query_norm_layers.{0}."),
    (r"decoder\.heads\.(\d+)\.class_predictor\.(\d)\.0\.", "predictor.class_embed_layers.{0}.layers.{1}."),
    (r"decoder\.heads\.(\d+)\.mask_predictor\.(\d)\.0\.", "predictor.mask_embed_layers.{0}.layers.{1}."),
    (r"decoder\.heads\.(\d+)\.mask_features\.", "predictor.mask_features_layers.{0}."),
)
#: The last layers of the classifiers, which depend on the number of classes.
_CLASSIFIERS = re.compile(r"(decoder\.heads\.\d+\.class_predictor\.2\.0|proposal_predictor\.2)\.(weight|bias)")
#: The loss's weights of the classes. The release has them twice: its decoder holds the loss too.
_CLASS_WEIGHTS = ("criterion.empty_weight", f"{_HEAD}predictor.criterion.empty_weight")


def import_checkpoint(model: FastInst, path: Path | str) -> str:
    """Copies a file of the official release into a model. Returns a sentence about it.

    The import is strict: the file must have every tensor of the model, with its shape, and no other tensor but the loss's class
    weights. If the file has another number of classes, the last layers of the classifiers start anew. Batch norm's step counters may be
    missing. If the file does not fit, it raises ValueError and does not change the model.
    """
    held, _ = read_tensors(path)
    held = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in held.items()
        if name not in _CLASS_WEIGHTS
    }
    wanted = model.state_dict()
    ours = {_theirs(name, model): name for name in _joined(wanted)}
    tensors = {name: tensor for name, tensor in wanted.items() if name.endswith(".num_batches_tracked")}
    tensors |= _parted({ours.get(name, name): tensor for name, tensor in held.items()})
    said = f"{path}: {len(held)} tensors of the release of FastInst"
    classes = tensors.get("proposal_predictor.2.bias", wanted["proposal_predictor.2.bias"]).numel() - 1
    fresh = classes != model.num_classes
    if fresh:
        for name in filter(_CLASSIFIERS.fullmatch, wanted):
            if name in tensors and tensors[name].shape == (classes + 1, *wanted[name].shape[1:]):
                tensors[name] = wanted[name]
        said += f"; the classifiers start anew, as the file has {classes} classes and the model {model.num_classes}"
    check_fit(path, tensors, wanted)
    model.load_state_dict(tensors)
    if fresh:
        model.reset_classifier(model.num_classes)
    return said


def export_checkpoint(model: FastInst, path: Path | str) -> None:
    """Writes a model with the names of the release: a .pth file with "model", or a safetensors file with the tensors alone. The release's
    batch norm counts no steps."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".num_batches_tracked")}
    tensors = {_theirs(name, model): tensor.cpu() for name, tensor in _joined(state).items()}
    for name in _CLASS_WEIGHTS:
        tensors[name] = torch.tensor([1.0] * model.num_classes + [model.config.no_object])
    if Path(path).suffix == ".safetensors":
        write_tensors(path, tensors)
        return
    with replacing(path) as temporary:
        torch.save({"model": tensors}, temporary)


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of self-attention in one tensor, as in the release."""
    found = dict(tensors)
    for query in [name for name in tensors if ".self_attn.q_proj." in name]:
        thirds = [found.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[query.replace(".q_proj.", ".in_proj_")] = torch.cat(thirds)
    return found


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `_joined`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".self_attn.in_proj_" in name and tensor.dim():
            for part, third in zip("qkv", tensor.tensor_split(3), strict=True):
                found[name.replace(".in_proj_", f".{part}_proj.")] = third.clone()
        else:
            found[name] = tensor
    return found


def _theirs(name: str, model: FastInst) -> str:
    """The release's name of a tensor of the model. It names those of a ResNet-D as timm and we do."""
    if name.startswith("backbone."):
        return released_name(name) if model.config.backbone_variant == "plain" else name
    for pattern, target in _RULES:
        if match := re.match(pattern, name):
            first, *rest = match.groups() or ("",)
            target = target.replace("{+0}", str(int(first or 0) + 1))
            return _HEAD + target.format(first, *rest) + name[match.end() :]
    return name

"""Import of the files of FastInst's official release."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sprompt.models.detectron2_names import resnet_name
from sprompt.models.fit import check_fit
from sprompt.nn.tensor_files import read_tensors

if TYPE_CHECKING:
    from sprompt.models.fastinst.model import FastInst

_PIXELS, _PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
#: The release's names behind one of these two -> ours. "{0}" is the first number, "{-0}" that number less 1.
_RULES = {
    _PIXELS: (
        (r"adapter_(\d)\.norm\.", "pixel_decoder.lateral.{-0}.gn."),
        (r"adapter_(\d)\.", "pixel_decoder.lateral.{-0}.conv."),
        (r"layer_(\d)\.norm\.", "pixel_decoder.output.{-0}.gn."),
        (r"layer_(\d)\.", "pixel_decoder.output.{-0}.conv."),
        (r"ppm\.stages\.(\d)\.1\.", "pixel_decoder.pooling.pooled.{0}.conv."),
        (r"ppm\.bottleneck\.", "pixel_decoder.pooling.mix.conv."),
    ),
    _PREDICTOR: (
        (r"meta_pos_embed$", "positions"),
        (r"empty_query_features\.", "auxiliary_content."),
        (r"empty_query_pos_embed\.", "auxiliary_positions."),
        (r"query_proposal\.conv_proposal_cls_logits\.", "proposal_predictor."),
        (r"transformer_mask_cross_attention_layers\.(\d+)\.multihead_attn\.", "decoder.layers.{0}.pixel_attn."),
        (r"transformer_mask_cross_attention_layers\.(\d+)\.norm\.", "decoder.layers.{0}.pixel_attn_layer_norm."),
        (r"transformer_mask_ffn_layers\.(\d+)\.linear(\d)\.", "decoder.layers.{0}.pixel_feedforward.fc{1}."),
        (r"transformer_mask_ffn_layers\.(\d+)\.norm\.", "decoder.layers.{0}.pixel_feedforward.layer_norm."),
        (r"transformer_query_cross_attention_layers\.(\d+)\.multihead_attn\.", "decoder.layers.{0}.query_attn."),
        (r"transformer_query_cross_attention_layers\.(\d+)\.norm\.", "decoder.layers.{0}.query_attn_layer_norm."),
        (r"transformer_query_self_attention_layers\.(\d+)\.self_attn\.", "decoder.layers.{0}.self_attn."),
        (r"transformer_query_self_attention_layers\.(\d+)\.norm\.", "decoder.layers.{0}.self_attn_layer_norm."),
        (r"transformer_query_ffn_layers\.(\d+)\.linear(\d)\.", "decoder.layers.{0}.query_feedforward.fc{1}."),
        (r"transformer_query_ffn_layers\.(\d+)\.norm\.", "decoder.layers.{0}.query_feedforward.layer_norm."),
        (r"decoder_query_norm_layers\.(\d+)\.", "decoder.heads.{0}.layer_norm."),
        (r"class_embed_layers\.(\d+)\.layers\.(\d)\.", "decoder.heads.{0}.class_predictor.{1}.0."),
        (r"mask_embed_layers\.(\d+)\.layers\.(\d)\.", "decoder.heads.{0}.mask_predictor.{1}.0."),
        (r"mask_features_layers\.(\d+)\.", "decoder.heads.{0}.mask_features."),
    ),
}
#: The last layers of the classifiers, which depend on the number of classes.
_CLASSIFIERS = re.compile(r"(decoder\.heads\.\d+\.class_predictor\.2\.0|proposal_predictor\.2)\.(weight|bias)")


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
        if not name.endswith("criterion.empty_weight")  # the release has it twice: the decoder holds the loss
    }
    wanted = model.state_dict()
    tensors = {name: tensor for name, tensor in wanted.items() if name.endswith(".num_batches_tracked")}
    for name, tensor in held.items():
        tensors |= _ours(name, tensor)
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


def _ours(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the release by our names. Its self-attention holds query, key and value in one tensor. Unknown names stay."""
    own = resnet_name(name) or _renamed(name)
    match = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", own)
    if match and tensor.dim():
        thirds = zip("qkv", tensor.tensor_split(3), strict=True)
        return {f"{match[1]}.{part}_proj.{match[2]}": third.clone() for part, third in thirds}
    return {own: tensor}


def _renamed(name: str) -> str:
    for part, rules in _RULES.items():
        for pattern, target in rules:
            if match := re.match(re.escape(part) + pattern, name):
                first, *rest = match.groups() or ("",)
                target = target.replace("{-0}", str(int(first or 0) - 1))
                return target.format(first, *rest) + name[match.end() :]
    return name

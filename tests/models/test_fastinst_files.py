"""Files of FastInst's release go into our model: their names, typed from the release's modules, and what does not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_fastinst import TINY, network
from torch import Tensor

import sprompt
from sprompt.models.fastinst import FastInst, FastInstConfig
from sprompt.models.fastinst.checkpoint import export_checkpoint, import_checkpoint
from sprompt.nn.tensor_files import read_tensors, write_tensors

#: Of everything but the backbone: the release's name of a module or parameter, and ours. L is a layer, H a head.
NAMES = """
pixel_decoder.adapter_1                                          pixel_decoder.lateral.0.conv
pixel_decoder.adapter_1.norm                                     pixel_decoder.lateral.0.gn
pixel_decoder.adapter_2                                          pixel_decoder.lateral.1.conv
pixel_decoder.adapter_2.norm                                     pixel_decoder.lateral.1.gn
pixel_decoder.adapter_3                                          pixel_decoder.lateral.2.conv
pixel_decoder.adapter_3.norm                                     pixel_decoder.lateral.2.gn
pixel_decoder.layer_1                                            pixel_decoder.output.0.conv
pixel_decoder.layer_1.norm                                       pixel_decoder.output.0.gn
pixel_decoder.layer_2                                            pixel_decoder.output.1.conv
pixel_decoder.layer_2.norm                                       pixel_decoder.output.1.gn
pixel_decoder.layer_3                                            pixel_decoder.output.2.conv
pixel_decoder.layer_3.norm                                       pixel_decoder.output.2.gn
pixel_decoder.ppm.stages.0.1                                     pixel_decoder.pooling.pooled.0.conv
pixel_decoder.ppm.stages.1.1                                     pixel_decoder.pooling.pooled.1.conv
pixel_decoder.ppm.stages.2.1                                     pixel_decoder.pooling.pooled.2.conv
pixel_decoder.ppm.stages.3.1                                     pixel_decoder.pooling.pooled.3.conv
pixel_decoder.ppm.bottleneck                                     pixel_decoder.pooling.mix.conv
predictor.meta_pos_embed                                         positions
predictor.empty_query_features                                   auxiliary_content
predictor.empty_query_pos_embed                                  auxiliary_positions
predictor.query_proposal.conv_proposal_cls_logits.0              proposal_predictor.0
predictor.query_proposal.conv_proposal_cls_logits.2              proposal_predictor.2
predictor.transformer_mask_cross_attention_layers.L.multihead_attn.in_proj_weight   decoder.layers.L.pixel_attn.in_proj_weight
predictor.transformer_mask_cross_attention_layers.L.multihead_attn.in_proj_bias     decoder.layers.L.pixel_attn.in_proj_bias
predictor.transformer_mask_cross_attention_layers.L.multihead_attn.out_proj         decoder.layers.L.pixel_attn.out_proj
predictor.transformer_mask_cross_attention_layers.L.norm         decoder.layers.L.pixel_attn_layer_norm
predictor.transformer_mask_ffn_layers.L.linear1                  decoder.layers.L.pixel_feedforward.fc1
predictor.transformer_mask_ffn_layers.L.linear2                  decoder.layers.L.pixel_feedforward.fc2
predictor.transformer_mask_ffn_layers.L.norm                     decoder.layers.L.pixel_feedforward.layer_norm
predictor.transformer_query_cross_attention_layers.L.multihead_attn.in_proj_weight  decoder.layers.L.query_attn.in_proj_weight
predictor.transformer_query_cross_attention_layers.L.multihead_attn.in_proj_bias    decoder.layers.L.query_attn.in_proj_bias
predictor.transformer_query_cross_attention_layers.L.multihead_attn.out_proj        decoder.layers.L.query_attn.out_proj
predictor.transformer_query_cross_attention_layers.L.norm        decoder.layers.L.query_attn_layer_norm
predictor.transformer_query_self_attention_layers.L.self_attn.out_proj              decoder.layers.L.self_attn.out_proj
predictor.transformer_query_self_attention_layers.L.norm         decoder.layers.L.self_attn_layer_norm
predictor.transformer_query_ffn_layers.L.linear1                 decoder.layers.L.query_feedforward.fc1
predictor.transformer_query_ffn_layers.L.linear2                 decoder.layers.L.query_feedforward.fc2
predictor.transformer_query_ffn_layers.L.norm                    decoder.layers.L.query_feedforward.layer_norm
predictor.decoder_query_norm_layers.H                            decoder.heads.H.layer_norm
predictor.class_embed_layers.H.layers.0                          decoder.heads.H.class_predictor.0.0
predictor.class_embed_layers.H.layers.1                          decoder.heads.H.class_predictor.1.0
predictor.class_embed_layers.H.layers.2                          decoder.heads.H.class_predictor.2.0
predictor.mask_embed_layers.H.layers.0                           decoder.heads.H.mask_predictor.0.0
predictor.mask_embed_layers.H.layers.1                           decoder.heads.H.mask_predictor.1.0
predictor.mask_embed_layers.H.layers.2                           decoder.heads.H.mask_predictor.2.0
predictor.mask_features_layers.H                                 decoder.heads.H.mask_features
"""


def release(model: FastInst) -> dict[str, Tensor]:
    """The tensors of a model as the release names them. Its frozen batch norm counts no steps."""
    own = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    found: dict[str, Tensor] = {}
    layers = model.config.decoder_layers
    for line in NAMES.strip().splitlines():
        theirs, ours = line.split()
        for number in range(layers if "L" in theirs else layers + 1 if "H" in theirs else 1):
            source = re.sub("[LH]", str(number), ours)
            for part in ("", ".weight", ".bias"):
                if source + part in own:
                    found["sem_seg_head." + re.sub("[LH]", str(number), theirs) + part] = own.pop(source + part)
    for number in range(layers):
        for part in ("weight", "bias"):
            thirds = [own.pop(f"decoder.layers.{number}.self_attn.{p}_proj.{part}") for p in "qkv"]
            name = f"transformer_query_self_attention_layers.{number}.self_attn.in_proj_{part}"
            found[f"sem_seg_head.predictor.{name}"] = torch.cat(thirds)
    for name in [n for n in own if n.startswith("backbone.")]:
        if model.config.backbone_variant != "plain":  # the release has timm's names, which are ours
            found[name] = own.pop(name)
            continue
        theirs = name.replace("backbone.conv1", "backbone.stem.conv1").replace(
            "backbone.bn1", "backbone.stem.conv1.norm"
        )
        theirs = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", theirs)
        theirs = re.sub(r"(?<=\d\.)bn(\d)", r"conv\1.norm", theirs)
        theirs = theirs.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        found[theirs] = own.pop(name)
    assert not own
    weights = torch.tensor([1.0, 1, 1, 0.1])
    return found | {"criterion.empty_weight": weights, "sem_seg_head.predictor.criterion.empty_weight": weights.clone()}


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, decoder_layers=1),
        replace(TINY, decoder_layers=3),
        replace(TINY, depth=50, backbone_variant="d-dcn"),
    ],
    ids=["D1", "D3", "ResNet-D"],
)
def test_a_file_of_the_release(config: FastInstConfig, tmp_path: Path) -> None:
    model = network(config, seed=1)
    tensors = release(model)
    some = "backbone.res5.1.conv2.norm.running_var backbone.stem.conv1.norm.weight backbone.res3.0.shortcut.norm.bias"
    if config.backbone_variant != "plain":
        some = (
            "backbone.conv1.0.weight backbone.conv1.4.running_mean backbone.conv1.6.weight backbone.bn1.weight "
            "backbone.layer2.0.downsample.1.weight backbone.layer2.0.downsample.2.bias backbone.layer3.5.conv2_offset.weight "
            "backbone.layer4.0.conv2_offset.bias backbone.layer4.2.conv2.weight backbone.layer4.2.bn3.running_var"
        )
    assert {*some.split(), "sem_seg_head.pixel_decoder.adapter_3.norm.bias"} <= tensors.keys()
    torch.save({"model": tensors}, tmp_path / "release.pth")
    fresh = FastInst(model.config)
    assert fresh.import_checkpoint(tmp_path / "release.pth") == (
        f"{tmp_path / 'release.pth'}: {len(tensors) - 2} tensors of the release of FastInst"
    )
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in fresh.state_dict().items())
    found = sprompt.load(tmp_path / "release.pth", model=model.config, device="cpu").predict(
        torch.rand(3, 50, 70), short=64, long=96
    )
    assert found.masks.size == (50, 70) and 0 < len(found) <= 21

    for name in ("own.pth", "own.safetensors"):
        export_checkpoint(model, tmp_path / name)
        held, _ = read_tensors(tmp_path / name)
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[n], t) for n, t in tensors.items())
    assert torch.load(tmp_path / "own.pth", weights_only=True).keys() == {"model"}


def test_another_number_of_classes_starts_the_classifiers_anew(tmp_path: Path) -> None:
    model = network()
    write_tensors(tmp_path / "release.safetensors", release(model))
    fresh = FastInst(replace(TINY, num_classes=5))
    said = import_checkpoint(fresh, tmp_path / "release.safetensors")
    assert said.endswith("; the classifiers start anew, as the file has 3 classes and the model 5")
    assert fresh.proposal_predictor[2].weight.shape == (6, 32, 1, 1)
    own = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        if tensor.shape == own[name].shape:
            assert torch.equal(tensor, own[name]), name
        else:
            assert re.fullmatch(r"(decoder\.heads\.\d\.class_predictor\.2\.0|proposal_predictor\.2)\.\w+", name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sem_seg_head.predictor.meta_pos_embed", None, "missing: positions"),
        ("sem_seg_head.predictor.meta_pos_embed", (1, 32, 10, 10), r"positions \(1, 32, 10, 10\) instead of \(1, 32, 3, 3\)"),
        ("sem_seg_head.predictor.query_more.weight", (3,), "not of this model: sem_seg_head.predictor.query_more.weight"),
        ("backbone.res3.0.conv2_offset.weight", (3,), "not of this model: backbone.res3.0.conv2_offset.weight"),
        (
            "sem_seg_head.predictor.transformer_query_self_attention_layers.0.self_attn.in_proj_bias", (),
            "not of this model: decoder.layers.0.self_attn.in_proj_bias",
        ),
        (
            "sem_seg_head.predictor.transformer_query_self_attention_layers.0.self_attn.in_proj_bias", (95,),
            r"decoder.layers.0.self_attn.v_proj.bias \(31,\) instead of \(32,\)",
        ),
        ("sem_seg_head.predictor.class_embed_layers.2.layers.2.bias", (9,), r"class_predictor.2.0.bias \(9,\) instead of \(4,\)"),
        ("sem_seg_head.pixel_decoder.adapter_9.bias", (3,), "not of this model: sem_seg_head.pixel_decoder.adapter_9.bias"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(name: str, value: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    held = release(network())
    held.pop(name, None)
    if value is not None:
        held[name] = torch.zeros(value)
    write_tensors(tmp_path / "broken.safetensors", held)
    model = FastInst(TINY)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_checkpoint(model, tmp_path / "broken.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

"""Files of Mask2Former: those of transformers in and out, those of the release in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers_mask2former import BACKBONE, BOTH, SWIN, TINY, labelled, ours, theirs

import sprompt
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.models.mask2former.checkpoint import export_checkpoint, import_checkpoint
from sprompt.models.saved import load_model, save_model
from sprompt.nn.tensor_files import read_tensors, write_tensors
from sprompt.settings import from_plain, to_plain


def test_transformers_has_no_resnet_d(tmp_path: Path) -> None:
    model = Mask2Former(replace(TINY, depth=50, backbone_variant="d-dcn"))
    with pytest.raises(ValueError, match="the ResNet must be plain for transformers, got d-dcn"):
        export_checkpoint(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "x.safetensors", model, ["a", "b", "c"])
    images = labelled((64, 96), [1])[0].float()
    assert torch.equal(load_model(tmp_path / "x.safetensors")[0].backbone(images)[3], model.eval().backbone(images)[3])


@BOTH
def test_files_go_there_and_back(config: Mask2FormerConfig, tmp_path: Path) -> None:
    other = theirs(config)
    model = ours(other, tmp_path, config)
    export_checkpoint(model, tmp_path / "ours.safetensors")
    tensors, _ = read_tensors(tmp_path / "ours.safetensors")
    other.save_pretrained(tmp_path)
    wanted, _ = read_tensors(tmp_path / "model.safetensors")
    assert tensors.keys() == {name for name in wanted if "swin.layernorm" not in name}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    (tmp_path / "ours.safetensors").rename(tmp_path / "model.safetensors")
    again = type(other).from_pretrained(tmp_path).eval()
    images = labelled((64, 96), [1])[0].float()
    assert torch.equal(again(images).class_queries_logits, other(images).class_queries_logits)
    save_model(tmp_path / "model.safetensors", model, ["a", "b", "c"])
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert about["model"] == "mask2former" and loaded.config == config
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_another_number_of_classes_starts_the_classifier_anew(tmp_path: Path) -> None:
    other = theirs()
    write_tensors(tmp_path / "theirs.safetensors", other.state_dict())
    model = Mask2Former(Mask2FormerConfig(**{**TINY.__dict__, "num_classes": 5}))
    assert "the file has 3 classes and the model 5" in import_checkpoint(model, tmp_path / "theirs.safetensors")
    assert model.class_predictor.weight.shape == (6, 32)
    tensors = dict(other.state_dict())
    del tensors["model.transformer_module.level_embed.weight"]
    write_tensors(tmp_path / "broken.safetensors", tensors)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: transformer_module\.level_embed\.weight"):
        import_checkpoint(model, tmp_path / "broken.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("swin.encoder.layers.1.blocks.1.attention.q_proj.bias", None, r"missing: backbone.layers.1.blocks.1.attn.qkv.bias"),
        ("swin.encoder.layers.1.blocks.1.mlp.fc3.bias", (3,), "not of this model: backbone.encoder.layers.1.blocks.1.mlp.fc3.bias"),
        ("hidden_states_norms.stage2.bias", (3,), r"other shapes: backbone.norm1.bias \(3,\) instead of \(16,\)"),
        ("swin.layernorm.bias", (3,), r"other shapes: backbone.layernorm.bias \(3,\) instead of \(64,\)"),
        ("swin.encoder.layers.1.blocks.1.attention.self.relative_position_index", (4, 4), r"index \(4, 4\) instead of \(9, 9\)"),
    ],
)  # fmt: skip
def test_a_swin_that_does_not_fit(name: str, value: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    held = theirs(SWIN).state_dict()
    held.pop(BACKBONE + name, None)
    if value is not None:
        held[BACKBONE + name] = torch.zeros(value, dtype=torch.int64 if name.endswith("index") else None)
    write_tensors(tmp_path / "broken.safetensors", held)
    model = Mask2Former(SWIN)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_checkpoint(model, tmp_path / "broken.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_settings_of_older_files(tmp_path: Path) -> None:
    """A file without the newer settings has their defaults."""
    save_model(tmp_path / "model.safetensors", Mask2Former(TINY), ["a", "b", "c"])
    tensors, metadata = read_tensors(tmp_path / "model.safetensors")
    about = json.loads(metadata["sprompt"])
    del about["config"]["backbone"], about["config"]["swin"]
    write_tensors(tmp_path / "model.safetensors", tensors, {"sprompt": json.dumps(about)})
    assert load_model(tmp_path / "model.safetensors")[0].config == TINY
    plain = to_plain(SWIN)
    assert from_plain(Mask2FormerConfig, {k: v for k, v in plain.items() if k != "name"}) == SWIN
    with pytest.raises(
        ValueError, match=r"backbone must be one of 'resnet', 'efficientnet-lite0', .*'swin', got 'vit'"
    ):
        replace(TINY, backbone="vit")
    with pytest.raises(ValueError, match=r"swin must be a SwinConfig, got \{\}"):
        replace(TINY, swin={})


def test_the_sizes_of_the_release() -> None:
    with torch.device("meta"):
        model = Mask2Former(Mask2FormerConfig(num_classes=1))
    assert sum(p.numel() for p in model.backbone.parameters()) == 23_508_032
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 44.0
    with torch.device("meta"):
        swin = Mask2Former(Mask2FormerConfig(num_classes=1, backbone="swin"))
    assert (
        sum(p.numel() for p in swin.backbone.parameters()) == 27_520_698
    )  # Swin-T less the classifier, with four norms


@BOTH
def test_parameter_groups(config: Mask2FormerConfig) -> None:
    model = Mask2Former(config)
    factors = [{p: (group.rate, group.decay) for p in group.parameters} for group in model.parameter_groups()]
    assert sum(map(len, factors)) == len(set().union(*factors))
    own = {p: pair for group in factors for p, pair in group.items()}
    still = r"level_embed|queries_|norm\.|norm\d\.|input_projections\.\d\.1\.|(adapter|layer)_1\.1\.|relative_position_bias_table"
    for name, parameter in model.named_parameters():
        rate, decay = own.get(parameter, (1.0, 1.0))
        assert rate == (0.1 if name.startswith("backbone.") else 1.0), name
        assert decay == (0 if re.search(still, name) else 1), name


@BOTH
def test_a_folder_of_transformers_is_loaded_by_its_name(config: Mask2FormerConfig, tmp_path: Path) -> None:
    other = theirs(config)
    other.save_pretrained(tmp_path)
    trained = sprompt.load(tmp_path, model="mask2former", device="cpu")
    assert trained.model.config == replace(config, frozen_stages=1)
    images = labelled((64, 96), [1])[0].float()
    torch.testing.assert_close(
        trained.model(images).classes[-1], other(images).class_queries_logits, rtol=1e-4, atol=1e-4
    )
    found = trained.predict(torch.rand(3, 50, 70), short=64, long=96)
    assert found.masks.size == (50, 70) and len(found) <= 100
    about = json.loads((tmp_path / "config.json").read_text())
    changes = [("model_type", "convnext", "the backbone must be a ResNet or a Swin, got 'convnext'")]
    if config.backbone == "swin":
        changes += [
            ("embed_dim", 10**9, "config.json: SwinConfig: width must be a whole number from 1 to 512"),
            ("depths", 2, "config.json: .*not iterable"),
            ("depths", [2, 2, 2], r"depths must be a tuple of four whole numbers"),
            ("use_absolute_embeddings", True, "use_absolute_embeddings of the Swin must be False, got True"),
            ("window_size", 4, "other shapes: backbone.layers.0.blocks.0.attn.relative_position_bias_table"),
        ]
    for name, value, message in changes:
        changed = {**about, "backbone_config": {**about["backbone_config"], name: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            sprompt.load(tmp_path, model="mask2former")


@BOTH
def test_a_file_of_the_release(config: Mask2FormerConfig, tmp_path: Path) -> None:
    """Names written out by hand, from those of the release's modules. tests/nn/test_swin.py has those of a Swin."""
    torch.manual_seed(0)
    model = Mask2Former(config)
    own, released = model.state_dict(), {"criterion.empty_weight": torch.ones(4)}

    def take(name: str, *sources: str) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            if f"{sources[0]}.{part}" in own:
                released[f"{name}.{part}"] = torch.cat([own[f"{s}.{part}"] for s in sources])

    if config.backbone == "swin":
        released |= {name: tensor for name, tensor in own.items() if name.startswith("backbone.")}
        for table in [name for name in released if name.endswith("relative_position_bias_table")]:
            released[table.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
    take("backbone.stem.conv1", "backbone.conv1")
    take("backbone.stem.conv1.norm", "backbone.bn1")
    for stage in range(4 if config.backbone == "resnet" else 0):
        for block in range(2):
            ours, theirs_ = f"backbone.layer{stage + 1}.{block}", f"backbone.res{stage + 2}.{block}"
            for k in (1, 2):
                take(f"{theirs_}.conv{k}", f"{ours}.conv{k}")
                take(f"{theirs_}.conv{k}.norm", f"{ours}.bn{k}")
            take(f"{theirs_}.shortcut", f"{ours}.downsample.0")
            take(f"{theirs_}.shortcut.norm", f"{ours}.downsample.1")
    pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for k in range(3):
        take(f"{pixels}.input_proj.{k}.0", f"pixel_decoder.input_projections.{k}.0")
        take(f"{pixels}.input_proj.{k}.1", f"pixel_decoder.input_projections.{k}.1")
        take(f"{predictor}.mask_embed.layers.{k}", f"transformer_module.decoder.mask_predictor.mask_embedder.{k}.0")
    released[f"{pixels}.transformer.level_embed"] = own["pixel_decoder.level_embed"]
    for k in range(TINY.encoder_layers):
        ours, theirs_ = f"pixel_decoder.encoder.layers.{k}", f"{pixels}.transformer.encoder.layers.{k}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            take(f"{theirs_}.self_attn.{part}", f"{ours}.self_attn.{part}")
        for name, source in (
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "final_layer_norm"),
            ("linear1", "fc1"),
            ("linear2", "fc2"),
        ):
            take(f"{theirs_}.{name}", f"{ours}.{source}")
    take(f"{pixels}.mask_features", "pixel_decoder.mask_projection")
    for part in ("adapter_1", "layer_1"):
        take(f"{pixels}.{part}", f"pixel_decoder.{part}.0")
        take(f"{pixels}.{part}.norm", f"pixel_decoder.{part}.1")
    for name, source in (
        ("query_feat", "queries_features"), ("query_embed", "queries_embedder"), ("level_embed", "level_embed"),
        ("decoder_norm", "decoder.layernorm"),
    ):  # fmt: skip
        take(f"{predictor}.{name}", f"transformer_module.{source}")
    take(f"{predictor}.class_embed", "class_predictor")
    for k in range(TINY.decoder_layers):
        ours = f"transformer_module.decoder.layers.{k}"
        to_self, to_map = (
            f"{predictor}.transformer_self_attention_layers.{k}",
            f"{predictor}.transformer_cross_attention_layers.{k}",
        )
        for part in ("weight", "bias"):
            thirds = [own[f"{ours}.self_attn.{p}_proj.{part}"] for p in "qkv"]
            released[f"{to_self}.self_attn.in_proj_{part}"] = torch.cat(thirds)
            released[f"{to_map}.multihead_attn.in_proj_{part}"] = own[f"{ours}.cross_attn.in_proj_{part}"]
        take(f"{to_self}.self_attn.out_proj", f"{ours}.self_attn.out_proj")
        take(f"{to_map}.multihead_attn.out_proj", f"{ours}.cross_attn.out_proj")
        take(f"{to_self}.norm", f"{ours}.self_attn_layer_norm")
        take(f"{to_map}.norm", f"{ours}.cross_attn_layer_norm")
        feed = f"{predictor}.transformer_ffn_layers.{k}"
        for name, source in (("linear1", "fc1"), ("linear2", "fc2"), ("norm", "final_layer_norm")):
            take(f"{feed}.{name}", f"{ours}.{source}")
    torch.save({"model": released}, tmp_path / "release.pth")
    torch.manual_seed(1)
    fresh = Mask2Former(config)
    assert "the release of Mask2Former" in import_checkpoint(fresh, tmp_path / "release.pth")
    assert all(torch.equal(t, own[n]) for n, t in fresh.state_dict().items())

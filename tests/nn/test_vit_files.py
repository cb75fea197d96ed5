"""Files of a ViT in the layouts of other projects and of this library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_vit import TINY, by_our_names, randomised, theirs

from sprompt.nn.resnet import ResNet
from sprompt.nn.tensor_files import write_tensors
from sprompt.nn.vit import Vit, VitConfig
from sprompt.nn.weights import load_backbone, open_backbone, save_backbone

#: A network whose heads have 64 channels, as those of all releases but ViT-H.
WIDE = VitConfig(patch=16, width=128, depth=1, heads=2, grid=3)
DINOV2 = VitConfig(patch=14, width=64, depth=2, heads=1, grid=5, layer_scale=True)


def network(config: VitConfig = WIDE, seed: int = 0) -> Vit:
    return randomised(Vit(config), seed)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 2), 9.0) for name in names}


def released(kind: str, right: Vit) -> dict[str, Any]:
    """The content of a project's file, as torch.load returns it. Tensors that are not in `right` hold other values."""
    good, other = dict(right.state_dict()), dict(network(right.config, seed=1).state_dict())
    if kind == "MAE":
        return {"model": good}
    if kind == "MAE, with its decoder":
        decoder = named(
            "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias", "decoder_blocks.0.attn.qkv.weight",
            "decoder_norm.weight", "decoder_pred.weight",
        )  # fmt: skip
        return {"model": good | decoder}
    if kind == "DeiT":
        return {"model": good | named("head.weight", "head.bias")}
    if kind == "DINO":
        return good
    if kind == "DINO, whole":
        heads = named("head.mlp.0.weight", "head.last_layer.weight_g")
        student = behind("module.backbone.", other) | behind("module.", heads)
        return {"student": student, "teacher": behind("backbone.", good) | heads, "epoch": 100}
    if kind == "DINO, the student":
        return {"state_dict": behind("module.backbone.", good) | named("module.head.mlp.0.weight")}
    if kind == "DINOv2":
        return good | named("mask_token")
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("MAE", "a checkpoint with timm's names"),
        (
            "MAE, with its decoder",
            "an MAE checkpoint; left out: mask_token, decoder_pos_embed, decoder_embed (2), decoder_blocks, decoder_norm, decoder_pred",
        ),
        ("DeiT", "a checkpoint with timm's names; left out: head (2)"),
        ("DINO", "a checkpoint with timm's names"),
        ("DINO, whole", "a DINO checkpoint; left out: head (2)"),
        ("DINO, the student", "a DINO checkpoint; left out: module.head"),
        ("DINOv2", "a checkpoint with timm's names; left out: mask_token"),
    ],
)
def test_files_of_releases(kind: str, says: str, tmp_path: Path) -> None:
    right, path = network(DINOV2 if kind == "DINOv2" else WIDE), tmp_path / "vit.pth"
    torch.save(released(kind, right), path)
    target = network(right.config, seed=2)
    said = load_backbone(target, path)
    depth, heads = ("depth 2", "1 heads, layer scale") if kind == "DINOv2" else ("depth 1", "2 heads")
    count = len(right.state_dict())
    patches = f"patches of {right.config.patch}"
    assert (
        said
        == f"{path}: {count} tensors of a ViT of width {right.config.width}, {depth}, {heads} and {patches} from {says}"
    )
    assert same(target.state_dict(), right.state_dict())
    opened = open_backbone(path)
    assert isinstance(opened, Vit) and opened.config == right.config and same(opened.state_dict(), right.state_dict())
    assert not opened.training and not any(p.requires_grad for p in opened.parameters())
    assert all(p.requires_grad for p in open_backbone(path, frozen_stages=-1).parameters())


@pytest.mark.parametrize("in_memory", [False, True], ids=["names of files", "names of modules"])
@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("ViTModel", "pooler (2)"),
        ("ViTForImageClassification", "classifier (2)"),
        ("ViTMAEForPreTraining", "decoder (24)"),
        ("Dinov2Model", "mask_token"),
        ("Dinov2ForImageClassification", "classifier (2), mask_token"),
    ],
)
def test_files_of_transformers(kind: str, left_out: str, in_memory: bool, tmp_path: Path) -> None:
    dino = kind.startswith("Dinov2")
    config = VitConfig(patch=14, width=32, depth=2, heads=4, grid=3, layer_scale=True) if dino else TINY
    decoder = {
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }  # fmt: skip
    other = theirs(config, kind, **(decoder if "MAE" in kind else {}))
    other.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if in_memory:
        write_tensors(path, other.state_dict())
    opened = open_backbone(path)
    assert isinstance(opened, Vit) and opened.config == config  # heads and eps from config.json
    said = load_backbone(opened, path)
    assert said.endswith(f"from a file of transformers; left out: {left_out}")
    inner = next((getattr(other, name) for name in ("vit", "dinov2") if hasattr(other, name)), other)
    images = torch.randn(2, 3, 3 * config.patch, 3 * config.patch) if dino else torch.randn(2, 3, 32, 32)
    if "MAE" in kind:  # the encoder of MAE drops patches at random
        last = inner.layers[1]
        assert torch.equal(opened.blocks[1].attn.qkv.weight[32:64], last.attention.k_proj.weight)
        assert torch.equal(opened.blocks[1].mlp.fc2.bias, last.mlp.fc2.bias)
    else:
        wanted = inner(images).last_hidden_state[:, 1:].mT.unflatten(2, [images.shape[2] // config.patch] * 2)
        torch.testing.assert_close(opened(images)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "must have hidden_act 'gelu' in the config.json beside it, got 'relu'"),
        ({"model_type": "deit"}, "must have model_type vit, vit_mae, dinov2 in the config.json beside it, got 'deit'"),
        ({"num_attention_heads": 5}, "VitConfig: heads must divide the width 32, got 5"),
        ({"num_attention_heads": "4"}, "VitConfig: heads must be a whole number"),
        ({"layer_norm_eps": [1]}, r"VitConfig: eps must be a number above 0 and at most 0.001, got \[1\]"),
        (None, "must be JSON, got"),
    ],
)
def test_a_config_that_does_not_fit(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    about = tmp_path / "config.json"
    about.write_text("{" if change is None else json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        open_backbone(tmp_path / "model.safetensors")


def test_heads_that_nobody_says(tmp_path: Path) -> None:
    """Without a word, heads have 64 channels; in ViT-H they have 80."""
    theirs().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        ValueError, match=r"must say its number of heads .*, got a ViT of width 32; put the config.json"
    ):
        open_backbone(path)
    target = network(TINY, seed=1)
    load_backbone(target, path)  # a network that has its heads takes the file
    assert same(target.state_dict(), by_our_names(theirs().state_dict(), TINY))
    huge = VitConfig(patch=14, width=1280, depth=1, heads=16, grid=1)
    write_tensors(path, Vit(huge).state_dict())
    assert open_backbone(path).config == huge


def test_other_heads_are_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path / "x.safetensors", network(WIDE))
    other = network(VitConfig(patch=16, width=128, depth=1, heads=4, grid=3))
    with pytest.raises(ValueError, match=r"must hold a ViT of width 128, .*, got 2 heads; VitConfig\(heads=2\)"):
        load_backbone(other, tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "config", [TINY, DINOV2, VitConfig(width=16, depth=1, heads=2, grid=2, conv_stem=True)], ids=["ViT", "DINOv2", "stem"]
)  # fmt: skip
def test_own_files(config: VitConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    right, path = network(config), tmp_path / "x.safetensors"
    save_backbone(path, right, dtype)
    opened = open_backbone(path)
    assert isinstance(opened, Vit) and opened.config == config
    assert same(opened.state_dict(), {name: t.to(dtype).float() for name, t in right.state_dict().items()})
    assert "from a backbone of this library" in load_backbone(network(config, seed=1), path)


def test_positions_are_resized_to_the_grid_of_the_network(tmp_path: Path) -> None:
    right, path = network(), tmp_path / "x.safetensors"
    save_backbone(path, right)
    target = network(VitConfig(patch=16, width=128, depth=1, heads=2, grid=5))
    assert load_backbone(target, path).endswith("; positions resized from 3x3 to 5x5")
    square = right.pos_embed[:, 1:].reshape(1, 3, 3, 128).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(square, (5, 5), mode="bicubic", align_corners=False)
    assert torch.equal(target.pos_embed[:, 1:], wanted.permute(0, 2, 3, 1).reshape(1, 25, 128))
    assert torch.equal(target.pos_embed[:, 0], right.pos_embed[:, 0])
    images = torch.randn(1, 3, 80, 80)
    torch.testing.assert_close(target(images), right(images), rtol=1e-4, atol=1e-4)


def test_a_stem_starts_anew_with_a_file_of_patches(tmp_path: Path) -> None:
    right, path = network(), tmp_path / "x.safetensors"
    save_backbone(path, right)
    config = VitConfig(patch=16, width=128, depth=1, heads=2, grid=3, conv_stem=True)
    target, before = network(config, seed=1), network(config, seed=1).state_dict()
    assert load_backbone(target, path).endswith("; the convolutional stem starts anew")
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith("patch_embed.") else right.state_dict())[name]), name
    save_backbone(path, target)
    with pytest.raises(
        ValueError, match=r"12 too many \(patch_embed.convs.0.weight, .*1 of another shape .*conv_stem=True"
    ):
        load_backbone(network(), path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.mlp.fc2.bias", None, r"1 tensors missing \(blocks.0.mlp.fc2.bias\)"),
        ("norm.bias", None, r"1 tensors missing \(norm.bias\)"),
        ("register_tokens", (1, 4, 128), r"1 too many \(register_tokens\)"),
        ("dist_token", (1, 1, 128), r"1 too many \(dist_token\)"),
        ("blocks.0.attn.q_norm.weight", (64,), r"1 too many \(blocks.0.attn.q_norm.weight\)"),
        ("blocks.0.attn.qkv.weight", (384, 127), r"1 of another shape \(blocks.0.attn.qkv.weight is \(384, 127\), must be \(384, 128\)"),
        ("pos_embed", (1, 12, 128), r"\(1, 12, 128\)"),
        ("pos_embed", (0,), r"\(0,\)"),
        ("cls_token", (128,), r"cls_token is \(128,\), must be \(1, 1, 128\)"),
        ("blocks.0.norm1.bias", float("nan"), "must be finite, got NaN or infinity in blocks.0.norm1.bias"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(name: str, value: Any, message: str, tmp_path: Path) -> None:
    held = dict(network().state_dict())
    if value is None:
        del held[name]
    else:
        held[name] = torch.zeros(value) if isinstance(value, tuple) else torch.full_like(held[name], value)
    write_tensors(tmp_path / "x.safetensors", held)
    target = network(seed=1)
    for call in (
        lambda: load_backbone(target, tmp_path / "x.safetensors"),
        lambda: open_backbone(tmp_path / "x.safetensors"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith(str(tmp_path / "x.safetensors"))
    assert same(target.state_dict(), network(seed=1).state_dict())


def test_another_network_is_refused_with_advice(tmp_path: Path) -> None:
    save_backbone(tmp_path / "vit.safetensors", network())
    save_backbone(tmp_path / "resnet.safetensors", ResNet(18, width=4))
    other = network(VitConfig(patch=8, width=128, depth=2, heads=2, grid=3))
    with pytest.raises(
        ValueError, match=r"the file holds a ViT of width 128, .*: VitConfig\(patch=16, depth=1\) in Python"
    ):
        load_backbone(other, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"must hold a ViT \(.*, got .*; the file holds a ResNet$"):
        load_backbone(network(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"must hold a ResNet \(.*, got .*; the file holds a ViT$"):
        load_backbone(ResNet(18, width=4), tmp_path / "vit.safetensors")


def test_advice_names_no_setting_that_fits_already(tmp_path: Path) -> None:
    """A file that does not say its heads fits any number of them, and one with patches fits a convolutional stem."""
    held = dict(network().state_dict())
    del held["norm.weight"]
    torch.save(held, tmp_path / "vit.pth")
    target = network(VitConfig(width=128, depth=1, heads=4, grid=3, conv_stem=True))
    with pytest.raises(ValueError, match=r"1 tensors missing \(norm.weight\); is it the right file\?$"):
        load_backbone(target, tmp_path / "vit.pth")


def test_unusual_heads_are_said(tmp_path: Path) -> None:
    """Heads are in no tensor. A wrong number would load without an error, and give other maps."""
    torch.save(network().state_dict(), tmp_path / "vit.pth")
    said = load_backbone(network(VitConfig(width=128, depth=1, heads=4, grid=3)), tmp_path / "vit.pth")
    assert said.endswith("; the file does not say its number of heads, released networks of width 128 have 2")
    assert "does not say" not in load_backbone(network(), tmp_path / "vit.pth")
    save_backbone(tmp_path / "own.safetensors", network(VitConfig(width=128, depth=1, heads=4, grid=3)))
    target = network(VitConfig(width=128, depth=1, heads=4, grid=3))
    assert "does not say" not in load_backbone(target, tmp_path / "own.safetensors")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    held = {
        "patch_embed.proj.weight": torch.zeros(4096, 3, 1, 1),
        "pos_embed": torch.zeros(1, 2, 1),
        "cls_token": torch.zeros(1),
    }
    held |= {f"blocks.{block}.norm1.weight": torch.zeros(1) for block in range(128)}
    write_tensors(tmp_path / "x.safetensors", held)
    with pytest.raises(ValueError, match="tensors missing"):  # the network would have 103 GB
        open_backbone(tmp_path / "x.safetensors")

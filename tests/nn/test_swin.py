"""Swin equals transformers' SwinBackbone; its tensors have the release's names; its files in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sprompt.nn.resnet import ResNet
from sprompt.nn.swin import Block, Swin, SwinConfig
from sprompt.nn.swin_files import from_transformers, to_transformers
from sprompt.nn.tensor_files import read_tensors, write_tensors
from sprompt.nn.weights import load_backbone, open_backbone, save_backbone

transformers = pytest.importorskip("transformers", reason="the independent truth of these tests")

TINY = SwinConfig(width=8, depths=(1, 2, 3, 2), heads=(1, 2, 4, 8), window=3, drop_path=0.2)


def network(config: SwinConfig = TINY, seed: int = 0) -> Swin:
    """A Swin with large random values in all tensors, also in norms and biases."""
    torch.manual_seed(seed)
    return randomised(Swin(config, frozen_stages=-1))


def randomised(module: Any) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def theirs(config: SwinConfig = TINY, kind: str = "SwinBackbone") -> Any:
    torch.manual_seed(0)
    sizes = transformers.SwinConfig(
        embed_dim=config.width, depths=list(config.depths), num_heads=list(config.heads), window_size=config.window,
        out_features=["stage1", "stage2", "stage3", "stage4"], num_labels=5,
    )  # fmt: skip
    return randomised(getattr(transformers, kind)(sizes))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("size", [(64, 96), (96, 160), (32, 32)])
@pytest.mark.parametrize(
    "config",
    [TINY, SwinConfig(4, (2, 2, 2, 2), (2, 1, 2, 4), window=4), SwinConfig(4, (1, 1, 4, 1), (1, 1, 1, 1), window=7)],
    ids=["window 3", "window 4", "window 7"],
)
def test_maps_and_gradients(config: SwinConfig, size: tuple[int, int], tmp_path: Path) -> None:
    other = theirs(config)
    other.save_pretrained(tmp_path)
    own = Swin(config, frozen_stages=-1)
    load_backbone(own, tmp_path / "model.safetensors")
    own, other = own.double().eval(), other.double()
    images = torch.randn(2, 3, *size, dtype=torch.double)
    maps, wanted = own(images), other(images).feature_maps
    assert [m.shape[1] for m in maps] == own.channels
    assert [m.shape[2:] for m in maps] == [(size[0] // s, size[1] // s) for s in own.strides]
    torch.testing.assert_close(maps, list(wanted), rtol=0, atol=1e-9)
    weights = [torch.randn_like(m) for m in maps]
    for found in (maps, wanted):
        sum((m * w).sum() for m, w in zip(found, weights, strict=True)).backward()
    gradients = from_transformers({name: p.grad for name, p in other.named_parameters() if p.grad is not None})
    assert gradients.keys() == {name for name, _ in own.named_parameters()}
    for name, parameter in own.named_parameters():
        scale = max(float(gradients[name].abs().max()), 1.0)
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-9 * scale, msg=name)


def test_names_of_the_release_written_out() -> None:
    with torch.device("meta"):
        model = Swin()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block = {
        "norm1.weight": (96,), "norm1.bias": (96,), "attn.relative_position_bias_table": (169, 3),
        "attn.qkv.weight": (288, 96), "attn.qkv.bias": (288,), "attn.proj.weight": (96, 96), "attn.proj.bias": (96,),
        "norm2.weight": (96,), "norm2.bias": (96,), "mlp.fc1.weight": (384, 96), "mlp.fc1.bias": (384,),
        "mlp.fc2.weight": (96, 384), "mlp.fc2.bias": (96,),
    }  # fmt: skip
    first = {name.removeprefix("layers.0.blocks.1."): s for name, s in shapes.items() if name.startswith("layers.0.blocks.1.")}  # fmt: skip
    assert first == block
    outside = {name: s for name, s in shapes.items() if ".blocks." not in name}
    assert outside == {
        "patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,),
        "patch_embed.norm.weight": (96,), "patch_embed.norm.bias": (96,),
        "layers.0.downsample.reduction.weight": (192, 384),
        "layers.0.downsample.norm.weight": (384,), "layers.0.downsample.norm.bias": (384,),
        "layers.1.downsample.reduction.weight": (384, 768),
        "layers.1.downsample.norm.weight": (768,), "layers.1.downsample.norm.bias": (768,),
        "layers.2.downsample.reduction.weight": (768, 1536),
        "layers.2.downsample.norm.weight": (1536,), "layers.2.downsample.norm.bias": (1536,),
        "norm0.weight": (96,), "norm0.bias": (96,), "norm1.weight": (192,), "norm1.bias": (192,),
        "norm2.weight": (384,), "norm2.bias": (384,), "norm3.weight": (768,), "norm3.bias": (768,),
    }  # fmt: skip
    assert shapes["layers.3.blocks.1.attn.relative_position_bias_table"] == (169, 24)
    # the paper's Swin-T has 28 288 354 parameters: less the classifier and its norm, and with the norms of the four maps
    classifier, norms = 768 * 1000 + 1000 + 2 * 768, 2 * (96 + 192 + 384 + 768)
    assert sum(p.numel() for p in model.parameters()) == 28_288_354 - classifier + norms


def release(own: dict[str, Tensor], config: SwinConfig = TINY) -> dict[str, Tensor]:
    """A classifier's file: without norms of the maps, with the classifier and with what follows from sizes."""
    cells = config.window**2
    held = {name: t for name, t in own.items() if not name.startswith(("norm0", "norm1", "norm2", "norm3"))}
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            held[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = torch.zeros(
                cells, cells, dtype=torch.int64
            )
            if block % 2 and stage < 3:
                held[f"layers.{stage}.blocks.{block}.attn_mask"] = torch.zeros(4, cells, cells)
    return held | {
        "norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(5, 64), "head.bias": torch.ones(5),
    }  # fmt: skip


def test_a_classifier_of_the_release(tmp_path: Path) -> None:
    right, path = network(), tmp_path / "swin.pth"
    torch.save({"model": release(right.state_dict())}, path)
    target = network(seed=1)
    said = load_backbone(target, path)
    assert (
        "117 tensors of a Swin of width 8, depths 1 2 3 2, heads 1 2 4 8 and window 3 from a checkpoint with the names of"
        in said
    )
    assert said.endswith("; the norms of its maps start anew; left out: norm (2), head (2)")
    for norm in right.norms():
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    assert same(target.state_dict(), right.state_dict())
    opened = open_backbone(path)
    assert isinstance(opened, Swin) and same(opened.state_dict(), right.state_dict()) and not opened.training
    assert opened.config == SwinConfig(8, (1, 2, 3, 2), (1, 2, 4, 8), 3)


@pytest.mark.parametrize("kind", ["SwinBackbone", "SwinModel", "SwinForImageClassification"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["names of files", "names of modules"])
def test_files_of_transformers(kind: str, in_memory: bool, tmp_path: Path) -> None:
    other, path = theirs(kind=kind), tmp_path / "model.safetensors"
    if in_memory:
        write_tensors(path, other.state_dict())
    else:
        other.save_pretrained(tmp_path)
    own = network(seed=1)
    said = load_backbone(own, path)
    assert "from a file of transformers" in said and "left out: " in said
    assert ("start anew" in said) == (kind != "SwinBackbone")
    assert said.endswith(
        "left out: classifier (2), layernorm (2)" if kind == "SwinForImageClassification" else "left out: layernorm (2)"
    )
    swin = other.swin if hasattr(other, "swin") else other
    images = torch.randn(1, 3, 64, 64)
    if kind == "SwinBackbone":
        torch.testing.assert_close(own(images), list(other(images).feature_maps), rtol=1e-4, atol=1e-4)
    attention, theirs_ = own.layers[1].blocks[1].attn, swin.encoder.layers[1].blocks[1].attention
    assert torch.equal(attention.qkv.bias[16:32], theirs_.k_proj.bias)
    assert torch.equal(attention.proj.weight, theirs_.o_proj.weight)


def test_transformers_reads_our_names(tmp_path: Path) -> None:
    other, own = theirs(), network(seed=1)
    other.save_pretrained(tmp_path)
    held, _ = read_tensors(tmp_path / "model.safetensors")
    ours = to_transformers(own.state_dict())
    assert ours.keys() == held.keys() - {"swin.layernorm.weight", "swin.layernorm.bias"}
    write_tensors(tmp_path / "model.safetensors", ours, {"format": "pt"})
    again = transformers.SwinBackbone.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(own(images), list(again(images).feature_maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_names_behind_a_prefix(prefix: str, tmp_path: Path) -> None:
    right, path = network(), tmp_path / "x.safetensors"
    others = {"sem_seg_head.predictor.query_feat.weight": torch.ones(1)} if prefix == "backbone." else {}
    write_tensors(path, {prefix + name: t for name, t in right.state_dict().items()} | others)
    opened = open_backbone(path, frozen_stages=2)
    assert same(opened.state_dict(), right.state_dict()) and opened.frozen_stages == 2
    assert ("from a Mask2Former checkpoint; left out: sem_seg_head" in load_backbone(network(), path)) == bool(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_own_files(dtype: torch.dtype, tmp_path: Path) -> None:
    right, path = network(), tmp_path / "x.safetensors"
    save_backbone(path, right, dtype)
    opened = open_backbone(path)
    assert same(opened.state_dict(), {name: t.to(dtype).float() for name, t in right.state_dict().items()})
    assert "from a backbone of this library" in load_backbone(network(seed=1), path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.blocks.1.mlp.fc2.bias", None, r"1 tensors missing \(layers.1.blocks.1.mlp.fc2.bias\)"),
        ("norm2.bias", None, r"1 tensors missing \(norm2.bias\)"),
        ("absolute_pos_embed", (1, 9, 8), r"1 too many \(absolute_pos_embed\)"),
        ("layers.1.blocks.1.attn.q_norm.bias", (8,), r"1 too many \(layers.1.blocks.1.attn.q_norm.bias\)"),
        ("layers.1.blocks.1.attn.qkv.weight", (48, 15), r"1 of another shape \(layers.1.*qkv.weight is \(48, 15\), must be \(48, 16\)"),
        ("layers.1.blocks.1.attn.relative_position_index", (49, 49), r"index is \(49, 49\), must be \(9, 9\)"),
        ("layers.1.blocks.1.attn_mask", (4, 9), r"attn_mask is \(4, 9\), must be \(4, 9, 9\)"),
        ("layers.1.blocks.1.norm1.bias", float("nan"), "must be finite, got NaN or infinity in layers.1.blocks.1.norm1.bias"),
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


def test_a_key_without_its_query(tmp_path: Path) -> None:
    held = to_transformers(network().state_dict())
    del held["encoder.layers.0.blocks.0.attention.self.query.bias"]
    write_tensors(tmp_path / "x.safetensors", held)
    with pytest.raises(ValueError, match=r"1 tensors missing \(layers.0.blocks.0.attn.qkv.bias\); 2 too many"):
        load_backbone(network(), tmp_path / "x.safetensors")


def test_another_network_is_refused_with_advice(tmp_path: Path) -> None:
    save_backbone(tmp_path / "swin.safetensors", network())
    save_backbone(tmp_path / "resnet.safetensors", ResNet(18, width=4))
    other = SwinConfig(8, (1, 2, 2, 2), (1, 2, 2, 8), window=4)
    with pytest.raises(
        ValueError, match=r"--model.swin.depths 1 2 3 2 --model.swin.heads 1 2 4 8 --model.swin.window 3 \(depths=\(1,"
    ):
        load_backbone(network(other), tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match=r"must hold a Swin \(.*, got .*; the file holds a ResNet$"):
        load_backbone(network(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"must hold a ResNet \(.*, got .*; the file holds a Swin$"):
        load_backbone(ResNet(18, width=4), tmp_path / "swin.safetensors")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    held: dict[str, Tensor] = {"patch_embed.proj.weight": torch.zeros(512, 3, 4, 4)}
    for stage in range(4):
        held[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] = torch.zeros(127**2, 2)
        held |= {f"layers.{stage}.blocks.{block}.norm1.weight": torch.zeros(1) for block in range(64)}
    write_tensors(tmp_path / "x.safetensors", held)
    with pytest.raises(ValueError, match="tensors missing"):  # the network would have 68 GB
        open_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize("stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(stages: int) -> None:
    model = Swin(TINY, frozen_stages=stages).train()
    place = {"patch_embed": 0} | {f"layers.{i}": i + 1 for i in range(4)} | {f"norm{i}": i + 1 for i in range(4)}
    for name, parameter in model.named_parameters():
        at = next(at for start, at in place.items() if name.startswith(start + "."))
        assert parameter.requires_grad == (at > stages), name
    for number, layer in enumerate(model.layers, start=1):
        assert all(module.training == (number > stages) for module in layer.modules())
    model.freeze(-1)
    assert all(p.requires_grad for p in model.parameters()) and model.train().patch_embed.training


def test_stochastic_depth() -> None:
    """A branch is left out for an image or, at a probability of one half, doubled. Here the second branch adds nothing."""
    torch.manual_seed(0)
    block = Block(8, 2, 3, 1, drop=0.5).train()
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(1, 6, 6, 8).expand(64, -1, -1, -1)
    apart = torch.zeros(4, 9, 9)
    branch = block.eval()(x, apart) - x
    added = block.train()(x, apart) - x
    kept = added.flatten(1).abs().amax(1) > 1e-3
    assert 16 < int(kept.sum()) < 48
    torch.testing.assert_close(added, 2 * branch * kept[:, None, None, None])
    drops = [b.drop for stage in Swin(TINY).layers for b in stage.blocks]
    assert drops == pytest.approx([0.2 * i / 7 for i in range(8)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width must be a whole number from 1 to 512, got 0"),
        ({"width": 10**9}, "width must be a whole number from 1 to 512"),
        ({"depths": (2, 2, 6)}, r"depths must be a tuple of four whole numbers from 1 to 64, got \(2, 2, 6\)"),
        ({"depths": (2, 2, 65, 2)}, "depths must"),
        ({"depths": [2, 2, 6, 2]}, "depths must be a tuple"),
        ({"heads": (3, 6, 12, True)}, "heads must be a tuple"),
        ({"heads": (5, 6, 12, 24)}, r"heads must divide the channels of the stages, \[96, 192, 384, 768\], got \(5, 6, 12, 24\)"),
        ({"window": 65}, "window must be a whole number from 1 to 64, got 65"),
        ({"drop_path": 1.0}, "drop_path must be a number from 0 to below 1, got 1.0"),
        ({"drop_path": float("nan")}, "drop_path must"),
    ],
)  # fmt: skip
def test_bad_sizes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SwinConfig: {message}"):
        SwinConfig(**values)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match=r"Swin: frozen_stages must be from -1 \(none\) to 4 \(all\), got 5"):
        Swin(TINY, frozen_stages=5)
    with pytest.raises(ValueError, match="Swin: images must have sides that are multiples of 32"):
        network()(torch.zeros(1, 3, 64, 70))

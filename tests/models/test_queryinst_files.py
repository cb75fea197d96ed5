"""Files of QueryInst's releases go into our model and come out of it: their names and shapes, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_queryinst import TINY, network
from torch import Tensor

import sprompt
from sprompt.models.queryinst import QueryInst
from sprompt.models.queryinst.checkpoint import export_checkpoint, import_checkpoint
from sprompt.nn.tensor_files import read_tensors, write_tensors

#: Every tensor of a release at its sizes, but for the backbone. T is a stage.
NAMES = """
neck.lateral_convs.0.conv.weight 256,256,1,1
neck.lateral_convs.1.conv.weight 256,512,1,1
neck.lateral_convs.2.conv.weight 256,1024,1,1
neck.lateral_convs.3.conv.weight 256,2048,1,1
neck.lateral_convs.0.conv.bias 256
neck.lateral_convs.1.conv.bias 256
neck.lateral_convs.2.conv.bias 256
neck.lateral_convs.3.conv.bias 256
neck.fpn_convs.0.conv.weight 256,256,3,3
neck.fpn_convs.1.conv.weight 256,256,3,3
neck.fpn_convs.2.conv.weight 256,256,3,3
neck.fpn_convs.3.conv.weight 256,256,3,3
neck.fpn_convs.0.conv.bias 256
neck.fpn_convs.1.conv.bias 256
neck.fpn_convs.2.conv.bias 256
neck.fpn_convs.3.conv.bias 256
rpn_head.init_proposal_features.weight 100,256
rpn_head.init_proposal_bboxes.weight 100,4
roi_head.bbox_head.T.attention.attn.in_proj_weight 768,256
roi_head.bbox_head.T.attention.attn.in_proj_bias 768
roi_head.bbox_head.T.attention.attn.out_proj.weight 256,256
roi_head.bbox_head.T.attention.attn.out_proj.bias 256
roi_head.bbox_head.T.attention_norm.weight 256
roi_head.bbox_head.T.attention_norm.bias 256
roi_head.bbox_head.T.instance_interactive_conv.dynamic_layer.weight 32768,256
roi_head.bbox_head.T.instance_interactive_conv.dynamic_layer.bias 32768
roi_head.bbox_head.T.instance_interactive_conv.norm_in.weight 64
roi_head.bbox_head.T.instance_interactive_conv.norm_in.bias 64
roi_head.bbox_head.T.instance_interactive_conv.norm_out.weight 256
roi_head.bbox_head.T.instance_interactive_conv.norm_out.bias 256
roi_head.bbox_head.T.instance_interactive_conv.fc_layer.weight 256,12544
roi_head.bbox_head.T.instance_interactive_conv.fc_layer.bias 256
roi_head.bbox_head.T.instance_interactive_conv.fc_norm.weight 256
roi_head.bbox_head.T.instance_interactive_conv.fc_norm.bias 256
roi_head.bbox_head.T.instance_interactive_conv_norm.weight 256
roi_head.bbox_head.T.instance_interactive_conv_norm.bias 256
roi_head.bbox_head.T.ffn.layers.0.0.weight 2048,256
roi_head.bbox_head.T.ffn.layers.0.0.bias 2048
roi_head.bbox_head.T.ffn.layers.1.weight 256,2048
roi_head.bbox_head.T.ffn.layers.1.bias 256
roi_head.bbox_head.T.ffn_norm.weight 256
roi_head.bbox_head.T.ffn_norm.bias 256
roi_head.bbox_head.T.cls_fcs.0.weight 256,256
roi_head.bbox_head.T.cls_fcs.1.weight 256
roi_head.bbox_head.T.cls_fcs.1.bias 256
roi_head.bbox_head.T.fc_cls.weight 80,256
roi_head.bbox_head.T.fc_cls.bias 80
roi_head.bbox_head.T.reg_fcs.0.weight 256,256
roi_head.bbox_head.T.reg_fcs.1.weight 256
roi_head.bbox_head.T.reg_fcs.1.bias 256
roi_head.bbox_head.T.reg_fcs.3.weight 256,256
roi_head.bbox_head.T.reg_fcs.4.weight 256
roi_head.bbox_head.T.reg_fcs.4.bias 256
roi_head.bbox_head.T.reg_fcs.6.weight 256,256
roi_head.bbox_head.T.reg_fcs.7.weight 256
roi_head.bbox_head.T.reg_fcs.7.bias 256
roi_head.bbox_head.T.fc_reg.weight 4,256
roi_head.bbox_head.T.fc_reg.bias 4
roi_head.mask_head.T.instance_interactive_conv.dynamic_layer.weight 32768,256
roi_head.mask_head.T.instance_interactive_conv.dynamic_layer.bias 32768
roi_head.mask_head.T.instance_interactive_conv.norm_in.weight 64
roi_head.mask_head.T.instance_interactive_conv.norm_in.bias 64
roi_head.mask_head.T.instance_interactive_conv.norm_out.weight 256
roi_head.mask_head.T.instance_interactive_conv.norm_out.bias 256
roi_head.mask_head.T.convs.0.conv.weight 256,256,3,3
roi_head.mask_head.T.convs.1.conv.weight 256,256,3,3
roi_head.mask_head.T.convs.2.conv.weight 256,256,3,3
roi_head.mask_head.T.convs.3.conv.weight 256,256,3,3
roi_head.mask_head.T.convs.0.conv.bias 256
roi_head.mask_head.T.convs.1.conv.bias 256
roi_head.mask_head.T.convs.2.conv.bias 256
roi_head.mask_head.T.convs.3.conv.bias 256
roi_head.mask_head.T.upsample.weight 256,256,2,2
roi_head.mask_head.T.upsample.bias 256
roi_head.mask_head.T.conv_logits.weight 80,256,1,1
roi_head.mask_head.T.conv_logits.bias 80
"""


def table() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for line in NAMES.strip().splitlines():
        name, sizes = line.split()
        for stage in range(6 if ".T." in name else 1):
            shapes[name.replace(".T.", f".{stage}.")] = tuple(map(int, sizes.split(",")))
    for stage in range(6):
        for number in range(4):
            at = f"roi_head.mask_head.{stage}.convs.{number}.bn"
            shapes |= {f"{at}.{part}": (256,) for part in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{at}.num_batches_tracked"] = ()
    return shapes


def test_names_and_shapes() -> None:
    with torch.device("meta"):
        model = QueryInst()
    held = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("backbone.")}
    assert held == table()
    assert len(held) == 18 + 6 * (40 + 18 + 20)
    assert {n.split(".")[0] for n in model.state_dict()} == {"backbone", "neck", "rpn_head", "roi_head"}


def release(model: QueryInst) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("head", ["QueryRoIHead", "SparseRoIHead"])
def test_a_file_of_a_release(head: str, tmp_path: Path) -> None:
    """Both releases have the same tensors; the name of the head is in the text of the configuration."""
    model = network(seed=1)
    tensors = release(model)
    meta = {"config": f"model = dict(type='QueryInst', roi_head=dict(type='{head}'))", "CLASSES": ("a", "b", "c")}
    torch.save({"meta": meta, "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "release.pth")
    fresh = QueryInst(model.config)
    said = fresh.import_checkpoint(tmp_path / "release.pth")
    assert said == f"{tmp_path / 'release.pth'}: {len(tensors)} tensors of QueryInst"
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in fresh.state_dict().items())
    found = sprompt.load(tmp_path / "release.pth", model=model.config, device="cpu").predict(
        torch.rand(3, 50, 70), short=64, long=96
    )
    assert found.masks.size == (50, 70)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_a_training(wrapped: bool, tmp_path: Path) -> None:
    """mmcv's hook of moving averages adds a copy of every tensor, without dots in its name. DistributedDataParallel adds a prefix."""
    model = network(seed=1)
    own = release(model)
    tensors = own | {"ema_" + name.replace(".", "_"): torch.zeros_like(tensor) for name, tensor in own.items()}
    torch.save({"state_dict": {"module." * wrapped + n: t for n, t in tensors.items()}}, tmp_path / "latest.pth")
    fresh = QueryInst(model.config)
    said = import_checkpoint(fresh, tmp_path / "latest.pth")
    assert said.endswith(f": {len(own)} tensors of QueryInst; left out {len(own)} copies of weights that were averaged")
    assert all(torch.equal(tensor, own[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("file", ["out.pth", "out.safetensors"])
def test_there_and_back(file: str, tmp_path: Path) -> None:
    model = network()
    export_checkpoint(model, tmp_path / file, None if file.endswith("s") else ["a", "b", "c"])
    held, _ = read_tensors(tmp_path / file)
    assert held.keys() == model.state_dict().keys()
    fresh = network(seed=3)
    import_checkpoint(fresh, tmp_path / file)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in fresh.state_dict().items())


def test_another_number_of_classes_starts_the_classifiers_anew(tmp_path: Path) -> None:
    """Also the masks' last layer, which has a channel for each class. Layers of prompts are left out."""
    model = network()
    write_tensors(tmp_path / "r.safetensors", {**release(model), "rpn_head.patch2query.weight": torch.zeros(2)})
    fresh = QueryInst(replace(TINY, num_classes=5))
    said = import_checkpoint(fresh, tmp_path / "r.safetensors")
    assert "; classifiers start anew, as the file has 3 classes and the model 5; left out" in said
    own = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        if {"fc_cls", "conv_logits"} & set(name.split(".")):
            assert len(tensor) == 5
        else:
            assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rpn_head.init_proposal_bboxes.weight", None, "missing: rpn_head.init_proposal_bboxes.weight"),
        ("rpn_head.init_proposal_features.weight", (100, 256), r"\(100, 256\) instead of \(6, 16\)"),
        ("roi_head.bbox_head.2.fc_reg.weight", (4, 16), "not of this model: roi_head.bbox_head.2.fc_reg.weight"),
        ("roi_head.mask_head.1.convs.3.bn.running_var", None, "missing: roi_head.mask_head.1.convs.3.bn.running_var"),
        ("roi_head.mask_head.0.conv_logits.bias", (9,), r"conv_logits.bias \(9,\) instead of \(3,\)"),
    ],
)
def test_files_that_do_not_fit(name: str, value: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    held = release(network())
    held.pop(name, None)
    if value is not None:
        held[name] = torch.zeros(value)
    write_tensors(tmp_path / "broken.safetensors", held)
    model = QueryInst(TINY)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_checkpoint(model, tmp_path / "broken.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

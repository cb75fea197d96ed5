"""Names, shapes and initial values of K-Net's tensors. Official checkpoints have the same names and shapes."""

from __future__ import annotations

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sprompt.models.knet import KNet, KNetConfig

C, N, K, F = 256, 100, 80, 2048


def table() -> dict[str, tuple[int, ...]]:
    """Every tensor outside the backbone, at the sizes of the release."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (C,)

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for i, width in enumerate((256, 512, 1024, 2048)):
        shapes[f"neck.lateral_convs.{i}.conv.weight"] = (C, width, 1, 1)
        shapes[f"neck.fpn_convs.{i}.conv.weight"] = (C, C, 3, 3)
        shapes[f"neck.lateral_convs.{i}.conv.bias"] = shapes[f"neck.fpn_convs.{i}.conv.bias"] = (C,)
    fpn = "rpn_head.localization_fpn"
    for level, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
        shapes[f"{fpn}.convs_all_levels.{level}.conv{j}.conv.weight"] = (C, C, 3, 3)
        norm(f"{fpn}.convs_all_levels.{level}.conv{j}.gn")
    for name in (f"{fpn}.conv_pred", f"{fpn}.aux_convs.0", "rpn_head.loc_convs.0", "rpn_head.seg_convs.0"):
        shapes[f"{name}.conv.weight"] = (C, C, 1, 1)
        norm(f"{name}.gn")
    shapes["rpn_head.init_kernels.weight"] = (N, C, 1, 1)
    shapes["rpn_head.conv_seg.weight"], shapes["rpn_head.conv_seg.bias"] = (K, C, 1, 1), (K,)
    for stage in range(3):
        at = f"roi_head.mask_head.{stage}"
        shapes[f"{at}.attention.attn.in_proj_weight"] = (3 * C, C)
        shapes[f"{at}.attention.attn.in_proj_bias"] = (3 * C,)
        linear(f"{at}.attention.attn.out_proj", C, C)
        for name in ("dynamic_layer", "input_layer"):
            linear(f"{at}.kernel_update_conv.{name}", 2 * C, C)
        for name in ("input_gate", "update_gate", "fc_layer"):
            linear(f"{at}.kernel_update_conv.{name}", C, C)
        for name in ("norm_in", "norm_out", "input_norm_in", "input_norm_out", "fc_norm"):
            norm(f"{at}.kernel_update_conv.{name}")
        shapes[f"{at}.feat_transform.conv.weight"], shapes[f"{at}.feat_transform.conv.bias"] = (C, C, 1, 1), (C,)
        linear(f"{at}.ffn.layers.0.0", F, C)
        linear(f"{at}.ffn.layers.1", C, F)
        linear(f"{at}.cls_fcs.0", C, C, bias=False)
        linear(f"{at}.mask_fcs.0", C, C, bias=False)
        for name in ("attention_norm", "ffn_norm", "cls_fcs.1", "mask_fcs.1"):
            norm(f"{at}.{name}")
        linear(f"{at}.fc_cls", K, C)
        linear(f"{at}.fc_mask", C, C)
    return shapes


def test_names_and_shapes() -> None:
    with torch.device("meta"):
        model = KNet()
    held = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("backbone.")}
    assert held == table()
    assert len(held) == 184
    outside = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert sum(p.numel() for p in outside.values()) == 13_974_336
    for stage in range(3):
        at = f"roi_head.mask_head.{stage}."
        assert sum(p.numel() for name, p in outside.items() if name.startswith(at)) == 2_062_416
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert backbone == 23_508_032  # torchvision's ResNet-50 without fc
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "neck", "rpn_head", "roi_head"}


def test_shapes_at_full_size() -> None:
    """One image of 800×1344, with tensors on the meta device, which take no memory."""
    with FakeTensorMode():
        model = KNet()
        features = model.encode(torch.empty(1, 3, 800, 1344))
        outputs = model.decode(features)
    assert [tuple(m.shape[1:]) for m in features.backbone] == [
        (256, 200, 336),
        (512, 100, 168),
        (1024, 50, 84),
        (2048, 25, 42),
    ]
    assert [tuple(m.shape[1:]) for m in features.maps] == [(256, 200 >> i, 336 >> i) for i in range(4)]
    assert [tuple(m.shape) for m in outputs.masks] == [(1, 100, 100, 168)] * 4
    assert [tuple(c.shape) for c in outputs.classes] == [(1, 100, 80)] * 3
    assert [tuple(k.shape) for k in outputs.kernels] == [(1, 100, 256)] * 3
    assert tuple(outputs.seg.shape) == (1, 80, 100, 168)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = KNet(KNetConfig(depth=18, backbone_width=8, num_classes=7))
    for name, p in model.named_parameters():
        if name.startswith("backbone."):
            continue
        value, std = p.detach(), float(p.detach().std())
        if name == "rpn_head.init_kernels.weight":
            assert abs(std - 1) < 0.02, name
        elif "conv_seg.bias" in name or "fc_cls.bias" in name:
            assert torch.allclose(value, torch.tensor(-math.log(99))), name
        elif name.endswith(("gn.weight", "norm.weight")) or ".norm_" in name or "_norm_" in name or "fcs.1" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif name.startswith("rpn_head.") and value.dim() > 1:
            assert abs(std - 0.01) < 0.001, name
        elif value.dim() > 1:  # Xavier: uniform within ±√(6 / (fan in + fan out))
            area = value[0, 0].numel()
            bound = math.sqrt(6 / ((value.shape[0] + value.shape[1]) * area))
            assert value.abs().max() <= bound and abs(std / (bound / math.sqrt(3)) - 1) < 0.05, name
        elif (
            name.startswith("neck.")
            or "attn" in name
            or "feat_transform" in name
            or name.endswith(("gn.bias", "norm.bias"))
        ):
            assert torch.equal(value, torch.zeros_like(value)), name
        else:  # the default of linear layers
            bound = 1 / math.sqrt(2048 if "ffn.layers.1" in name else 256)
            assert 0.5 * bound < value.abs().max() <= bound, name

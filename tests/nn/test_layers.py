"""Layers by hand: positions, group norm under autocast, the pyramid's sums, upsampling. Tests of K-Net cover them together."""

from __future__ import annotations

import math

import pytest
import torch

from sprompt.nn.conv import ConvGN
from sprompt.nn.fpn import FPN
from sprompt.nn.positions import sine_positions
from sprompt.nn.semantic_fpn import SemanticFPN


def test_positions() -> None:
    got = sine_positions(8, 3, 5, torch.zeros(()))
    assert got.shape == (8, 3, 5)
    y, x = 2 / (3 + 1e-6) * 2 * math.pi, 4 / (5 + 1e-6) * 2 * math.pi
    # T = 1, 1, 100, 100 (10000^(2⌊k/2⌋/4))
    expected = [f(z / t) for z in (y, x) for t in (1, 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(got[:, 1, 3], torch.tensor(expected))


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 32), (48, 16), (20, 4), (7, 1)])
def test_groups(channels: int, groups: int) -> None:
    layer = ConvGN(4, channels)
    assert layer.gn.num_groups == groups and layer.conv.bias is None
    x = layer(torch.randn(2, 4, 6, 6))
    parts = torch.nn.functional.group_norm(layer.conv(torch.zeros(2, 4, 6, 6)), groups)
    assert x.shape == parts.shape and (x >= 0).all()


def test_group_norm_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = ConvGN(16, 32, 3), torch.randn(1, 16, 9, 9)
    seen = []
    layer.gn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert seen == [(torch.float32, torch.float32)] and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)


def test_pyramid_sums_go_down() -> None:
    neck = FPN([1, 1], 1)
    with torch.no_grad():
        for lateral, conv in zip(neck.lateral_convs, neck.fpn_convs, strict=True):
            lateral.conv.weight.fill_(1)
            conv.conv.weight.zero_()[0, 0, 1, 1] = 1
    fine, coarse = torch.zeros(1, 1, 4, 4), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    down = neck([fine, coarse])
    assert torch.equal(down[1], coarse)
    assert down[0][0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_semantic_pyramid_ends_at_stride_8() -> None:
    layer = SemanticFPN(8)
    maps = [torch.randn(2, 8, 32 >> i, 48 >> i) for i in range(4)]
    loc, sem = layer(maps)
    assert loc.shape == sem.shape == (2, 8, 16, 24)
    for level in range(4):  # every level reaches both
        changed = [m + (i == level) for i, m in enumerate(maps)]
        assert all(not torch.equal(a, b) for a, b in zip(layer(changed), (loc, sem), strict=True))

"""Backbones of stages: the order of their maps in memory."""

from __future__ import annotations

import pytest
import torch

from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import ResNet
from sprompt.nn.stages import Staged


@pytest.mark.parametrize(
    "network", [lambda: ResNet(18, width=16), lambda: ResNet(50, width=8, variant="d-dcn"), EfficientNet]
)
def test_on_a_cpu_the_channels_of_a_pixel_lie_side_by_side(network: type[Staged]) -> None:
    torch.manual_seed(0)
    backbone, images = network().eval(), torch.randn(2, 3, 64, 96)
    maps = backbone(images)
    assert all(m.is_contiguous(memory_format=torch.channels_last) and m.stride(1) == 1 for m in maps)
    for same in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert all(torch.equal(a, b) for a, b in zip(maps, backbone(same), strict=True))

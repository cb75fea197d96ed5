"""The network of Mask Auto-Labeler against the formulas in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sprompt.nn.mask_labeler import AREAS, MaskLabeler, size_class
from sprompt.nn.resnet import ResNet
from sprompt.nn.vit import Vit, VitConfig

VIT = VitConfig(width=32, depth=2, heads=2, grid=3, conv_stem=True)


def network(width: int = 12, vit: bool = False) -> MaskLabeler:
    torch.manual_seed(0)
    made = MaskLabeler(Vit(VIT) if vit else ResNet(18, width=8, frozen_stages=-1), width)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "head" in name and name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made.double()


def resized(maps: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialias: every output pixel from its four neighbours."""
    side = maps.shape[-1]
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, side - 1), at - low
    rows = maps[..., low, :] * (1 - share)[:, None] + maps[..., high, :] * share[:, None]
    return rows[..., low] * (1 - share) + rows[..., high] * share


def conv3(maps: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A 3×3 convolution with a border of zeros, tap by tap, and its ReLU."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    total = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            total += np.einsum("oi,ihw->ohw", weight[:, :, dy, dx], padded[:, dy : dy + height, dx : dx + width])
    return np.maximum(total, 0)


def literal(made: MaskLabeler, features: np.ndarray, kind: int, size: int) -> np.ndarray:
    """The logits of one object from its map (D, h, h)."""
    first, _, second = made.instance_head
    mean = features.mean((1, 2))
    hidden = np.maximum(first.weight.detach().numpy() @ mean + first.bias.detach().numpy(), 0)
    kappa = second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()
    side = features.shape[1]
    pixels = resized(features, {0: side // 2, 1: side, 2: 2 * side}[kind])
    for layer in made.pixel_head.before:
        pixels = conv3(pixels, layer)
    pixels = conv3(resized(pixels, 2 * pixels.shape[1]), made.pixel_head.after)
    return resized(np.einsum("c,chw->hw", kappa, pixels), size // 4)


@pytest.mark.parametrize(("size", "vit"), [(64, False), (96, True)])
def test_the_network_is_its_formulas(size: int, vit: bool) -> None:
    made = network(vit=vit)
    crops = torch.randn(5, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = [2, 0, 1, 0, 2]
    with torch.no_grad():
        found = made(crops, classes).numpy()
        features = made.backbone(crops)[0 if vit else 2].numpy()
    assert features.shape == (5, 32, size // 16, size // 16)
    assert found.shape == (5, size // 4, size // 4) and found.dtype == np.float32
    for own, kind, logits in zip(features, classes, found, strict=True):
        want = literal(made, own, kind, size)
        assert abs(want).max() > 1e-3
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-6 * abs(want).max())


def test_size_classes_are_half_open() -> None:
    assert AREAS == (1024, 9216)
    assert [size_class(a) for a in (0.5, 1023.999, 1024, 1024.001, 9215.999, 9216, 1e9)] == [0, 0, 1, 1, 1, 2, 2]


def test_the_pixel_head_runs_for_the_classes_that_are_there() -> None:
    made = network()
    seen: list[tuple[int, ...]] = []
    made.pixel_head.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    crops = torch.zeros(4, 3, 64, 64, dtype=torch.float64)
    made(crops, [1, 1, 1, 1])
    assert seen == [(4, 12, 8, 8)]
    seen.clear()
    made(crops, [2, 0, 2, 2])
    assert seen == [(1, 12, 4, 4), (3, 12, 16, 16)]
    seen.clear()
    assert made(crops[:0], []).shape == (0, 16, 16) and seen == []


@pytest.mark.parametrize("vit", [False, True])
def test_gradients_reach_all_that_trains_and_only_that(vit: bool) -> None:
    made = network(vit=vit)
    made(torch.randn(2, 3, 64, 64, dtype=torch.float64), [0, 2]).sum().backward()
    for name, parameter in made.named_parameters():
        unused = name.startswith("backbone.layer4.")
        assert parameter.requires_grad != unused and (parameter.grad is None) == unused, name


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (1, 3, 48, 48), (2, 3, 64, 64)])
def test_other_crops_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="MaskLabeler: crops must have shape"):
        network()(torch.zeros(shape, dtype=torch.float64), [1])


def test_an_encoder_without_a_map_of_stride_16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a map of stride 16, got \(8,\)"):
        MaskLabeler(Vit(VitConfig(patch=8, width=32, depth=1, heads=2)))

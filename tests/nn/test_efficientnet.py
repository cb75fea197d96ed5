"""EfficientNet-Lite against tables of its networks, typed from the public ones, and against a literal implementation, which reads tensors
by the names of efficientnet_pytorch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.nn.efficientnet import EfficientNet, SameConv

KERNELS, EXPANSIONS = (3, 3, 5, 3, 5, 5, 3), (1, 6, 6, 6, 6, 6, 6)  # of the seven groups of blocks
STRIDES = (1, 2, 2, 2, 1, 2, 1)
#: name -> blocks and channels of each group, and the parameters of the network with its classifier of 1000 classes.
NETWORKS = {
    "efficientnet-lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), 4_652_008),
    "efficientnet-lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320), 5_416_680),
    "efficientnet-lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352), 6_092_072),
    "efficientnet-lite3": ((1, 3, 3, 5, 5, 6, 1), (24, 32, 48, 96, 136, 232, 384), 8_197_096),
    "efficientnet-lite4": ((1, 4, 4, 6, 6, 8, 1), (24, 32, 56, 112, 160, 272, 448), 13_006_568),
}


def literal_blocks(name: str) -> list[tuple[int, int, int, int, int]]:
    """Inputs, outputs, kernel, stride and inner channels of every block."""
    counts, channels, _ = NETWORKS[name]
    found, inputs = [], 32
    for count, outputs, kernel, stride, expansion in zip(counts, channels, KERNELS, STRIDES, EXPANSIONS, strict=True):
        for block in range(count):
            found.append((inputs, outputs, kernel, stride if block == 0 else 1, inputs * expansion))
            inputs = outputs
    return found


def package_tensors(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values of all tensors by the names of efficientnet_pytorch, with the head."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def conv(name: str, outputs: int, inputs: int, size: int) -> None:
        scale = math.sqrt(2 / (inputs * size**2))
        tensors[f"{name}.weight"] = scale * torch.randn(outputs, inputs, size, size, generator=generator)

    def norm(name: str, channels: int) -> None:
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            tensors[f"{name}.{part}"] = torch.rand(channels, generator=generator) + low
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(0)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for number, (inputs, outputs, kernel, _, inner) in enumerate(literal_blocks(name)):
        block = f"_blocks.{number}."
        if inner != inputs:
            conv(f"{block}_expand_conv", inner, inputs, 1)
            norm(f"{block}_bn0", inner)
        conv(f"{block}_depthwise_conv", inner, 1, kernel)
        norm(f"{block}_bn1", inner)
        conv(f"{block}_project_conv", outputs, inner, 1)
        norm(f"{block}_bn2", outputs)
    conv("_conv_head", 1280, NETWORKS[name][1][-1], 1)
    norm("_bn1", 1280)
    tensors["_fc.weight"], tensors["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def timm_name(name: str, own: str) -> str:
    """timm's name of a tensor of efficientnet_pytorch."""
    module, _, rest = own.partition(".")
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    if module in outside:
        return f"{outside[module]}.{rest}"
    number, inner, part = rest.split(".")
    group, block = [(g, b) for g, count in enumerate(NETWORKS[name][0]) for b in range(count)][int(number)]
    if group == 0:
        names = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        names = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        names |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{group}.{block}.{names[inner]}.{part}"


def timm_tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    return {timm_name(name, own): tensor for own, tensor in package_tensors(name, seed).items()}


def functional(t: dict[str, Tensor], pixels: Tensor, name: str) -> list[Tensor]:
    """The maps of pictures of 0 to 255, from tensors with the names of efficientnet_pytorch."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        size = t[f"{name}.weight"].shape[-1]
        sides = []  # before and after, along the width and then the height
        for n in (x.shape[3], x.shape[2]):
            total = max((math.ceil(n / stride) - 1) * stride + size - n, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), t[f"{name}.weight"], stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            t[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    x = norm(conv((pixels - 127) / 128, "_conv_stem", 2), "_bn0").clamp(0, 6)
    ends = [sum(NETWORKS[name][0][:groups]) - 1 for groups in (2, 3, 5, 7)]
    maps = []
    for number, (inputs, outputs, _, stride, inner) in enumerate(literal_blocks(name)):
        block, y = f"_blocks.{number}.", x
        if inner != inputs:
            y = norm(conv(y, f"{block}_expand_conv"), f"{block}_bn0").clamp(0, 6)
        y = norm(conv(y, f"{block}_depthwise_conv", stride, inner), f"{block}_bn1").clamp(0, 6)
        y = norm(conv(y, f"{block}_project_conv"), f"{block}_bn2")
        x = x + y if stride == 1 and inputs == outputs else y
        if number in ends:
            maps.append(x)
    return maps


def normalised(pixels: Tensor) -> Tensor:
    """By the colours of ImageNet, as pictures are for every network."""
    mean, std = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


@pytest.mark.parametrize("name", NETWORKS)
def test_has_timms_tensors(name: str) -> None:
    made = EfficientNet(name)
    wanted = {n: tuple(t.shape) for n, t in timm_tensors(name).items()}
    head = {n: s for n, s in wanted.items() if n.startswith(("conv_head.", "bn2.", "classifier."))}
    assert {n: tuple(t.shape) for n, t in made.state_dict().items()} == {
        n: s for n, s in wanted.items() if n not in head
    }
    last = NETWORKS[name][1][-1]
    assert sum(p.numel() for p in made.parameters()) == NETWORKS[name][2] - (last * 1280 + 2 * 1280 + 1281 * 1000)
    assert made.strides == (4, 8, 16, 32)
    assert made.channels == [NETWORKS[name][1][group] for group in (1, 2, 4, 6)]
    norms = [m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


#: cells, kernel, stride -> cells before the map, and cells of the result; TensorFlow's "SAME", by hand
PADDINGS = [
    (1, 3, 2, 1, 1), (2, 3, 2, 0, 1), (5, 3, 2, 1, 3), (6, 3, 2, 0, 3), (1, 5, 2, 2, 1), (2, 5, 2, 1, 1), (6, 5, 2, 1, 3),
    (7, 5, 2, 2, 4), (4, 3, 1, 1, 4), (5, 3, 1, 1, 5), (4, 5, 1, 2, 4), (5, 5, 1, 2, 5), (3, 1, 1, 0, 3),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(a, b) for a in PADDINGS for b in PADDINGS if a[1:3] == b[1:3]])
def test_same_padding_by_loops(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    height, size, stride, top, down = rows
    width, _, _, left, right = columns
    made = SameConv(2, 4, size, stride, groups=2).double()
    x = torch.randn(2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, found = made.weight.detach().numpy(), np.zeros((4, down, right))
    for o in range(4):
        for i in range(down):
            for j in range(right):
                for a in range(size):
                    for b in range(size):
                        row, column = i * stride - top + a, j * stride - left + b
                        if 0 <= row < height and 0 <= column < width:
                            found[o, i, j] += weight[o, 0, a, b] * x[o // 2, row, column].item()
    np.testing.assert_allclose(made(x[None])[0].detach().numpy(), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "size"), [
    ("efficientnet-lite0", (64, 96)), ("efficientnet-lite0", (51, 78)), ("efficientnet-lite2", (37, 64)),
])  # fmt: skip
def test_values(name: str, size: tuple[int, int]) -> None:
    tensors = package_tensors(name, seed=1, dtype=torch.float64)
    made = EfficientNet(name).double().eval()
    made.load_state_dict({n: t for own, t in tensors.items() if (n := timm_name(name, own)) in made.state_dict()})
    pixels = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 255
    with torch.no_grad():
        found, wanted = made(normalised(pixels)), functional(tensors, pixels, name)
        two = made(normalised(pixels), levels=2)
    for stride, channels, map_, want in zip(made.strides, made.channels, found, wanted, strict=True):
        assert map_.shape == (2, channels, *(-(-n // stride) for n in size))
        torch.testing.assert_close(map_, want, rtol=1e-9, atol=1e-9)
    assert len(two) == 2 and all(torch.equal(a, b) for a, b in zip(two, found, strict=False))


@pytest.mark.parametrize("stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(stages: int) -> None:
    made = EfficientNet(frozen_stages=0, train_batchnorm=True)
    made.freeze(stages)
    made.train()
    frozen = ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6"]
    frozen = frozen[: {-1: 0, 0: 2, 1: 4, 2: 5, 3: 7, 4: 9}[stages]]
    for name, parameter in made.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(f"{part}." for part in frozen)), name
    for name, module in made.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.training != f"{name}.".startswith(tuple(f"{part}." for part in frozen)), name
    assert not any(m.training for m in EfficientNet().train().modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"EfficientNet: name must be one of efficientnet-lite0, .* got 'efficientnet-b0'"
    ):
        EfficientNet("efficientnet-b0")
    with pytest.raises(ValueError, match="EfficientNet: frozen_stages must be from -1"):
        EfficientNet(frozen_stages=5)


def test_a_program_for_maps_of_any_size() -> None:
    """The padding of TensorFlow depends on the size; a program still takes all multiples of 32."""
    made, dim = torch.nn.Sequential(SameConv(3, 4, 3, 2), SameConv(4, 4, 5, 2, groups=4)), torch.export.Dim
    sizes = {0: dim("b", min=1, max=8), 2: 32 * dim("h", min=1, max=64), 3: 32 * dim("w", min=1, max=64)}
    program = torch.export.export(made, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,))
    images = torch.randn(3, 3, 96, 64)
    torch.testing.assert_close(program.module()(images), made(images))

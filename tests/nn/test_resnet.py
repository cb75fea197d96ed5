"""ResNet against hand-written tables of torchvision's networks and a small functional implementation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_deform_conv import deformable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sprompt.nn.deform_conv import Offsets
from sprompt.nn.resnet import ResNet

COUNTS = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160}  # torchvision's, without fc
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


#: timm's resnet50d without fc, and with offset convolutions of 18 channels: 497 826 parameters.
COUNTS_D = {"d": 23_527_264, "d-dcn": 24_025_090}


def expected(depth: int, width: int = 64, variant: str = "plain") -> dict[str, tuple[int, ...]]:
    """Every tensor of the network by name, from the descriptions in the papers (He et al. 2016, Table 1; He et al. 2019, Figure 2)."""

    def conv(name: str, outputs: int, inputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes: dict[str, tuple[int, ...]] = {}
    if variant == "plain":
        conv("conv1", width, 3, 7)
    else:
        for place, outputs, inputs in ((0, width // 2, 3), (3, width // 2, width // 2), (6, width, width // 2)):
            conv(f"conv1.{place}", outputs, inputs, 3)
            if place < 6:
                norm(f"conv1.{place + 1}", outputs)
    norm("bn1", width)
    inputs = width
    for layer, count in enumerate(BLOCKS[depth]):
        planes = width * 2**layer
        for i in range(count):
            name = f"layer{layer + 1}.{i}"
            if depth >= 50:
                sizes, outputs = ((planes, inputs, 1), (planes, planes, 3), (4 * planes, planes, 1)), 4 * planes
            else:
                sizes, outputs = ((planes, inputs, 3), (planes, planes, 3)), planes
            for number, (to, of, size) in enumerate(sizes, start=1):
                conv(f"{name}.conv{number}", to, of, size)
                norm(f"{name}.bn{number}", to)
            if variant == "d-dcn" and layer >= 2:
                conv(f"{name}.conv2_offset", 18, planes, 3)
                shapes[f"{name}.conv2_offset.bias"] = (18,)
            if i == 0 and inputs != outputs:
                place = 0 if variant == "plain" else 1
                conv(f"{name}.downsample.{place}", outputs, inputs, 1)
                norm(f"{name}.downsample.{place + 1}", outputs)
            inputs = outputs
    return shapes


def functional(t: dict[str, Tensor], images: Tensor, depth: int) -> list[Tensor]:
    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            t[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def conv(x: Tensor, name: str, stride: int) -> Tensor:
        weight = t[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=(weight.shape[-1] - 1) // 2)

    if "conv1.0.weight" in t:
        x = norm(conv(images, "conv1.0", 2), "conv1.1").clamp(min=0)
        x = norm(conv(x, "conv1.3", 1), "conv1.4").clamp(min=0)
        x = norm(conv(x, "conv1.6", 1), "bn1").clamp(min=0)
    else:
        x = norm(conv(images, "conv1", 2), "bn1").clamp(min=0)

    def middle(x: Tensor, name: str, stride: int) -> Tensor:
        if f"{name}_offset.weight" not in t:
            return conv(x, name, stride)
        offsets = conv(x, f"{name}_offset", stride) + t[f"{name}_offset.bias"][:, None, None]
        return deformable(x, offsets, t[f"{name}.weight"], stride)

    x = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    maps = []
    for layer, count in enumerate(BLOCKS[depth], start=1):
        for i in range(count):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            strides = (1, stride, 1) if depth >= 50 else (stride, 1)
            y = x
            for number, s in enumerate(strides, start=1):
                y = norm(middle(y, f"{name}.conv{number}", s), f"{name}.bn{number}")
                y = y.clamp(min=0) if number < len(strides) else y
            if f"{name}.downsample.0.weight" in t:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            if f"{name}.downsample.2.weight" in t:
                x = norm(conv(means(x) if stride == 2 else x, f"{name}.downsample.1", 1), f"{name}.downsample.2")
            x = (x + y).clamp(min=0)
        maps.append(x)
    return maps


def means(x: Tensor) -> Tensor:
    """Of 2×2 cells; of those that are there, at the end of an odd side."""
    height, width = x.shape[2:]
    rows = [x[:, :, i : i + 2] for i in range(0, height, 2)]
    return torch.stack(
        [torch.stack([row[..., j : j + 2].mean((2, 3)) for j in range(0, width, 2)], -1) for row in rows], 2
    )


def randomised(depth: int, **options: object) -> ResNet:
    """A float64 network with random statistics and weights of batch norm, and offsets of up to some cells."""
    torch.manual_seed(0)
    network = ResNet(depth, **options).double()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
        if isinstance(module, Offsets):
            torch.nn.init.normal_(module.weight, std=0.1)
            torch.nn.init.normal_(module.bias)
    return network


@pytest.mark.parametrize("depth", COUNTS)
def test_has_torchvisions_tensors(depth):
    with torch.device("meta"):
        network = ResNet(depth)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected(depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[depth]


@pytest.mark.parametrize("variant", COUNTS_D)
def test_variants_have_timms_tensors(variant):
    with torch.device("meta"):
        network = ResNet(50, variant=variant)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected(50, variant=variant)
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS_D[variant]


def test_names_of_resnet_50_d_written_out():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in ResNet(50, variant="d-dcn").state_dict().items()}
    assert len(shapes) == 318 + 12 + 18
    assert shapes["conv1.0.weight"] == (32, 3, 3, 3)
    assert shapes["conv1.4.running_var"] == (32,)
    assert shapes["conv1.6.weight"] == (64, 32, 3, 3)
    assert shapes["bn1.weight"] == (64,)
    assert shapes["layer1.0.downsample.1.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.downsample.2.num_batches_tracked"] == ()
    assert shapes["layer3.5.conv2_offset.weight"] == (18, 256, 3, 3)
    assert shapes["layer4.0.conv2_offset.bias"] == (18,)
    assert shapes["layer4.0.conv2.weight"] == (512, 512, 3, 3)


def test_names_of_resnet_50_written_out():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in ResNet(50).state_dict().items()}
    assert len(shapes) == 318
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer1.0.downsample.1.running_var"] == (256,)
    assert shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer3.5.bn3.num_batches_tracked"] == ()
    assert shapes["layer4.2.conv1.weight"] == (512, 2048, 1, 1)


@pytest.mark.parametrize(
    ("depth", "width", "variant"),
    [
        (18, 8, "plain"),
        (34, 4, "plain"),
        (50, 4, "plain"),
        (101, 4, "plain"),
        (18, 8, "d"),
        (50, 4, "d"),
        (50, 4, "d-dcn"),
    ],
)
def test_values(depth, width, variant):
    network = randomised(depth, width=width, variant=variant)
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == expected(depth, width, variant)
    images = torch.randn(2, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        maps = network(images)
        for got, want in zip(maps, functional(network.state_dict(), images, depth), strict=True):
            torch.testing.assert_close(got, want)
    assert (
        [m.shape[1] for m in maps] == network.channels == [width * s * (4 if depth >= 50 else 1) for s in (1, 2, 4, 8)]
    )
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in network.strides]
    channels_last = network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        again = channels_last(images.contiguous(memory_format=torch.channels_last))
    assert again[-1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again, maps, check_stride=False)


def test_gradients_of_deformable_convolutions():
    """Of all parameters, and of images of an odd size."""
    network = randomised(50, width=4, variant="d-dcn", frozen_stages=-1)
    images = torch.randn(2, 3, 77, 50, dtype=torch.double, requires_grad=True)
    parameters = dict(network.named_parameters())
    sum(m.sin().sum() for m in network(images)).backward()
    own = {"images": images.grad, **{name: p.grad for name, p in parameters.items()}}
    tensors = {n: t.detach().clone().requires_grad_(n in parameters) for n, t in network.state_dict().items()}
    images = images.detach().requires_grad_()
    sum(m.sin().sum() for m in functional(tensors, images, 50)).backward()
    wanted = {"images": images.grad, **{name: tensors[name].grad for name in parameters}}
    assert own["layer3.0.conv2_offset.weight"].abs().max() > 0
    for name, gradient in own.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-9 * wanted[name].abs().max().clamp(min=1), name


class Convolutions(TorchDispatchMode):
    """Records (input channels, side of the kernel, stride) of every convolution."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten.convolution.default:
            _, weight, _, stride, *_ = args
            self.seen.append((weight.shape[1], weight.shape[2], stride[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [1, 4, 6, 8, 12, 16])
def test_gradients_of_narrow_networks(width):
    """They equal float64's in both layouts, and oneDNN never gets a convolution that it computes wrongly."""
    torch.manual_seed(width)
    network = ResNet(18, width=width, frozen_stages=-1)
    images = torch.randn(3, 3, 32, 32)

    def gradients(images, network):
        network.zero_grad()
        sum(m.sum() for m in network(images)).backward()
        return [p.grad.double() for p in network.parameters()]

    with torch.no_grad(), Convolutions() as convolutions:
        network(images)
    assert len(convolutions.seen) == 20
    assert not [seen for seen in convolutions.seen if seen[0] < 16 and seen[1:] == (1, 2)]
    wanted = gradients(images.double(), copy.deepcopy(network).double())
    for layout in (torch.contiguous_format, torch.channels_last):
        got = gradients(images.contiguous(memory_format=layout), network.to(memory_format=layout))
        for (name, _), a, b in zip(network.named_parameters(), got, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1), (layout, name)


@pytest.mark.parametrize("stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(stages):
    network = ResNet(18, width=4, frozen_stages=stages, train_batchnorm=True).train()
    order = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for name, parameter in network.named_parameters():
        place = order.index(name.split(".")[0].replace("bn1", "conv1"))
        assert parameter.requires_grad == (place > stages), name
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            place = order.index(name.split(".")[0].replace("bn1", "conv1"))
            assert module.training == (place > stages), name


def test_batchnorm_is_frozen_unless_asked():
    images = torch.randn(2, 3, 32, 32)
    for trained in (False, True):
        network = ResNet(18, width=4, frozen_stages=-1, train_batchnorm=trained)
        assert any(m.training for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)) == trained
        before = network.bn1.running_mean.clone()
        network.train()(images)
        assert torch.equal(network.bn1.running_mean, before) != trained
        before = network.bn1.running_mean.clone()
        network.eval()(images)
        assert torch.equal(network.bn1.running_mean, before)


@pytest.mark.parametrize(
    "options",
    [{"depth": 20}, {"width": 0}, {"frozen_stages": 5}, {"frozen_stages": -2}, {"variant": "c"}, {"variant": "d-dcn", "depth": 34},
     {"width": 1, "variant": "d"}],
)  # fmt: skip
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=rf"ResNet: {next(iter(options))} must"):
        ResNet(**options)

"""ResNet-18, 34, 50 and 101 without the classifier: an image to its maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from sprompt.nn.deform_conv import DeformConv, Offsets
from sprompt.nn.stages import Staged, laid_out

Variant = Literal["plain", "d", "d-dcn"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, pooled: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inputs, planes, stride, pooled)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut; the 3×3 one takes the stride."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, pooled: bool) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, pooled)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self._middle(x)))
        return relu(self.bn3(self.conv3(x)) + shortcut)

    def _middle(self, x: Tensor) -> Tensor:
        return self.conv2(x)


class DeformableBottleneck(Bottleneck):
    """A `Bottleneck` whose 3×3 convolution is deformable."""

    def __init__(self, inputs: int, planes: int, stride: int, pooled: bool) -> None:
        super().__init__(inputs, planes, stride, pooled)
        self.conv2_offset = Offsets(planes, stride)
        self.conv2 = DeformConv(planes, planes, stride)

    def _middle(self, x: Tensor) -> Tensor:
        return self.conv2(x, self.conv2_offset(x))


Block = type[BasicBlock] | type[Bottleneck]

#: depth -> the block, and the number of blocks of each layer
DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(Staged):
    """Images (B, 3, H, W), normalised -> [C2, C3, C4, C5], each after its ReLU. Tensors have torchvision's names, those of the variants
    timm's.

    Args:
        depth: 18, 34, 50 or 101.
        width: channels of the stem; every other width is a multiple of it. 64 is the normal network.
        variant: "d" is ResNet-D: three 3×3 convolutions at the start instead of one of 7×7, and in a shortcut the mean of 2×2 cells
            instead of a stride. "d-dcn" has deformable 3×3 convolutions too, in all blocks of layer3 and layer4.
        frozen_stages, train_batchnorm: see `Staged`.
    """

    def __init__(
        self, depth: int = 50, *, width: int = 64, variant: Variant = "plain", frozen_stages: int = 1,
        train_batchnorm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"ResNet: depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        if variant not in get_args(Variant):
            raise ValueError(f"ResNet: variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
        if width < (least := 1 if variant == "plain" else 2):
            raise ValueError(f"ResNet: width must be at least {least}, got {width}; 64 is the normal network")
        block, counts = DEPTHS[depth]
        if variant == "d-dcn" and block is not Bottleneck:
            raise ValueError(
                f"ResNet: variant must be plain or d at depth {depth}, got d-dcn; take a depth of 50 or 101"
            )
        self.depth, self.width, self.variant, self.train_batchnorm = depth, width, variant, train_batchnorm
        self.channels = [width * scale * block.expansion for scale in (1, 2, 4, 8)]

        self.conv1 = _conv(3, width, 7, stride=2) if variant == "plain" else _deep_stem(width)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for layer, (count, outputs) in enumerate(zip(counts, self.channels, strict=True), start=1):
            if variant == "d-dcn" and layer == 3:
                block = DeformableBottleneck
            planes, pooled = outputs // block.expansion, variant != "plain"
            blocks = [block(inputs, planes, 1 if layer == 1 else 2, pooled)]
            blocks += [block(outputs, planes, 1, pooled) for _ in range(count - 1)]
            setattr(self, f"layer{layer}", nn.Sequential(*blocks))
            inputs = outputs

        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not isinstance(module, Offsets):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.freeze(frozen_stages)

    def forward(self, images: Tensor, levels: int = 4) -> list[Tensor]:
        """The first `levels` maps; the layers behind them do not run."""
        x = self.maxpool(relu(self.bn1(self.conv1(laid_out(images)))))
        maps = []
        for layer in self._layers()[:levels]:
            x = layer(x)
            maps.append(x)
        return maps

    def parts(self) -> list[list[nn.Module]]:
        return [[self.conv1, self.bn1], *([layer] for layer in self._layers())]

    def _layers(self) -> list[nn.Module]:
        return [cast(nn.Module, getattr(self, f"layer{number}")) for number in (1, 2, 3, 4)]


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


def _deep_stem(width: int) -> nn.Module:
    """Three 3×3 convolutions, the last without its norm."""
    half = width // 2
    return nn.Sequential(
        _conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, width, 3),
    )  # fmt: skip


def _shortcut(inputs: int, outputs: int, stride: int, pooled: bool) -> nn.Module | None:
    """A 1×1 projection where the shape changes, otherwise nothing. `pooled`: it has no stride, but means of cells as its input."""
    if inputs == outputs and stride == 1:
        return None
    if not pooled:
        return nn.Sequential(_Projection(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, _conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))


class _Projection(nn.Conv2d):
    """A 1×1 convolution that avoids a bug of oneDNN for fewer than 16 channels.

    With a stride, channels last and fewer channels than a vector register holds (16 at most), oneDNN's gradient of the weights
    writes past its workspace (uxlfoundation/oneDNN#6035). For so few channels this layer slices the input by the stride, and
    then convolves without a stride.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 16:
            return super().forward(x)
        down, right = self.stride
        return conv2d(x[:, :, ::down, ::right], self.weight)

"""EfficientNet-Lite 0 to 4 without the head: an image to its maps of strides 4, 8, 16 and 32."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import relu6

from sprompt.nn.stages import Staged, laid_out
from sprompt.normalisation import MEAN, STD

Name = Literal[
    "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "efficientnet-lite3", "efficientnet-lite4"
]
#: name -> factors on the channels and on the number of blocks. The channels of the stem stay, and so do the blocks of the first and the
#: last group.
SCALES: dict[Name, tuple[float, float]] = {
    "efficientnet-lite0": (1.0, 1.0),
    "efficientnet-lite1": (1.0, 1.1),
    "efficientnet-lite2": (1.1, 1.2),
    "efficientnet-lite3": (1.2, 1.4),
    "efficientnet-lite4": (1.4, 1.8),
}
STEM = 32  # channels


class Group(NamedTuple):
    """Blocks of one width, one after the other; the first of them takes the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_LITE0 = (
    Group(1, 3, 1, 1, 16), Group(2, 3, 2, 6, 24), Group(2, 5, 2, 6, 40), Group(3, 3, 2, 6, 80), Group(3, 5, 1, 6, 112),
    Group(4, 5, 2, 6, 192), Group(1, 3, 1, 6, 320),
)  # fmt: skip
_STAGES = ((0, 1), (2,), (3, 4), (5, 6))  # the groups of each stage


def groups(name: Name) -> list[Group]:
    """The groups of blocks of a network."""
    width, depth = SCALES[name]
    last = len(_LITE0) - 1
    return [
        group._replace(
            blocks=group.blocks if place in (0, last) else math.ceil(group.blocks * depth),
            channels=_channels(group.channels * width),
        )
        for place, group in enumerate(_LITE0)
    ]


def _channels(wanted: float) -> int:
    """The multiple of 8 next to a number of channels, and at least nine tenths of it."""
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: n cells become n / stride, rounded up. Where the padding is odd, its larger half is on the
    right and below."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        # the two halves are equal without a stride
        super().__init__(inputs, outputs, size, stride, size // 2 if stride == 1 else 0, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            down, right = (size - 1 - (n - 1) % stride for n in x.shape[-2:])
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(x)


class SeparableBlock(nn.Module):
    """A depthwise convolution, and a 1×1 convolution that is linear."""

    def __init__(self, inputs: int, outputs: int, group: Group, stride: int) -> None:
        super().__init__()
        self.conv_dw = SameConv(inputs, inputs, group.kernel, stride, groups=inputs)
        self.bn1 = _norm(inputs)
        self.conv_pw = SameConv(inputs, outputs, 1)
        self.bn2 = _norm(outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv_pw(relu6(self.bn1(self.conv_dw(x)))))
        return out + x if self.shortcut else out


class InvertedBlock(nn.Module):
    """A 1×1 convolution to more channels, a depthwise convolution, and a 1×1 convolution that is linear."""

    def __init__(self, inputs: int, outputs: int, group: Group, stride: int) -> None:
        super().__init__()
        inner = inputs * group.expansion
        self.conv_pw = SameConv(inputs, inner, 1)
        self.bn1 = _norm(inner)
        self.conv_dw = SameConv(inner, inner, group.kernel, stride, groups=inner)
        self.bn2 = _norm(inner)
        self.conv_pwl = SameConv(inner, outputs, 1)
        self.bn3 = _norm(outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = relu6(self.bn1(self.conv_pw(x)))
        out = self.bn3(self.conv_pwl(relu6(self.bn2(self.conv_dw(out)))))
        return out + x if self.shortcut else out


class EfficientNet(Staged):
    """Images (B, 3, H, W), normalised -> [C2, C3, C4, C5], the outputs of the last blocks of these strides, which are linear. Tensors have
    timm's names.

    The network was trained on pictures of other colours, (pixel - mean) / std. It converts its input, which has the normalisation of all
    networks here.

    Args:
        name: the network, one of `SCALES`.
        frozen_stages, train_batchnorm: see `Staged`.
    """

    mean, std = 127.0, 128.0

    def __init__(
        self, name: Name = "efficientnet-lite0", *, frozen_stages: int = 1, train_batchnorm: bool = False
    ) -> None:
        super().__init__()
        if name not in SCALES:
            raise ValueError(f"EfficientNet: name must be one of {', '.join(SCALES)}, got {name!r}")
        self.name, self.train_batchnorm = name, train_batchnorm
        self.conv_stem = SameConv(3, STEM, 3, stride=2)
        self.bn1 = _norm(STEM)
        inputs = STEM
        self.blocks = nn.ModuleList()
        for group in groups(name):
            kind = SeparableBlock if group.expansion == 1 else InvertedBlock
            blocks = [kind(inputs, group.channels, group, group.stride)]
            blocks += [kind(group.channels, group.channels, group, 1) for _ in range(group.blocks - 1)]
            self.blocks.append(nn.Sequential(*blocks))
            inputs = group.channels
        self.channels = [groups(name)[places[-1]].channels for places in _STAGES]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        self.freeze(frozen_stages)

    def forward(self, images: Tensor, levels: int = 4) -> list[Tensor]:
        """The first `levels` maps; the blocks behind them do not run."""
        x = relu6(self.bn1(self.conv_stem(laid_out(self._converted(images)))))
        maps = []
        for stage in self.parts()[1 : levels + 1]:
            for group in stage:
                x = group(x)
            maps.append(x)
        return maps

    def parts(self) -> list[list[nn.Module]]:
        return [[self.conv_stem, self.bn1], *([self.blocks[place] for place in places] for places in _STAGES)]

    def _converted(self, images: Tensor) -> Tensor:
        # numbers of Python, because a tensor of them would be sent to the device in every pass
        factors = [(std / self.std, (mean - self.mean) / self.std) for mean, std in zip(MEAN, STD, strict=True)]
        return torch.stack([images[:, c] * factor + shift for c, (factor, shift) in enumerate(factors)], 1)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)

"""The box head and the mask head of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sprompt.models.queryinst.boxes import refined
from sprompt.nn.conv import full_precision
from sprompt.nn.dynamic_interaction import DynamicInteraction
from sprompt.nn.query_layers import RARE, FeedForward, SelfAttention, branch
from sprompt.ops import roi_align

BOX_CELLS, MASK_CELLS = 7, 14  # cells of a box in each direction that a head reads
MASK_SIDE = 2 * MASK_CELLS  # of a mask's logits
_CONVOLUTIONS = 4  # of a mask head, before the upsampling


class Stage(NamedTuple):
    """What a box head makes of its queries."""

    attended: Tensor  # (B, N, C): the queries after they attended to each other; the mask head reads boxes with them
    queries: Tensor  # (B, N, C), for the next stage
    classes: Tensor  # (B, N, K) logits
    boxes: Tensor  # (B, N, 4), refined


class BoxHead(nn.Module):
    """Queries and their boxes -> new queries, classes and boxes."""

    def __init__(self, channels: int, heads: int, dynamic: int, feedforward: int, num_classes: int) -> None:
        super().__init__()
        self.attention = SelfAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.instance_interactive_conv = DynamicInteraction(channels, dynamic, BOX_CELLS**2)
        self.instance_interactive_conv_norm = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, feedforward)
        self.ffn_norm = nn.LayerNorm(channels)
        self.cls_fcs = branch(channels)
        self.fc_cls = nn.Linear(channels, num_classes)
        self.reg_fcs = branch(channels, 3)
        self.fc_reg = nn.Linear(channels, 4)
        _xavier(self)
        nn.init.constant_(self.fc_cls.bias, RARE)

    def reset_classifier(self, num_classes: int) -> None:
        like = self.fc_reg.weight
        self.fc_cls = nn.Linear(like.shape[1], num_classes, device=like.device, dtype=like.dtype)
        _xavier(self.fc_cls)
        nn.init.constant_(self.fc_cls.bias, RARE)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor, queries: Tensor) -> Stage:
        attended = self.attention_norm(self.attention(queries))
        regions = roi_align(maps, boxes.detach(), BOX_CELLS)
        read = self.instance_interactive_conv(regions.flatten(0, 1), attended.flatten(0, 1)).view_as(attended)
        queries = self.ffn_norm(self.ffn(self.instance_interactive_conv_norm(attended + read)))
        deltas = full_precision(self.fc_reg(self.reg_fcs(queries)))
        return Stage(attended, queries, self.fc_cls(self.cls_fcs(queries)), refined(boxes, deltas))


class BatchNormOfReal(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the samples marked as real. It computes in float32 under autocast too.

    The mask heads of a batch may get no sample or one. One object says little about the others, so with fewer than two samples
    training uses the running statistics and leaves them as they are. Nothing waits for the number of marked samples.
    """

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """x: (M, C, h, w). real: bool (M,), for training; the values of other samples have no meaning. None means all."""
        if real is None and self.training and len(x) >= 2:
            return super().forward(x)  # sums in float32 too
        wide = full_precision(x)
        if real is not None and self.training:
            return self._marked(wide, real).to(x.dtype)
        factor, bias = self.of_running()
        return (wide * factor[:, None, None] + bias[:, None, None]).to(x.dtype)

    def of_running(self) -> tuple[Tensor, Tensor]:
        """Factors (C,) and biases (C,): the norm by the running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        # A copy, because a batch that follows before the backward pass may change the statistics.
        return factor, self.bias - self.running_mean.clone() * factor

    def _marked(self, x: Tensor, real: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        number = real.sum()
        enough, weight = number >= 2, real.to(x.dtype)[:, None, None, None]
        cells = (number * x.shape[2] * x.shape[3]).clamp(min=1)
        mean = (x * weight).sum((0, 2, 3)) / cells
        variance = ((x - mean[:, None, None]).square() * weight).sum((0, 2, 3)) / cells
        with torch.no_grad():
            share = enough.to(mean.dtype) * self.momentum
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (variance * cells / (cells - 1).clamp(min=1) - self.running_var)
            self.num_batches_tracked += enough
        mean = torch.where(enough, mean, self.running_mean)
        variance = torch.where(enough, variance, self.running_var)
        factor = self.weight * (variance + self.eps).rsqrt()
        return (x - mean[:, None, None]) * factor[:, None, None] + self.bias[:, None, None]


class ConvBN(nn.Module):
    """A 3×3 convolution with bias, batch norm and a ReLU. Outside of training the norm is a part of the convolution's weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = BatchNormOfReal(channels)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if self.training:
            return F.relu(self.bn(self.conv(x), real), inplace=True)
        factor, bias = self.bn.of_running()
        assert self.conv.bias is not None
        weight = self.conv.weight * factor[:, None, None, None]
        return F.relu(F.conv2d(x, weight, self.conv.bias * factor + bias, padding=1), inplace=True)


class MaskHead(nn.Module):
    """The features of boxes and their queries -> mask logits of the wanted classes."""

    def __init__(self, channels: int, dynamic: int, num_classes: int) -> None:
        super().__init__()
        self.instance_interactive_conv = DynamicInteraction(channels, dynamic)
        self.convs = nn.ModuleList(ConvBN(channels) for _ in range(_CONVOLUTIONS))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        _xavier(self)
        nn.init.zeros_(self.conv_logits.bias)  # type: ignore[arg-type]  # it has a bias

    def reset_classifier(self, num_classes: int) -> None:
        like = self.conv_logits.weight
        self.conv_logits = nn.Conv2d(like.shape[1], num_classes, 1, device=like.device, dtype=like.dtype)
        _xavier(self.conv_logits)
        nn.init.zeros_(self.conv_logits.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, regions: Tensor, queries: Tensor, classes: Tensor, real: Tensor | None = None) -> Tensor:
        """The last convolution is 1×1: a class is a row of its weights. The rows of the wanted classes are gathered, and each box is
        multiplied with its own rows, so logits exist for no other class.

        Args:
            regions: (M, C, 14, 14). queries: (M, C), attended.
            classes: int64 (M, k).
            real: bool (M,), in training: the boxes that count for batch norm; None means all.

        Returns: (M, k, 28, 28).
        """
        x = self.instance_interactive_conv(regions, queries).mT.unflatten(2, regions.shape[2:])
        for convolution in self.convs:
            x = convolution(x, real)
        x = F.relu(self.upsample(x), inplace=True)
        weight, bias = self.conv_logits.weight.flatten(1)[classes], self.conv_logits.bias
        assert bias is not None
        # Cells come first, so that the gradient has the layout of x: channels last.
        logits = torch.baddbmm(bias[classes][:, None], x.flatten(2).mT, weight.mT)
        return logits.mT.unflatten(2, x.shape[2:])


def _xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)

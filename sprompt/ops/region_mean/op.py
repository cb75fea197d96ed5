"""The declarations of region_mean and mask_mean."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


def lanes(features: Tensor) -> Tensor:
    """The map with stride 1 along rows or along channels, as the kernels read it. NCHW, NHWC and their slices are not
    copied."""
    _, channel, row, column = features.stride()
    along_x = column == 1 and row >= features.shape[3]
    return features if along_x or channel == 1 else features.contiguous()


def wide_boxes(boxes: Tensor) -> Tensor:
    """The boxes as float32, float64 or int64. These dtypes hold the values of all other dtypes."""
    if boxes.dtype in (torch.float32, torch.float64, torch.int64):
        return boxes
    return boxes.to(torch.float32 if boxes.is_floating_point() else torch.int64)


def check_boxes(boxes: Tensor, counts: Tensor | None) -> None:
    """Checks that real boxes are finite. It reads values, so it checks only on a CPU."""
    if not boxes.is_cpu or not boxes.is_floating_point():
        return
    bad = ~boxes.isfinite().all(-1)
    if counts is not None:
        bad &= torch.arange(boxes.shape[1]) < counts[:, None]
    if bool(bad.any()):
        b, l = bad.nonzero()[0].tolist()
        found, advice = f"{boxes[b, l].tolist()} at [{b}, {l}]", "leave such boxes out, or move them behind counts"
        checks.bad_value("region_mean", "boxes", "be finite", found, advice)


@op("triton", computes=("features",))  # float64 boxes are read as they are
def region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    return new(features, *boxes.shape[:2], features.shape[1])


@op("triton")
def mask_mean(features: Tensor, words: Tensor) -> Tensor:
    return new(features, *words.shape[:2], features.shape[1])


region_mean.values(lambda a: checks.counts_within("region_mean", a.counts, a.boxes.shape[1]))


@region_mean.native
def _(a: Args, out: Tensor) -> None:
    boxes = wide_boxes(a.boxes).contiguous()
    if native._C.region_mean(lanes(a.features), boxes, a.counts, out, native.threads()) >= 0:
        check_boxes(a.boxes, a.counts)


@mask_mean.native
def _(a: Args, out: Tensor) -> None:
    native._C.mask_mean(lanes(a.features), a.words.contiguous(), out, native.threads())


@region_mean.saves
@mask_mean.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(*a[1:])
    ctx.size = a.features.shape[2:]


@op("triton", computes=("grad",))
def region_mean_backward(grad: Tensor, boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    return new(grad, grad.shape[0], grad.shape[2], height, width)


@op("triton")
def mask_mean_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return new(grad, grad.shape[0], grad.shape[2], height, width)


region_mean.backward(lambda ctx, _, grad: region_mean_backward(grad, *ctx.saved_tensors, *ctx.size))
mask_mean.backward(lambda ctx, _, grad: mask_mean_backward(grad, *ctx.saved_tensors, *ctx.size))


@region_mean_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.region_mean_backward(a.grad, wide_boxes(a.boxes).contiguous(), a.counts, out, native.threads())


@mask_mean_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.mask_mean_backward(a.grad, a.words.contiguous(), out, native.threads())

"""The declarations of region_mean and mask_mean."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


def _lanes(features: Tensor) -> Tensor:
    """A map whose rows or whose channels lie together, as the kernels read it: no copy of NCHW, of NHWC and of their slices."""
    along_x = features.stride(3) == 1 and features.stride(2) >= features.shape[3]
    return features if along_x or features.stride(1) == 1 else features.contiguous()


def _boxes(boxes: Tensor) -> Tensor:
    if boxes.dtype not in (torch.float32, torch.float64, torch.int64):
        boxes = boxes.to(torch.float32 if boxes.is_floating_point() else torch.int64)
    return boxes.contiguous()


def _runs(shapes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scratch, runs and heads of csrc/region_mean/region_mean.h, of boxes or masks (B, L, ...) on a map."""
    batch, length = shapes.shape[:2]
    runs = native.scratch(batch, length, size[0] * ((size[1] + 3) // 4), dtype=torch.int64)
    return runs, native.scratch(batch, length, 3, dtype=torch.int64, slot=1)


def _sums(out: Tensor) -> Tensor | None:
    """Scratch for float32 sums of results in half types; float32 results are summed where they stand."""
    return None if out.dtype == torch.float32 else native.scratch(native.threads(), 4 * out.shape[2] * out.shape[3])


def check_boxes(boxes: Tensor, counts: Tensor | None) -> None:
    """Real boxes are finite. Reads values: on a CPU only."""
    if boxes.device.type != "cpu" or not boxes.is_floating_point():
        return
    bad = ~boxes.isfinite().all(-1)
    if counts is not None:
        bad &= torch.arange(boxes.shape[1]) < counts[:, None]
    if bool(bad.any()):
        b, l = bad.nonzero()[0].tolist()
        advice = "leave such boxes out, or behind counts"
        checks.bad_value("region_mean", "boxes", "be finite", f"{boxes[b, l].tolist()} at [{b}, {l}]", advice)


# -- region_mean; float64 boxes are read as they are


@op("triton", computes=("features",))
def region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    return new(features, boxes.shape[0], boxes.shape[1], features.shape[1])


@region_mean.values
def _(a: Args) -> None:
    checks.counts_within("region_mean", a.counts, a.boxes.shape[1])


@region_mean.native
def _(a: Args, out: Tensor) -> None:
    problem = native.scratch(1, dtype=torch.int64, slot=2)
    runs, heads = _runs(a.boxes, a.features.shape[2:])
    native._C.region_mean(_lanes(a.features), _boxes(a.boxes), a.counts, runs, heads, problem, out, native.threads())
    if problem.item():
        check_boxes(a.boxes, a.counts)


@region_mean.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(a.boxes, a.counts)
    ctx.size = a.features.shape[2:]


@region_mean.backward
def _(ctx: Any, needs: Args, grad: Tensor) -> dict[str, Tensor]:
    return {"features": region_mean_backward(grad, *ctx.saved_tensors, *ctx.size)} if needs.features else {}


@op("triton", computes=("grad",))
def region_mean_backward(grad: Tensor, boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    return new(grad, grad.shape[0], grad.shape[2], height, width)


@region_mean_backward.native
def _(a: Args, out: Tensor) -> None:
    runs, heads = _runs(a.boxes, out.shape[2:])
    native._C.region_mean_backward(a.grad, _boxes(a.boxes), a.counts, runs, heads, _sums(out), out, native.threads())


# -- mask_mean


@op("triton")
def mask_mean(features: Tensor, words: Tensor) -> Tensor:
    return new(features, words.shape[0], words.shape[1], features.shape[1])


@mask_mean.native
def _(a: Args, out: Tensor) -> None:
    runs, heads = _runs(a.words, a.features.shape[2:])
    native._C.mask_mean(_lanes(a.features), a.words.contiguous(), runs, heads, out, native.threads())


@mask_mean.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(a.words)
    ctx.size = a.features.shape[2:]


@mask_mean.backward
def _(ctx: Any, needs: Args, grad: Tensor) -> dict[str, Tensor]:
    return {"features": mask_mean_backward(grad, *ctx.saved_tensors, *ctx.size)} if needs.features else {}


@op("triton")
def mask_mean_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return new(grad, grad.shape[0], grad.shape[2], height, width)


@mask_mean_backward.native
def _(a: Args, out: Tensor) -> None:
    runs, heads = _runs(a.words, out.shape[2:])
    native._C.mask_mean_backward(a.grad, a.words.contiguous(), runs, heads, _sums(out), out, native.threads())

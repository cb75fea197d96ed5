"""The declaration of roi_align."""

import functools
from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op
from sprompt.ops.region_mean.op import lanes


@op("cuda")
def roi_align(
    maps: list[Tensor], boxes: Tensor, counts: Tensor | None, size: int, sampling: int, strides: list[int]
) -> Tensor:
    B, N, _ = boxes.shape
    return new(maps[0], B, N, maps[0].shape[1], size, size)


@functools.lru_cache(64)
def table(strides: tuple[int, ...]) -> Tensor:
    """The strides as the kernels read them, (V,)."""
    return torch.tensor(strides, dtype=torch.int64, device="cpu")


@roi_align.native
def _(a: Args, out: Tensor) -> None:
    maps = [lanes(level) for level in a.maps]
    native._C.roi_align(
        maps, a.boxes.contiguous(), a.counts, table(tuple(a.strides)), a.sampling, out, native.threads()
    )


roi_align.values(lambda a: checks.counts_within("roi_align", a.counts, a.boxes.shape[1]))


@roi_align.saves
def _(ctx: Any, a: Args, out: Tensor) -> None:
    ctx.save_for_backward(a.boxes, a.counts)
    ctx.numbers = a.sampling, [int(n) for level in a.maps for n in level.shape[2:]], a.strides


@op("cuda")
def roi_align_backward(
    grad: Tensor, boxes: Tensor, counts: Tensor | None, sampling: int, sizes: list[int], strides: list[int]
) -> list[Tensor]:
    """The gradients of the maps. `sizes` holds h, w of every map, one after the other."""
    B, _, C = grad.shape[:3]
    return [new(grad, B, C, h, w) for h, w in zip(sizes[::2], sizes[1::2], strict=True)]


roi_align.backward(lambda ctx, _, grad: (roi_align_backward(grad, *ctx.saved_tensors, *ctx.numbers),))


@roi_align_backward.native
def _(a: Args, out: list[Tensor]) -> None:
    native._C.roi_align_backward(
        a.grad.contiguous(), a.boxes.contiguous(), a.counts, table(tuple(a.strides)), a.sampling, out, native.threads()
    )

"""Soft targets of the losses and the matching cost: their checks, and their meaning in plain PyTorch.

Targets are dense, at the resolution of the loss (bool and uint8: any value but 0 counts as 1; floats: as they are), or BitMasks
at r times that resolution, r in {1, 2, 4}. BitMasks are reduced by half-pixel bilinear interpolation: the mean of a 2×2 block
for r = 2, and of the central 2×2 of a 4×4 block for r = 4. An op takes targets as (tensor, ratio). Ratio 0 is dense; for other
ratios the tensor is words.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.masks.reference import unpack

DENSE = (torch.bool, torch.uint8, *checks.FLOATS)
RATIOS = (1, 2, 4)


def as_targets(
    op: str, targets: Any, batch: tuple[int | None, ...], letters: str, size: tuple[int, int]
) -> tuple[Tensor, int]:
    """Checks targets for a loss of this size. `batch` are the batch dimensions (None: any), and `letters` their names in
    messages."""
    if isinstance(targets, BitMasks):
        if len(targets.shape) != len(batch) or any(
            w not in (None, g) for g, w in zip(targets.shape, batch, strict=True)
        ):
            known = "" if None in batch else f" = {tuple(batch)}"
            checks.bad_value(op, "targets", f"be BitMasks of shape ({letters}){known}", tuple(targets.shape))
        for ratio in RATIOS:
            if targets.size == (ratio * size[0], ratio * size[1]):
                return targets.words, ratio
        checks.bad_value(
            op, "targets", f"be BitMasks of 1, 2 or 4 times the size of the loss, {tuple(size)}", tuple(targets.size),
            "the loss has the size of the logits times upsample",
        )  # fmt: skip
    if not isinstance(targets, Tensor):
        checks.bad_type(op, "targets", "be a BitMasks or a dense tensor", type(targets).__name__)
    checks.tensor(op, "targets", targets, DENSE, "convert labels with .bool()")
    form = f"({letters} h·upsample, w·upsample)" if letters.endswith(",") else f"({letters}, h·upsample, w·upsample)"
    checks.shape(op, "targets", targets, form, (*batch, *size), "resize the targets, or pass them as BitMasks")
    return targets.detach() if targets.requires_grad else targets, 0


def whole_upsample(op: str, upsample: Any) -> None:
    checks.whole(op, "upsample", upsample, "be a whole number of at least 1", 1)


def loss_dtype(*inputs: Tensor | None) -> torch.dtype:
    """float64 if an input is float64 (the reference then computes in float64), else float32."""
    for x in inputs:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def soft_targets(targets: Tensor, ratio: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The targets as the loss uses them, (..., height, width). They are contiguous, because torch's sums depend on the
    layout."""
    if ratio == 0:
        return (targets if targets.is_floating_point() else targets != 0).to(dtype).contiguous()
    bits = unpack(targets, ratio * height * ratio * width)
    bits = bits.reshape(*targets.shape[:-1], ratio * height, ratio * width).to(dtype)
    if ratio == 1:
        return bits
    first = ratio // 2 - 1
    rows = bits[..., first::ratio, :] + bits[..., first + 1 :: ratio, :]
    return (rows[..., first::ratio] + rows[..., first + 1 :: ratio]) / 4


def upsampled(logits: Tensor, upsample: int, dtype: torch.dtype) -> Tensor:
    """(..., h, w) -> (..., h·upsample, w·upsample), bilinear with half-pixel centres; contiguous."""
    maps = logits.to(dtype).contiguous()
    if upsample == 1:
        return maps
    size = (*maps.shape[:-2], maps.shape[-2] * upsample, maps.shape[-1] * upsample)
    if maps.numel() == 0:
        return maps.new_zeros(size)
    maps = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(maps, scale_factor=upsample, mode="bilinear", align_corners=False).reshape(size)


class ForTriton(NamedTuple):
    """Targets in the form that the Triton kernels take (sprompt/ops/triton_tile.py, soft_target)."""

    tensor: Tensor  #: bool as bytes
    strides: tuple[
        int, ...
    ]  #: of the batch dimensions, rows and pixels; for words: of the batch dimensions, 0, of words
    load: int  #: bytes that one pixel loads: an element, or one word of each of the 1 or 2 rows that it averages
    touched: int  #: bytes of the tensor that are loaded at all: for ratio 4 only the middle two of 4 rows of bits


def for_triton(targets: Tensor, ratio: int) -> ForTriton:
    if ratio == 0:
        dense = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
        return ForTriton(dense, dense.stride(), dense.element_size(), dense.nbytes)
    touched = targets.nbytes // 2 if ratio == 4 else targets.nbytes
    return ForTriton(targets, (*targets.stride()[:-1], 0, targets.stride(-1)), 4 if ratio == 1 else 8, touched)


def quad_edge(upsample: int) -> int:
    """The number of rows and columns of quads minus that of cells. Upsampled pixels lie between two cells or outside the last
    cell. Without upsampling a quad is a cell."""
    return 1 if upsample > 1 else 0

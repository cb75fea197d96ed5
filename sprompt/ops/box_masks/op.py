"""The declarations of crop_masks and paste_masks."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op
from sprompt.ops.masks.op import rows
from sprompt.ops.region_mean.op import wide_boxes

#: Parts of an axis of a crop, at most.
MOST_PARTS = 2**15


@op("cuda", computes=())  # boxes are read as they are
def crop_masks(words: Tensor, boxes: Tensor, index: Tensor, height: int, width: int, size: int) -> Tensor:
    return new(words, *index.shape, size, size, dtype=torch.float32)


@op("cuda", computes=("soft",))
def paste_masks(soft: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    return new(soft, soft.shape[0], words_for(height * width), dtype=torch.int32)


@crop_masks.values
def _(a: Args) -> None:
    if a.index.numel() == 0:
        return
    low, high = (x.item() for x in a.index.aminmax())
    masks = a.words.shape[1]
    if low < -1 or high >= masks:
        rule = f"lie in [0, {masks}), or be -1"
        checks.bad_value("crop_masks", "index", rule, low if low < -1 else high, "it counts the masks of one image")


def kernel_arguments(a: Args) -> tuple[Any, ...]:
    """What the kernels of crop_masks take before `out`."""
    boxes, index = wide_boxes(a.boxes).contiguous(), a.index.contiguous().view(-1)
    return rows(a.words), boxes, index, a.words.shape[1], a.index.shape[1], *a[3:]


@crop_masks.native
def _(a: Args, out: Tensor) -> None:
    native._C.crop_masks(*kernel_arguments(a), out, native.threads())


@paste_masks.native
def _(a: Args, words: Tensor) -> None:
    native._C.paste_masks(a.soft, wide_boxes(a.boxes).contiguous(), *a[2:], words, native.threads())

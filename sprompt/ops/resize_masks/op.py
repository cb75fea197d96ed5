"""The declarations of resize_masks and of BitMasks.resize."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.masks.op import rows


def extent(a: Args) -> tuple[float, float]:
    """The numbers of rows and columns of the map that become the image."""
    return a.crop_height or a.soft.shape[-2], a.crop_width or a.soft.shape[-1]


@op("cuda", "triton")
def resize_masks(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None
) -> Tensor:
    return new(soft, *soft.shape[:-2], words_for(height * width), dtype=torch.int32)


@resize_masks.native
def _(a: Args, words: Tensor) -> None:
    maps = a.soft.reshape(a.soft.shape[:-2].numel(), *a.soft.shape[-2:])
    native._C.resize_masks(maps, a.height, a.width, a.threshold, *extent(a), rows(words), native.threads())


@op("cuda")
def resize_bits(words: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    return new(words, *words.shape[:-1], words_for(height * width), dtype=torch.int32)


resize_bits.native(lambda a, out: native._C.resize_bits(rows(a.words), *a[1:], rows(out), native.threads()))

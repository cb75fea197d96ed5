"""The declarations of resize_masks and of BitMasks.resize."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.masks.op import rows


def extent(a: Args, via: tuple[int | None, int | None] = (None, None)) -> tuple[float, float]:
    """The numbers of rows and columns of the map, or of `via`, that become the image."""
    return a.crop_height or via[0] or a.soft.shape[-2], a.crop_width or via[1] or a.soft.shape[-1]


@op("cuda", "triton")
def resize_masks(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None
) -> Tensor:
    return new(soft, *soft.shape[:-2], words_for(height * width), dtype=torch.int32)


@resize_masks.native
def _(a: Args, words: Tensor) -> None:
    _native(a, (None, None), words, None, None)


@op("triton")
def resize_masks_general(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None,
    via_height: int | None, via_width: int | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """words, sums of probabilities float32 (...), areas int64 (...). Without `sums` the last two have no elements."""
    batch = tuple(soft.shape[:-2]) if sums else (0,)
    words = new(soft, *soft.shape[:-2], words_for(height * width), dtype=torch.int32)
    return words, new(soft, *batch, dtype=torch.float32), new(soft, *batch, dtype=torch.int64)


@resize_masks_general.native
def _(a: Args, words: Tensor, sums: Tensor, areas: Tensor) -> None:
    measures = (sums.view(-1), areas.view(-1)) if a.sums else (None, None)
    _native(a, (a.via_height, a.via_width), words, *measures)


def _native(
    a: Args, via: tuple[int | None, int | None], words: Tensor, sums: Tensor | None, areas: Tensor | None
) -> None:
    maps = a.soft.reshape(a.soft.shape[:-2].numel(), *a.soft.shape[-2:])
    native._C.resize_masks(
        maps, a.height, a.width, a.threshold, *extent(a, via), via[0] or 0, via[1] or 0, rows(words), sums, areas,
        native.threads(),
    )  # fmt: skip


@op("cuda")
def resize_bits(words: Tensor, h: int, w: int, height: int, width: int, threshold: float) -> Tensor:
    return new(words, *words.shape[:-1], words_for(height * width), dtype=torch.int32)


@op("cuda")
def cover_bits(words: Tensor, h: int, w: int, height: int, width: int, nearest: bool) -> Tensor:
    return new(words, *words.shape[:-1], words_for(height * width), dtype=torch.int32)


resize_bits.native(lambda a, out: native._C.resize_bits(rows(a.words), *a[1:], rows(out), native.threads()))
cover_bits.native(lambda a, out: native._C.cover_bits(rows(a.words), *a[1:], rows(out), native.threads()))

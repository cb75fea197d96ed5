"""The declarations of resize_masks and of BitMasks.resize."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.masks.registration import rows


def scratch_words(w: int, width: int, threads: int) -> int:
    """int32 of scratch for sources of w columns: five tables by output column, and for each thread two source rows (cells,
    cells at output columns, two sets of bits, states by segment of 32 pixels) and the runs of segments; whole cache lines."""

    def lines(size: int) -> int:
        return -(-size // 64) * 16

    segments, padded = -(-width // 32), -(-w // 32) * 32
    row = lines(4 * padded) + lines(128 * segments) + 2 * lines(padded // 8 + 8) + lines(segments)
    return 5 * lines(128 * segments) + threads * (2 * row + lines(segments) + lines(4 * segments))


def extent(a: Args) -> tuple[float, float]:
    """Rows and columns of the map that become the image."""
    return a.crop_height or a.soft.shape[-2], a.crop_width or a.soft.shape[-1]


@op("cuda", "triton")
def resize_masks(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None
) -> Tensor:
    return new(soft, *soft.shape[:-2], words_for(height * width), dtype=torch.int32)


@resize_masks.native
def _(a: Args, words: Tensor) -> None:
    if words.numel() == 0:
        return
    maps, out, threads = a.soft.reshape(-1, *a.soft.shape[-2:]), rows(words), native.threads()
    scratch = native.scratch(scratch_words(maps.shape[2], a.width, threads), dtype=torch.int32)
    native._C.resize_masks(maps, a.height, a.width, a.threshold, *extent(a), out, scratch, threads)


@op("cuda")
def resize_bits(words: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    return new(words, *words.shape[:-1], words_for(height * width), dtype=torch.int32)


@resize_bits.native
def _(a: Args, out: Tensor) -> None:
    if out.numel() == 0:
        return
    words, h, w, height, width = a
    threads = native.threads()
    scratch = native.scratch(scratch_words(w, width, threads), dtype=torch.int32)
    native._C.resize_bits(rows(words), h, w, height, width, rows(out), scratch, threads)

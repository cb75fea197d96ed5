"""Fake kernels and backends of resize_masks and of BitMasks.resize."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.library import register_op
from sprompt.ops.resize_masks import reference


def scratch_words(w: int, width: int, threads: int) -> int:
    """int32 of scratch for sources of w columns: five tables by output column, and for each thread two source rows (cells,
    cells at output columns, two sets of bits, states by segment of 32 pixels) and the runs of segments; whole cache lines."""

    def lines(size: int) -> int:
        return -(-size // 64) * 16

    segments, padded = -(-width // 32), -(-w // 32) * 32
    row = lines(4 * padded) + lines(128 * segments) + 2 * lines(padded // 8 + 8) + lines(segments)
    return 5 * lines(128 * segments) + threads * (2 * row + lines(segments) + lines(4 * segments))


def _resize_masks(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None
) -> Tensor:
    *batch, h, w = soft.shape
    words = soft.new_empty((*batch, words_for(height * width)), dtype=torch.int32)
    if words.numel() == 0:
        return words
    masks, threads = torch.Size(batch).numel(), native.threads()
    native._C.resize_masks(
        soft.reshape(masks, h, w), height, width, threshold,
        h if crop_height is None else crop_height, w if crop_width is None else crop_width,
        words.view(masks, -1), soft.new_empty(scratch_words(w, width, threads), dtype=torch.int32), threads,
    )  # fmt: skip
    return words


def _resize_masks_fake(
    soft: Tensor, height: int, width: int, threshold: float, crop_height: float | None, crop_width: float | None
) -> Tensor:
    return soft.new_empty((*soft.shape[:-2], words_for(height * width)), dtype=torch.int32)


def _resize_bits(words: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    out = words.new_empty((*words.shape[:-1], words_for(height * width)), dtype=torch.int32)
    if out.numel() == 0:
        return out
    masks, threads = words.shape[:-1].numel(), native.threads()
    native._C.resize_bits(
        words.reshape(masks, -1).contiguous(), h, w, height, width,
        out.view(masks, -1), words.new_empty(scratch_words(w, width, threads)), threads,
    )  # fmt: skip
    return out


def _resize_bits_fake(words: Tensor, h: int, w: int, height: int, width: int) -> Tensor:
    return words.new_empty((*words.shape[:-1], words_for(height * width)), dtype=torch.int32)


register_op(
    "resize_masks", fake=_resize_masks_fake, reference=reference.resize_masks,
    native_kernel=_resize_masks, gpu="triton",
)  # fmt: skip
register_op(
    "resize_bits", fake=_resize_bits_fake, reference=reference.resize_bits, native_kernel=_resize_bits, gpu="cuda"
)

"""The suppression ops on their CUDA kernels (csrc/mask_nms/mask_nms_cuda.cu)."""

from math import isqrt

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.masks import words_for
from sprompt.ops.declare import Args
from sprompt.ops.mask_nms import op

#: Scratch memory for pairs of masks has about this many bytes, for any number of masks.
MOST = 1 << 26


def _multiple(x: int) -> int:
    """The next multiple of 32, at least 32."""
    return max(-(-x // 32), 1) * 32


def batched_mask_nms(a: Args, keep: Tensor, kept: Tensor) -> None:
    words, scores, threshold, counts, _ = a
    batch, masks, _ = words.shape
    order = words.new_empty((batch, masks), dtype=torch.int64)
    area = words.new_empty((batch, masks))
    removed = words.new_empty((batch, words_for(masks)))
    panel = MOST // (4 * max(removed.numel(), 1)) // 32 * 32
    bits = words.new_empty((batch, min(_multiple(masks), max(panel, 128), 2048), removed.shape[1]))
    native._C.cuda.mask_nms(
        stream(words), native.rows(words), scores, counts, threshold, keep, kept, order, area, removed, bits
    )


def mask_nms(a: Args) -> Tensor:
    a = op.batch_of_one(a)
    keep, kept = op.batched_mask_nms.outputs(*a)
    batched_mask_nms(a, keep, kept)
    return keep[0, : int(kept)].clone()  # waits for the device, which computes the length of the result


def matrix_nms(a: Args, out: Tensor) -> None:
    words, scores, kernel, sigma, labels, counts = a
    batch, masks, n = words.shape
    order = words.new_empty((batch, masks), dtype=torch.int64)
    area = words.new_empty((batch, masks))
    extremes = words.new_empty((2, batch, masks), dtype=torch.int64)
    dtype = torch.int16 if 32 * n < 1 << 16 else torch.int32
    panel = isqrt(MOST // (dtype.itemsize * max(batch, 1))) // 32 * 32
    side = min(_multiple(masks), max(panel, 128))
    pairs = words.new_empty((batch, side, side), dtype=dtype)
    native._C.cuda.matrix_nms(
        stream(words), native.rows(words), scores, labels, counts, kernel == "gaussian", sigma, out, order, area,
        extremes, pairs,
    )  # fmt: skip

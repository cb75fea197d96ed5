"""The suppression ops on their CUDA kernels (csrc/mask_nms/mask_nms_cuda.cu)."""

from math import isqrt

import torch
from torch import Tensor

from sprompt import native
from sprompt.cuda import stream
from sprompt.masks import words_for
from sprompt.ops.mask_nms import reference
from sprompt.ops.mask_nms.registration import _rows

#: Scratch for pairs of masks holds about so many bytes, however many masks there are.
MOST = 1 << 26


def _multiple(x: int) -> int:
    """The next multiple of 32, at least 32."""
    return max(-(-x // 32), 1) * 32


def _greedy(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    batch, masks, _ = words.shape
    keep = words.new_empty((batch, max_output), dtype=torch.int64)
    kept = words.new_empty(batch, dtype=torch.int64)
    order = words.new_empty((batch, masks), dtype=torch.int64)
    area = words.new_empty((batch, masks))
    removed = words.new_empty((batch, words_for(masks)))
    panel = MOST // (4 * max(removed.numel(), 1)) // 32 * 32
    bits = words.new_empty((batch, min(_multiple(masks), max(panel, 128), 2048), removed.shape[1]))
    native._C.cuda.mask_nms(
        stream(words), _rows(words), scores, counts, iou_threshold, keep, kept, order, area, removed, bits
    )
    return keep, kept


def mask_nms(words: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    keep, kept = _greedy(words[None], scores[None], iou_threshold, None, scores.shape[0])
    return keep[0, : int(kept)].clone()  # waits for the device: the result's length is its answer


def batched_mask_nms(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    reference.check_values("batched_mask_nms", words, counts)
    return _greedy(words, scores, iou_threshold, counts, max_output)


def matrix_nms(
    words: Tensor, scores: Tensor, kernel: str, sigma: float, labels: Tensor | None, counts: Tensor | None
) -> Tensor:
    if scores.dim() == 1:
        label_rows = None if labels is None else labels[None]
        return matrix_nms(words[None], scores[None], kernel, sigma, label_rows, counts)[0]
    reference.check_values("matrix_nms", words, counts)
    batch, masks, n = words.shape
    out = scores.new_empty(scores.shape)
    order = words.new_empty((batch, masks), dtype=torch.int64)
    area = words.new_empty((batch, masks))
    extremes = words.new_empty((2, batch, masks), dtype=torch.int64)
    dtype = torch.int16 if 32 * n < 1 << 16 else torch.int32
    panel = isqrt(MOST // (dtype.itemsize * max(batch, 1))) // 32 * 32
    side = min(_multiple(masks), max(panel, 128))
    pairs = words.new_empty((batch, side, side), dtype=dtype)
    native._C.cuda.matrix_nms(
        stream(words),
        _rows(words),
        scores,
        labels,
        counts,
        kernel == "gaussian",
        sigma,
        out,
        order,
        area,
        extremes,
        pairs,
    )
    return out

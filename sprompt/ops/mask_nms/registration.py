"""Fake kernels and backends of the suppression ops."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.library import register_op
from sprompt.ops.mask_nms import reference


def _rows(words: Tensor) -> Tensor:
    """Words with last stride 1, batch and mask strides as they are."""
    return words if words.stride(-1) == 1 or words.shape[-1] <= 1 else words.contiguous()


def _scratch(words: Tensor, sketch: bool = False) -> Tensor:
    """What nms_scratch_per_mask and nms_sketch in csrc/mask_nms/mask_nms.h ask for."""
    batch, masks, n = words.shape
    bytes_per_mask = native._C.nms_scratch_per_mask
    if sketch and n > 512:
        bytes_per_mask += (n + 255) // 256 * 64
    return words.new_empty(batch * (masks + 32) * bytes_per_mask, dtype=torch.uint8)


def _greedy(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    keep = words.new_empty((words.shape[0], max_output), dtype=torch.int64)
    kept = words.new_empty(words.shape[0], dtype=torch.int64)
    native._C.mask_nms(_rows(words), scores, counts, iou_threshold, keep, kept, _scratch(words, True), native.threads())
    return keep, kept


def _mask_nms(words: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    keep, kept = _greedy(words[None], scores[None], iou_threshold, None, scores.shape[0])
    return keep[0, : int(kept)].clone()


def _mask_nms_fake(words: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return words.new_empty(kept, dtype=torch.int64)


def _batched_mask_nms(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    reference.check_values("batched_mask_nms", words, counts)
    return _greedy(words, scores, iou_threshold, counts, max_output)


def _batched_mask_nms_fake(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    keep = words.new_empty((words.shape[0], max_output), dtype=torch.int64)
    return keep, words.new_empty(words.shape[0], dtype=torch.int64)


def _matrix_nms(
    words: Tensor, scores: Tensor, kernel: str, sigma: float, labels: Tensor | None, counts: Tensor | None
) -> Tensor:
    if scores.dim() == 1:
        return _matrix_nms(words[None], scores[None], kernel, sigma, None if labels is None else labels[None], counts)[
            0
        ]
    reference.check_values("matrix_nms", words, counts)
    out = scores.new_empty(scores.shape)
    native._C.matrix_nms(
        _rows(words), scores, labels, counts, kernel == "gaussian", sigma, out, _scratch(words), native.threads()
    )
    return out


def _matrix_nms_fake(
    words: Tensor, scores: Tensor, kernel: str, sigma: float, labels: Tensor | None, counts: Tensor | None
) -> Tensor:
    return scores.new_empty(scores.shape)


register_op("mask_nms", fake=_mask_nms_fake, reference=reference.mask_nms, native_kernel=_mask_nms, gpu="cuda")
register_op(
    "batched_mask_nms",
    fake=_batched_mask_nms_fake,
    reference=reference.batched_mask_nms,
    native_kernel=_batched_mask_nms,
    gpu="cuda",
)
register_op("matrix_nms", fake=_matrix_nms_fake, reference=reference.matrix_nms, native_kernel=_matrix_nms, gpu="cuda")

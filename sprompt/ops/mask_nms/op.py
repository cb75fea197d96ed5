"""The declarations of the suppression ops: words (B, N, n), scores (B, N), counts (B,); mask_nms has no B."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


@op("cuda")
def batched_mask_nms(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    return new(words, words.shape[0], max_output, dtype=torch.int64), new(words, words.shape[0], dtype=torch.int64)


@batched_mask_nms.native
def _greedy(a: Args, keep: Tensor, kept: Tensor) -> None:
    words, scores, threshold, counts, _ = a
    native._C.mask_nms(native.rows(words), scores, counts, threshold, keep, kept, native.threads())


@op("cuda", dynamic=True)
def mask_nms(words: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    context = torch.library.get_ctx()  # None without tracing: sprompt.testing.compiled runs this function on tensors
    return words.new_empty(0 if context is None else context.new_dynamic_size(), dtype=torch.int64)


def batch_of_one(a: Args) -> Args:
    """The arguments of batched_mask_nms, from the arguments of mask_nms."""
    return batched_mask_nms.args(a.words[None], a.scores[None], a.iou_threshold, None, a.scores.shape[0])


@mask_nms.native
def _(a: Args) -> Tensor:
    a = batch_of_one(a)
    keep, kept = batched_mask_nms.outputs(*a)
    _greedy(a, keep, kept)
    return keep[0, : kept.item()].clone()


@op("cuda")
def matrix_nms(
    words: Tensor, scores: Tensor, kernel: str, sigma: float, labels: Tensor | None, counts: Tensor | None
) -> Tensor:
    return new(scores, *scores.shape)


@matrix_nms.native
def _(a: Args, out: Tensor) -> None:
    words, scores, kernel, sigma, labels, counts = a
    native._C.matrix_nms(native.rows(words), scores, labels, counts, kernel == "gaussian", sigma, out, native.threads())


batched_mask_nms.values(lambda a: checks.counts_within("batched_mask_nms", a.counts, a.words.shape[1]))
matrix_nms.values(lambda a: checks.counts_within("matrix_nms", a.counts, a.words.shape[1]))

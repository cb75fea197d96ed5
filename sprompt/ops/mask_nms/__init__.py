"""Suppression of overlapping masks: greedy and matrix non-maximum suppression."""

from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.mask_nms import op
from sprompt.ops.masks import as_bits

KERNELS = ("gaussian", "linear")


def mask_nms(masks: BitMasks | Tensor, scores: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """Greedy non-maximum suppression: `torchvision.ops.nms` for masks.

    Masks are visited by decreasing score. A mask is removed if its IoU with a mask kept before it is > iou_threshold. The IoU
    is the float64 quotient of the exact pixel counts. Only pairs that bounds cannot decide are counted, and no pair matrix is
    stored.

    Args:
        masks: BitMasks (N,), or dense (N, H, W), packed by `pack_masks` (floats: > 0.5).
        scores: (N,) float. Ties are visited by lower index. A NaN counts as -inf.
        iou_threshold: between 0 and 1.

    Returns: indices of the kept masks by decreasing score, int64 (K,). K depends on the values, so the call waits for a GPU,
    and torch.compile needs `capture_dynamic_output_shape_ops`. `batched_mask_nms` has neither drawback. Empty masks are never
    kept. N of 0 gives an empty result. Exact, the same on every backend and number of threads; not differentiable. Autocast
    changes nothing.

    >>> masks = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 1]], [[0, 0, 0, 0]]])
    >>> mask_nms(masks, torch.tensor([0.7, 0.9, 0.8, 1.0])).tolist()
    [1, 2]
    """
    bits = _checked("mask_nms", masks, scores, batched=False)
    checks.number("mask_nms", "iou_threshold", iou_threshold, "lie between 0 and 1", 0, 1)
    return op.mask_nms(bits.words, scores, float(iou_threshold))


def batched_mask_nms(
    masks: BitMasks | Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    counts: Tensor | None = None,
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`mask_nms` of every image of a batch, padded to a known length.

    Args:
        masks: BitMasks (B, N), or dense (B, N, H, W).
        scores: (B, N) float; ties and NaN as in `mask_nms`.
        iou_threshold: between 0 and 1.
        counts: int64 (B,), the number of real masks of each image (they come first); None means all. Values out of range raise
            on the CPU. On a GPU they are not checked, because reading them would wait for it.
        max_output: the most kept masks that are returned per image, best first; None means N.

    Returns: keep int64 (B, max_output), each row padded with -1, and counts int64 (B,), the number of real entries of each row.
    No synchronisation. Exact, the same on every backend and number of threads; not differentiable. Autocast changes nothing.

    >>> masks = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 1]]]).expand(2, 3, 1, 4)
    >>> keep, counts = batched_mask_nms(masks, torch.tensor([[0.7, 0.9, 0.8]]).expand(2, 3), counts=torch.tensor([3, 1]))
    >>> keep.tolist(), counts.tolist()
    ([[1, 2, -1], [0, -1, -1]], [2, 1])
    """
    bits = _checked("batched_mask_nms", masks, scores, batched=True)
    checks.number("batched_mask_nms", "iou_threshold", iou_threshold, "lie between 0 and 1", 0, 1)
    checks.counts("batched_mask_nms", counts, bits.shape[0])
    if max_output is None:
        max_output = bits.shape[1]
    checks.whole("batched_mask_nms", "max_output", max_output, "be a whole number of at least 0")
    checks.same_device("batched_mask_nms", masks=bits.words, counts=counts)
    return op.batched_mask_nms(bits.words, scores, float(iou_threshold), counts, max_output)


def matrix_nms(
    masks: BitMasks | Tensor,
    scores: Tensor,
    *,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Matrix non-maximum suppression: every score decays by the overlap with better masks. No mask is removed.

    Masks are in the order of `mask_nms`. Only pairs i < j of the same label count. The IoU is 0 where a mask is empty. cⱼ =
    maxᵢ iouᵢⱼ and decayⱼ = minᵢ f(iouᵢⱼ) / f(cᵢ), or 1 without any pair. f(t) = exp(-sigma·t²) for "gaussian" and f(t) = 1 - t
    for "linear", with a divisor of at least 1e-6. A larger sigma suppresses more.

    Args:
        masks: BitMasks (N,) or (B, N), or dense (..., H, W).
        scores: (N,) or (B, N) float. Ties go by lower index. A NaN counts as -inf, stays NaN, and does not change other scores.
        kernel: "gaussian" or "linear".
        sigma: at least 0; the linear kernel does not use it.
        labels: int64 of the shape of scores; None means one label for all.
        counts: int64 (B,), the number of real masks of each image, as in `batched_mask_nms`; None means all.

    Returns: decayed scores of the shape and dtype of `scores`, in the caller's order; 0 where padded. They are computed in
    float64 from exact counts (with a float32 exponential) and rounded once. They are the same for every number of threads.
    Neither a pair matrix nor a dense mask is stored. A GPU stores the integer counts of the pairs of as many masks at a time as
    fit into about 64 MB. Not differentiable. Autocast changes nothing.

    >>> masks = torch.tensor([[[1, 1]], [[1, 1]], [[1, 0]]])
    >>> matrix_nms(masks, torch.tensor([0.8, 1.0, 0.5]), kernel="linear").tolist()
    [0.0, 1.0, 0.25]
    """
    bits = _checked("matrix_nms", masks, scores, batched=None)
    checks.choice("matrix_nms", "kernel", kernel, KERNELS)
    checks.number("matrix_nms", "sigma", sigma, "be a finite number of at least 0", 0, 3.4e38)
    if labels is not None:
        checks.tensor("matrix_nms", "labels", labels, (torch.int64,))
        if labels.shape != scores.shape:
            checks.bad_value(
                "matrix_nms", "labels", f"have the shape of scores, {tuple(scores.shape)}", tuple(labels.shape)
            )
    if counts is not None and scores.dim() == 1:
        checks.bad_value(
            "matrix_nms", "counts", "be None where there is no batch dimension", "a tensor", "slice the masks"
        )
    if scores.dim() == 2:
        checks.counts("matrix_nms", counts, bits.shape[0])
    checks.same_device("matrix_nms", masks=bits.words, labels=labels, counts=counts)
    words = bits.words
    if scores.dim() == 2:
        return op.matrix_nms(words, scores, kernel, float(sigma), labels, counts)
    labels = None if labels is None else labels[None]
    return op.matrix_nms(words[None], scores[None], kernel, float(sigma), labels, None)[0]


def _checked(op: str, masks: Any, scores: Any, batched: bool | None) -> BitMasks:
    """Checks that masks are (N,) or (B, N) (batched=None: either), with one score per mask. Returns them as bits."""
    bits = as_bits(op, "masks", masks)
    ranks, form = {False: ((1,), "(N,)"), True: ((2,), "(B, N)"), None: ((1, 2), "(N,) or (B, N)")}[batched]
    if len(bits.shape) not in ranks:
        checks.bad_value(
            op, "masks", f"have batch dimensions {form}", tuple(bits.shape), "dense masks add (H, W) to these"
        )
    checks.tensor(op, "scores", scores, checks.FLOATS)
    if scores.shape != bits.shape:
        checks.bad_value(
            op,
            "scores",
            f"have the batch dimensions of masks, {tuple(bits.shape)}",
            tuple(scores.shape),
            "give each mask a score",
        )
    checks.same_device(op, masks=bits.words, scores=scores)
    return bits

"""Suppression of overlapping masks in plain PyTorch, on words int32 (..., N, n). It computes one row of pairs at a time, in
float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.mask_nms import op
from sprompt.ops.masks.reference import unpack

#: The linear kernel divides by 1 - c, but by no less than this.
SMALLEST = 1e-6


def order_of(scores: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices (B, N) by decreasing score, and which of them are real. Ties go by lower index, NaN counts as -inf, and padding
    is last."""
    n = scores.shape[-1]
    place = torch.arange(n, device=scores.device)
    real = place < (n if counts is None else counts[:, None])
    real = real.expand(scores.shape)
    key = torch.where(scores.isnan() | ~real, -torch.inf, scores)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    # A second stable sort moves padding behind real entries of score -inf.
    order = order.gather(-1, (~real).gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices)
    return order, real.gather(-1, order)


def overlaps(words: Tensor, order: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Areas int64 (B, N) of the masks in `order`, and a function: j -> IoU float64 (B, j) of mask j with the masks before
    it."""
    dense = unpack(words, 32 * words.shape[-1])
    dense = dense.gather(-2, order[..., None].expand(dense.shape))
    area = dense.sum(-1)

    def row(j: int) -> Tensor:
        common = (dense[:, :j] & dense[:, j, None]).sum(-1)
        either = area[:, :j] + area[:, j, None] - common
        return common.double() / either.clamp(min=1).double()

    return area, row


def batched_mask_nms(a: Args) -> tuple[Tensor, Tensor]:
    words, scores, threshold, counts, most = a
    order, real = order_of(scores, counts)
    area, row = overlaps(words, order)
    kept = real & (area > 0)
    for j in range(1, scores.shape[1]):
        kept[:, j] &= ~(kept[:, :j] & (row(j) > threshold)).any(-1)
    # The r-th kept mask goes to column r. All other masks go to one extra column, which is cut off.
    rank = kept.cumsum(-1) - 1
    column = torch.where(kept & (rank < most), rank, most)
    keep = torch.full((scores.shape[0], most + 1), -1, dtype=torch.int64, device=scores.device)
    return keep.scatter(-1, column, order)[:, :most].contiguous(), kept.sum(-1).clamp(max=most)


def mask_nms(a: Args) -> Tensor:
    keep, _ = batched_mask_nms(op.batch_of_one(a))
    return keep[keep >= 0]


def matrix_nms(a: Args) -> Tensor:
    words, scores, kernel, sigma, labels, counts = a
    order, real = order_of(scores, counts)
    _, row = overlaps(words, order)
    label = torch.zeros_like(order) if labels is None else labels.gather(-1, order)
    most = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)  # c: largest IoU with an earlier mask
    decay = torch.ones_like(most)
    for j in range(1, scores.shape[1]):
        iou, pairs, c = row(j), label[:, :j] == label[:, j, None], most[:, :j]
        gaussian = kernel == "gaussian"
        ratio = torch.exp(-sigma * (iou**2 - c**2)) if gaussian else (1 - iou) / (1 - c).clamp(min=SMALLEST)
        most[:, j] = torch.where(pairs, iou, 0).amax(-1)
        decay[:, j] = torch.where(pairs, ratio, 1).amin(-1)
    decayed = torch.where(real, scores.gather(-1, order).double() * decay, 0)
    return torch.empty_like(decayed).scatter_(-1, order, decayed).to(scores.dtype)

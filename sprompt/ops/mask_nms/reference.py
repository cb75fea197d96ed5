"""Suppression of overlapping masks in plain PyTorch, on words int32 (..., N, n). One row of pairs at a time, in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.masks.reference import unpack_masks

#: The linear kernel divides by 1 - c, held to at least this.
SMALLEST = 1e-6


def check_values(op: str, words: Tensor, counts: Tensor | None) -> None:
    checks.counts_within(op, counts, words.shape[-2])


def order_of(scores: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices (B, N) by decreasing score, ties by lower index, NaN as -inf, padding last; and which of them are real."""
    n = scores.shape[-1]
    place = torch.arange(n, device=scores.device)
    real = place < (n if counts is None else counts[:, None])
    real = real.expand(scores.shape)
    key = torch.where(scores.isnan() | ~real, -torch.inf, scores)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    # A second stable sort takes padding behind real entries of score -inf.
    order = order.gather(-1, (~real).gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices)
    return order, real.gather(-1, order)


def rows_of_iou(words: Tensor, order: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Areas int64 (B, N) of the masks in `order`, and a function: i -> IoU float64 (B, N) of mask i with all (empty: 0)."""
    dense = unpack_masks(words, 32 * words.shape[-1])
    dense = dense.gather(-2, order[..., None].expand(dense.shape))
    area = dense.sum(-1)

    def row(i: int) -> Tensor:
        common = (dense[:, i, None] & dense).sum(-1)
        either = area[:, i, None] + area - common
        return common.double() / either.clamp(min=1).double()

    return area, row


def batched_mask_nms(
    words: Tensor, scores: Tensor, iou_threshold: float, counts: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    check_values("batched_mask_nms", words, counts)
    order, alive = order_of(scores, counts)
    area, row = rows_of_iou(words, order)
    alive = alive & (area > 0)
    place = torch.arange(scores.shape[-1], device=scores.device)
    for i in range(scores.shape[-1]):
        alive = alive & ~(alive[:, i, None] & (place > i) & (row(i) > iou_threshold))
    # The r-th survivor goes to column r, all others to one column more, which is cut off.
    rank = alive.cumsum(-1) - 1
    column = torch.where(alive & (rank < max_output), rank, max_output)
    keep = torch.full((scores.shape[0], max_output + 1), -1, dtype=torch.int64, device=scores.device)
    keep = keep.scatter(-1, column, order)[:, :max_output].contiguous()
    return keep, alive.sum(-1).clamp(max=max_output)


def mask_nms(words: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    keep, _ = batched_mask_nms(words[None], scores[None], iou_threshold, None, scores.shape[-1])
    return keep[keep >= 0]


def matrix_nms(
    words: Tensor, scores: Tensor, kernel: str, sigma: float, labels: Tensor | None, counts: Tensor | None
) -> Tensor:
    if scores.dim() == 1:
        label_rows = None if labels is None else labels[None]
        return matrix_nms(words[None], scores[None], kernel, sigma, label_rows, counts)[0]
    check_values("matrix_nms", words, counts)
    order, real = order_of(scores, counts)
    _, row = rows_of_iou(words, order)
    n = scores.shape[-1]
    place = torch.arange(n, device=scores.device)
    label = torch.zeros_like(order) if labels is None else labels.gather(-1, order)

    def counted(i: int) -> Tensor:
        """Which pairs (i, j) count: j behind i, both of one label."""
        return (place > i) & (label == label[:, i, None])

    most = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)  # c: largest IoU with a mask before
    for i in range(n):
        most = torch.where(counted(i), most.maximum(row(i)), most)
    decay = torch.ones_like(most)
    for i in range(n):
        if kernel == "gaussian":
            ratio = torch.exp(-sigma * (row(i) ** 2 - most[:, i, None] ** 2))
        else:
            ratio = (1 - row(i)) / (1 - most[:, i, None]).clamp(min=SMALLEST)
        decay = torch.where(counted(i), decay.minimum(ratio), decay)
    decayed = torch.where(real, scores.gather(-1, order).double() * decay, 0)
    return torch.empty_like(decayed).scatter_(-1, order, decayed).to(scores.dtype)

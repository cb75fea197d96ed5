"""activation_queries in plain PyTorch. It computes in float32 (float64 for float64).

In float32 every product, sum and quotient is rounded by itself, in the order written here. The other backends compute the same
bits, so that they put equal cells in the same order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.unfused import exp

#: A local maximum has at least this score.
LEAST_SCORE = 1e-6


def scores_and_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """a and k of every cell, (B, h, w)."""
    known = torch.where(logits.isnan(), -torch.inf, logits)
    foreground = known[:, :-1]
    best, most = foreground.amax(1), known.amax(1)
    classes = torch.arange(foreground.shape[1], device=logits.device)[:, None, None]
    labels = torch.where(foreground == best[:, None], classes, foreground.shape[1]).amin(1)
    total = torch.zeros_like(most)
    for channel in logits.unbind(1):
        total = total + exp(channel - most)
    return exp(best - most) / total, labels


def local_maxima(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether a cell is a local maximum in the plane of its class, bool (B, h, w)."""
    h, w = scores.shape[1:]
    around, classes = F.pad(scores, (1, 1, 1, 1)), F.pad(labels, (1, 1, 1, 1), value=-1)
    found = scores >= LEAST_SCORE
    for y in range(3):
        for x in range(3):
            beside = around[:, y : y + h, x : x + w], classes[:, y : y + h, x : x + w]
            found = found & ~((beside[0] > scores) & (beside[1] == labels))
    return found


def activation_queries(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    logits = a.logits if a.logits.dtype == torch.float64 else a.logits.float()
    scores, labels = scores_and_labels(logits)
    first = local_maxima(scores, labels).flatten(1)
    scores, labels = scores.flatten(1), labels.flatten(1)
    order = torch.where(scores.isnan(), -1, scores).sort(stable=True, dim=1, descending=True).indices
    order = order.gather(1, first.gather(1, order).int().sort(stable=True, dim=1, descending=True).indices)
    index = order[:, : a.count].contiguous()
    return index, scores.gather(1, index).to(a.logits.dtype), labels.gather(1, index)

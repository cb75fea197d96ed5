"""The declaration of activation_queries."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op


@op("triton")
def activation_queries(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    B = logits.shape[0]
    return new(logits, B, count, dtype=torch.int64), new(logits, B, count), new(logits, B, count, dtype=torch.int64)


@activation_queries.native
def _(a: Args, index: Tensor, scores: Tensor, labels: Tensor) -> None:
    cells = native.rows(a.logits.flatten(2))
    native._C.activation_queries(cells, a.logits.shape[3], index, scores, labels, native.threads())

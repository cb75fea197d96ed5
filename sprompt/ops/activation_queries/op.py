"""The declaration of activation_queries."""

import torch
from torch import Tensor

from sprompt.ops.declare import new, op


@op()
def activation_queries(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    B = logits.shape[0]
    return new(logits, B, count, dtype=torch.int64), new(logits, B, count), new(logits, B, count, dtype=torch.int64)

"""mask_attention in plain PyTorch. query (B, H, N, D), key and value (B, H, S, D), words int32 (B or 1, N, n) or None. Products
and sums are in float32 (float64 for float64)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import unpack


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32 (float64 stays), contiguous, so that its layout does not change the order of sums."""
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def _scores(a: Args) -> Tensor:
    """(B, H, N, S): the scaled products, -inf where the query does not attend."""
    scores = a.scale * _wide(a.query) @ _wide(a.key).mT
    if a.words is None:
        return scores
    attended = unpack(a.words, a.key.shape[2])
    if a.empty_all:
        attended = attended | ~attended.any(-1, keepdim=True)
    return torch.where(attended[:, None], scores, -torch.inf)


def exactly(reference: Callable[[Args], Any]) -> Callable[[Args], Any]:
    """Autocast would form the products in a half type. It has acted on the arguments already."""

    @functools.wraps(reference)
    def run(a: Args) -> Any:
        with torch.autocast(a.query.device.type, enabled=False):
            return reference(a)

    return run


@exactly
def mask_attention(a: Args) -> tuple[Tensor, Tensor]:
    scores = _scores(a)
    logsum = scores.logsumexp(-1)
    logsum = torch.where(logsum == -torch.inf, 0, logsum)  # exp(-inf - 0) is 0, as a row that attends no key needs
    out = (scores - logsum[..., None]).exp() @ _wide(a.value)
    return out.to(a.query.dtype), logsum


@exactly
def mask_attention_backward(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    grad = _wide(a.grad)
    weights = (_scores(a) - a.logsum[..., None]).exp()
    mean = (grad * _wide(a.out)).sum(-1, keepdim=True)
    to_scores = weights * (grad @ _wide(a.value).mT - mean)
    to_query = a.scale * (to_scores @ _wide(a.key))
    to_key = a.scale * (to_scores.mT @ _wide(a.query))
    to_value = weights.mT @ grad
    return to_query.to(a.query.dtype), to_key.to(a.key.dtype), to_value.to(a.value.dtype)

"""The declaration of mask_attention."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op


@op("triton")
def mask_attention(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor | None, scale: float, empty_all: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of the softmax's sum (B, H, N): log Σ exp(score), 0 for a row that attends no key."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return new(query, *query.shape), new(query, *query.shape[:3], dtype=wide)


@mask_attention.native
def _(a: Args, out: Tensor, logsum: Tensor) -> None:
    inputs = (None if x is None else native.rows(x) for x in a[:4])
    native._C.mask_attention(*inputs, a.scale, a.empty_all, out, logsum, native.threads())


@mask_attention.saves
def _(ctx: Any, a: Args, out: Tensor, logsum: Tensor) -> None:
    ctx.save_for_backward(*a[:4], out, logsum)
    ctx.rule = a[4:]
    ctx.set_materialize_grads(False)


@op("triton")
def mask_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, words: Tensor | None, out: Tensor, logsum: Tensor,
    scale: float, empty_all: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    return new(query, *query.shape), new(key, *key.shape), new(value, *value.shape)


@mask_attention_backward.native
def _(a: Args, *grads: Tensor) -> None:
    inputs = (None if x is None else native.rows(x) for x in a[:6])
    logsum = a.logsum.contiguous()
    native._C.mask_attention_backward(*inputs, logsum, a.scale, a.empty_all, *grads, native.threads())


@mask_attention.backward
def _(ctx: Any, needs: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else mask_attention_backward(grad, *ctx.saved_tensors, *ctx.rule)

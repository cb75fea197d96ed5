"""The declaration of prompt_match."""

from typing import Any

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


@op("triton")
def prompt_match(
    kernels: Tensor, prompts: Tensor, counts: Tensor | None, keep: Tensor | None, order: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor]:
    B, _, C = prompts.shape
    N = kernels.shape[-2]
    return new(prompts, B, N, C), new(prompts, B, N, dtype=torch.int64)


prompt_match.values(lambda a: checks.counts_within("prompt_match", a.counts, a.prompts.shape[1]))


@prompt_match.native
def _(a: Args, out: Tensor, index: Tensor) -> None:
    keep = None if a.keep is None else a.keep.contiguous()
    kernels, prompts = native.rows(a.kernels), native.rows(a.prompts)
    native._C.prompt_match(kernels, prompts, a.counts, keep, a.order, a.cosine, out, index, native.threads())


@prompt_match.saves
def _(ctx: Any, a: Args, out: Tensor, index: Tensor) -> None:
    ctx.save_for_backward(index)
    ctx.shared, ctx.prompts = a.kernels.dim() == 2, a.prompts.shape[1]


@prompt_match.backward
def _(ctx: Any, needs: Args, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None]:
    to_kernels = grad.sum(0) if ctx.shared and needs.kernels else grad
    return to_kernels, prompt_match_backward(grad, *ctx.saved_tensors, ctx.prompts) if needs.prompts else None


@op("triton")
def prompt_match_backward(grad: Tensor, index: Tensor, prompts: int) -> Tensor:
    return new(grad, grad.shape[0], prompts, grad.shape[2])


@prompt_match_backward.native
def _(a: Args, out: Tensor) -> None:
    native._C.prompt_match_backward(native.rows(a.grad), a.index.contiguous(), out, native.threads())

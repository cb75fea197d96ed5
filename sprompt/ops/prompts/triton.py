"""Triton kernels of prompt_match, region_mean and mask_mean. B images, N kernels, L prompts, C channels."""

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops.launch import Cost, config, launch, tiles


@triton.jit
def _match_backward(
    grad,  # (B, N, C), any strides
    index,  # (B, N) i64, any strides, in [-1, L)
    out,  # (B, L, C), contiguous
    N, L, C,
    grad_b, grad_n, grad_c, index_b, index_n,  # strides
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b, l, c] = sum over the n with index[b, n] = l of grad[b, n, c], in float32, by increasing n.
    One program a (prompt, image, block of channels); a row of grad is read only by the program of its prompt."""
    l = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(N):
        mine = tl.load(index + b * index_b + tl.cast(n, tl.int64) * index_n) == l
        row = grad + b * grad_b + tl.cast(n, tl.int64) * grad_n
        sums += tl.load(row + tl.cast(c, tl.int64) * grad_c, mask=(c < C) & mine, other=0.0).to(tl.float32)
    tl.store(out + (b * L + l) * C + c, sums.to(out.dtype.element_ty), mask=c < C)


def prompt_match_backward(grad: Tensor, index: Tensor, prompts: int) -> Tensor:
    B, N, C = grad.shape
    out = grad.new_empty((B, prompts, C))
    tile = config("prompts.match_backward", grad)
    blocks = tiles(C, tile["BLOCK_C"])
    cost = Cost(
        read=grad.nbytes + index.nbytes,
        again=(prompts * blocks - 1) * index.nbytes,
        written=out.nbytes,
        flops=grad.numel(),
    )
    launch(
        _match_backward,
        (prompts, B, blocks),
        grad,
        index,
        out,
        N,
        prompts,
        C,
        *grad.stride(),
        *index.stride(),
        cost=cost,
        **tile,
    )
    return out

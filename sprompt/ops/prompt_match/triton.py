"""Triton kernels of prompt_match. B images, N kernels, L prompts, C channels."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.prompt_match.reference import EPSILON, SLOTS
from sprompt.ops.triton_launch import Cost, config, launch, padded, tiles

#: Tile choices to time on a GPU, besides those of configs.json.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "match": [
        {"BLOCK_N": n, "BLOCK_C": 256, "HALVINGS": j, "num_warps": w, "num_stages": s}
        for n, j, w, s in ((4, 4, 4, 2), (4, 3, 2, 2), (2, 4, 2, 2), (4, 5, 4, 2), (8, 3, 4, 2), (2, 5, 4, 3))
    ],
    "match_backward": [
        {"BLOCK_L": 32, "BLOCK_C": c, "UNROLL": u, "num_warps": w, "num_stages": 1}
        for c, u, w in ((8, 16, 1), (16, 8, 1), (16, 32, 1), (32, 16, 2), (32, 8, 4))
    ],
}


@triton.jit
def _match(
    kernels,  # (B, N, C), any strides
    prompts,  # (B, L, C), any strides
    counts,  # (B,) i64, any stride, or None
    keep,  # (B, N) b8, any strides, or None
    order,  # (N,) i64, any stride, or None
    out,  # (B, N, C), contiguous
    index,  # (B, N) i64, contiguous
    N, L, C,
    kernel_b, kernel_n, kernel_c, prompt_b, prompt_l, prompt_c, count_b, keep_b, keep_n, order_n,  # strides
    COSINE: tl.constexpr, SLOTS: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """index[b, n] = the first largest <k, p> / (max(|k|, EPSILON) max(|p|, EPSILON)) over the counts[b] real prompts; a NaN
    counts as -inf. Without COSINE it is the prompt of slot floor(order[n] SLOTS / N). It is -1 without prompts and where keep
    is false. out = kernel + prompt[index]. One program per image and BLOCK_N kernels.

    All sums over channels, of products and of squares, have the same order for every place and all strides: lane j of LANES =
    2^HALVINGS adds channels j, j + LANES, ..., with each product rounded (fp_fusion=False). Then the lanes are folded. So equal
    prompts tie."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_far = n.to(tl.int64)
    count = tl.cast(L, tl.int64)
    if counts is not None:
        count = tl.minimum(tl.maximum(tl.load(counts + b * count_b), 0), count)
    kernel = kernels + b * kernel_b + n_far[:, None] * kernel_n
    prompt = prompts + b * prompt_b
    chosen = tl.zeros((BLOCK_N,), tl.int64)
    if COSINE:
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        LANES: tl.constexpr = 1 << HALVINGS
        lane = tl.arange(0, LANES)
        for l0 in range(0, L, BLOCK_L):
            l = l0 + tl.arange(0, BLOCK_L)
            real = l < count
            row = prompt + l.to(tl.int64)[:, None] * prompt_l
            products = tl.zeros((BLOCK_N, BLOCK_L, LANES), tl.float32)
            squares_k = tl.zeros((BLOCK_N, LANES), tl.float32)
            squares_p = tl.zeros((BLOCK_L, LANES), tl.float32)
            for c0 in range(0, C, LANES):
                c = c0 + lane
                c_far = c.to(tl.int64)[None, :]
                inside = (n < N)[:, None] & (c < C)[None, :]
                k = tl.load(kernel + c_far * kernel_c, mask=inside, other=0.0).to(tl.float32)
                p = tl.load(row + c_far * prompt_c, mask=real[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
                products += k[:, None, :] * p[None, :, :]
                squares_k += k * k
                squares_p += p * p
            norm_k = tl.sqrt_rn(triton_tile.folded(squares_k, HALVINGS))
            norm_k = tl.where(norm_k < EPSILON, EPSILON, norm_k)
            norm_p = tl.sqrt_rn(triton_tile.folded(squares_p, HALVINGS))
            norm_p = tl.where(norm_p < EPSILON, EPSILON, norm_p)
            product = triton_tile.folded(products, HALVINGS)
            similarity = tl.div_rn(product, norm_k[:, None] * norm_p[None, :])
            similarity = tl.where((similarity == similarity) & real[None, :], similarity, float("-inf"))
            largest = tl.max(similarity, axis=1)
            first = tl.min(tl.where(similarity == largest[:, None], l[None, :], L), axis=1)
            chosen = tl.where(largest > best, first.to(tl.int64), chosen)
            best = tl.maximum(best, largest)
    else:
        turn = n_far
        if order is not None:
            turn = tl.load(order + n_far * order_n, mask=n < N, other=0)
        slot = turn * SLOTS // N
        length = tl.maximum(count, 1)
        each = SLOTS // length
        chosen = tl.where(slot < each * length, slot // tl.maximum(each, 1), slot - each * length)
        chosen = tl.minimum(tl.maximum(chosen, 0), length - 1)  # for any values in `order`
    chosen = tl.where((count > 0) & (n < N), chosen, -1)
    if keep is not None:
        kept = tl.load(keep + b * keep_b + n_far * keep_n, mask=n < N, other=0)
        chosen = tl.where(kept != 0, chosen, -1)
    tl.store(index + b * N + n, chosen, mask=n < N)
    row = prompt + chosen[:, None] * prompt_l
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_far = c.to(tl.int64)[None, :]
        inside = (n < N)[:, None] & (c < C)[None, :]
        k = tl.load(kernel + c_far * kernel_c, mask=inside, other=0.0).to(tl.float32)
        added = inside & (chosen >= 0)[:, None]
        p = tl.load(row + c_far * prompt_c, mask=added, other=0.0).to(tl.float32)
        sums = triton_tile.rounded(tl.where(added, k + p, k), out.dtype.element_ty)
        tl.store(out + (b * N + n_far)[:, None] * C + c[None, :], sums, mask=inside)


def prompt_match(a: Args, out: Tensor, index: Tensor) -> None:
    kernels, prompts, counts, keep, order, cosine = a
    B, L, C = prompts.shape
    shared = kernels.dim() == 2
    N = kernels.shape[-2]
    shape = config("prompt_match.match", prompts, C)
    block_l = min(padded(L), 128)
    blocks, passes = tiles(N, shape["BLOCK_N"]), tiles(L, block_l)
    row = C * prompts.element_size()
    # Worst case: all prompts are real, and every kernel gets a different prompt. A program reads its kernels once per block of
    # prompts and once for the sum. It reads its image's prompts for the products and for the sum.
    first = (N if shared else B * N) * row + B * row * (L if cosine else min(L, N))
    first += 8 * B * (counts is not None) + 8 * N * (order is not None) + B * N * (keep is not None)
    loaded = B * N * row * (1 + passes * cosine) + B * row * (blocks * L * cosine + N * (L > 0))
    loaded += 8 * B * blocks * (counts is not None) + 8 * B * N * (order is not None) + B * N * (keep is not None)
    cost = Cost(
        read=first,
        again=loaded - first,
        written=out.nbytes + index.nbytes,
        flops=2 * B * C * (N * L + N * passes + L * blocks) * cosine + B * N * C,
    )
    launch(
        _match,
        (B, blocks),
        kernels,
        prompts,
        counts,
        keep,
        order,
        out,
        index,
        N,
        L,
        C,
        0 if shared else kernels.stride(0),
        *kernels.stride()[-2:],
        *prompts.stride(),
        *_strides(counts, 1),
        *_strides(keep, 2),
        *_strides(order, 1),
        cost=cost,
        fp_fusion=False,
        COSINE=cosine,
        SLOTS=SLOTS,
        EPSILON=EPSILON,
        BLOCK_L=block_l,
        **shape,
    )


def _strides(tensor: Any, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


@triton.jit
def _match_backward(
    grad,  # (B, N, C), any strides
    index,  # (B, N) i64, any strides, in [-1, L)
    out,  # (B, L, C), contiguous
    N, L, C,
    grad_b, grad_n, grad_c, index_b, index_n,  # strides
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[b, l, c] = sum over the n with index[b, n] = l of grad[b, n, c], in float32, by increasing n. One program per image,
    block of channels and BLOCK_L prompts. UNROLL rows are in flight at a time."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    l = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    sums = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    column = grad + b * grad_b + c.to(tl.int64) * grad_c
    for n0 in range(0, N, UNROLL):
        for i in tl.static_range(UNROLL):
            n = tl.cast(n0 + i, tl.int64)
            mine = tl.load(index + b * index_b + n * index_n, mask=n < N, other=-1) == l
            row = tl.load(column + n * grad_n, mask=(c < C) & (n < N), other=0.0).to(tl.float32)
            sums += tl.where(mine[:, None], row[None, :], 0.0)
    place = (b * L + l)[:, None] * C + c[None, :]
    tl.store(out + place, triton_tile.rounded(sums, out.dtype.element_ty), mask=(l < L)[:, None] & (c < C)[None, :])


def prompt_match_backward(a: Args, out: Tensor) -> None:
    grad, index, prompts = a
    B, N, C = grad.shape
    shape = config("prompt_match.match_backward", grad)
    blocks, passes = tiles(C, shape["BLOCK_C"]), tiles(prompts, shape["BLOCK_L"])
    grad_bytes = B * N * C * grad.element_size()
    index_bytes = B * N * 8
    cost = Cost(
        read=grad_bytes + index_bytes,
        again=(passes - 1) * grad_bytes + (passes * blocks - 1) * index_bytes,
        written=out.nbytes,
        flops=grad.numel(),
    )
    launch(
        _match_backward,
        (B, blocks, passes),
        grad,
        index,
        out,
        N,
        prompts,
        C,
        *grad.stride(),
        *index.stride(),
        cost=cost,
        **shape,
    )

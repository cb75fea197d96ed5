"""Triton kernels of mask_attention. B images, H heads, N queries, S keys, D channels, n words per mask.

Keys are cut into chunks of whole tiles. A program has one block of queries and one chunk. It leaves out tiles of keys that no
query of its block attends. The softmax of a chunk is joined with the others in order. The gradients are in triton_backward.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.mask_attention.triton_backward import CANDIDATES as BACKWARD_CANDIDATES
from sprompt.ops.mask_attention.triton_backward import mask_attention_backward as mask_attention_backward
from sprompt.ops.mask_attention.triton_masks import Masks, attended, floats
from sprompt.ops.mask_conv.triton_chunks import block, cut
from sprompt.ops.triton_launch import Cost, config, launch, padded, precision, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "forward": [
        {"BLOCK_N": n, "BLOCK_S": s, "PROGRAMS": p, "num_warps": w, "num_stages": 2}
        for n, s, w in ((64, 128, 8), (64, 64, 8), (128, 64, 8), (32, 64, 8))
        for p in (528, 1056, 2112)
    ],
    **BACKWARD_CANDIDATES,
}


@triton.jit
def _forward(
    query,  # (B, H, N, D), any strides
    key,  # (B, H, S, D), any strides
    value,  # (B, H, S, D), any strides
    words,  # (B or 1, N, n) i32, any strides, or None
    empty,  # (B or 1, N) i32, contiguous: 1 for a query that attends everywhere; or None
    tops,  # (B, H, chunks, N) f32, contiguous, written: the largest score of a chunk
    totals,  # (B, H, chunks, N) f32, contiguous, written: the sum of exp(score - top)
    sums,  # (B, H, chunks, N, D) f32, contiguous, written: the sum of the values with these weights
    scale, H, N, S, D, n, chunks, chunk,  # chunk: in tiles
    query_b, query_h, query_n, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,  # strides
    words_b, words_n, words_w, empty_b,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (chunk, head and image, block of queries)."""
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q = block(query + b * query_b + h * query_h, i, N, query_n, d, D, query_d)
    keys = key + b * key_b + h * key_h
    values = value + b * value_b + h * value_h
    everywhere = i < 0
    if empty is not None:
        everywhere = tl.load(empty + b * empty_b + i, mask=i < N, other=0) != 0
    masks = words
    if words is not None:
        masks = words + b * words_b
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for t in range(c * chunk, tl.minimum((c + 1) * chunk, tl.cdiv(S, BLOCK_S))):
        bits = attended(masks, everywhere, i, N, t, S, n, words_n, words_w, BLOCK_N, BLOCK_S)
        if tl.max(tl.max(bits.to(tl.int32), axis=1), axis=0) > 0:
            s = t * BLOCK_S + tl.arange(0, BLOCK_S)
            k = block(keys, s, S, key_s, d, D, key_d)
            scores = triton_tile.dot(q, tl.trans(k), tl.zeros((BLOCK_N, BLOCK_S), tl.float32), PRECISION) * scale
            scores = tl.where(bits, scores, float("-inf"))
            now = tl.maximum(top, tl.max(scores, axis=1))
            level = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp(scores - level[:, None])
            kept = tl.exp(top - level)
            total = total * kept + tl.sum(weights, axis=1)
            v = block(values, s, S, value_s, d, D, value_d)
            acc = triton_tile.dot(triton_tile.rounded(weights, v.dtype), v, acc * kept[:, None], PRECISION)
            top = now
    place = (bh * chunks + c) * N + i
    tl.store(tops + place, top, mask=i < N)
    tl.store(totals + place, total, mask=i < N)
    tl.store(sums + place[:, None] * D + d[None, :], acc, mask=(i < N)[:, None] & (d < D)[None, :])


@triton.jit
def _join(
    tops,  # as _forward writes them
    totals,
    sums,
    out,  # (B, H, N, D), contiguous, written
    logsum,  # (B, H, N) f32, contiguous, written
    N, D, chunks, blocks,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Results from the sums of the chunks, added in order. One program per (block of queries, head and image)."""
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (i < N)[:, None] & (d < D)[None, :]
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for c in range(chunks):
        top = tl.maximum(top, tl.load(tops + (bh * chunks + c) * N + i, mask=i < N, other=float("-inf")))
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for c in range(chunks):
        place = (bh * chunks + c) * N + i
        kept = tl.exp(tl.load(tops + place, mask=i < N, other=float("-inf")) - level)
        total += kept * tl.load(totals + place, mask=i < N, other=0.0)
        acc += kept[:, None] * tl.load(sums + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    divisor = tl.where(total == 0.0, 1.0, total)
    mean = tl.div_rn(acc, tl.zeros((BLOCK_N, BLOCK_D), tl.float32) + divisor[:, None])
    row = bh * N + i
    tl.store(out + row[:, None] * D + d[None, :], triton_tile.rounded(mean, out.dtype.element_ty), mask=inside)
    tl.store(logsum + row, tl.where(total == 0.0, 0.0, level + tl.log(divisor)), mask=i < N)


def mask_attention(a: Args, out: Tensor, logsum: Tensor) -> None:
    query, key, value = a.query, a.key, a.value
    (B, H, N, D), S = query.shape, key.shape[2]
    shape = config("mask_attention.forward", query, S)
    programs = shape.pop("PROGRAMS")
    shape["BLOCK_N"], deep = min(shape["BLOCK_N"], padded(N)), padded(D)
    blocks = tiles(N, shape["BLOCK_N"])
    of_keys = cut(S, shape["BLOCK_S"], programs, B * H * blocks)
    masks = Masks.of(a)
    tops, totals = floats(query, B, H, of_keys.chunks, N), floats(query, B, H, of_keys.chunks, N)
    sums = floats(query, *tops.shape, D)
    cost = Cost(
        read=query.nbytes + key.nbytes + value.nbytes + masks.bytes,
        again=(of_keys.chunks - 1) * query.nbytes + (blocks - 1) * (key.nbytes + value.nbytes)
        + masks.again(B * H, of_keys.chunks, N),
        written=tops.nbytes + totals.nbytes + sums.nbytes,
        flops=4 * B * H * N * S * D,
    )  # fmt: skip
    launch(
        _forward, (B * H * of_keys.chunks, blocks), query, key, value, masks.words, masks.empty, tops, totals, sums,
        a.scale, H, N, S, D, masks.n, of_keys.chunks, of_keys.chunk, *query.stride(), *key.stride(), *value.stride(),
        *masks.strides, cost=cost, BLOCK_D=deep, PRECISION=precision(query), **shape,
    )  # fmt: skip
    shape = config("mask_attention.join", query)
    blocks = tiles(N, shape["BLOCK_N"])
    cost = Cost(
        read=tops.nbytes + totals.nbytes + sums.nbytes,
        again=tops.nbytes,
        written=out.nbytes + logsum.nbytes,
        flops=2 * sums.numel(),
    )
    launch(
        _join, (B * H * blocks,), tops, totals, sums, out, logsum, N, D, of_keys.chunks, blocks,
        cost=cost, BLOCK_D=deep, **shape,
    )  # fmt: skip

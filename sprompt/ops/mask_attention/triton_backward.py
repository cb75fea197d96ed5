"""Triton kernels of the gradients of mask_attention: of queries by chunks of keys, of keys and values by tiles of keys. Letters as
in triton.py. Scores are computed again, and weights follow from the saved logsum."""

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.mask_attention.triton_masks import Masks, attended, floats
from sprompt.ops.mask_conv.triton_chunks import add_chunks, block, cut
from sprompt.ops.triton_launch import Cost, config, launch, padded, precision, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "grad_query": [
        {"BLOCK_N": n, "BLOCK_S": s, "PROGRAMS": p, "num_warps": w, "num_stages": 2}
        for n, s, w in ((64, 32, 4), (64, 64, 8), (64, 128, 8), (32, 64, 8))
        for p in (528, 1056, 2112)
    ],
    "grad_keys": [
        {"BLOCK_N": n, "BLOCK_S": s, "num_warps": w, "num_stages": 2}
        for n, s, w in ((64, 64, 8), (64, 128, 8), (32, 128, 8), (128, 64, 8))
    ],
}


@triton.jit
def _means(
    grad,  # (B, H, N, D), any strides
    out,  # (B, H, N, D), any strides
    means,  # (B, H, N) f32, contiguous, written
    H, N, D, blocks,
    grad_b, grad_h, grad_n, grad_d, out_b, out_h, out_n, out_d,  # strides
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """means[b, h, i] = <grad, out>, added by increasing channel. One program per (block of queries, head and image)."""
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    of_grad = grad + b * grad_b + h * grad_h + tl.cast(i, tl.int64) * grad_n
    of_out = out + b * out_b + h * out_h + tl.cast(i, tl.int64) * out_n
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(D):
        at = tl.cast(d, tl.int64)
        g = tl.load(of_grad + at * grad_d, mask=i < N, other=0.0).to(tl.float32)
        mean += g * tl.load(of_out + at * out_d, mask=i < N, other=0.0).to(tl.float32)
    tl.store(means + bh * N + i, mean, mask=i < N)


@triton.jit
def _weights(q, k, bits, logsum, scale, PRECISION: tl.constexpr):
    """f32 (queries, keys): the weights of the softmax."""
    scores = triton_tile.dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION) * scale
    return tl.where(bits, tl.exp(scores - logsum[:, None]), 0.0)


@triton.jit
def _to_scores(weights, g, v, mean, PRECISION: tl.constexpr):
    """f32 (queries, keys): the gradient of the scores."""
    products = triton_tile.dot(g, tl.trans(v), tl.zeros((g.shape[0], v.shape[0]), tl.float32), PRECISION)
    return weights * (products - mean[:, None])


@triton.jit
def _grad_query(
    grad,  # (B, H, N, D), any strides
    query,  # (B, H, N, D), any strides
    key,  # (B, H, S, D), any strides
    value,  # (B, H, S, D), any strides
    words,  # (B or 1, N, n) i32, any strides, or None
    empty,  # (B or 1, N) i32, contiguous, or None
    logsum,  # (B, H, N) f32, contiguous
    means,  # (B, H, N) f32, contiguous
    partial,  # (B, H, chunks, N, D) f32, contiguous, written
    scale, H, N, S, D, n, chunks, chunk,  # chunk: in tiles
    grad_b, grad_h, grad_n, grad_d, query_b, query_h, query_n, query_d,  # strides
    key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d, words_b, words_n, words_w, empty_b,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries from one chunk of keys. One program per (chunk, head and image, block of queries)."""
    c = tl.program_id(0) % chunks
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q = block(query + b * query_b + h * query_h, i, N, query_n, d, D, query_d)
    g = block(grad + b * grad_b + h * grad_h, i, N, grad_n, d, D, grad_d)
    of_row = tl.load(logsum + bh * N + i, mask=i < N, other=0.0)
    mean = tl.load(means + bh * N + i, mask=i < N, other=0.0)
    keys = key + b * key_b + h * key_h
    values = value + b * value_b + h * value_h
    everywhere = i < 0
    if empty is not None:
        everywhere = tl.load(empty + b * empty_b + i, mask=i < N, other=0) != 0
    masks = words
    if words is not None:
        masks = words + b * words_b
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for t in range(c * chunk, tl.minimum((c + 1) * chunk, tl.cdiv(S, BLOCK_S))):
        bits = attended(masks, everywhere, i, N, t, S, n, words_n, words_w, BLOCK_N, BLOCK_S)
        if tl.max(tl.max(bits.to(tl.int32), axis=1), axis=0) > 0:
            s = t * BLOCK_S + tl.arange(0, BLOCK_S)
            k = block(keys, s, S, key_s, d, D, key_d)
            v = block(values, s, S, value_s, d, D, value_d)
            weights = _weights(q, k, bits, of_row, scale, PRECISION)
            to_scores = _to_scores(weights, g, v, mean, PRECISION)
            acc = triton_tile.dot(triton_tile.rounded(to_scores, k.dtype), k, acc, PRECISION)
    place = (bh * chunks + c) * N + i
    tl.store(partial + place[:, None] * D + d[None, :], acc * scale, mask=(i < N)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_keys(
    grad, query, key, value, words, empty, logsum, means,  # as for _grad_query
    grad_key,  # (B, H, S, D), contiguous, written
    grad_value,  # (B, H, S, D), contiguous, written
    scale, H, N, S, D, n, blocks,
    grad_b, grad_h, grad_n, grad_d, query_b, query_h, query_n, query_d,  # strides
    key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d, words_b, words_n, words_w, empty_b,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, from the queries in order. Blocks of queries that attend no key of the tile
    are not read. One program per (tile, head and image)."""
    t = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    s = t * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    k = block(key + b * key_b + h * key_h, s, S, key_s, d, D, key_d)
    v = block(value + b * value_b + h * value_h, s, S, value_s, d, D, value_d)
    masks = words
    if words is not None:
        masks = words + b * words_b
    to_key = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    to_value = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for first in range(0, N, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        everywhere = i < 0
        if empty is not None:
            everywhere = tl.load(empty + b * empty_b + i, mask=i < N, other=0) != 0
        bits = attended(masks, everywhere, i, N, t, S, n, words_n, words_w, BLOCK_N, BLOCK_S)
        if tl.max(tl.max(bits.to(tl.int32), axis=1), axis=0) > 0:
            q = block(query + b * query_b + h * query_h, i, N, query_n, d, D, query_d)
            g = block(grad + b * grad_b + h * grad_h, i, N, grad_n, d, D, grad_d)
            of_row = tl.load(logsum + bh * N + i, mask=i < N, other=0.0)
            mean = tl.load(means + bh * N + i, mask=i < N, other=0.0)
            weights = _weights(q, k, bits, of_row, scale, PRECISION)
            to_scores = _to_scores(weights, g, v, mean, PRECISION)
            to_value = triton_tile.dot(tl.trans(triton_tile.rounded(weights, g.dtype)), g, to_value, PRECISION)
            to_key = triton_tile.dot(tl.trans(triton_tile.rounded(to_scores, q.dtype)), q, to_key, PRECISION)
    place = (bh * S + s)[:, None] * D + d[None, :]
    inside = (s < S)[:, None] & (d < D)[None, :]
    tl.store(grad_key + place, triton_tile.rounded(to_key * scale, grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + place, triton_tile.rounded(to_value, grad_value.dtype.element_ty), mask=inside)


def mask_attention_backward(a: Args, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
    grad, query, key, value = a.grad, a.query, a.key, a.value
    (B, H, N, D), S = query.shape, key.shape[2]
    logsum, means, masks = a.logsum.contiguous(), floats(query, B, H, N), Masks.of(a)
    shape = config("mask_attention.means", query)
    blocks = tiles(N, shape["BLOCK_N"])
    cost = Cost(read=grad.nbytes + a.out.nbytes, written=means.nbytes, flops=2 * grad.numel())
    strides = *grad.stride(), *a.out.stride()
    launch(_means, (B * H * blocks,), grad, a.out, means, H, N, D, blocks, *strides, cost=cost, **shape)

    inputs = grad, query, key, value, masks.words, masks.empty, logsum, means
    strides = *grad.stride(), *query.stride(), *key.stride(), *value.stride(), *masks.strides
    rows, both = grad.nbytes + query.nbytes + logsum.nbytes + means.nbytes, key.nbytes + value.nbytes
    options = {"BLOCK_D": padded(D), "PRECISION": precision(query)}

    shape = config("mask_attention.grad_query", query, S)
    programs = shape.pop("PROGRAMS")
    shape["BLOCK_N"] = min(shape["BLOCK_N"], padded(N))
    blocks = tiles(N, shape["BLOCK_N"])
    of_keys = cut(S, shape["BLOCK_S"], programs, B * H * blocks)
    partial = floats(query, B * H, of_keys.chunks, N, D)
    cost = Cost(
        read=rows + both + masks.bytes,
        again=(of_keys.chunks - 1) * rows + (blocks - 1) * both + masks.again(B * H, of_keys.chunks, N),
        written=partial.nbytes,
        flops=6 * B * H * N * S * D,
    )
    launch(
        _grad_query, (B * H * of_keys.chunks, blocks), *inputs, partial, a.scale, H, N, S, D, masks.n, of_keys.chunks,
        of_keys.chunk, *strides, cost=cost, **options, **shape,
    )  # fmt: skip
    add_chunks(partial, grad_query.flatten(0, 1))

    shape = config("mask_attention.grad_keys", query)
    shape["BLOCK_N"] = min(shape["BLOCK_N"], padded(N))
    blocks = tiles(S, shape["BLOCK_S"])
    cost = Cost(
        read=rows + both + masks.bytes,
        again=(blocks - 1) * rows + masks.again(B * H, blocks, N),
        written=grad_key.nbytes + grad_value.nbytes,
        flops=8 * B * H * N * S * D,
    )
    launch(
        _grad_keys, (B * H * blocks,), *inputs, grad_key, grad_value, a.scale, H, N, S, D, masks.n, blocks, *strides,
        cost=cost, **options, **shape,
    )  # fmt: skip

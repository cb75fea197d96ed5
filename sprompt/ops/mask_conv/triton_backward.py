"""Triton kernels of the gradients of mask_conv, mask_pool and mask_update. The letters are those of triton.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.mask_conv.op import as_update, reached
from sprompt.ops.mask_conv.triton_chunks import add_chunks, block, cut, rows, split
from sprompt.ops.triton_launch import Cost, config, launch, padded, precision, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "grad_features": [
        {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_P": 64, "PROGRAMS": 528, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 128, "BLOCK_C": 256, "BLOCK_P": 64, "PROGRAMS": 132, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_P": 128, "PROGRAMS": 264, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_P": 64, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 2},
        {"BLOCK_N": 16, "BLOCK_C": 128, "BLOCK_P": 128, "PROGRAMS": 1056, "num_warps": 8, "num_stages": 2},
    ],
    "grad_kernels": [
        {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_P": 64, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_P": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 2},
        {"BLOCK_N": 128, "BLOCK_C": 256, "BLOCK_P": 64, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_P": 32, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 2},
        {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_P": 16, "PROGRAMS": 528, "num_warps": 8, "num_stages": 3},
    ],
}


@triton.jit
def _dot_bits(x, bits, acc):
    """acc + x bits, x (M, K), bits bool (K, N). Products with 0 and 1 are exact on the tensor cores. float32 is multiplied as
    three bfloat16 parts."""
    if x.dtype == tl.float32:
        weights = bits.to(tl.float32).to(tl.bfloat16)
        high, middle, low = split(x)
        acc = triton_tile.dot(low, weights, acc, "ieee")
        acc = triton_tile.dot(middle, weights, acc, "ieee")
        return triton_tile.dot(high, weights, acc, "ieee")
    else:
        return triton_tile.dot(x, bits.to(tl.float32).to(x.dtype), acc, "ieee")


@triton.jit
def _grad_features(
    grad,  # (B, N, P), any strides; None without CONV
    kernels,  # (B, N, C), any strides; None without CONV
    grad_pooled,  # (B, N, C), any strides; None without POOL
    words,  # (B, N, n) i32, any strides; None without POOL
    out,  # (B, C, P), contiguous, written
    N, C, P, n, chunks, chunk,  # chunk: in tiles
    grad_b, grad_n, grad_p, kernels_b, kernels_n, kernels_c, pooled_b, pooled_n, pooled_c, words_b, words_n, words_w,  # strides
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ONE: tl.constexpr, CONV: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, c, p] = sum over m of kernels[b, m, c] grad[b, m, p] (CONV) + bit p of words[b, m] times grad_pooled[b, m, c]
    (POOL), by increasing blocks of m. ONE: N <= BLOCK_N, and a program reads kernels and grad_pooled once.
    One program per (chunk and image, block of BLOCK_C channels)."""
    k = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.arange(0, BLOCK_N)
    if CONV:
        grad += b * grad_b
        kernels += b * kernels_b
        if ONE:
            weights = block(kernels, c, C, kernels_c, m, N, kernels_n)
    if POOL:
        words += b * words_b
        grad_pooled += b * pooled_b
        if ONE:
            pooled = block(grad_pooled, c, C, pooled_c, m, N, pooled_n)
    for t in range(k * chunk, tl.minimum((k + 1) * chunk, tl.cdiv(P, BLOCK_P))):
        p = t * BLOCK_P + tl.arange(0, BLOCK_P)
        w = t * (BLOCK_P // 32) + tl.arange(0, BLOCK_P // 32)
        sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        if ONE:
            if CONV:
                sums = triton_tile.dot(weights, block(grad, m, N, grad_n, p, P, grad_p), sums, PRECISION)
            if POOL:
                packed = block(words, m, N, words_n, w, n, words_w)
                sums = _dot_bits(pooled, triton_tile.unpack(packed, BLOCK_N, BLOCK_P // 32), sums)
        else:
            if CONV:
                for first in range(0, N, BLOCK_N):
                    some = block(kernels, c, C, kernels_c, first + m, N, kernels_n)
                    sums = triton_tile.dot(some, block(grad, first + m, N, grad_n, p, P, grad_p), sums, PRECISION)
            if POOL:
                for first in range(0, N, BLOCK_N):
                    part = block(grad_pooled, c, C, pooled_c, first + m, N, pooled_n)
                    packed = block(words, first + m, N, words_n, w, n, words_w)
                    sums = _dot_bits(part, triton_tile.unpack(packed, BLOCK_N, BLOCK_P // 32), sums)
        place = (b * C + c)[:, None] * P + p[None, :]
        tl.store(out + place, triton_tile.rounded(sums, out.dtype.element_ty), mask=(c < C)[:, None] & (p < P)[None, :])


@triton.jit
def _grad_kernels(
    grad,  # (B, N, P), any strides
    features,  # (B, C, P), any strides
    partial,  # (B, chunks, N, C) f32, contiguous, written
    N, C, P, chunks, chunk,  # chunk: in tiles
    grad_b, grad_n, grad_p, features_b, features_c, features_p,  # strides
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[b, k, m, c] = sum over the p of chunk k of grad[b, m, p] features[b, c, p].
    One program per (chunk and image, block of BLOCK_N kernels, block of BLOCK_C channels)."""
    k = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    m = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    grad += b * grad_b
    features += b * features_b
    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for t in range(k * chunk, tl.minimum((k + 1) * chunk, tl.cdiv(P, BLOCK_P))):
        p = t * BLOCK_P + tl.arange(0, BLOCK_P)
        g = block(grad, m, N, grad_n, p, P, grad_p)
        x = block(features, c, C, features_c, p, P, features_p)
        sums = triton_tile.dot(g, tl.trans(x), sums, PRECISION)
    place = ((b * chunks + k) * N + m)[:, None] * C + c[None, :]
    tl.store(partial + place, sums, mask=(m < N)[:, None] & (c < C)[None, :])


# -- launches


def _to_features(
    out: Tensor, grad: Tensor | None, kernels: Tensor | None, grad_pooled: Tensor | None, words: Tensor | None
) -> None:
    """Fills out (B, C, P) from grad and kernels, from grad_pooled and words, or from both pairs."""
    B, C, P = out.shape
    some = grad if grad is not None else grad_pooled
    assert some is not None
    N, n, size = some.shape[1], words_for(P), out.element_size()
    options = dict(config("mask_conv.grad_features", out))
    one = options["BLOCK_N"] >= N
    options["BLOCK_N"] = min(options["BLOCK_N"], padded(N))
    options["BLOCK_C"] = min(options["BLOCK_C"], padded(C))
    blocks = tiles(C, options["BLOCK_C"])
    pieces = cut(P, options["BLOCK_P"], options.pop("PROGRAMS"), B * blocks)
    loops = pieces.chunks if one else pieces.tiles
    # pixels: bytes that every block of channels reads. small: bytes that every chunk or tile reads.
    pixels = (B * N * P * size if grad is not None else 0) + (B * N * n * 4 if words is not None else 0)
    small = B * N * C * size * ((grad is not None) + (words is not None))
    launch(
        _grad_features,
        (B * pieces.chunks, blocks),
        grad,
        kernels,
        grad_pooled,
        words,
        out,
        N,
        C,
        P,
        n,
        pieces.chunks,
        pieces.chunk,
        *(
            stride
            for x in (grad, kernels, grad_pooled, words)
            for stride in (x.stride() if x is not None else (0, 0, 0))
        ),
        cost=Cost(
            read=pixels + small,
            again=max(blocks - 1, 0) * pixels + max(loops - 1, 0) * small,
            written=out.nbytes,
            flops=2 * B * N * C * P * ((grad is not None) + (words is not None)),
        ),
        ONE=one,
        CONV=grad is not None,
        POOL=words is not None,
        PRECISION=precision(out),
        **options,
    )


def _to_kernels(out: Tensor, grad: Tensor, features: Tensor) -> None:
    """Fills out (B, N, C) with grad (B, N, P) features^T."""
    B, N, C = out.shape
    P = grad.shape[2]
    options = dict(config("mask_conv.grad_kernels", out))
    options["BLOCK_N"] = min(options["BLOCK_N"], padded(N))
    options["BLOCK_C"] = min(options["BLOCK_C"], padded(C))
    over_n, over_c = tiles(N, options["BLOCK_N"]), tiles(C, options["BLOCK_C"])
    pieces = cut(P, options["BLOCK_P"], options.pop("PROGRAMS"), B * over_n * over_c)
    partial = out.new_empty((B, pieces.chunks, N, C), dtype=torch.float32)
    launch(
        _grad_kernels,
        (B * pieces.chunks, over_n, over_c),
        grad,
        features,
        partial,
        N,
        C,
        P,
        pieces.chunks,
        pieces.chunk,
        *grad.stride(),
        *features.stride(),
        cost=Cost(
            read=grad.nbytes + features.nbytes,
            again=max(over_c - 1, 0) * grad.nbytes + max(over_n - 1, 0) * features.nbytes,
            written=partial.nbytes,
            flops=2 * B * N * C * P,
        ),
        PRECISION=precision(out),
        **options,
    )
    add_chunks(partial, out)


def mask_update_backward(a: Args, grad_features: Tensor, grad_kernels: Tensor) -> None:
    grad = None if a.grad_logits is None else rows(a.grad_logits.to(a.features.dtype))
    pooled = None if a.grad_pooled is None else a.grad_pooled.to(a.features.dtype)
    kernels, words = None if grad is None else a.kernels, None if pooled is None else a.words
    to_features, to_kernels = reached(a, grad_features, grad_kernels)
    if to_features is not None:
        _to_features(to_features.flatten(2), grad, kernels, pooled, words)
    if to_kernels is not None:
        _to_kernels(to_kernels, grad, rows(a.features))


def mask_conv_backward(a: Args, grad_features: Tensor, grad_kernels: Tensor) -> None:
    mask_update_backward(as_update(a), grad_features, grad_kernels)


def mask_pool_backward(a: Args, out: Tensor) -> None:
    _to_features(out.flatten(2), None, None, a.grad, a.words)

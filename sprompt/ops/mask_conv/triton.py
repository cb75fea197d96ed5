"""Triton kernels of mask_conv, mask_bits, mask_pool and mask_update. B images, N kernels or masks, C channels, P pixels, n words per mask.

All run `_forward` with the same tiles, so mask_update equals mask_conv and mask_pool to the bit. Pixels are cut into
chunks of whole tiles. Sums over pixels are added within a chunk, then over the chunks, both in order. The gradients are in
triton_backward.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.mask_conv.triton_backward import CANDIDATES as BACKWARD_CANDIDATES
from sprompt.ops.mask_conv.triton_backward import mask_conv_backward as mask_conv_backward
from sprompt.ops.mask_conv.triton_backward import mask_pool_backward as mask_pool_backward
from sprompt.ops.mask_conv.triton_backward import mask_update_backward as mask_update_backward
from sprompt.ops.mask_conv.triton_chunks import Chunks, add_chunks, block, cut, rows, split
from sprompt.ops.triton_launch import Cost, config, launch, padded, precision, tiles

#: Other tiles for a tuner to try. HELD: up to this number of channels, a program holds all channels of a tile. With more
#: channels (0: always), features are read once for the logits, in steps of STEP channels, and once for the sums, BLOCK_D
#: channels per program. SKIP: leave empty tiles out.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "forward": [
        {"BLOCK_N": 128, "BLOCK_P": 64, "HELD": 256, "SKIP": 0, "PROGRAMS": 132, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_P": 64, "HELD": 256, "SKIP": 1, "PROGRAMS": 264, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 128, "BLOCK_P": 32, "HELD": 256, "SKIP": 1, "PROGRAMS": 132, "num_warps": 8, "num_stages": 4},
        {"BLOCK_N": 64, "BLOCK_P": 64, "HELD": 256, "SKIP": 1, "PROGRAMS": 264, "num_warps": 4, "num_stages": 2},
        {"BLOCK_N": 64, "BLOCK_P": 64, "HELD": 256, "SKIP": 1, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_P": 64, "HELD": 0, "SKIP": 1, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_P": 64, "HELD": 0, "SKIP": 0, "PROGRAMS": 264, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 64, "BLOCK_P": 64, "HELD": 0, "SKIP": 1, "PROGRAMS": 528, "num_warps": 4, "num_stages": 2},
    ],
}
for entry in CANDIDATES["forward"]:
    entry |= {"STEP": 64 if entry["HELD"] else 16, "BLOCK_D": 128}
CANDIDATES |= BACKWARD_CANDIDATES


@triton.jit
def _bits_dot(bits, x, acc):
    """acc + bits x, bits bool (M, K), x (K, N). Products with 0 and 1 are exact on the tensor cores. float32 is multiplied as
    three bfloat16 parts."""
    if x.dtype == tl.float32:
        weights = bits.to(tl.float32).to(tl.bfloat16)
        high, middle, low = split(x)
        acc = triton_tile.dot(weights, low, acc, "ieee")
        acc = triton_tile.dot(weights, middle, acc, "ieee")
        return triton_tile.dot(weights, high, acc, "ieee")
    else:
        return triton_tile.dot(bits.to(tl.float32).to(x.dtype), x, acc, "ieee")


@triton.jit
def _forward(
    features,  # (B, C, P), any strides
    kernels,  # (B, N, C), any strides; None without CONV
    logits,  # (B, N, P), contiguous, written; None without CONV, and where only their signs are wanted
    words,  # (B, N, n) i32, any strides: written if CONV (None: not written), else read
    partial,  # (B, chunks, N, C) f32, contiguous, written; None without POOL
    N, C, P, n, chunks, chunk,  # chunk: in tiles
    features_b, features_c, features_p, kernels_b, kernels_n, kernels_c, words_b, words_n, words_w,  # strides
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    HELD: tl.constexpr, SKIP: tl.constexpr, CONV: tl.constexpr, POOL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """CONV: logits[b, m, p] = sum over c of kernels[b, m, c] features[b, c, p]; bit p of words[b, m] = stored logits > 0, or
    rounded logits >= 0 if they are not stored.
    POOL: partial[b, k, m, c] = sum over the p of chunk k of bit p of words[b, m] times features[b, c, p].
    HELD: BLOCK_C = BLOCK_D >= C, and one tile of features is used for both. Without HELD a launch computes either CONV, in
    steps of BLOCK_C channels, or POOL. One program per (chunk and image, block of BLOCK_N kernels, block of BLOCK_D channels of
    the sums). SKIP: a tile without a set bit in the block of kernels is left out of the sums; without CONV its features are not
    read."""
    k = tl.program_id(0) % chunks
    b = (tl.program_id(0) // chunks).to(tl.int64)
    m = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    features += b * features_b
    words_m = words
    if words is not None:
        words_m = words + b * words_b + tl.cast(m, tl.int64)[:, None] * words_n
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CONV:
        kernels += b * kernels_b
        if logits is not None:
            logits_m = logits + (b * N + m)[:, None] * P
        if HELD:
            weights = block(kernels, m, N, kernels_n, c, C, kernels_c)
    for t in range(k * chunk, tl.minimum((k + 1) * chunk, tl.cdiv(P, BLOCK_P))):
        p = t * BLOCK_P + tl.arange(0, BLOCK_P)
        w = t * (BLOCK_P // 32) + tl.arange(0, BLOCK_P // 32)
        in_words = (m < N)[:, None] & (w < n)[None, :]
        if CONV:
            products = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            if HELD:
                x = block(features, c, C, features_c, p, P, features_p)
                products = triton_tile.dot(weights, x, products, PRECISION)
            else:
                for first in range(0, C, BLOCK_C):
                    some = block(kernels, m, N, kernels_n, first + c, C, kernels_c)
                    part = block(features, first + c, C, features_c, p, P, features_p)
                    products = triton_tile.dot(some, part, products, PRECISION)
            stored = triton_tile.rounded(products, features.dtype.element_ty)
            if logits is not None:
                tl.store(logits_m + p[None, :], stored, mask=(m < N)[:, None] & (p < P)[None, :])
                bits = (stored.to(tl.float32) > 0) & (p < P)[None, :]
            else:
                bits = (stored.to(tl.float32) >= 0) & (p < P)[None, :]
            if words is not None:
                packed = triton_tile.pack(bits, BLOCK_N, BLOCK_P // 32)
                tl.store(words_m + tl.cast(w, tl.int64)[None, :] * words_w, packed, mask=in_words)
        else:
            packed = tl.load(words_m + tl.cast(w, tl.int64)[None, :] * words_w, mask=in_words, other=0)
        if POOL:
            filled = 1
            if SKIP:
                filled = tl.max(tl.max((packed != 0).to(tl.int32), axis=1), axis=0)
            if filled > 0:
                if CONV:
                    sums = _bits_dot(bits, tl.trans(x), sums)
                else:
                    y = block(features, d, C, features_c, p, P, features_p)
                    sums = _bits_dot(triton_tile.unpack(packed, BLOCK_N, BLOCK_P // 32), tl.trans(y), sums)
    if POOL:
        place = ((b * chunks + k) * N + m)[:, None] * C + d[None, :]
        tl.store(partial + place, sums, mask=(m < N)[:, None] & (d < C)[None, :])


# -- launches


class _Pass(NamedTuple):
    """One run of `_forward` over features (B, C, P). Its tiles depend only on the shapes and are the same for all three ops."""

    features: Tensor
    N: int
    options: dict[str, Any]
    cut: Chunks
    whole: bool  #: a program holds all channels

    @staticmethod
    def over(features: Tensor, N: int) -> "_Pass":
        x = rows(features)
        B, C, P = x.shape
        options: dict[str, Any] = dict(config("mask_conv.forward", x, padded(C)))
        held, step, programs = (options.pop(name) for name in ("HELD", "STEP", "PROGRAMS"))
        whole = padded(C) <= held
        options["BLOCK_N"] = min(options["BLOCK_N"], padded(N))
        options["BLOCK_C"] = padded(C) if whole else min(step, padded(C))
        options["BLOCK_D"] = padded(C) if whole else min(options["BLOCK_D"], padded(C))
        return _Pass(x, N, options, cut(P, options["BLOCK_P"], programs, B * tiles(N, options["BLOCK_N"])), whole)

    def partial(self) -> Tensor:
        B, C, _ = self.features.shape
        return self.features.new_empty((B, self.cut.chunks, self.N, C), dtype=torch.float32)

    def run(self, kernels: Tensor | None, logits: Tensor | None, words: Tensor | None, partial: Tensor | None) -> None:
        x = self.features
        B, C, P = x.shape
        N, n = self.N, words_for(P)
        blocks = tiles(N, self.options["BLOCK_N"])
        # Without sums, one block of channels is enough. With C = 0 one program must still write zeros.
        deep = 1 if partial is None else max(1, tiles(C, self.options["BLOCK_D"]))
        loops = self.cut.chunks if self.whole else self.cut.tiles
        read, again, written = x.nbytes, max(blocks - 1, 0) * x.nbytes, 0
        if kernels is not None:
            read += kernels.nbytes
            again += max(loops - 1, 0) * kernels.nbytes
            written += B * N * P * x.element_size() if logits is not None else 0
            written += B * N * n * 4 if words is not None else 0
        else:
            # Worst case: no tile is empty.
            read += B * N * n * 4
            again += (deep - 1) * B * N * n * 4
        if partial is not None:
            written += partial.nbytes
        flops = 2 * B * N * C * P * ((kernels is not None) + (partial is not None))
        launch(
            _forward,
            (B * self.cut.chunks, blocks, deep),
            x,
            kernels,
            logits,
            words,
            partial,
            N,
            C,
            P,
            n,
            self.cut.chunks,
            self.cut.chunk,
            *x.stride(),
            *(kernels.stride() if kernels is not None else (0, 0, 0)),
            *(words.stride() if words is not None else (0, 0, 0)),
            cost=Cost(read=read, again=again, written=written, flops=flops),
            HELD=self.whole,
            CONV=kernels is not None,
            POOL=partial is not None,
            PRECISION=precision(x),
            **self.options,
        )


def mask_conv(a: Args, logits: Tensor) -> None:
    _Pass.over(a.features, a.kernels.shape[1]).run(a.kernels, logits, None, None)


def mask_bits(a: Args, words: Tensor) -> None:
    _Pass.over(a.features, a.kernels.shape[1]).run(a.kernels, None, words, None)


def mask_pool(a: Args, pooled: Tensor) -> None:
    task = _Pass.over(a.features, a.words.shape[1])
    partial = task.partial()
    task.run(None, None, a.words, partial)
    add_chunks(partial, pooled)


def mask_update(a: Args, logits: Tensor, pooled: Tensor, words: Tensor) -> None:
    task = _Pass.over(a.features, a.kernels.shape[1])
    partial = task.partial()
    if task.whole:
        task.run(a.kernels, logits, words, partial)
    else:
        task.run(a.kernels, logits, words, None)
        task.run(None, None, words, partial)
    add_chunks(partial, pooled)

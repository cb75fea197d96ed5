"""The masks of mask_attention in its Triton kernels: tiles of bits, and the queries that attend everywhere."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.triton_launch import Cost, config, launch, tiles


@triton.jit
def attended(
    words, everywhere, i, N, t, S, n, words_n, words_w, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """bool (BLOCK_N, BLOCK_S): which keys of tile t the queries i attend. words (N, n) of one image, or None: all keys.
    everywhere bool (BLOCK_N): the queries that attend all keys."""
    s = t * BLOCK_S + tl.arange(0, BLOCK_S)
    bits = (i < N)[:, None] & (s < S)[None, :]
    if words is not None:
        w = t * (BLOCK_S // 32) + tl.arange(0, BLOCK_S // 32)
        place = tl.cast(i, tl.int64)[:, None] * words_n + tl.cast(w, tl.int64)[None, :] * words_w
        packed = tl.load(words + place, mask=(i < N)[:, None] & (w < n)[None, :], other=0)
        bits = bits & (triton_tile.unpack(packed, BLOCK_N, BLOCK_S // 32) | everywhere[:, None])
    return bits


@triton.jit
def _empty_rows(
    words,  # (B, N, n) i32, any strides
    empty,  # (B, N) i32, contiguous, written
    N, n, blocks, words_b, words_n, words_w,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """empty[b, i] = 1 if no bit of words[b, i] is set, else 0. One program per (block of queries, image)."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = words + b * words_b + tl.cast(i, tl.int64)[:, None] * words_n
    filled = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, n, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        some = tl.load(
            rows + tl.cast(w, tl.int64)[None, :] * words_w, mask=(i < N)[:, None] & (w < n)[None, :], other=0
        )
        filled = filled | tl.max((some != 0).to(tl.int32), axis=1)
    tl.store(empty + b * N + i, 1 - filled, mask=i < N)


class Masks(NamedTuple):
    """The masks of one call, as the kernels take them."""

    words: Tensor | None
    empty: Tensor | None  #: None: no query attends everywhere because its mask is empty
    n: int
    strides: tuple[int, int, int, int]  #: of words, and of the images of empty; 0 for images that share the masks
    bytes: int  #: of words and empty

    @staticmethod
    def of(a: Args) -> "Masks":
        words = a.words
        if words is None:
            return Masks(None, None, 0, (0, 0, 0, 0), 0)
        images, N, n = words.shape
        shared = images == 1
        empty = None
        if a.empty_all:
            empty = words.new_empty((images, N))
            shape = config("mask_attention.empty_rows", words)
            blocks = tiles(N, shape["BLOCK_N"])
            cost = Cost(read=words.nbytes, written=empty.nbytes)
            launch(_empty_rows, (images * blocks,), words, empty, N, n, blocks, *words.stride(), cost=cost, **shape)
        strides = (0 if shared else words.stride(0), words.stride(1), words.stride(2), 0 if shared else N)
        return Masks(words, empty, n, strides, words.nbytes + (0 if empty is None else empty.nbytes))

    def again(self, heads: int, parts: int, N: int) -> int:
        """Bytes that a launch reads more often than once, if `heads` heads in all images read every word once, and `empty` once
        in each of `parts` parts."""
        if self.words is None:
            return 0
        read = heads * N * self.n * 4 + (0 if self.empty is None else heads * parts * N * 4)
        return read - self.bytes


def floats(like: Tensor, *sizes: int) -> Tensor:
    """A new float32 tensor on the device of `like`."""
    return like.new_empty(sizes, dtype=torch.float32)

"""What the Triton kernels of mask_conv's room share: blocks of matrices, exact float32 sums under bits, and sums in chunks.
B images, N kernels or masks, C channels, P pixels."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import tile
from sprompt.ops.launch import Cost, config, launch, tiles


@triton.jit
def block(base, row, rows, row_stride, column, columns, column_stride):
    """Rows and columns of a matrix of any strides, 0 behind its ends."""
    place = tl.cast(row, tl.int64)[:, None] * row_stride + tl.cast(column, tl.int64)[None, :] * column_stride
    return tl.load(base + place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def split(x):
    """float32 -> three bfloat16 whose sum is x: 8 bits of its significand each, cut off, not rounded (so none overflows)."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    low = rest - middle
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def _add_chunks(
    partial,  # (B, chunks, M) f32, contiguous
    out,  # (B, M), contiguous, written
    M, chunks, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, i] = sum over k of partial[b, k, i], by increasing k. One program a (block of BLOCK elements and image)."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        sums += tl.load(partial + (b * chunks + k) * M + i, mask=i < M, other=0.0)
    tl.store(out + b * M + i, tile.rounded(sums, out.dtype.element_ty), mask=i < M)


# -- launches


class Chunks(NamedTuple):
    """How the pixels of an image are cut; of shapes and configuration alone."""

    tiles: int  #: of BLOCK_P pixels, an image
    chunk: int  #: tiles a chunk
    chunks: int  #: an image


def cut(pixels: int, block: int, programs: int, others: int) -> Chunks:
    """Chunks for about `programs` programs in all, `others` of which each chunk of an image has already."""
    count = tiles(pixels, block)
    chunk = max(1, tiles(count, max(1, tiles(programs, max(others, 1)))))
    return Chunks(count, chunk, tiles(count, chunk))


def rows(x: Tensor) -> Tensor:
    """(B, rows, H, W) -> (B, rows, P); copied only where neither pixels nor rows are neighbours in memory."""
    flat = x.flatten(2)
    return flat if flat.stride(2) in (0, 1) or flat.stride(1) == 1 or flat.numel() == 0 else flat.contiguous()


def add_chunks(partial: Tensor, out: Tensor) -> None:
    """partial (B, chunks, N, C) f32 -> out (B, N, C); no chunks give 0."""
    B, chunks, N, C = partial.shape
    block = config("mask_conv.add_chunks", out)
    blocks = tiles(N * C, block["BLOCK"])
    cost = Cost(read=partial.nbytes, written=out.nbytes, flops=partial.numel())
    launch(_add_chunks, (B * blocks,), partial, out, N * C, chunks, blocks, cost=cost, **block)

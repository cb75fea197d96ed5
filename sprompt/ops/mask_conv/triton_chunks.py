"""Common parts of the Triton kernels of mask_conv: blocks of matrices, exact float32 sums under bits, and sums in chunks. B
images, N kernels or masks, C channels, P pixels."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.triton_launch import Cost, config, launch, tiles


@triton.jit
def block(base, row, rows, row_stride, column, columns, column_stride):
    """A block of rows and columns of a matrix with any strides. It is 0 behind the ends of the matrix."""
    place = tl.cast(row, tl.int64)[:, None] * row_stride + tl.cast(column, tl.int64)[None, :] * column_stride
    return tl.load(base + place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def split(x):
    """float32 -> three bfloat16 with the sum x. Each has 8 bits of x's significand, cut off and not rounded, so none
    overflows."""
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
    """out[b, i] = sum over k of partial[b, k, i], by increasing k. One program per (block of BLOCK elements and image)."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        sums += tl.load(partial + (b * chunks + k) * M + i, mask=i < M, other=0.0)
    tl.store(out + b * M + i, triton_tile.rounded(sums, out.dtype.element_ty), mask=i < M)


# -- launches


class Chunks(NamedTuple):
    """How the pixels of an image are cut. It depends only on shapes and configuration."""

    tiles: int  #: tiles of BLOCK_P pixels per image
    chunk: int  #: tiles per chunk
    chunks: int  #: chunks per image


def cut(pixels: int, block: int, programs: int, others: int) -> Chunks:
    """Cuts an image's pixels so that a launch has about `programs` programs. Each chunk has `others` programs."""
    count = tiles(pixels, block)
    chunk = max(1, tiles(count, max(1, tiles(programs, max(others, 1)))))
    return Chunks(count, chunk, tiles(count, chunk))


def rows(x: Tensor) -> Tensor:
    """(B, rows, H, W) -> (B, rows, P). Copies only if neither pixels nor rows are neighbours in memory."""
    flat = x.flatten(2)
    return flat if flat.stride(2) in (0, 1) or flat.stride(1) == 1 or flat.numel() == 0 else flat.contiguous()


def add_chunks(partial: Tensor, out: Tensor) -> None:
    """out (B, N, C) = sum of partial (B, chunks, N, C) f32 over the chunks. Without chunks it is 0."""
    B, chunks, N, C = partial.shape
    block = config("mask_conv.add_chunks", out)
    blocks = tiles(N * C, block["BLOCK"])
    cost = Cost(read=partial.nbytes, written=out.nbytes, flops=partial.numel())
    launch(_add_chunks, (B * blocks,), partial, out, N * C, chunks, blocks, cost=cost, **block)

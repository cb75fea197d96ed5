"""Triton functions of the ops at points: the points, where they lie in a map, the values there, and sums of fixed point of what
points add to the cells around them. Arithmetic that decides where a point lies and which points are chosen equals the
reference to the bit, so kernels with it are launched with fp_fusion=False."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: A limit of a map whose whole gradient is NaN.
NOT_FINITE = tl.constexpr(1 << 20)
#: Products below this power of two are below the resolution of float sums of normal numbers.
LEAST_EXPONENT = tl.constexpr(-80)


@triton.jit
def coordinates(seed, points, m, i, real, points_m, points_t, points_c):
    """x and y of points i of mask m (i64): drawn as by philox.py, or given (.., T, 2). Where not real, they mean nothing."""
    if points is None:
        zero = tl.zeros(i.shape, tl.uint32)
        low, high = zero + m.to(tl.uint32), zero + (m >> 32).to(tl.uint32)
        first, second, _, _ = tl.philox(tl.load(seed), low, high, i.to(tl.uint32), zero)
        return (first >> 8).to(tl.float32) * (1 / 16777216), (second >> 8).to(tl.float32) * (1 / 16777216)
    else:
        place = points + m * points_m + i.to(tl.int64) * points_t
        return tl.load(place, mask=real, other=0.0), tl.load(place + points_c, mask=real, other=0.0)


@triton.jit
def taps(x, y, h, w):
    """Where points lie in maps of h x w cells: column and row of the upper left of the four cells around a point, the fractions,
    and whether one of the four cells lies in the map."""
    width, height = tl.cast(w, tl.float32), tl.cast(h, tl.float32)
    px, py = x * width - 0.5, y * height - 0.5
    inside = (px > -1.0) & (px < width) & (py > -1.0) & (py < height)
    px, py = tl.where(inside, px, -1.0), tl.where(inside, py, -1.0)
    column, row = tl.floor(px), tl.floor(py)
    return column.to(tl.int32), row.to(tl.int32), px - column, py - row, inside


@triton.jit
def _cell(maps, column, row, inside, h, w, stride_y, stride_x):
    """The cell of a float map, or the pixel of a mask (words, i32); 0 outside of the map and where not `inside`. f32."""
    known = inside & (column >= 0) & (column < w) & (row >= 0) & (row < h)
    if maps.dtype.element_ty == tl.int32:
        pixel = row * w + column
        word = tl.load(maps + (pixel >> 5).to(tl.int64) * stride_x, mask=known, other=0)
        return ((word >> (pixel & 31)) & 1).to(tl.float32)
    else:
        offset = row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
        return tl.load(maps + offset, mask=known, other=0.0).to(tl.float32)


@triton.jit
def values(maps, column, row, fx, fy, inside, h, w, stride_y, stride_x):
    """The values of maps (pointers that broadcast with the points) at points, f32."""
    a = _cell(maps, column, row, inside, h, w, stride_y, stride_x)
    b = _cell(maps, column + 1, row, inside, h, w, stride_y, stride_x)
    upper = a + fx * (b - a)
    a = _cell(maps, column, row + 1, inside, h, w, stride_y, stride_x)
    b = _cell(maps, column + 1, row + 1, inside, h, w, stride_y, stride_x)
    lower = a + fx * (b - a)
    return upper + fy * (lower - upper)


@triton.jit
def logistic(z):
    """sigmoid(z), 1 - sigmoid(z) without cancellation, and log(1 + e^z)."""
    e = tl.exp(-tl.abs(z))
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    # For small e, 1 + e would keep too few digits.
    small = e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25)))
    rest = tl.where(e < 0.03125, small, tl.log(1.0 + e))
    return tl.where(z >= 0, near, far), tl.where(z >= 0, far, near), tl.where(z > 0, z, 0.0) + rest


# -- sums of fixed point: integers, so the order of the additions has no influence


@triton.jit
def exponent(x):
    """e with x < 2^e, i32, for x >= 0; at least LEAST_EXPONENT, and 129 for infinity and NaN."""
    return tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 126, LEAST_EXPONENT)


@triton.jit
def _power_of_2(e):
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_shares(
    cells, value, column, row, fx, fy, real, h, w, limit, room,
    MARK: tl.constexpr,
):  # fmt: skip
    """Adds the shares of the four cells in `value` (|value| < 2^limit) to cells (h, w) i64, in units of 2^(limit - room).
    Shares that are not finite are left out. MARK: writes NaN to cells (h, w) for these, and does nothing else."""
    first = (room - limit) >> 1  # 2^(room - limit) may be beyond float
    second = room - limit - first
    for corner in tl.static_range(4):
        j, i = column + corner % 2, row + corner // 2
        share = value * (fx if corner % 2 == 1 else 1.0 - fx) * (fy if corner // 2 == 1 else 1.0 - fy)
        known = real & (i >= 0) & (i < h) & (j >= 0) & (j < w)
        finite = tl.abs(share) < float("inf")
        if MARK:
            nan = (share * 0.0 + float("nan")).to(cells.dtype.element_ty)
            tl.store(cells + (i * w + j), nan, mask=known & (finite == 0))
        else:
            units = tl.where(finite, share, 0.0) * _power_of_2(first) * _power_of_2(second)
            tl.atomic_add(cells + (i * w + j), units.to(tl.int64), mask=known & finite, sem="relaxed")


@triton.jit
def _convert(
    sums,  # (maps, cells) i64, contiguous
    limits,  # (maps) i32, contiguous
    out,  # (maps, cells), contiguous, written
    cells, blocks, room,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of fixed point as floats. One program per (map, block of cells)."""
    m = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    limit = tl.load(limits + m)
    known = tl.where(limit == NOT_FINITE, 0, limit - room)
    first = known >> 1
    total = tl.load(sums + m * cells + i, mask=i < cells, other=0).to(tl.float32)
    total = total * _power_of_2(first) * _power_of_2(known - first)
    total = tl.where(limit == NOT_FINITE, float("nan"), total)
    tl.store(out + m * cells + i, triton_tile.rounded(total, out.dtype.element_ty), mask=i < cells)


# -- launches


class Source(NamedTuple):
    """The points of a call: drawn from a seed, or given."""

    seed: Tensor | None
    points: Tensor | None

    @property
    def strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.points is None else self.points.stride()

    def bytes(self, programs: int, count: int) -> int:
        """What `programs` programs load, which read `count` points together."""
        return 8 * programs if self.points is None else 8 * count


def loaded(maps: Tensor, count: int) -> Cost:
    """The bytes of the cells around `count` points of maps or masks, if all of them lie in their map."""
    loads = 4 * maps.element_size() * count
    read = min(loads, maps.nbytes)
    return Cost(read=read, again=loads - read)


def map_strides(maps: Tensor) -> tuple[int, ...]:
    """Of the batch dimensions, rows and cells; for words: of the batch dimensions, 0, of words."""
    return maps.stride() if maps.is_floating_point() else (*maps.stride()[:-1], 0, maps.stride(-1))


def room_of(count: int) -> int:
    """The bits above the limit of one share, so that a sum of `count` shares stays within 62 bits."""
    return 62 - count.bit_length()


def convert(sums: Tensor, limits: Tensor, out: Tensor, room: int) -> None:
    """out (maps, cells) = sums (maps, cells) i64 as floats, NaN for maps with the limit NOT_FINITE."""
    maps, cells = sums.shape
    block = config("points.convert", out)
    blocks = tiles(cells, block["BLOCK"])
    cost = Cost(
        read=sums.nbytes + limits.nbytes,
        again=max(blocks - 1, 0) * limits.nbytes,
        written=out.nbytes,
        flops=sums.numel(),
    )
    launch(_convert, (maps * blocks,), sums, limits, out, cells, blocks, room, cost=cost, **block)


def fixed_point(like: Tensor, maps: int, cells: int) -> tuple[Tensor, Tensor]:
    """Sums of zeros (maps, cells), and limits (maps), uninitialised."""
    return like.new_zeros((maps, cells), dtype=torch.int64), like.new_empty((maps,), dtype=torch.int32)

"""Products of columns of feature maps in Triton. saliency_masks/triton.py makes its maps from them. B images, D channels, P = H
* W cells, R rows. A row of P floats is stored as `line` floats, P rounded up to a multiple of 16. The floats behind P are
undefined."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.triton_launch import Cost, config, launch, precision, tiles

#: Lower bound of the norms.
SMALLEST = tl.constexpr(1e-12)


@triton.jit
def _pack(
    x,  # (B, D, H, W), any strides
    out,  # (B, D, line), contiguous
    D, P, width, line,
    x_b, x_d, x_h, x_w,
    RUN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[b, d, p] = x[b, d, p // width, p % width], 0 for p >= P. RUN: cells are x_w apart, also from one row to the next."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.cast(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.int64)
    b = tl.cast(tl.program_id(2), tl.int64)
    cell = tl.cast(p, tl.int64) * x_w
    if not RUN:
        cell = tl.cast(p // width, tl.int64) * x_h + tl.cast(p % width, tl.int64) * x_w
    real = d[:, None] < D
    values = tl.load(x + b * x_b + d[:, None] * x_d + cell[None, :], mask=real & (p < P)[None, :], other=0.0)
    tl.store(out + (b * D + d[:, None]) * line + p[None, :], values, mask=real & (p < line)[None, :])


@triton.jit
def _product(
    a,  # (B, R, D), any strides
    x,  # (B, D, limit), any strides
    out,  # (B, R, line) f32, contiguous
    norms,  # (B, line) f32 or None, contiguous
    D, R, a_limit, limit, line, count,
    a_b, a_r, a_d, x_b, x_d, x_p,
    TRIANGLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, r, c] = sum over d of a[b, r, d] x[b, d, c], in float32, by increasing d; 0 for c in [limit, line).

    TRIANGLE: a is x transposed, and the blocks are square. Only the blocks on and right of the diagonal of the count x
    count blocks are computed. The other blocks are their transposes. norms[b, c] = max(sqrt(out[b, c, c]), SMALLEST).
    One program per block and image."""
    t = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    if TRIANGLE:
        # The triangle is folded into a rectangle: row u holds block row count - u - even, then block row u.
        even = 1 - count % 2
        u = t // (count + even)
        v = t % (count + even)
        i = tl.where(v >= u + even, u, count - u - even)
        j = tl.where(v >= u + even, v - even, count - 1 - v)
    else:
        i = t // count
        j = t % count
    r = i * BLOCK_M + tl.arange(0, BLOCK_M)
    c = j * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = a + b * a_b + tl.cast(r, tl.int64)[:, None] * a_r + tl.cast(k, tl.int64)[None, :] * a_d
    right = x + b * x_b + tl.cast(k, tl.int64)[:, None] * x_d + tl.cast(c, tl.int64)[None, :] * x_p
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        rows = tl.load(left, mask=(r < a_limit)[:, None] & (k < D - start)[None, :], other=0.0)
        columns = tl.load(right, mask=(k < D - start)[:, None] & (c < limit)[None, :], other=0.0)
        if a.dtype.element_ty != x.dtype.element_ty:
            columns = columns.to(a.dtype.element_ty)
        acc = triton_tile.dot(rows, columns, acc, PRECISION)
        left += tl.cast(BLOCK_K, tl.int64) * a_d
        right += tl.cast(BLOCK_K, tl.int64) * x_d
    out += b * R * line
    place = tl.cast(r, tl.int64)[:, None] * line + c[None, :]
    tl.store(out + place, acc, mask=(r < R)[:, None] & (c < line)[None, :])
    if TRIANGLE:
        if i == j:
            if norms is not None:
                square = tl.sum(tl.where(r[:, None] == c[None, :], acc, 0.0), axis=1)
                norm = tl.sqrt_rn(square)
                tl.store(norms + b * line + r, tl.where(norm < SMALLEST, SMALLEST, norm), mask=r < line)
        else:
            mirrored = tl.cast(c, tl.int64)[:, None] * line + r[None, :]
            tl.store(out + mirrored, tl.trans(acc), mask=(c < R)[:, None])


@triton.jit
def _norms(
    x,  # (B, D, COUNT * P), any strides
    norms,  # (B, line) f32, contiguous
    D, P, line,
    x_b, x_d, x_p,
    COUNT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """norms[b, p] = max(|mean of the columns COUNT p .. COUNT p + COUNT - 1 of x[b]|, SMALLEST), COUNT 1 or 4."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    b = tl.cast(tl.program_id(1), tl.int64)
    at = x + b * x_b + tl.cast(d, tl.int64)[:, None] * x_d + tl.cast(p, tl.int64)[None, :] * COUNT * x_p
    squares = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    for start in range(0, D, BLOCK_D):
        real = (d < D - start)[:, None] & (p < P)[None, :]
        values = tl.load(at, mask=real, other=0.0).to(tl.float32)
        if COUNT == 4:
            second = tl.load(at + x_p, mask=real, other=0.0).to(tl.float32)
            third = tl.load(at + 2 * x_p, mask=real, other=0.0).to(tl.float32)
            fourth = tl.load(at + 3 * x_p, mask=real, other=0.0).to(tl.float32)
            values = (0.25 * values + 0.25 * second) + (0.25 * third + 0.25 * fourth)
        squares += values * values
        at += tl.cast(BLOCK_D, tl.int64) * x_d
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    tl.store(norms + b * line + p, tl.where(norm < SMALLEST, SMALLEST, norm), mask=p < line)


@triton.jit
def _gather(
    x,  # (B, D, P), any strides
    addresses,  # (B, K, 3) i64, contiguous
    valid,  # (B, P) u8 or None, contiguous
    rows,  # (B, 4 * K, D), contiguous
    usable,  # (B, K) u8, contiguous
    D, K, height, width,
    x_b, x_d, x_p,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row per cell: the columns of x at the four cells of a seed of the pyramid (at scale 0 its cell four times). If the
    address is invalid, or a cell of the seed's block is not valid, the rows are zeros and usable is 0. One program per (ROWS
    seeds, image, block of D)."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(tl.program_id(1), tl.int64)
    d = tl.cast(tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D), tl.int64)
    real = k < K
    address = addresses + (b * K + k) * 3
    scale = tl.load(address, mask=real, other=-1)
    row = tl.load(address + 1, mask=real, other=0)
    column = tl.load(address + 2, mask=real, other=0)
    side = tl.where(scale == 2, 4, tl.where(scale == 1, 2, 1))
    good = (scale >= 0) & (scale <= 2) & (row >= 0) & (row < height // side) & (column >= 0) & (column < width // side)
    top = tl.where(good, row * side, 0)
    left = tl.where(good, column * side, 0)
    if valid is not None:
        y = (tl.arange(0, 16) // 4)[None, :]
        z = (tl.arange(0, 16) % 4)[None, :]
        block = valid + b * height * width + (top[:, None] + y) * width + left[:, None] + z
        mine = good[:, None] & (y < side[:, None]) & (z < side[:, None])
        inside = tl.load(block, mask=mine, other=1).to(tl.int32)
        good = good & (tl.min(inside, axis=1) != 0)
    inner = tl.where(scale == 2, 1, 0)
    step = tl.where(scale == 0, 0, 1)
    first = (top + inner) * width + left + inner
    for i in tl.static_range(4):
        cell = first + step * ((i // 2) * width + i % 2)
        at = x + b * x_b + d[None, :] * x_d + cell[:, None] * x_p
        values = tl.load(at, mask=(d < D)[None, :] & good[:, None], other=0.0)
        row_of = ((b * K + k) * 4 + i)[:, None] * D
        tl.store(rows + row_of + d[None, :], values, mask=(d < D)[None, :] & real[:, None])
    if tl.program_id(2) == 0:
        tl.store(usable + b * K + k, good.to(tl.uint8), mask=real)


@triton.jit
def _windows(
    x,  # (B, D, P), any strides
    addresses,  # (B, R, 3) i64 or None, contiguous
    valid,  # (B, P) u8 or None, contiguous
    rows,  # (B, R, D) f32, contiguous
    usable,  # (B, R) u8, contiguous
    D, R, height, width, grid_height, grid_width,
    x_b, x_d, x_p,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows[b, r] = mean of x[b] over the valid cells of window r of adaptive pooling to grid_height x grid_width, or of the
    window with address r. Without a window or a valid cell, the row is zeros and usable is 0. One program per (window, image,
    block of D)."""
    r = tl.program_id(0)
    b = tl.cast(tl.program_id(1), tl.int64)
    d = tl.cast(tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D), tl.int64)
    if addresses is not None:
        address = addresses + (b * R + r) * 3
        row = tl.load(address + 1)
        column = tl.load(address + 2)
        good = (tl.load(address) == 0) & (row >= 0) & (row < grid_height) & (column >= 0) & (column < grid_width)
    else:
        row = tl.cast(r // grid_width, tl.int64)
        column = tl.cast(r % grid_width, tl.int64)
        good = row < grid_height
    top = tl.where(good, row * height // grid_height, 0).to(tl.int32)
    bottom = tl.where(good, ((row + 1) * height + grid_height - 1) // grid_height, 0).to(tl.int32)
    left = tl.where(good, column * width // grid_width, 0).to(tl.int32)
    right = tl.where(good, ((column + 1) * width + grid_width - 1) // grid_width, 0).to(tl.int32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    cells = tl.zeros((), tl.int32)
    for y in range(top, bottom):
        for z in range(left, right):
            cell = tl.cast(y, tl.int64) * width + z
            inside = tl.full((), 1, tl.int32)
            if valid is not None:
                inside = tl.load(valid + b * height * width + cell).to(tl.int32)
            values = tl.load(x + b * x_b + d * x_d + cell * x_p, mask=(d < D) & (inside != 0), other=0.0)
            total += values.to(tl.float32)
            cells += inside
    mean = tl.div_rn(total, tl.zeros((BLOCK_D,), tl.float32) + tl.maximum(cells, 1).to(tl.float32))
    tl.store(rows + (b * R + r) * D + d, mean, mask=d < D)
    if tl.program_id(2) == 0:
        tl.store(usable + b * R + r, (cells > 0).to(tl.uint8))


# ---- launches


class Columns(NamedTuple):
    """Feature maps in the form that the kernels read: column p of image b is data[b * stride[0] + p * stride[2] ::
    stride[1]]."""

    data: Tensor
    stride: tuple[int, int, int]  # of images, channels, columns
    limit: int  #: columns that may be read: P, or more if the others hold zeros
    D: int
    P: int
    line: int

    def images(self, first: int, last: int) -> "Columns":
        return self._replace(data=self.data[first:last])


def columns_of(features: Tensor) -> Columns:
    """The feature maps as Columns. Maps that suit wide loads are not copied (such as channels-last maps with a multiple of 16
    channels). Other maps are copied once, so that their rows begin at multiples of 16."""
    B, D, height, width = features.shape
    P, line = height * width, -(-height * width // 16) * 16
    b, d, h, w = features.stride()
    step = h if width == 1 else w
    run = height <= 1 or h == width * step
    wide = (step, d % 16) == (1, 0) or (d, step % 16) == (1, 0)
    if run and wide and b % 16 == 0 and features.data_ptr() % 16 == 0:
        return Columns(features, (b, d, step), P, D, P, line)
    out = features.new_empty((B, D, line))
    block = config("saliency_masks.pack", features)
    cost = Cost(read=features.numel() * features.element_size(), written=out.nbytes)
    launch(
        _pack, (tiles(line, block["BLOCK_P"]), tiles(D, block["BLOCK_D"]), B), features, out, D, P, width, line,
        b, d, h, step if run else w, cost=cost, RUN=run, **block,
    )  # fmt: skip
    return Columns(out, (D * line, line, 1), line, D, P, line)


def gram(x: Columns, cosine: bool) -> tuple[Tensor, Tensor | None]:
    """Products of all pairs of columns (B, P, line), and (cosine) the norms (B, line)."""
    B = x.data.shape[0]
    block = config("saliency_masks.gram", x.data, x.P)
    side, count = block["BLOCK_M"], tiles(x.P, block["BLOCK_M"])
    out = x.data.new_empty((B, x.P, x.line), dtype=torch.float32)
    norms = x.data.new_empty((B, x.line), dtype=torch.float32) if cosine else None
    pairs = count * (count + 1) // 2
    once = B * x.D * min(x.limit, count * side) * x.data.element_size()
    cost = Cost(
        read=once,
        again=count * once,  # a column is read count + 1 times in all, as a left or a right operand
        written=out.nbytes + (norms.nbytes if norms is not None else 0),
        flops=2 * B * pairs * side * side * x.D,
    )
    b, d, p = x.stride
    launch(
        _product, (pairs, B), x.data, x.data, out, norms, x.D, x.P, x.limit, x.limit, x.line, count, b, p, d, b, d, p,
        cost=cost, TRIANGLE=True, PRECISION=precision(x.data), **block,
    )  # fmt: skip
    return out, norms


def product(rows: Tensor, limit: int, x: Columns) -> Tensor:
    """rows (B, limit, D) times the columns: (B, limit, line) float32."""
    B = x.data.shape[0]
    block = config("saliency_masks.product", rows, limit)
    down, across = tiles(limit, block["BLOCK_M"]), tiles(x.P, block["BLOCK_N"])
    out = x.data.new_empty((B, limit, x.line), dtype=torch.float32)
    left = B * limit * x.D * rows.element_size()
    right = B * min(x.limit, across * block["BLOCK_N"]) * x.D * x.data.element_size()
    cost = Cost(
        read=left + right,
        again=(across - 1) * left + (down - 1) * right,
        written=out.nbytes,
        flops=2 * B * down * across * block["BLOCK_M"] * block["BLOCK_N"] * x.D,
    )
    launch(
        _product, (down * across, B), rows, x.data, out, None, x.D, limit, limit, x.limit, x.line, across,
        *rows.stride(), *x.stride, cost=cost, TRIANGLE=False, PRECISION=precision(rows), **block,
    )  # fmt: skip
    return out


def norms_of(x: Tensor, stride: tuple[int, int, int], D: int, P: int, line: int, count: int = 1) -> Tensor:
    """Norms (B, line) of columns, or of the means of every 4 columns. stride: of images, channels, columns."""
    B = x.shape[0]
    out = x.new_empty((B, line), dtype=torch.float32)
    block = config("saliency_masks.norms", x)
    cost = Cost(read=B * D * P * count * x.element_size(), written=out.nbytes, flops=B * D * P * (2 * count))
    launch(_norms, (tiles(line, block["BLOCK_P"]), B), x, out, D, P, line, *stride, cost=cost, COUNT=count, **block)
    return out


def gathered(x: Columns, addresses: Tensor, valid: Tensor | None, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows (B, 4 K, D) of the pyramid's seeds, and which seeds are usable (B, K)."""
    B, K = addresses.shape[:2]
    rows = x.data.new_empty((B, 4 * K, x.D))
    usable = x.data.new_empty((B, K), dtype=torch.uint8)
    block = config("saliency_masks.gather", x.data)
    blocks = max(tiles(x.D, block["BLOCK_D"]), 1)
    checked = addresses.nbytes + (16 * B * K if valid is not None else 0)  # upper bound: all seeds of scale 2
    cost = Cost(read=rows.nbytes + checked, again=(blocks - 1) * checked, written=rows.nbytes + usable.nbytes)
    launch(
        _gather, (tiles(K, block["ROWS"]), B, blocks), x.data, addresses.contiguous(), valid, rows, usable, x.D, K, height,
        width, *x.stride, cost=cost, **block,
    )  # fmt: skip
    return rows, usable


def windows(
    x: Columns, addresses: Tensor | None, valid: Tensor | None, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Means (B, R, D) float32 over the windows of a grid, and which windows have a valid cell. addresses: only these
    windows."""
    B = x.data.shape[0]
    R = grid[0] * grid[1] if addresses is None else addresses.shape[1]
    rows = x.data.new_empty((B, R, x.D), dtype=torch.float32)
    usable = x.data.new_empty((B, R), dtype=torch.uint8)
    block = config("saliency_masks.windows", x.data)
    blocks = max(tiles(x.D, block["BLOCK_D"]), 1)
    heights, widths = (
        [-(-(i + 1) * side // pieces) - i * side // pieces for i in range(pieces)]
        for side, pieces in zip(size, grid, strict=True)
    )
    # Cells of all windows. With addresses it is an upper bound: every window is the largest. Windows overlap if the sides do
    # not divide.
    cells = B * (sum(heights) * sum(widths) if addresses is None else R * max(heights) * max(widths))
    once = min(cells, B * x.P) * x.D * x.data.element_size()
    heads = (addresses.nbytes if addresses is not None else 0) + (cells if valid is not None else 0)
    cost = Cost(
        read=once + heads,
        again=cells * x.D * x.data.element_size() - once + (blocks - 1) * heads,
        written=rows.nbytes + usable.nbytes,
        flops=cells * x.D,
    )
    launch(
        _windows, (R, B, blocks), x.data, addresses.contiguous() if addresses is not None else None, valid, rows, usable,
        x.D, R, *size, *grid, *x.stride, cost=cost, **block,
    )  # fmt: skip
    return rows, usable

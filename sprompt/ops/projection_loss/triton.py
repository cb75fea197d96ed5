"""Triton kernels of projection_loss and projection_loss_backward. B maps of h x w.

A candidate for a maximum is one int64: the key of its value above the bits of its place, inverted. So the largest candidate is the
largest value at the lowest place, and sums of candidates do not depend on any order. Maps are read once, in strips of rows. A
second kernel takes the maxima over strips and computes the loss and its slopes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.projection_loss import op
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: Tile choices to time on a GPU, besides those of configs.json.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "maxima": [
        {"ROWS": r, "BLOCK": b, "num_warps": w, "num_stages": 1}
        for r, b, w in ((16, 128, 4), (32, 64, 4), (32, 128, 8), (64, 64, 8))
    ],
    "dice": [{"BLOCK": b, "num_warps": w, "num_stages": 1} for b, w in ((128, 1), (128, 4), (256, 4))],
    "backward": [
        {"ROWS": r, "BLOCK": b, "num_warps": 4, "num_stages": 1} for r, b in ((8, 128), (16, 64), (16, 128), (32, 128))
    ],
}  # fmt: skip

EPSILON = tl.constexpr(op.EPSILON)
#: The key of NaN, which is the largest; and a candidate below all others.
MOST, LEAST = tl.constexpr(0x7FFFFFFF), tl.constexpr(-(1 << 63))


@triton.jit
def _candidate(value, place, real):
    """int64 of float32 values at places (int32)."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 as 0
    key = tl.where(value == value, bits ^ ((bits >> 31) & MOST), MOST)
    return tl.where(real, (key.to(tl.int64) << 32) | (place ^ MOST).to(tl.int64), LEAST)


@triton.jit
def _value(candidate):
    key = (candidate >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & MOST)).to(tl.float32, bitcast=True)


@triton.jit
def _maxima(
    masks, boxes,  # (B, h, w), any strides
    rows, rows_of_box,  # (B, h) i64, contiguous, written: the row maxima
    columns, columns_of_box,  # (B, strips, w) i64, contiguous, written: the column maxima of each strip
    h, w, strips,
    masks_b, masks_y, masks_x, boxes_b, boxes_y, boxes_x,  # strides
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (map, strip of ROWS rows)."""
    b = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    y = strip * ROWS + tl.arange(0, ROWS)
    mask_row = masks + b * masks_b + y.to(tl.int64)[:, None] * masks_y
    box_row = boxes + b * boxes_b + y.to(tl.int64)[:, None] * boxes_y
    best = tl.full((ROWS,), LEAST, tl.int64)
    best_of_box = tl.full((ROWS,), LEAST, tl.int64)
    for first in range(0, w, BLOCK):
        x = first + tl.arange(0, BLOCK)
        real = (y < h)[:, None] & (x < w)[None, :]
        m = tl.load(mask_row + x.to(tl.int64)[None, :] * masks_x, mask=real, other=0.0).to(tl.float32)
        t = tl.load(box_row + x.to(tl.int64)[None, :] * boxes_x, mask=real, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.max(_candidate(m, x[None, :], real), axis=1))
        best_of_box = tl.maximum(best_of_box, tl.max(_candidate(t, x[None, :], real), axis=1))
        at = (b * strips + strip) * w + x
        tl.store(columns + at, tl.max(_candidate(m, y[:, None], real), axis=0), mask=x < w)
        tl.store(columns_of_box + at, tl.max(_candidate(t, y[:, None], real), axis=0), mask=x < w)
    tl.store(rows + b * h + y, best, mask=y < h)
    tl.store(rows_of_box + b * h + y, best_of_box, mask=y < h)


@triton.jit
def _largest(candidates, b, i, n, strips):
    """The largest candidates (BLOCK,) at i over the strips of (B, strips, n)."""
    best = tl.full(i.shape, LEAST, tl.int64)
    for strip in range(strips):
        best = tl.maximum(best, tl.load(candidates + (b * strips + strip) * n + i, mask=i < n, other=LEAST))
    return best


@triton.jit
def _axis(candidates, candidates_of_box, slopes, places, b, n, strips, BLOCK: tl.constexpr):
    """The dice along one axis. Writes its slopes and places, (n)."""
    product = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        m = tl.where(i < n, _value(_largest(candidates, b, i, n, strips)), 0.0)
        t = tl.where(i < n, _value(_largest(candidates_of_box, b, i, n, strips)), 0.0)
        product += m * t
        total += m * m + t * t
    common = tl.sum(product, axis=0)
    denominator = tl.sum(total, axis=0) + EPSILON
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        best = _largest(candidates, b, i, n, strips)
        m = tl.where(i < n, _value(best), 0.0)
        t = tl.where(i < n, _value(_largest(candidates_of_box, b, i, n, strips)), 0.0)
        slope = 4.0 * m * (common / denominator) / denominator - 2.0 * t / denominator
        tl.store(slopes + i, slope, mask=i < n)
        tl.store(places + i, (best & MOST).to(tl.int32) ^ MOST, mask=i < n)
    return 1.0 - 2.0 * common / denominator


@triton.jit
def _dice(
    rows, rows_of_box,  # (B, h) i64, contiguous
    columns, columns_of_box,  # (B, strips, w) i64, contiguous
    loss,  # (B) f32, written
    slopes, places,  # (B, h + w) f32 and i32, contiguous, written
    h, w, strips,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per map."""
    b = tl.program_id(0).to(tl.int64)
    slopes += b * (h + w)
    places += b * (h + w)
    along_rows = _axis(rows, rows_of_box, slopes, places, b, h, 1, BLOCK)
    along_columns = _axis(columns, columns_of_box, slopes + h, places + h, b, w, strips, BLOCK)
    tl.store(loss + b, along_rows + along_columns)


def projection_loss(a: Args, loss: Tensor, slopes: Tensor, places: Tensor) -> None:
    """Needs 16 bytes of scratch per row, and per column and strip."""
    masks, boxes = a
    B, h, w = masks.shape
    if h * w == 0:
        loss.fill_(2), slopes.zero_(), places.zero_()
        return
    tile = config("projection_loss.maxima", masks)
    strips = tiles(h, tile["ROWS"])
    rows, rows_of_box = (loss.new_empty((B, h), dtype=torch.int64) for _ in range(2))
    columns, columns_of_box = (loss.new_empty((B, strips, w), dtype=torch.int64) for _ in range(2))
    candidates = 2 * (rows.nbytes + columns.nbytes)
    cost = Cost(
        read=masks.numel() * masks.element_size() + boxes.numel() * boxes.element_size(),
        written=candidates,
        flops=12 * masks.numel(),
    )
    launch(
        _maxima, (B * strips,), masks, boxes, rows, rows_of_box, columns, columns_of_box, h, w, strips, *masks.stride(),
        *boxes.stride(), cost=cost, **tile,
    )  # fmt: skip
    written = loss.nbytes + slopes.nbytes + places.nbytes
    launch(
        _dice, (B,), rows, rows_of_box, columns, columns_of_box, loss, slopes, places, h, w, strips,
        cost=Cost(read=candidates, again=candidates, written=written, flops=20 * slopes.numel()),
        **config("projection_loss.dice", masks),
    )  # fmt: skip


@triton.jit
def _backward(
    grad,  # (B) f32, any stride
    slopes, places,  # (B, h + w) f32 and i32, contiguous
    out,  # (B, h, w), contiguous, written
    h, w, strips, grad_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (map, strip of ROWS rows)."""
    b = (tl.program_id(0) // strips).to(tl.int64)
    y = tl.program_id(0) % strips * ROWS + tl.arange(0, ROWS)
    slopes += b * (h + w)
    places += b * (h + w)
    g = tl.load(grad + b * grad_b)
    slope_of_row = tl.load(slopes + y, mask=y < h, other=0.0)[:, None]
    column = tl.load(places + y, mask=y < h, other=0)[:, None]
    for first in range(0, w, BLOCK):
        x = first + tl.arange(0, BLOCK)
        slope_of_column = tl.load(slopes + h + x, mask=x < w, other=0.0)[None, :]
        row = tl.load(places + h + x, mask=x < w, other=0)[None, :]
        in_row, in_column = x[None, :] == column, y[:, None] == row
        slope = tl.where(in_row, slope_of_row, 0.0) + tl.where(in_column, slope_of_column, 0.0)
        value = tl.where(in_row | in_column, g * slope, 0.0)
        at = (b * h + y[:, None]) * w + x[None, :]
        real = (y < h)[:, None] & (x < w)[None, :]
        tl.store(out + at, triton_tile.rounded(value, out.dtype.element_ty), mask=real)


def projection_loss_backward(a: Args, out: Tensor) -> None:
    B, h, w = out.shape
    slopes, places = a.slopes.contiguous(), a.places.contiguous()
    tile = config("projection_loss.backward", out)
    strips = tiles(h, tile["ROWS"])
    read = 4 * B + slopes.nbytes + places.nbytes
    cost = Cost(read=read, again=(strips - 1) * B * (4 + 8 * w), written=out.nbytes, flops=3 * out.numel())
    if out.numel() > 0:
        launch(_backward, (B * strips,), a.grad, slopes, places, out, h, w, strips, a.grad.stride(0), cost=cost, **tile)

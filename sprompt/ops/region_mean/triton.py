"""Triton kernels of region_mean and mask_mean. B images, L boxes or masks, C channels, a map of H x W = P cells.

Boxes and masks use the same kernels. Only the computation of a tile's bits differs. Sums over cells are products with the bits,
so their order does not depend on the layout of the loads. Cells that are not finite are left out of the products and added
separately, so that cells outside have no influence. Long maps are cut into chunks, and a second kernel adds the chunks in
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.region_mean.op import wide_boxes
from sprompt.ops.triton_launch import Cost, config, launch, tiles

BLOCK_L = 32  # boxes or masks per program

CANDIDATES: dict[str, list[dict[str, int]]] = {
    "mean": [
        {"BLOCK_C": c, "BLOCK_P": p, "CHUNK": chunk, "num_warps": w, "num_stages": s}
        for c, p, chunk, w, s in (
            (32, 32, 512, 2, 3), (32, 64, 512, 4, 3), (64, 64, 256, 4, 2), (64, 32, 256, 4, 4), (64, 64, 512, 4, 3),
            (128, 32, 256, 4, 3), (16, 64, 1024, 2, 3),
        )
    ],
    "spread": [
        {"BLOCK_C": c, "BLOCK_P": p, "num_warps": w, "num_stages": 2}
        for c, p, w in ((16, 128, 2), (16, 256, 4), (32, 64, 4), (32, 128, 8), (8, 256, 4))
    ],
}  # fmt: skip


@triton.jit
def _span(low, high, size):
    """First cell and end, i32, of float64 coordinates on an axis of `size` cells: at least one cell, inside the map unless the
    map is empty. NaN counts as 0."""
    low = tl.floor(tl.where(low == low, low, 0.0))
    high = tl.ceil(tl.where(high == high, high, 0.0))
    first = tl.minimum(tl.maximum(low, 0.0), tl.maximum(size - 1, 0).to(tl.float64))
    end = tl.maximum(tl.minimum(high, size.to(tl.float64)), first + 1.0)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def _box(boxes, b, l, real, box_b, box_l, box_4, H, W):
    """c0, r0, c1, r1 (BLOCK_L,) of boxes l of image b. A box that is not real gives a box of one cell."""
    box = boxes + b * box_b + l.to(tl.int64) * box_l
    x1 = tl.load(box, mask=real, other=0).to(tl.float64)
    y1 = tl.load(box + box_4, mask=real, other=0).to(tl.float64)
    x2 = tl.load(box + 2 * box_4, mask=real, other=0).to(tl.float64)
    y2 = tl.load(box + 3 * box_4, mask=real, other=0).to(tl.float64)
    c0, c1 = _span(x1, x2, tl.cast(W, tl.int32))
    r0, r1 = _span(y1, y2, tl.cast(H, tl.int32))
    return c0, r0, c1, r1


@triton.jit
def _real(counts, count_b, b, L):
    """The number of real boxes of image b, i64 in [0, L]."""
    count = tl.cast(L, tl.int64)
    if counts is not None:
        count = tl.minimum(tl.maximum(tl.load(counts + b * count_b), 0), count)
    return count


@triton.jit
def _words(words, b, l, L, n, p0, word_b, word_l, word_n, BLOCK_P: tl.constexpr):
    """i32 (BLOCK_L, BLOCK_P / 32): the bits of masks l from cell p0 on. Padding bits of a mask's last word are 0."""
    w = p0 // 32 + tl.arange(0, BLOCK_P // 32)
    place = words + b * word_b + l.to(tl.int64)[:, None] * word_l + w.to(tl.int64)[None, :] * word_n
    return tl.load(place, mask=(l < L)[:, None] & (w < n)[None, :], other=0)


@triton.jit
def _ones(words):
    """The number of set bits of each word, i32."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)  # counts of 2 bits, then of 4, of 8, and of the word
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    return ((v + (v >> 16)) & 63).to(tl.int32)


@triton.jit
def _inside_boxes(c0, r0, c1, r1, real, p, P, W):
    """bool (BLOCK_L, BLOCK_P): whether cells p are in the boxes."""
    y = (p // W)[None, :]
    x = (p % W)[None, :]
    inside = (x >= c0[:, None]) & (x < c1[:, None]) & (y >= r0[:, None]) & (y < r1[:, None])
    return inside & real[:, None] & (p < P)[None, :]


@triton.jit
def _mean(
    features,  # (B, C, H, W), any strides
    shapes,  # boxes (B, L, 4) f32/f64/i64, or words (B, L, n) i32; any strides
    counts,  # (B,) i64, any stride, or None
    sums,  # (B, S, L, C) f32, contiguous: one sum per chunk; with S = 1 the result, (B, L, C) of features' type
    areas,  # (B, S, L) i32, contiguous: cells that count; not used with S = 1
    C, H, W, L, n, S, chunk,  # chunk: cells of a chunk, a multiple of BLOCK_P
    feature_b, feature_c, feature_y, feature_x, shape_b, shape_l, shape_n, count_b,  # strides
    BOXES: tl.constexpr, ONE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[b, s, l, c] = sum over the cells p of chunk s in shape l of features[b, c, p]. One program per image, chunk,
    BLOCK_C channels and BLOCK_L shapes: features (BLOCK_C, BLOCK_P) times bits (BLOCK_P, BLOCK_L).
    ROWS: the distance between rows is feature_x * W, so a cell's offset is p * feature_x.
    A chunk with cells that are not finite is read a second time (not in the Cost). One more product per tile counts the
    +inf, -inf and NaN in every shape: they are coded as 1, 128 and 16384. A tile has at most BLOCK_P <= 64 of each, so the
    counts are exact in any type."""
    b = (tl.program_id(0) // S).to(tl.int64)
    s = tl.program_id(0) % S
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    l = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    P = H * W
    start = s * chunk
    end = tl.minimum(start + chunk, P)
    real = l < _real(counts, count_b, b, L)
    if BOXES:
        c0, r0, c1, r1 = _box(shapes, b, l, real, shape_b, shape_l, shape_n, H, W)
    held_ones = tl.zeros((BLOCK_L, BLOCK_P // 32), tl.int32)
    plane = features + b * feature_b + c.to(tl.int64)[:, None] * feature_c
    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    odd = tl.zeros((BLOCK_C, BLOCK_P), tl.int32)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        if ROWS:  # noqa: SIM108  # the two cases are easier to read apart
            offset = p.to(tl.int64) * feature_x
        else:
            offset = (p // W).to(tl.int64) * feature_y + (p % W).to(tl.int64) * feature_x
        if BOXES:
            bits = _inside_boxes(c0, r0, c1, r1, real, p, P, W)
        else:
            held = _words(shapes, b, l, L, n, p0, shape_b, shape_l, shape_n, BLOCK_P)
            held_ones += _ones(held)
            bits = triton_tile.unpack(held, BLOCK_L, BLOCK_P // 32)
        f = tl.load(plane + offset[None, :], mask=(c < C)[:, None] & (p < P)[None, :], other=0.0)
        wide = f.to(tl.float32)
        finite = tl.abs(wide) < float("inf")
        odd = odd | tl.where(finite, 0, 1)
        acc = triton_tile.dot(
            tl.where(finite, wide, 0.0).to(f.dtype), tl.trans(bits.to(tl.float32).to(f.dtype)), acc, PRECISION
        )
    if tl.max(tl.max(odd, axis=1), axis=0) > 0:
        for p0 in range(start, end, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            offset = (p // W).to(tl.int64) * feature_y + (p % W).to(tl.int64) * feature_x
            if BOXES:
                bits = _inside_boxes(c0, r0, c1, r1, real, p, P, W)
            else:
                held = _words(shapes, b, l, L, n, p0, shape_b, shape_l, shape_n, BLOCK_P)
                bits = triton_tile.unpack(held, BLOCK_L, BLOCK_P // 32)
            f = tl.load(plane + offset[None, :], mask=(c < C)[:, None] & (p < P)[None, :], other=0.0)
            wide = f.to(tl.float32)
            code = tl.where(wide == wide, 0.0, 16384.0)
            code = tl.where(wide == float("inf"), 1.0, tl.where(wide == float("-inf"), 128.0, code))
            hits = triton_tile.dot(
                code.to(f.dtype),
                tl.trans(bits.to(tl.float32).to(f.dtype)),
                tl.zeros((BLOCK_C, BLOCK_L), tl.float32),
                "ieee",
            ).to(tl.int32)
            acc += tl.where(hits % 128 > 0, float("inf"), 0.0)
            acc += tl.where(hits // 128 % 128 > 0, float("-inf"), 0.0)
            acc += tl.where(hits >= 16384, float("nan"), 0.0)
    if BOXES:  # noqa: SIM108  # the two cases are easier to read apart
        area = tl.where(real & (s == 0), (c1 - c0) * (r1 - r0), 0)  # the first chunk gets the area of the whole box
    else:
        area = tl.sum(held_ones, axis=1)
    store = (l < L)[None, :] & (c < C)[:, None]
    place = ((b * S + s) * L + l)[None, :] * C + c[:, None]
    if ONE:
        mean = tl.div_rn(acc, tl.maximum(area, 1).to(tl.float32)[None, :])
        tl.store(sums + place, triton_tile.rounded(mean, sums.dtype.element_ty), mask=store)
    else:
        tl.store(sums + place, acc, mask=store)
        tl.store(areas + (b * S + s) * L + l, area, mask=(l < L) & (tl.program_id(1) == 0))


@triton.jit
def _mean_finish(
    sums,  # (B, S, L, C) f32, contiguous
    areas,  # (B, S, L) i32, contiguous
    out,  # (B, L, C), contiguous
    C, L, S,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b, l] = sum of sums[b, :, l] / max(sum of areas[b, :, l], 1), both by increasing s. One program per row and
    BLOCK_C channels."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    l = row % L
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    area = 0
    for s in range(S):
        at = (b * S + s) * L + l
        acc += tl.load(sums + at * C + c, mask=c < C, other=0.0)
        area += tl.load(areas + at)
    mean = tl.div_rn(acc, tl.zeros((BLOCK_C,), tl.float32) + tl.maximum(area, 1).to(tl.float32))
    tl.store(out + row * C + c, triton_tile.rounded(mean, out.dtype.element_ty), mask=c < C)


@triton.jit
def _shares(
    grad,  # (B, L, C), any strides
    shapes,  # boxes (B, L, 4) or words (B, L, n), any strides
    counts,  # (B,) i64, any stride, or None
    out,  # (B, L, C) f32, contiguous
    spans,  # (B, L, 4) i32, contiguous: c0, r0, c1, r1 of boxes, all 0 behind counts; not used for masks
    C, H, W, L, n,
    grad_b, grad_l, grad_c, shape_b, shape_l, shape_n, count_b,  # strides
    BOXES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out[b, l] = grad[b, l] / max(cells of shape l, 1). Shapes behind counts are not read and give 0. One program per
    shape."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    l = row % L
    real = l < _real(counts, count_b, b, L)
    if BOXES:
        c0, r0, c1, r1 = _box(shapes, b, l, real, shape_b, shape_l, shape_n, H, W)
        area = (c1 - c0) * (r1 - r0)
        tl.store(spans + row * 4, tl.where(real, c0, 0))
        tl.store(spans + row * 4 + 1, tl.where(real, r0, 0))
        tl.store(spans + row * 4 + 2, tl.where(real, c1, 0))
        tl.store(spans + row * 4 + 3, tl.where(real, r1, 0))
    else:
        held = tl.zeros((BLOCK_W,), tl.int32)
        for w0 in range(0, n, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            place = shapes + b * shape_b + l * shape_l + w.to(tl.int64) * shape_n
            held += _ones(tl.load(place, mask=w < n, other=0))
        area = tl.sum(held, axis=0)
    whole = tl.zeros((BLOCK_C,), tl.float32) + tl.maximum(area, 1).to(tl.float32)
    for c0_ in range(0, C, BLOCK_C):
        c = c0_ + tl.arange(0, BLOCK_C)
        g = tl.load(grad + b * grad_b + l * grad_l + c.to(tl.int64) * grad_c, mask=(c < C) & real, other=0.0).to(
            tl.float32
        )
        tl.store(out + row * C + c, tl.div_rn(g, whole), mask=c < C)


@triton.jit
def _spread(
    shares,  # (B, L, C) f32, contiguous
    shapes,  # spans of boxes (B, L, 4) i32, contiguous, or words (B, L, n) i32, any strides
    out,  # (B, C, H, W), contiguous
    C, H, W, L, n, blocks,  # blocks: of cells
    shape_b, shape_l, shape_n,  # strides
    BOXES: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[b, c, p] = sum over the shapes l that hold cell p of shares[b, l, c], by increasing l. One program per image,
    BLOCK_P cells and BLOCK_C channels: a gather. The bits of BLOCK_L masks at a time are collected into one number per
    cell."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p0 = tl.program_id(0) % blocks * BLOCK_P
    p = p0 + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    P = H * W
    y = p // W
    x = p % W
    acc = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        if not BOXES:
            held = _words(shapes, b, l0 + tl.arange(0, BLOCK_L), L, n, p0, shape_b, shape_l, shape_n, BLOCK_P)
            bits = triton_tile.unpack(held, BLOCK_L, BLOCK_P // 32).to(tl.uint32)
            member = tl.sum(bits << tl.arange(0, BLOCK_L).to(tl.uint32)[:, None], axis=0)
        for i in range(0, tl.minimum(L - l0, BLOCK_L)):
            row = b * L + l0 + i
            if BOXES:
                span = shapes + row * 4
                inside = (x >= tl.load(span)) & (y >= tl.load(span + 1))
                inside = inside & (x < tl.load(span + 2)) & (y < tl.load(span + 3))
            else:
                inside = ((member >> i) & 1) != 0
            share = tl.load(shares + row * C + c, mask=c < C, other=0.0)
            acc += tl.where(inside[None, :], share[:, None], 0.0)
    store = (c < C)[:, None] & (p < P)[None, :]
    place = (b * C + c)[:, None] * P + p[None, :]
    tl.store(out + place, triton_tile.rounded(acc, out.dtype.element_ty), mask=store)


def _cell_mean(features: Tensor, shapes: Tensor, counts: Tensor | None, boxes: bool, out: Tensor) -> None:
    B, C, H, W = features.shape
    L, P = shapes.shape[1], H * W
    shape = dict(config("region_mean.mean", features, C))
    limit = shape.pop("CHUNK")
    # Chunks depend only on the map, so an image's result is the same in every batch.
    chunk = tiles(tiles(P, shape["BLOCK_P"]), max(tiles(P, limit), 1)) * shape["BLOCK_P"]
    S = max(tiles(P, max(chunk, 1)), 1)
    sums = out if S == 1 else features.new_empty((B, S, L, C), dtype=torch.float32)
    areas = features.new_empty((B, S, L) if S > 1 else (0,), dtype=torch.int32)
    blocks, passes = tiles(C, shape["BLOCK_C"]), tiles(L, BLOCK_L)
    read = features.numel() * features.element_size()
    held = shapes.numel() * shapes.element_size()  # a program reads whole boxes, but only a chunk of each mask
    small = 8 * B if counts is not None else 0
    launch(
        _mean,
        (B * S, blocks, passes),
        features,
        shapes,
        counts,
        sums,
        areas,
        C,
        H,
        W,
        L,
        shapes.shape[2],
        S,
        chunk,
        *features.stride(),
        *shapes.stride(),
        0 if counts is None else counts.stride(0),
        cost=Cost(
            read=read + held + small,
            again=(passes - 1) * read + ((S if boxes else 1) * blocks - 1) * held + (S * blocks * passes - 1) * small,
            written=sums.nbytes + areas.nbytes,
            flops=2 * B * C * P * L,
        ),
        BOXES=boxes,
        ONE=S == 1,
        ROWS=features.stride(2) == features.stride(3) * W,
        BLOCK_L=BLOCK_L,
        PRECISION="ieee",
        **shape,
    )
    if S > 1:
        width = 256
        launch(
            _mean_finish,
            (B * L, tiles(C, width)),
            sums,
            areas,
            out,
            C,
            L,
            S,
            cost=Cost(
                read=sums.nbytes + areas.nbytes,
                again=(tiles(C, width) - 1) * areas.nbytes,
                written=out.nbytes,
                flops=sums.numel(),
            ),
            BLOCK_C=width,
            num_warps=2,
        )


def _cell_mean_backward(grad: Tensor, shapes: Tensor, counts: Tensor | None, boxes: bool, out: Tensor) -> None:
    B, L, C = grad.shape
    height, width = out.shape[2:]
    P = height * width
    shares = grad.new_empty((B, L, C), dtype=torch.float32)
    spans = grad.new_empty((B, L, 4) if boxes else (0,), dtype=torch.int32)
    held = shapes.numel() * shapes.element_size()
    launch(
        _shares,
        (B * L,),
        grad,
        shapes,
        counts,
        shares,
        spans,
        C,
        height,
        width,
        L,
        shapes.shape[2],
        *grad.stride(),
        *shapes.stride(),
        0 if counts is None else counts.stride(0),
        cost=Cost(
            read=grad.numel() * grad.element_size() + held + (8 * B if counts is not None else 0),
            again=8 * B * (L - 1) if counts is not None else 0,
            written=shares.nbytes + spans.nbytes,
            flops=grad.numel(),
        ),
        BOXES=boxes,
        BLOCK_C=256,
        BLOCK_W=128,
        num_warps=2,
    )
    shape = config("region_mean.spread", grad)
    blocks, rows = tiles(P, shape["BLOCK_P"]), tiles(C, shape["BLOCK_C"])
    if boxes:
        shapes, held = spans, spans.nbytes
    launch(
        _spread,
        (B * blocks, rows),
        shares,
        shapes,
        out,
        C,
        height,
        width,
        L,
        shapes.shape[2],
        blocks,
        *shapes.stride(),
        cost=Cost(
            read=shares.nbytes + held,
            again=(blocks - 1) * shares.nbytes + ((blocks if boxes else 1) * rows - 1) * held,
            written=out.nbytes,
            flops=2 * out.numel() * L,
        ),
        BOXES=boxes,
        BLOCK_L=BLOCK_L,
        **shape,
    )


def region_mean(a: Args, out: Tensor) -> None:
    _cell_mean(a.features, wide_boxes(a.boxes), a.counts, True, out)


def region_mean_backward(a: Args, out: Tensor) -> None:
    _cell_mean_backward(a.grad, wide_boxes(a.boxes), a.counts, True, out)


def mask_mean(a: Args, out: Tensor) -> None:
    _cell_mean(a.features, a.words, None, False, out)


def mask_mean_backward(a: Args, out: Tensor) -> None:
    _cell_mean_backward(a.grad, a.words, None, False, out)

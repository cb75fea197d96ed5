"""Triton kernels of resize_masks with `via` or `sums`. M maps of h x w cells, images of H x W pixels, 32 pixels per word in
reading order."""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.resize_masks.op import extent
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: Tile choices to time on a GPU, besides those of configs.json.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "general": [{"WORDS": n, "num_warps": w, "num_stages": 1} for n, w in ((16, 4), (32, 4), (32, 8), (64, 8))]
}
LARGEST = tl.constexpr(2.0**127)
_TABLE = 256  # pixels per program of _general_taps


@triton.jit
def held(x):
    """x as float32, clamped to +-2^127. NaN stays."""
    x = x.to(tl.float32)
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x < -LARGEST, -LARGEST, x)


@triton.jit
def lower_cell(x, ratio, cells):
    """The lower cell (i32) of float64 coordinates x, and the weight of the next cell (float64). The place is (x + 1/2) ratio -
    1/2."""
    s = (x + 0.5) * ratio - 0.5
    s = tl.minimum(tl.maximum(s, 0.0), (cells - 1).to(tl.float64))
    floor = tl.floor(s)
    return floor.to(tl.int32), s - floor


@triton.jit
def _merged(cell, weight, other_cell, other_weight):
    """Moves the weight of another tap to this one if both have the same cell. Returns both weights."""
    same = cell == other_cell
    return tl.where(same, weight + other_weight, weight), tl.where(same, 0.0, other_weight)


@triton.jit
def _general_taps(
    cell, weight,  # (4, W + H) i32 and f32, contiguous: of columns, then of rows
    H, W, h, w,
    extent_y, extent_x,  # TWO_MAPS: cells of the second map
    ratio_y, ratio_x, via_y, via_x,  # float64 as the bits of an i64: cells per pixel, and cells per via cell
    TWO_MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The taps that reference.taps and reference.taps_via define, for both axes. One map has two taps."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_row = i >= W
    size = W + H
    x = tl.where(of_row, i - W, i).to(tl.float64)
    cells = tl.where(of_row, tl.cast(h, tl.int32), tl.cast(w, tl.int32))
    ratio = tl.where(of_row, tl.cast(ratio_y, tl.int64), tl.cast(ratio_x, tl.int64)).to(tl.float64, bitcast=True)
    if TWO_MAPS:
        via = tl.where(of_row, tl.cast(via_y, tl.int64), tl.cast(via_x, tl.int64)).to(tl.float64, bitcast=True)
        last = tl.where(of_row, tl.cast(extent_y, tl.int32), tl.cast(extent_x, tl.int32))
        low, fraction = lower_cell(x, ratio, last)
        a, inner = lower_cell(low.to(tl.float64), via, cells)
        wa = (1 - fraction) * (1 - inner)
        wb = (1 - fraction) * inner
        c, inner = lower_cell((low + 1).to(tl.float64), via, cells)
        wc = fraction * (1 - inner)
        wd = fraction * inner
        wa, wc = _merged(a, wa, c, wc)
        wb, wc = _merged(a + 1, wb, c, wc)
        wa, wd = _merged(a, wa, c + 1, wd)
        wb, wd = _merged(a + 1, wb, c + 1, wd)
        free = wc == 0  # of an enlarged map, only one of the last two taps has weight; it becomes the third
        third = tl.where(free, c + 1, c)
        wc, wd = tl.where(free, wd, wc), tl.where(free, 0.0, wd)
        tl.store(cell + i, a, mask=i < size)
        tl.store(cell + size + i, tl.where(wb > 0, a + 1, a), mask=i < size)
        tl.store(cell + 2 * size + i, tl.where(wc > 0, third, a), mask=i < size)
        tl.store(cell + 3 * size + i, tl.where(wd > 0, c + 1, a), mask=i < size)
        tl.store(weight + i, wa.to(tl.float32), mask=i < size)
        tl.store(weight + size + i, wb.to(tl.float32), mask=i < size)
        tl.store(weight + 2 * size + i, wc.to(tl.float32), mask=i < size)
        tl.store(weight + 3 * size + i, wd.to(tl.float32), mask=i < size)
    else:
        low, fraction = lower_cell(x, ratio, cells)
        w1 = fraction.to(tl.float32)
        w0 = 1.0 - w1
        tl.store(cell + i, tl.where(w0 > 0, low, low + 1), mask=i < size)
        tl.store(cell + size + i, tl.where(w1 > 0, low + 1, low), mask=i < size)
        tl.store(weight + i, w0, mask=i < size)
        tl.store(weight + size + i, w1, mask=i < size)


@triton.jit
def _tap(cell, weight, number, mask, stride, FAR: tl.constexpr):
    """The offset of a tap's cell, and its weight."""
    offset = tl.load(cell + number, mask=mask, other=0)
    if FAR:
        offset = offset.to(tl.int64)
    return offset * stride, tl.load(weight + number, mask=mask, other=0.0)


@triton.jit
def _general(
    soft,  # (M, h, w), any strides
    cell, weight,  # (4, W + H) i32 and f32 of _general_taps
    words,  # (M, n) i32, contiguous
    sums, areas,  # (M, blocks) f32 and i32, or None
    H, W, n, blocks,
    soft_m, soft_y, soft_x,  # strides
    threshold,  # f32
    TAPS: tl.constexpr,  # per axis
    WORDS: tl.constexpr, FAR: tl.constexpr,  # FAR: offsets within a map beyond 2^31
):  # fmt: skip
    """Bit p of words[m] = z(p) > threshold, z(p) = sum_i h(row i) weight_i, h(r) = sum_j soft[m, r, column j] weight_j. One
    program per WORDS words of a map. sums[m, block] = sum of sigmoid(z) over its set pixels, areas[m, block] = their
    number."""
    m = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    p = block.to(tl.int64) * (32 * WORDS) + tl.arange(0, 32 * WORDS)
    y = (p // W).to(tl.int32)
    x = (p - y.to(tl.int64) * W).to(tl.int32)
    inside = y < H
    size = W + H
    map_ = soft + m * soft_m
    x0, w0 = _tap(cell, weight, x, inside, soft_x, FAR)
    x1, w1 = _tap(cell, weight, size + x, inside, soft_x, FAR)
    if TAPS > 2:
        x2, w2 = _tap(cell, weight, 2 * size + x, inside, soft_x, FAR)
    if TAPS > 3:
        x3, w3 = _tap(cell, weight, 3 * size + x, inside, soft_x, FAR)
    z = tl.zeros((32 * WORDS,), tl.float32)
    for i in tl.static_range(TAPS):
        row, weight_y = _tap(cell, weight, i * size + W + y, inside, soft_y, FAR)
        here = map_ + row
        wide = held(tl.load(here + x0, mask=inside, other=0.0)) * w0
        wide = wide + held(tl.load(here + x1, mask=inside, other=0.0)) * w1
        if TAPS > 2:
            wide = wide + held(tl.load(here + x2, mask=inside, other=0.0)) * w2
        if TAPS > 3:
            wide = wide + held(tl.load(here + x3, mask=inside, other=0.0)) * w3
        z = z + wide * weight_y
    is_set = inside & (z > threshold)
    word = block.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    packed = tl.reshape(triton_tile.pack(tl.reshape(is_set, (1, 32 * WORDS)), 1, WORDS), (WORDS,))
    tl.store(words + m * n + word, packed, mask=word < n)
    if sums is not None:
        tl.store(sums + m * blocks + block, tl.sum(tl.where(is_set, triton_tile.sigmoid(z), 0.0), axis=0))
        tl.store(areas + m * blocks + block, tl.sum(is_set.to(tl.int32), axis=0))


def bits(number: float) -> int:
    """The bits of a double as an integer, because Triton passes floats as float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def resize_masks_general(a: Args, words: Tensor, sums: Tensor, areas: Tensor) -> None:
    soft, height, width = a.soft, a.height, a.width
    if words.numel() == 0:
        sums.zero_()
        areas.zero_()
        return
    maps = soft.reshape(-1, *soft.shape[-2:])
    M, h, w = maps.shape
    via = a.via_height, a.via_width
    sides = extent(a, via)
    two_maps = via[0] is not None
    # Two neighbouring via cells of an enlarged map have at least one cell in common.
    taps = 2 if not two_maps else 3 if via[0] >= h and via[1] >= w else 4
    cell = soft.new_empty((4, width + height), dtype=torch.int32)
    weight = soft.new_empty((4, width + height), dtype=torch.float32)
    launch(
        _general_taps,
        (tiles(width + height, _TABLE),),
        cell,
        weight,
        height,
        width,
        h,
        w,
        *map(int, sides),
        bits(sides[0] / height),
        bits(sides[1] / width),
        *(map(bits, (h / via[0], w / via[1])) if two_maps else (0, 0)),
        cost=Cost(written=8 * (4 if two_maps else 2) * (width + height), flops=30 * (width + height)),
        fp_fusion=False,
        TWO_MAPS=two_maps,
        BLOCK=_TABLE,
    )
    shape = config("resize_masks.general", soft, width)
    blocks = tiles(words.shape[-1], shape["WORDS"])
    parts = [soft.new_empty((M, blocks), dtype=dtype) for dtype in (torch.float32, torch.int32)] if a.sums else None
    item, pixels = soft.element_size(), M * height * width
    loaded = pixels * (16 * taps + taps * taps * item)
    read = min(M * h * w * item + 8 * taps * (width + height), loaded)
    launch(
        _general,
        (M * blocks,),
        maps,
        cell,
        weight,
        words,
        *(parts or (None, None)),
        height,
        width,
        words.shape[-1],
        blocks,
        *maps.stride(),
        a.threshold,
        cost=Cost(
            read=read,
            again=loaded - read,
            written=words.nbytes + sum(part.nbytes for part in parts or ()),
            flops=pixels * (2 * taps * taps + 2 * taps),
        ),
        fp_fusion=False,
        TAPS=taps,
        FAR=(h - 1) * maps.stride(1) + (w - 1) * maps.stride(2) >= 2**31,
        **shape,
    )
    if parts is not None:
        sums.view(-1).copy_(parts[0].sum(1, dtype=torch.float64))
        areas.view(-1).copy_(parts[1].sum(1))

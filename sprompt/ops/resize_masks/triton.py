"""Triton kernels of resize_masks. M maps of h x w cells, images of H x W pixels, 32 pixels per word in reading order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.resize_masks.op import extent
from sprompt.ops.resize_masks.triton_general import CANDIDATES as GENERAL_CANDIDATES
from sprompt.ops.resize_masks.triton_general import bits, held, lower_cell
from sprompt.ops.resize_masks.triton_general import resize_masks_general as resize_masks_general
from sprompt.ops.triton_launch import Cost, config, launch, padded, tiles

#: Tile choices to time on a GPU, besides those of configs.json.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "resize": [
        {"ROWS": r, "WORDS": n, "num_warps": w, "num_stages": 1}
        for r, n, w in ((8, 4, 4), (8, 8, 4), (16, 4, 4), (16, 8, 8), (32, 4, 8), (4, 8, 4))
    ],
    **GENERAL_CANDIDATES,
}  # fmt: skip
_TABLE = 256  # entries per program of _taps


@triton.jit
def _taps(
    cell,  # (W + H,) i32, contiguous: of columns, then of rows
    weight,  # (W + H,) f32, contiguous
    H, W, h, w,
    ratio_y, ratio_x,  # float64 as the bits of an i64: extent / size
    BLOCK: tl.constexpr,
):  # fmt: skip
    """cell = floor(s), weight = s - floor(s) with s = clamp((i + 1/2) ratio - 1/2, 0, cells - 1), for both axes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ratio_x = tl.cast(ratio_x, tl.int64).to(tl.float64, bitcast=True)
    ratio_y = tl.cast(ratio_y, tl.int64).to(tl.float64, bitcast=True)
    cell_x, weight_x = lower_cell(i.to(tl.float64), ratio_x, tl.cast(w, tl.int32))
    cell_y, weight_y = lower_cell((i - W).to(tl.float64), ratio_y, tl.cast(h, tl.int32))
    tl.store(cell + i, tl.where(i < W, cell_x, cell_y), mask=i < W + H)
    tl.store(weight + i, tl.where(i < W, weight_x, weight_y).to(tl.float32), mask=i < W + H)


@triton.jit
def _ends(cell, w1):
    """First and second cell of pixels, and the first cell's weight. A cell of weight 0 is replaced by the other cell."""
    w0 = 1.0 - w1
    first = tl.where(w0 > 0, cell, cell + 1)
    second = tl.where(w1 > 0, cell + 1, cell)
    return first, second, w0


@triton.jit
def _resize(
    soft,  # (M, h, w), any strides
    cell, weight,  # (W + H,) i32 and f32 of _taps
    words,  # (M, n) i32, contiguous
    H, W, h, w, n,
    row_tiles, column_tiles,
    soft_m, soft_y, soft_x,  # strides
    threshold,  # f32
    ROWS: tl.constexpr, WORDS: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr,  # cells that the pixels of a tile can reach; 0: no window is read
    NARROW: tl.constexpr,  # W < 32: a word may span many rows
    FAR: tl.constexpr,  # offsets within a map beyond 2^31
):  # fmt: skip
    """Bit p of words[m] = h(first(y)) w0(y) + h(second(y)) w1(y) > threshold, h(r) = soft[m, r, first(x)] w0(x) +
    soft[m, r, second(x)] w1(x), at (y, x) = divmod(p, W). One program per map, ROWS rows and 32 WORDS columns. It writes
    the words that start in this tile. A row's last word continues in the next row.
    If all cells that a tile can reach lie on one side of the threshold, by more than the rounding error of the
    interpolation, the words are written without interpolation. The error is at most 8 units of the largest magnitude; the
    margin is 16 units."""
    tile_ = tl.program_id(0) % (row_tiles * column_tiles)
    m = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    y0 = tile_ // column_tiles * ROWS
    x0 = tile_ % column_tiles * (32 * WORDS)
    y = y0 + tl.arange(0, ROWS)
    row_start = y.to(tl.int64) * W  # first pixel of the row
    word = (row_start + x0 + 31) // 32  # the first word that starts at or behind (y, x0)
    start = (word * 32 - row_start).to(tl.int32)  # its column
    number = tl.arange(0, WORDS)
    column = start[:, None] + 32 * number[None, :]
    store = (y < H)[:, None] & (column < W)
    out = words + m * n + word[:, None] + number[None, :]
    map_ = soft + m * soft_m

    sure = 0  # 1: all bits set, -1: none
    if WINDOW_Y > 0:  # noqa: SIM102  # a constexpr, decided at compile time
        if (x0 + 32 * WORDS + 31 <= W) & (y0 + ROWS <= H):  # no word of the tile continues in another row
            top = tl.load(cell + W + y0)
            left = tl.load(cell + x0)
            rows = tl.minimum(top + tl.arange(0, WINDOW_Y), h - 1)
            columns = tl.minimum(left + tl.arange(0, WINDOW_X), w - 1)
            place = rows.to(tl.int64)[:, None] * soft_y + columns.to(tl.int64)[None, :] * soft_x
            window = held(tl.load(map_ + place))
            lowest = tl.min(tl.where(window == window, window, float("-inf")))
            highest = tl.max(tl.where(window == window, window, float("inf")))
            size = tl.maximum(tl.maximum(tl.abs(lowest), tl.abs(highest)), tl.abs(threshold))
            margin = size * 9.5367431640625e-07 + 1e-30  # 2^-20
            if lowest > threshold + margin:
                sure = 1
            if highest < threshold - margin:
                sure = -1
    if sure != 0:
        tl.store(out, tl.zeros((ROWS, WORDS), tl.int32) + tl.where(sure > 0, -1, 0), mask=store)
    else:
        lane = tl.arange(0, 32 * WORDS)
        x = start[:, None] + lane[None, :]
        needed = (y < H)[:, None] & (start[:, None] + (lane - lane % 32)[None, :] < W)  # in a word of the tile
        if NARROW:
            row = y[:, None] + x // W
            x = x % W
            inside = needed & (row < H)
            cell_y = tl.load(cell + W + row, mask=inside, other=0)
            weight_y = tl.load(weight + W + row, mask=inside, other=0.0)
        else:
            wraps = x >= W
            x = tl.where(wraps, x - W, x)
            inside = needed & (y[:, None] + tl.where(wraps, 1, 0) < H)
            here = tl.load(cell + W + y, mask=y < H, other=0)[:, None]
            below = tl.load(cell + W + y + 1, mask=y + 1 < H, other=0)[:, None]
            cell_y = tl.where(wraps, below, here)
            here_w = tl.load(weight + W + y, mask=y < H, other=0.0)[:, None]
            below_w = tl.load(weight + W + y + 1, mask=y + 1 < H, other=0.0)[:, None]
            weight_y = tl.where(wraps, below_w, here_w)
        cell_x = tl.load(cell + x, mask=inside, other=0)
        weight_x = tl.load(weight + x, mask=inside, other=0.0)
        x_first, x_second, x_w0 = _ends(cell_x, weight_x)
        y_first, y_second, y_w0 = _ends(cell_y, weight_y)
        if FAR:
            x_first = x_first.to(tl.int64)
            x_second = x_second.to(tl.int64)
            y_first = y_first.to(tl.int64)
            y_second = y_second.to(tl.int64)
        upper = map_ + y_first * soft_y
        lower = map_ + y_second * soft_y
        a = held(tl.load(upper + x_first * soft_x, mask=inside, other=0.0))
        b = held(tl.load(upper + x_second * soft_x, mask=inside, other=0.0))
        top_ = a * x_w0 + b * weight_x
        a = held(tl.load(lower + x_first * soft_x, mask=inside, other=0.0))
        b = held(tl.load(lower + x_second * soft_x, mask=inside, other=0.0))
        pixel = top_ * y_w0 + (a * x_w0 + b * weight_x) * weight_y
        tl.store(out, triton_tile.pack(inside & (pixel > threshold), ROWS, WORDS), mask=store)


def _window(pixels: int, ratio: float) -> int:
    """Cells that neighbouring pixels reach. Their places span (pixels - 1) ratio, and each pixel reaches two cells."""
    return padded(int((pixels - 1) * ratio) + 3, 1)


def resize_masks(a: Args, words: Tensor) -> None:
    soft, height, width, threshold, *_ = a
    if words.numel() == 0:
        return
    maps = soft.reshape(-1, *soft.shape[-2:])
    M, h, w = maps.shape
    ratios = tuple(cells / size for cells, size in zip(extent(a), (height, width), strict=True))
    cell = soft.new_empty((width + height,), dtype=torch.int32)
    weight = soft.new_empty((width + height,), dtype=torch.float32)
    launch(
        _taps,
        (tiles(width + height, _TABLE),),
        cell,
        weight,
        height,
        width,
        h,
        w,
        bits(ratios[0]),
        bits(ratios[1]),
        cost=Cost(written=cell.nbytes + weight.nbytes, flops=5 * (width + height)),
        fp_fusion=False,
        BLOCK=_TABLE,
    )
    shape = config("resize_masks.resize", soft, width)
    item = soft.element_size()
    rows, columns = shape["ROWS"], 32 * shape["WORDS"]
    window = _window(rows, ratios[0]), _window(columns + 31, ratios[1])
    if window[0] * window[1] > rows * columns:
        window = (0, 0)
    row_tiles, column_tiles = tiles(height, rows), tiles(width, columns)
    # Upper bound: no tile is decided by its window. Every pixel reads four cells and its column's taps. Every row of a tile
    # reads its own taps and the taps of the row below (in narrow images: every pixel). Every tile with a window reads it.
    ahead = (height // rows) * max((width - columns - 31) // columns + 1, 0) if window[0] else 0
    taps = 16 * height * width if width < 32 else 8 * height * width + column_tiles * 8 * (2 * height - 1)
    loaded = M * (4 * item * height * width + taps + ahead * (8 + window[0] * window[1] * item))
    # First reads: whole source rows that pixels lie between.
    read = min(M * min(h, 2 * height) * w * item + cell.nbytes + weight.nbytes, loaded)
    far = (h - 1) * maps.stride(1) + (w - 1) * maps.stride(2) >= 2**31
    launch(
        _resize,
        (M * row_tiles * column_tiles,),
        maps,
        cell,
        weight,
        words,
        height,
        width,
        h,
        w,
        words.shape[-1],
        row_tiles,
        column_tiles,
        *maps.stride(),
        threshold,
        cost=Cost(read=read, again=loaded - read, written=words.nbytes, flops=9 * M * height * width),
        fp_fusion=False,
        WINDOW_Y=window[0],
        WINDOW_X=window[1],
        NARROW=width < 32,
        FAR=far,
        **shape,
    )

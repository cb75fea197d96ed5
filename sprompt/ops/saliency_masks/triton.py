"""Triton kernels of saliency_bits, saliency_soft and saliency_maps: maps from rows of products (products.py). B images,
P = H * W cells, M seeds, n = ceil(P / 32) words. The maps of all seeds are never stored. The maps of the pyramid are pooled
rows of the Gram matrix, which is symmetric. A seed that is a vector has one row of products."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.saliency_masks.products import Columns, columns_of, gathered, gram, norms_of, product, windows
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: Bytes of products that are held at a time.
SCRATCH = 1 << 29
#: Images of one launch, at most: the limit of the second axis of a grid.
IMAGES = 65535

#: Other tiles worth timing on a GPU.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "gram": [
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    ],
    "product": [
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ],
    "cut": [
        {"ROWS": 2, "CHUNK": 512, "num_warps": 4, "num_stages": 2},
        {"ROWS": 4, "CHUNK": 128, "num_warps": 4, "num_stages": 2},
        {"ROWS": 4, "CHUNK": 256, "num_warps": 4, "num_stages": 2},
        {"ROWS": 8, "CHUNK": 128, "num_warps": 4, "num_stages": 2},
        {"ROWS": 16, "CHUNK": 128, "num_warps": 8, "num_stages": 2},
    ],
    "pack": [
        {"BLOCK_D": 16, "BLOCK_P": 128, "num_warps": 4, "num_stages": 2},
        {"BLOCK_D": 32, "BLOCK_P": 128, "num_warps": 4, "num_stages": 2},
        {"BLOCK_D": 8, "BLOCK_P": 512, "num_warps": 4, "num_stages": 2},
    ],
}


@triton.jit
def _values(
    products,  # (ROWS,) pointers to the first row of each seed
    right, down,  # steps from a cell's row of products to the rows of its neighbours
    c,  # (CHUNK,) columns
    real,  # (ROWS,)
    norms,  # (line) f32 or None
    valid,  # (P) u8 or None
    P, line,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Columns c of the maps (ROWS, CHUNK), and which columns are valid cells. A map is the mean of COUNT (1 or 4) rows, divided
    by the columns' norms."""
    at = products[:, None] + c[None, :]
    mask = real[:, None] & (c < line)[None, :]
    y = tl.load(at, mask=mask, other=0.0)
    if COUNT == 4:  # quarters first: they are exact, and nothing overflows unless the mean overflows
        second = tl.load(at + right, mask=mask, other=0.0)
        third = tl.load(at + down, mask=mask, other=0.0)
        fourth = tl.load(at + down + right, mask=mask, other=0.0)
        y = (0.25 * y + 0.25 * second) + (0.25 * third + 0.25 * fourth)
    if norms is not None:
        norm = tl.load(norms + c, mask=c < line, other=1.0)
        y = tl.div_rn(y, tl.broadcast_to(norm[None, :], y.shape))
    inside = c < P
    if valid is not None:
        inside = inside & (tl.load(valid + c, mask=inside, other=0) != 0)
    return y, tl.broadcast_to(inside[None, :], y.shape)


@triton.jit
def _range(
    products, right, down, real, norms, valid, P, line, seed_norm,  # (ROWS,) f32
    COUNT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Least value and range of the maps (ROWS,), and which maps are good. A good map is finite and has a range of at least 1e-6
    seed_norm. For other maps the returned range is 1."""
    lowest = tl.full((ROWS, CHUNK), float("inf"), tl.float32)
    highest = tl.full((ROWS, CHUNK), float("-inf"), tl.float32)
    for start in range(0, P, CHUNK):
        c = start + tl.arange(0, CHUNK)
        y, inside = _values(products, right, down, c, real, norms, valid, P, line, COUNT)
        finite = tl.abs(y) < float("inf")
        lowest = tl.minimum(lowest, tl.where(inside, tl.where(finite, y, float("-inf")), float("inf")))
        highest = tl.maximum(highest, tl.where(inside & finite, y, float("-inf")))
    low = tl.min(lowest, axis=1)
    high = tl.max(highest, axis=1)
    extent = high - low  # infinite or NaN if a value is not finite, or without cells
    good = (extent < float("inf")) & (tl.div_rn(extent, seed_norm) >= 1e-6)
    return low, tl.where(good, extent, 1.0), good


@triton.jit
def _cut(
    products,  # (B, R, line) f32, contiguous
    norms,  # (B, line) f32 or None, contiguous
    valid,  # (B, P) u8 or None, contiguous
    seed_norms,  # (B, seed_norm_b) f32 or None, contiguous; of single rows
    usable,  # (B, usable_b) u8 or None, contiguous; of single rows
    words,  # (B, M, n) i32, contiguous
    areas,  # (B, M) i64, contiguous
    scores,  # (B, M) f32, contiguous
    count, columns, width, base, first,
    R, M, P, line, n, seed_norm_b, usable_b, threshold, min_area,
    SIDE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bits, area and score of the maps of `count` seeds, from place `first` on.

    SIDE 1: row s of products is seed s. Its norm and its usable flag are at base + s. SIDE 2, 4: there are `columns` seeds
    per row. Each is the mean of four cells in a block of SIDE x SIDE cells of a map of `width`. Row 0 of products is cell
    `base`, at a multiple of SIDE rows.
    One program per ROWS seeds of one image. It reads the rows once for the range and once for the bits."""
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(tl.program_id(1), tl.int64)
    real = s < count
    s = tl.cast(s, tl.int64)
    good = real
    seed_norm = tl.full((ROWS,), 1.0, tl.float32)
    products += b * R * line
    if norms is not None:
        norms += b * line
    if valid is not None:
        valid += b * P
    if SIDE == 1:
        rows = products + s * line
        COUNT: tl.constexpr = 1
        if seed_norms is not None:
            seed_norm = tl.load(seed_norms + b * seed_norm_b + base + s, mask=real, other=1.0)
        if usable is not None:
            good = good & (tl.load(usable + b * usable_b + base + s, mask=real, other=0) != 0)
    else:
        COUNT: tl.constexpr = 4
        corner = s // columns * SIDE * width + s % columns * SIDE
        cell = corner + (SIDE // 4) * (width + 1)
        rows = products + cell * line
        if norms is not None:
            square = tl.zeros((ROWS,), tl.float32)
            for i in tl.static_range(16):
                one = (i // 8) * width + i // 4 % 2
                other = (i // 2 % 2) * width + i % 2
                square += tl.load(rows + tl.cast(one, tl.int64) * line + base + cell + other, mask=real, other=1.0)
            norm = tl.sqrt_rn(tl.where(square > 0, square, 0.0) * 0.0625)
            seed_norm = tl.where(norm < 1e-12, 1e-12, norm)
        if valid is not None:
            for i in range(SIDE * SIDE):
                at = valid + base + corner + (i // SIDE) * width + i % SIDE
                good = good & (tl.load(at, mask=real, other=0) != 0)
    right = tl.cast(line, tl.int64)
    down = right * width
    low, extent, is_map = _range(rows, right, down, real, norms, valid, P, line, seed_norm, COUNT, ROWS, CHUNK)
    good = good & is_map

    words += (b * M + first + s[:, None]) * n
    total = tl.zeros((ROWS, CHUNK), tl.float64)  # exact: the order of cells does not matter
    cells = tl.zeros((ROWS, CHUNK), tl.int32)
    lows = tl.broadcast_to(low[:, None], (ROWS, CHUNK))
    extents = tl.broadcast_to(extent[:, None], (ROWS, CHUNK))
    for start in range(0, P, CHUNK):
        c = start + tl.arange(0, CHUNK)
        y, inside = _values(rows, right, down, c, real, norms, valid, P, line, COUNT)
        t = tl.div_rn(y - lows, extents)
        bits = inside & good[:, None] & (t >= threshold)
        total += tl.where(bits, t, 0.0).to(tl.float64)
        cells += bits.to(tl.int32)
        w = start // 32 + tl.arange(0, CHUNK // 32)
        tl.store(words + w[None, :], triton_tile.pack(bits, ROWS, CHUNK // 32), mask=real[:, None] & (w < n)[None, :])
    area = tl.sum(cells, axis=1)
    kept = area >= min_area
    score = tl.sum(total, axis=1) / tl.maximum(area, 1).to(tl.float64)
    place = b * M + first + s
    tl.store(areas + place, tl.where(kept, area, 0).to(tl.int64), mask=real)
    tl.store(scores + place, tl.where(kept, score, 0.0).to(tl.float32), mask=real)
    small = real & (area > 0) & (area < min_area)
    if tl.max(small.to(tl.int32), axis=0) > 0:
        tl.debug_barrier()  # other threads may have written these words
        for start in range(0, P, CHUNK):
            w = start // 32 + tl.arange(0, CHUNK // 32)
            none = tl.zeros((ROWS, CHUNK // 32), tl.int32)
            tl.store(words + w[None, :], none, mask=small[:, None] & (w < n)[None, :])


@triton.jit
def _write(
    products,  # (B, COUNT * M, line) f32, contiguous
    norms,  # (B, line) f32 or None, contiguous
    valid,  # (B, P) u8 or None, contiguous
    seed_norms,  # (B, seed_norm_b) f32 or None, contiguous
    usable,  # (B, M) u8 or None, contiguous
    maps,  # (B, all, P), contiguous
    M, all, first, P, line, seed_norm_b,
    COUNT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """maps[b, first + m] = Norm(mean of rows COUNT m .. COUNT m + COUNT - 1 of products over norms), 0 at cells that are not
    valid and for maps that are not good. One program per ROWS maps of one image."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.cast(tl.program_id(1), tl.int64)
    real = m < M
    m = tl.cast(m, tl.int64)
    good = real
    seed_norm = tl.full((ROWS,), 1.0, tl.float32)
    if norms is not None:
        norms += b * line
        seed_norm = tl.load(seed_norms + b * seed_norm_b + first + m, mask=real, other=1.0)
    if valid is not None:
        valid += b * P
    if usable is not None:
        good = good & (tl.load(usable + b * all + first + m, mask=real, other=0) != 0)
    right = tl.cast(line, tl.int64)
    rows = products + (b * M + m) * COUNT * line
    low, extent, is_map = _range(rows, right, 2 * right, real, norms, valid, P, line, seed_norm, COUNT, ROWS, CHUNK)
    good = good & is_map
    lows = tl.broadcast_to(low[:, None], (ROWS, CHUNK))
    extents = tl.broadcast_to(extent[:, None], (ROWS, CHUNK))
    maps += (b * all + first + m[:, None]) * P
    for start in range(0, P, CHUNK):
        c = start + tl.arange(0, CHUNK)
        y, inside = _values(rows, right, 2 * right, c, real, norms, valid, P, line, COUNT)
        t = tl.where(inside & good[:, None], tl.div_rn(y - lows, extents), 0.0)
        tl.store(
            maps + c[None, :], triton_tile.rounded(t, maps.dtype.element_ty), mask=real[:, None] & (c < P)[None, :]
        )


# ---- launches


def _cells(valid: Tensor | None) -> Tensor | None:
    """valid as bytes (B, P)."""
    return None if valid is None else valid.flatten(1).contiguous().view(torch.uint8)


def _part(x: Tensor | None, first: int, last: int) -> Tensor | None:
    return None if x is None else x[first:last]


def _lines(x: Tensor | None, programs: int, each: int) -> tuple[int, int]:
    """Bytes of one line per image, as (first reads, further reads). Each of `programs` programs reads it twice."""
    bytes_ = 0 if x is None else x.shape[0] * each
    return bytes_, (2 * programs - 1) * bytes_


def _launch_cut(
    products: Tensor, norms: Tensor | None, valid: Tensor | None, seed_norms: Tensor | None, usable: Tensor | None,
    outputs: tuple[Tensor, ...], P: int, threshold: float, min_area: int, *,
    side: int = 1, count: int, columns: int = 1, width: int = 1, base: int = 0, first: int = 0,
) -> None:  # fmt: skip
    words, areas, scores = outputs
    B, R, line = products.shape
    M, n = words.shape[1:]
    tile_ = config("saliency_masks.cut", products)
    programs = tiles(count, tile_["ROWS"])
    seeds = B * count
    norm_bytes, norm_again = _lines(norms, programs, 4 * line)
    valid_bytes, valid_again = _lines(valid, programs, P)
    rows = seeds * (1 if side == 1 else 4) * line * 4
    if side == 1:
        heads = (4 * seeds if seed_norms is not None else 0) + (seeds if usable is not None else 0)
    else:
        heads = (64 * seeds if norms is not None else 0) + (side * side * seeds if valid is not None else 0)
    cost = Cost(
        read=rows + norm_bytes + valid_bytes,
        again=rows + norm_again + valid_again + heads,
        written=seeds * (2 * 4 * n + 12),  # upper bound: words of too small maps are written twice
        flops=seeds * P * (12 if side == 1 else 24),
    )
    launch(
        _cut, (programs, B), products, norms, valid, seed_norms, usable, words, areas, scores, count, columns, width, base,
        first, R, M, P, line, n, 0 if seed_norms is None else seed_norms.shape[1], 0 if usable is None else usable.shape[1],
        threshold, min_area, cost=cost, SIDE=side, **tile_,
    )  # fmt: skip


def _launch_write(
    products: Tensor, norms: Tensor | None, valid: Tensor | None, seed_norms: Tensor | None, usable: Tensor | None,
    maps: Tensor, first: int, pooled: int,
) -> None:  # fmt: skip
    B, rows, line = products.shape
    count, P = rows // pooled, maps.shape[2] * maps.shape[3]
    tile_ = config("saliency_masks.write", products)
    programs = tiles(count, tile_["ROWS"])
    norm_bytes, norm_again = _lines(norms, programs, 4 * line)
    valid_bytes, valid_again = _lines(valid, programs, P)
    heads = B * count * ((4 if norms is not None else 0) + (1 if usable is not None else 0))
    cost = Cost(
        read=products.nbytes + norm_bytes + valid_bytes + heads,
        again=products.nbytes + norm_again + valid_again,
        written=B * count * P * maps.element_size(),
        flops=B * count * P * (8 if pooled == 1 else 20),
    )
    launch(
        _write, (programs, B), products, norms, valid, seed_norms, usable, maps, count, maps.shape[1], first, P, line,
        0 if seed_norms is None else seed_norms.shape[1], cost=cost, COUNT=pooled, **tile_,
    )  # fmt: skip


def _pyramid_bits(
    x: Columns, valid: Tensor | None, size: tuple[int, int], cosine: bool, threshold: float, min_area: int,
    outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Takes the whole Gram matrix of as many images as fit SCRATCH. If one matrix does not fit, takes stripes of a multiple of
    4 rows of cells."""
    height, width = size
    whole = x.P * x.line * 4 <= SCRATCH
    group = min(SCRATCH // (x.P * x.line * 4), IMAGES) if whole else 1
    stripe = height if whole else max(SCRATCH // (4 * x.line * width) // 4 * 4, 4)
    _, d, p = x.stride
    all_norms = norms_of(x.data, x.stride, x.D, x.P, x.line) if cosine and not whole else None
    for b in range(0, x.data.shape[0], group):
        images, cells = x.images(b, b + group), _part(valid, b, b + group)
        mine = tuple(output[b : b + group] for output in outputs)
        for y0 in range(0, height, stripe):
            y1, base = min(y0 + stripe, height), y0 * width
            if whole:
                products, norms = gram(images, cosine)
            else:
                norms = _part(all_norms, b, b + group)
                view = images.data.as_strided(
                    (images.data.shape[0], (y1 - y0) * width, x.D), (x.stride[0], p, d),
                    images.data.storage_offset() + base * p,
                )  # fmt: skip
                products = product(view, (y1 - y0) * width, images)
            skipped = 0
            for scale in range(3):
                columns = width >> scale
                _launch_cut(
                    products, norms, cells, norms, cells, mine, x.P, threshold, min_area, side=1 << scale,
                    count=((y1 >> scale) - (y0 >> scale)) * columns, columns=columns, width=width, base=base,
                    first=skipped + (y0 >> scale) * columns,
                )  # fmt: skip
                skipped += (height >> scale) * columns


def _blocks(images: int, rows: int, line: int, multiple: int) -> Any:
    """(first image, last, first row, last) of blocks of products that fit SCRATCH. Rows are cut at multiples of `multiple`."""
    most = max(SCRATCH // (4 * line), 1)
    group = max(min(most // max(rows, 1), IMAGES), 1)
    step = rows if rows <= most else max(most // multiple * multiple, multiple)
    for b in range(0, images, group):
        for r in range(0, rows, step):
            yield b, min(b + group, images), r, min(r + step, rows)


def saliency_bits(a: Args, *outputs: Tensor) -> None:
    features, valid, grid_height, grid_width, cosine, threshold, min_area = a
    words, areas, scores = outputs
    if words.numel() == 0:
        areas.zero_(), scores.zero_()
        return
    x, cells, size = columns_of(features), _cells(valid), features.shape[2:]
    if grid_height == 0:
        _pyramid_bits(x, cells, size, cosine, threshold, min_area, outputs)
        return
    rows, usable = windows(x, None, cells, size, (grid_height, grid_width))
    norms, seed_norms = _vector_norms(x, rows, cosine)
    for b0, b1, r0, r1 in _blocks(*words.shape[:2], x.line, 1):
        products = product(rows[b0:b1, r0:r1], r1 - r0, x.images(b0, b1))
        _launch_cut(
            products, _part(norms, b0, b1), _part(cells, b0, b1), _part(seed_norms, b0, b1), usable[b0:b1],
            tuple(output[b0:b1] for output in outputs), x.P, threshold, min_area, count=r1 - r0, base=r0, first=r0,
        )  # fmt: skip


def _vector_norms(x: Columns, rows: Tensor, cosine: bool, pooled: int = 1) -> tuple[Tensor | None, Tensor | None]:
    """Norms of the cells and of the seeds. The seeds' vectors are the rows, or the means of every four rows."""
    if not cosine:
        return None, None
    seeds = rows.shape[1] // pooled
    b, r, d = rows.stride()
    return norms_of(x.data, x.stride, x.D, x.P, x.line), norms_of(rows, (b, d, r), x.D, seeds, seeds, pooled)


def _write_all(
    x: Columns, rows: Tensor, cells: Tensor | None, usable: Tensor | None, cosine: bool, maps: Tensor, pooled: int
) -> None:
    norms, seed_norms = _vector_norms(x, rows, cosine, pooled)
    for b0, b1, r0, r1 in _blocks(rows.shape[0], rows.shape[1], x.line, pooled):
        products = product(rows[b0:b1, r0:r1], r1 - r0, x.images(b0, b1))
        _launch_write(
            products, _part(norms, b0, b1), _part(cells, b0, b1), _part(seed_norms, b0, b1), _part(usable, b0, b1),
            maps[b0:b1], r0 // pooled, pooled,
        )  # fmt: skip


def saliency_soft(a: Args, maps: Tensor) -> None:
    if maps.numel() == 0:
        return
    x, cells, size = columns_of(a.features), _cells(a.valid), a.features.shape[2:]
    if a.grid_height == 0:
        rows, usable = gathered(x, a.addresses, cells, *size)
    else:
        rows, usable = windows(x, a.addresses, cells, size, (a.grid_height, a.grid_width))
    _write_all(x, rows, cells, usable, a.cosine, maps, 4 if a.grid_height == 0 else 1)


def saliency_maps(a: Args, maps: Tensor) -> None:
    if maps.numel() > 0:
        _write_all(columns_of(a.features), a.seeds, _cells(a.valid), None, a.cosine, maps, 1)

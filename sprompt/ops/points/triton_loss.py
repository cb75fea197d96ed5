"""Triton kernels of point_loss. M masks, logits of h x w cells, D candidates, K of them kept, T points of a loss.

The keys of the candidates lie in memory, 4 bytes each. The K least are found exactly."""

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.points.triton_taps import (
    NOT_FINITE,
    Source,
    add_shares,
    convert,
    coordinates,
    exponent,
    fixed_point,
    loaded,
    logistic,
    map_strides,
    room_of,
    taps,
    values,
)
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "keys": [{"BLOCK": b, "num_warps": w, "num_stages": 1} for b, w in ((256, 4), (512, 4), (1024, 4), (1024, 8))],
    "choose": [{"BLOCK": b, "num_warps": w, "num_stages": 1} for b, w in ((1024, 4), (2048, 8), (4096, 8), (4096, 16))],
    "loss": [
        {"BLOCK": b, "TILES": t, "num_warps": w, "num_stages": 1}
        for b, t, w in ((256, 4, 4), (256, 8, 4), (512, 4, 4), (512, 8, 8))
    ],
    "slopes": [{"BLOCK": b, "num_warps": w, "num_stages": 1} for b, w in ((128, 4), (256, 4), (512, 4))],
}


@triton.jit
def _keys(
    logits,  # (M, h, w), any strides
    seed,  # () i64, or None
    points,  # (M, D + T - K, 2) f32, any strides, or None
    keys,  # (M, D) i32, contiguous, written: increases with |z|; 0 for NaN
    D, h, w, blocks, logits_m, logits_y, logits_x, points_m, points_t, points_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (mask, block of candidates)."""
    m = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x, y = coordinates(seed, points, m, i, i < D, points_m, points_t, points_c)
    column, row, fx, fy, inside = taps(x, y, h, w)
    z = values(logits + m * logits_m, column, row, fx, fy, inside & (i < D), h, w, logits_y, logits_x)
    tl.store(keys + m * D + i, tl.where(z == z, tl.abs(z).to(tl.int32, bitcast=True) + 1, 0), mask=i < D)


@triton.jit
def _choose(
    keys,  # (M, D) i32, contiguous
    chosen,  # (M, kept) i32, contiguous, written: places of the least keys, increasing
    D, kept,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per mask."""
    m = tl.program_id(0).to(tl.int64)
    triton_tile.choose_least(keys + m * D, chosen + m * kept, D, kept, BLOCK)


@triton.jit
def _final(chosen, m, i, T, drawn, kept):
    """The numbers of points i of the loss of mask m: the chosen ones, then those that are added."""
    old = tl.load(chosen + m * kept + i, mask=i < kept, other=0)
    return tl.where(i < kept, old, drawn - kept + i)


@triton.jit
def _loss_sums(
    logits,  # (M, h, w), any strides
    words,  # (M, n) i32, any strides
    seed,  # () i64, or None
    points,  # (M, D + T - K, 2) f32, any strides, or None
    chosen,  # (M, kept) i32, contiguous
    partial,  # (M, chunks, 4) f32, contiguous, written
    T, drawn, kept, h, w, height, width, chunks,
    logits_m, logits_y, logits_x, words_m, words_y, words_w, points_m, points_t, points_c,  # strides
    HALVINGS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """partial[m, c] = sums over the points of chunk c of log(1 + e^z) - z t, p t, p and t, p = sigmoid(z). One program per
    (mask, chunk of TILES x BLOCK points); BLOCK = 2^HALVINGS."""
    m = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    part = tl.arange(0, 4)[:, None]
    sums = tl.zeros((4, BLOCK), tl.float32)
    for first in range(c * TILES * BLOCK, tl.minimum((c + 1) * TILES * BLOCK, T), BLOCK):
        i = first + tl.arange(0, BLOCK)
        x, y = coordinates(seed, points, m, _final(chosen, m, i, T, drawn, kept), i < T, points_m, points_t, points_c)
        column, row, fx, fy, inside = taps(x, y, h, w)
        z = values(logits + m * logits_m, column, row, fx, fy, inside & (i < T), h, w, logits_y, logits_x)
        column, row, fx, fy, inside = taps(x, y, height, width)
        t = values(words + m * words_m, column, row, fx, fy, inside & (i < T), height, width, words_y, words_w)
        p, _, softplus = logistic(z)
        three = tl.where(part == 1, (p * t)[None, :], tl.where(part == 2, p[None, :], t[None, :]))
        terms = tl.where(part == 0, (softplus - z * t)[None, :], three)
        sums += tl.where((i < T)[None, :], terms, 0.0)
    place = partial + (m * chunks + c) * 4 + tl.arange(0, 4)
    tl.store(place, triton_tile.folded(sums, HALVINGS))


@triton.jit
def _loss_finish(
    partial,  # (M, chunks, 4) f32, contiguous
    bce, dice,  # (M) f32, contiguous, written
    sums,  # (M, 2) f32, contiguous, written: sum p t, sum p + sum t
    T, chunks,
):  # fmt: skip
    """The losses from the sums of the chunks, added in order. One program per mask."""
    m = tl.program_id(0).to(tl.int64)
    cross = 0.0
    pt = 0.0
    p = 0.0
    t = 0.0
    for c in range(chunks):
        place = partial + (m * chunks + c) * 4
        cross += tl.load(place)
        pt += tl.load(place + 1)
        p += tl.load(place + 2)
        t += tl.load(place + 3)
    tl.store(bce + m, cross / tl.cast(tl.maximum(T, 1), tl.float32))
    tl.store(dice + m, 1.0 - (2.0 * pt + 1.0) / (p + t + 1.0))
    tl.store(sums + m * 2, pt)
    tl.store(sums + m * 2 + 1, p + t)


@triton.jit
def _slopes(
    grad_bce, grad_dice,  # (M) f32, any stride
    logits, words, seed, points, chosen,  # as for _loss_sums
    sums,  # (M, 2) f32, contiguous
    cells,  # (M, h, w) i64, contiguous, added to
    limits,  # (M) i32, contiguous, written: every |slope| is below 2^limit; NOT_FINITE: the gradient is NaN
    T, drawn, kept, h, w, height, width, blocks, room,
    grad_bce_m, grad_dice_m, logits_m, logits_y, logits_x, words_m, words_y, words_w, points_m, points_t, points_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of every point's logit to its four cells: with ratio = (2 sum p t + 1) / below and below =
    sum p + sum t + 1 it is to_bce (p - t) + to_dice (ratio - 2 t) / below p (1 - p). One program per (mask, block of points)."""
    m = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks
    to_bce = tl.load(grad_bce + m * grad_bce_m) / tl.cast(tl.maximum(T, 1), tl.float32)
    to_dice = tl.load(grad_dice + m * grad_dice_m)
    below = tl.load(sums + m * 2 + 1) + 1.0
    ratio = (2.0 * tl.load(sums + m * 2) + 1.0) / below
    most = tl.abs(to_bce) + tl.abs(to_dice) * ((tl.abs(ratio) + 2.0) / below)
    finite = most < float("inf")
    limit = tl.where(finite, exponent(most) + 1, NOT_FINITE)  # + 1: sums of rounded numbers may pass `most`
    if k == 0:
        tl.store(limits + m, limit)
    if finite:
        i = k * BLOCK + tl.arange(0, BLOCK)
        x, y = coordinates(seed, points, m, _final(chosen, m, i, T, drawn, kept), i < T, points_m, points_t, points_c)
        column, row, fx, fy, inside = taps(x, y, height, width)
        t = values(words + m * words_m, column, row, fx, fy, inside & (i < T), height, width, words_y, words_w)
        column, row, fx, fy, inside = taps(x, y, h, w)
        real = inside & (i < T)
        p, q, _ = logistic(values(logits + m * logits_m, column, row, fx, fy, real, h, w, logits_y, logits_x))
        slope = to_bce * (p - t) + to_dice * ((ratio - 2.0 * t) / below) * (p * q)
        add_shares(cells + m * h * w, slope, column, row, fx, fy, real, h, w, limit, room, False)


# -- launches


def _points_cost(a: Args, loads: int) -> Cost:
    """The bytes that the kernels of the final points load, in `loads` blocks of points: coordinates, chosen, cells and pixels."""
    M, T, source = a.logits.shape[0], a.number, Source(a.seed, a.points)
    cells, pixels = loaded(a.logits, M * T), loaded(a.words, M * T)
    taken, first = source.bytes(loads, M * T), source.bytes(min(loads, 1), M * T)
    return Cost(
        read=cells.read + pixels.read + first + 4 * M * a.kept, again=cells.again + pixels.again + taken - first
    )


def point_loss(a: Args, bce: Tensor, dice: Tensor, chosen: Tensor, sums: Tensor) -> None:
    """Needs 4 bytes of scratch per candidate."""
    (M, h, w), D, T, source = a.logits.shape, a.drawn, a.number, Source(a.seed, a.points)
    if a.kept > 0:
        keys = chosen.new_empty((M, D))
        block = config("points.keys", a.logits)
        blocks, cells = tiles(D, block["BLOCK"]), loaded(a.logits, M * D)
        first = source.bytes(min(M, 1), M * D)
        cost = Cost(
            cells.read + first, keys.nbytes, cells.again + source.bytes(M * blocks, M * D) - first, 100 * keys.numel()
        )
        launch(
            _keys, (M * blocks,), a.logits, a.seed, a.points, keys, D, h, w, blocks, *a.logits.stride(), *source.strides,
            cost=cost, fp_fusion=False, **block,
        )  # fmt: skip
        cost = Cost(
            read=keys.nbytes, again=triton_tile.STEPS.value * keys.nbytes, written=chosen.nbytes, flops=5 * keys.numel()
        )
        launch(_choose, (M,), keys, chosen, D, a.kept, cost=cost, **config("points.choose", a.logits))

    tile = config("points.loss", a.logits)
    chunks = tiles(T, tile["BLOCK"] * tile["TILES"])
    partial = sums.new_empty((M, chunks, 4))
    of_points = _points_cost(a, M * tiles(T, tile["BLOCK"]))
    launch(
        _loss_sums, (M * chunks,), a.logits, a.words, a.seed, a.points, chosen, partial, T, D, a.kept, h, w,
        a.height, a.width, chunks, *a.logits.stride(), *map_strides(a.words), *source.strides,
        cost=of_points._replace(written=partial.nbytes, flops=100 * M * T), fp_fusion=False,
        HALVINGS=tile["BLOCK"].bit_length() - 1, **tile,
    )  # fmt: skip
    cost = Cost(read=partial.nbytes, written=16 * M, flops=partial.numel())
    launch(_loss_finish, (M,), partial, bce, dice, sums, T, chunks, cost=cost, num_warps=1)


def point_loss_backward(a: Args, grad: Tensor) -> None:
    """Needs 8 bytes of scratch per cell."""
    (M, h, w), T, source = a.logits.shape, a.number, Source(a.seed, a.points)
    room, block = room_of(T), config("points.slopes", a.logits)
    cells, limits = fixed_point(a.logits, M, h * w)
    # Without points one program writes the limit.
    blocks = max(tiles(T, block["BLOCK"]), 1)
    of_points, shares, numbers = _points_cost(a, M * blocks), 4 * 8 * M * T, 16 * M
    first = min(shares, cells.nbytes)
    cost = Cost(
        read=of_points.read + numbers + first,
        again=of_points.again + (blocks - 1) * numbers + shares - first,
        written=shares + limits.nbytes,
        flops=120 * M * T,
    )
    launch(
        _slopes, (M * blocks,), a.grad_bce, a.grad_dice, a.logits, a.words, a.seed, a.points, a.chosen.contiguous(),
        a.sums.contiguous(), cells, limits, T, a.drawn, a.kept, h, w, a.height, a.width, blocks, room,
        a.grad_bce.stride(0), a.grad_dice.stride(0), *a.logits.stride(), *map_strides(a.words), *source.strides,
        cost=cost, fp_fusion=False, **block,
    )  # fmt: skip
    convert(cells, limits, grad.flatten(1), room)

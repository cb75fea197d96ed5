"""Triton kernels of point_cost. B images, N masks, G targets, C channels of a pair, T points. Points are cut into chunks of whole
tiles, and a second kernel adds the chunks in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.mask_conv.triton_chunks import block, cut, split
from sprompt.ops.points.triton_taps import Source, coordinates, loaded, logistic, map_strides, taps, values
from sprompt.ops.triton_launch import Cost, config, interpreted, launch, padded, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "cost": [
        {"BLOCK_N": n, "BLOCK_G": 32, "BLOCK_T": t, "PROGRAMS": p, "num_warps": w, "num_stages": 1}
        for n, t, w in ((64, 16, 4), (64, 16, 8), (64, 32, 8), (128, 16, 8))
        for p in (528, 1056, 2112)
    ],
}
# For sm_100 Triton 3.7 compiles the pair with 128 masks to a trap, which would end the tuner.
CANDIDATES["cost_of_pair"] = [
    entry | {"BLOCK_C": c} for entry in CANDIDATES["cost"] for c in (16, 32) if entry["BLOCK_N"] <= 64
]


@triton.jit
def _product(a, b, acc):
    """acc + a b on the tensor cores, from three bfloat16 parts of each float32. The products of parts that are left out are
    together below 2^-21 of a product. Small parts are added first. float32 itself would not do: for sm_100 Triton multiplies
    float32 that comes from half types as tf32, whatever the precision that is asked for."""
    a0, a1, a2 = split(a)
    b0, b1, b2 = split(b)
    acc = triton_tile.dot(a0, b2, acc, "ieee")
    acc = triton_tile.dot(a1, b1, acc, "ieee")
    acc = triton_tile.dot(a2, b0, acc, "ieee")
    acc = triton_tile.dot(a0, b1, acc, "ieee")
    acc = triton_tile.dot(a1, b0, acc, "ieee")
    return triton_tile.dot(a0, b0, acc, "ieee")


@triton.jit
def _cost_sums(
    maps,  # (B, N, h, w) logits, or (B, C, h, w) features; any strides
    kernels,  # (B, N, C), any strides, or None
    words,  # (B, G, n) i32, any strides
    counts,  # (B) i64, any stride, or None
    seed,  # () i64, or None
    points,  # (B, T, 2) f32, any strides, or None
    products,  # (B, chunks, 2, N, G) f32, contiguous, written: sums of z t and p t
    of_masks,  # (B, chunks, 2, N) f32, contiguous, written: sums of log(1 + e^z) and p
    of_targets,  # (B, chunks, G) f32, contiguous, written: sums of t
    N, C, G, T, h, w, height, width, chunks, chunk, blocks_n, blocks_g,  # chunk: in tiles
    maps_b, maps_n, maps_y, maps_x, kernels_b, kernels_n, kernels_c,  # strides
    words_b, words_g, words_y, words_w, counts_b, points_b, points_t, points_c,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    """z: logits at points, p = sigmoid(z), t: targets at points. Masks are sampled once for a block of targets, targets once for
    a block of masks. One program per (image, chunk, block of masks, block of targets); BLOCK_T = 2^HALVINGS."""
    block_g = tl.program_id(0) % blocks_g
    block_n = tl.program_id(0) // blocks_g % blocks_n
    c = tl.program_id(0) // (blocks_g * blocks_n) % chunks
    b = (tl.program_id(0) // (blocks_g * blocks_n) // chunks).to(tl.int64)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g = block_g * BLOCK_G + tl.arange(0, BLOCK_G)
    count = tl.cast(G, tl.int64)
    if counts is not None:
        count = tl.load(counts + b * counts_b)
    mine, theirs = (n < N)[:, None], ((g < G) & (g < count))[:, None]
    targets = words + b * words_b + g.to(tl.int64)[:, None] * words_g
    zt = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    pt = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    soft = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    p_sum = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    t_sum = tl.zeros((BLOCK_G, BLOCK_T), tl.float32)
    for tile in range(c * chunk, tl.minimum((c + 1) * chunk, tl.cdiv(T, BLOCK_T))):
        i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        real = (i < T)[None, :]
        x, y = coordinates(seed, points, b, i, i < T, points_b, points_t, points_c)
        x, y = x[None, :], y[None, :]
        column, row, fx, fy, inside = taps(x, y, h, w)
        if kernels is None:
            logits = maps + b * maps_b + n.to(tl.int64)[:, None] * maps_n
            z = values(logits, column, row, fx, fy, inside & real & mine, h, w, maps_y, maps_x)
        else:
            z = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for first in range(0, C, BLOCK_C):
                d = first + tl.arange(0, BLOCK_C)
                features = maps + b * maps_b + d.to(tl.int64)[:, None] * maps_n
                known = inside & real & (d < C)[:, None]
                sampled = values(features, column, row, fx, fy, known, h, w, maps_y, maps_x)
                weights = block(kernels + b * kernels_b, n, N, kernels_n, d, C, kernels_c).to(tl.float32)
                z = _product(weights, sampled, z)
        column, row, fx, fy, inside = taps(x, y, height, width)
        t = values(targets, column, row, fx, fy, inside & real & theirs, height, width, words_y, words_w)
        p, _, softplus = logistic(z)
        p = tl.where(real, p, 0.0)
        soft += tl.where(real, softplus, 0.0)
        p_sum += p
        t_sum += t
        t = tl.trans(t)
        zt, pt = _product(z, t, zt), _product(p, t, pt)
    k = b * chunks + c
    both = mine & (g < G)[None, :]
    place = products + (k * 2 * N + n)[:, None] * G + g[None, :]
    tl.store(place, zt, mask=both)
    tl.store(place + tl.cast(N, tl.int64) * G, pt, mask=both)
    if block_g == 0:
        tl.store(of_masks + k * 2 * N + n, triton_tile.folded(soft, HALVINGS), mask=n < N)
        tl.store(of_masks + (k * 2 + 1) * N + n, triton_tile.folded(p_sum, HALVINGS), mask=n < N)
    if block_n == 0:
        tl.store(of_targets + k * G + g, triton_tile.folded(t_sum, HALVINGS), mask=g < G)


@triton.jit
def _cost_finish(
    products, of_masks, of_targets,  # as _cost_sums writes them
    counts,  # (B) i64, any stride, or None
    cost,  # (B, N, G) f32, contiguous, written
    bce_weight, dice_weight,
    N, G, T, chunks, blocks_g, counts_b,
    BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The costs from the sums of the chunks; 0 for g >= counts[b]. The sums of BLOCK_K chunks are added together, then these
    totals in order. One program per (image, mask, block of targets)."""
    g = tl.program_id(0) % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G)
    row = (tl.program_id(0) // blocks_g).to(tl.int64)
    b, n = row // N, row % N
    real = g < G
    if counts is not None:
        real = real & (g < tl.load(counts + b * counts_b))
    zt = tl.zeros((BLOCK_G,), tl.float32)
    pt = tl.zeros((BLOCK_G,), tl.float32)
    t = tl.zeros((BLOCK_G,), tl.float32)
    soft = tl.zeros((BLOCK_K,), tl.float32)
    p = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, chunks, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        k = b * chunks + c
        both = (c < chunks)[:, None] & real[None, :]
        place = products + (k * 2 * N + n)[:, None] * G + g[None, :]
        zt += tl.sum(tl.load(place, mask=both, other=0.0), axis=0)
        pt += tl.sum(tl.load(place + tl.cast(N, tl.int64) * G, mask=both, other=0.0), axis=0)
        t += tl.sum(tl.load(of_targets + k[:, None] * G + g[None, :], mask=both, other=0.0), axis=0)
        soft += tl.load(of_masks + k * 2 * N + n, mask=c < chunks, other=0.0)
        p += tl.load(of_masks + (k * 2 + 1) * N + n, mask=c < chunks, other=0.0)
    ones = tl.full((BLOCK_G,), 1.0, tl.float32)
    bce = tl.div_rn(tl.sum(soft) - zt, ones * tl.maximum(T, 1))
    dice = 1.0 - tl.div_rn(2.0 * pt + 1.0, tl.sum(p) + t + 1.0)
    tl.store(cost + row * G + g, tl.where(real, bce_weight * bce + dice_weight * dice, 0.0), mask=g < G)


def point_cost(a: Args, cost: Tensor) -> None:
    if cost.numel() == 0:
        return
    maps, kernels, words, counts, T = a.maps, a.kernels, a.words, a.counts, a.number
    B, N, G = cost.shape
    C, h, w = maps.shape[1:]
    tile = config("points.cost" if kernels is None else "points.cost_of_pair", maps)
    programs = tile.pop("PROGRAMS")
    if interpreted():  # its time grows with the number of tiles
        tile["BLOCK_T"] *= 8
    tile["BLOCK_N"] = min(tile["BLOCK_N"], padded(N))
    tile["BLOCK_G"] = min(tile["BLOCK_G"], padded(G))
    tile["BLOCK_C"] = min(tile.get("BLOCK_C", 16), padded(C))
    blocks_n, blocks_g = tiles(N, tile["BLOCK_N"]), tiles(G, tile["BLOCK_G"])
    parts = cut(T, tile["BLOCK_T"], programs, B * blocks_n * blocks_g)
    chunks, source = parts.chunks, Source(a.seed, a.points)
    products, of_masks, of_targets = (
        maps.new_empty((B, chunks, *sizes), dtype=torch.float32) for sizes in ((2, N, G), (2, N), (G,))
    )
    written = products.nbytes + of_masks.nbytes + of_targets.nbytes

    blocks = blocks_n * blocks_g
    counted = 0 if counts is None else 8 * B
    sampled = loaded(maps, B * C * T)
    # Worst case: every target is real, and every point lies in the maps.
    bits = loaded(words, B * G * T)
    taken, taken_by_all = source.bytes(1, B * T), source.bytes(B * parts.tiles * blocks, B * T * blocks)
    read = sampled.read + bits.read + taken + counted
    loads = (sampled.read + sampled.again) * (blocks_g if kernels is None else blocks) + taken_by_all
    loads += (bits.read + bits.again) * blocks_n + counted * chunks * blocks
    flops = B * T * (25 * N + 9 * G + 4 * N * G + (9 * N if kernels is None else 9 * C + 2 * C * N))
    if kernels is not None:
        read += kernels.nbytes
        loads += kernels.nbytes * parts.tiles * blocks_g
    read = min(read, loads)  # without points nothing is loaded
    counts_b = 0 if counts is None else counts.stride(0)
    launch(
        _cost_sums, (B * chunks * blocks,), maps, kernels, words, counts, a.seed, a.points, products, of_masks, of_targets,
        N, C, G, T, h, w, a.height, a.width, chunks, parts.chunk, blocks_n, blocks_g,
        *maps.stride(), *(kernels.stride() if kernels is not None else (0, 0, 0)), *map_strides(words), counts_b,
        *source.strides, cost=Cost(read, written, loads - read, flops), fp_fusion=False,
        HALVINGS=tile["BLOCK_T"].bit_length() - 1, **tile,
    )  # fmt: skip
    width = min(padded(G), 128)
    blocks = tiles(G, width)
    again = (blocks - 1) * of_masks.nbytes + (N - 1) * of_targets.nbytes + max(N * blocks - 1, 0) * counted
    launch(
        _cost_finish, (B * N * blocks,), products, of_masks, of_targets, counts, cost, a.bce_weight, a.dice_weight,
        N, G, T, chunks, blocks, counts_b,
        cost=Cost(written + counted, cost.nbytes, again, products.numel() + 15 * cost.numel()),
        BLOCK_K=16, BLOCK_G=width, num_warps=1 if width <= 32 else 4,
    )  # fmt: skip

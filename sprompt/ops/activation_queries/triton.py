"""Triton kernels of activation_queries. B images, C channels, P = h w cells.

Scores have the bits of the reference: every sum has its order, and no product is fused (fp_fusion=False)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile, unfused
from sprompt.ops.activation_queries import reference
from sprompt.ops.declare import Args
from sprompt.ops.triton_launch import Cost, config, launch, tiles

#: Tile choices to time on a GPU, besides those of configs.json.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "score": [{"BLOCK": b, "UNROLL": u, "num_warps": b // 32, "num_stages": 1} for b in (32, 64, 128) for u in (4, 8, 16)],
    "select": [
        {"BLOCK": b, "RANK": r, "num_warps": w, "num_stages": 1}
        for b, r, w in ((512, 32, 4), (1024, 32, 8), (1024, 64, 8), (2048, 64, 16))
    ],
}  # fmt: skip

LEAST_EXPONENT, LEAST_SCORE = tl.constexpr(unfused.LEAST_EXPONENT), tl.constexpr(reference.LEAST_SCORE)
LOG2_E, ROUNDER = tl.constexpr(unfused.LOG2_E), tl.constexpr(unfused.ROUNDER)
LN2_HIGH, LN2_LOW = tl.constexpr(unfused.LN2_HIGH), tl.constexpr(unfused.LN2_LOW)
EXP_0, EXP_1, EXP_2, EXP_3, EXP_4, EXP_5, EXP_6 = (tl.constexpr(factor) for factor in unfused.EXP)
#: The bits of 1.0; the key of the first cell that is no maximum; the key of a cell without a score.
ONE, NO_MAXIMUM, NO_SCORE = tl.constexpr(0x3F800000), tl.constexpr(1 << 30), tl.constexpr(0x7FFFFFFF)


@triton.jit
def _exp(x):
    """exp of unfused.py."""
    tiny = x < LEAST_EXPONENT
    x = tl.where(tiny, LEAST_EXPONENT, x)
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    power = EXP_0 * r + EXP_1
    power = power * r + EXP_2
    power = power * r + EXP_3
    power = power * r + EXP_4
    power = power * r + EXP_5
    power = power * r + EXP_6
    two_to_n = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(tiny, 0.0, power * two_to_n)


@triton.jit
def _score(
    logits,  # (B, C, h, w), any strides
    scores,  # (B, P) f32, contiguous, written
    labels,  # (B, P) i32, contiguous, written
    C, P, w, blocks,
    logits_b, logits_c, logits_y, logits_x,  # strides
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program per (image, block of cells). It reads the logits twice, the second time from the cache."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = i < P
    cell = logits + b * logits_b + (i // w).to(tl.int64) * logits_y + (i % w).to(tl.int64) * logits_x
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    label = tl.zeros((BLOCK,), tl.int32)
    for c in tl.range(0, C - 1, loop_unroll_factor=UNROLL):
        z = tl.load(cell + tl.cast(c, tl.int64) * logits_c, mask=real, other=0.0).to(tl.float32)
        more = z > best  # false for NaN
        best = tl.where(more, z, best)
        label = tl.where(more, c, label)
    z = tl.load(cell + tl.cast(C - 1, tl.int64) * logits_c, mask=real, other=0.0).to(tl.float32)
    most = tl.where(z > best, z, best)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in tl.range(0, C, loop_unroll_factor=UNROLL):
        z = tl.load(cell + tl.cast(c, tl.int64) * logits_c, mask=real, other=0.0).to(tl.float32)
        total += _exp(z - most)
    tl.store(scores + b * P + i, tl.div_rn(_exp(best - most), total), mask=real)
    tl.store(labels + b * P + i, label, mask=real)


@triton.jit
def _select(
    scores,  # (B, P) f32, contiguous
    labels,  # (B, P) i32, contiguous
    keys,  # (B, P) i32, contiguous, written: the first cell has the smallest key
    chosen,  # (B, count) i32, contiguous, written: the cells, increasing
    index, found, classes,  # (B, count), contiguous, written
    h, w, count,
    BLOCK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """One program per image: keys, the cells of the least keys, and the rank of each of these cells among them. Keys of local
    maxima are below NO_MAXIMUM. Scores are in [0, 1], whose bits increase with them."""
    b = tl.program_id(0).to(tl.int64)
    P = h * w
    scores += b * P
    labels += b * P
    keys += b * P
    chosen += b * count
    for first in range(0, P, BLOCK):
        i = first + tl.arange(0, BLOCK)
        y, x = i // w, i % w
        score = tl.load(scores + i, mask=i < P, other=0.0)
        label = tl.load(labels + i, mask=i < P, other=0)
        outdone = score < LEAST_SCORE
        for n in tl.static_range(9):
            if n != 4:
                row, column = y + (n // 3 - 1), x + (n % 3 - 1)
                known = (i < P) & (row >= 0) & (row < h) & (column >= 0) & (column < w)
                beside = row * w + column
                same = tl.load(labels + beside, mask=known, other=-1) == label
                outdone |= same & (tl.load(scores + beside, mask=known, other=0.0) > score)
        key = ONE - score.to(tl.int32, bitcast=True) + tl.where(outdone, NO_MAXIMUM, 0)
        tl.store(keys + i, tl.where(score == score, key, NO_SCORE), mask=i < P)
    tl.debug_barrier()  # other threads may have written these keys
    triton_tile.choose_least(keys, chosen, P, count, BLOCK)
    tl.debug_barrier()  # and these cells
    for first in range(0, count, RANK):
        i = first + tl.arange(0, RANK)
        cell = tl.load(chosen + i, mask=i < count, other=0)
        key = tl.load(keys + cell, mask=i < count, other=0)
        rank = tl.zeros((RANK,), tl.int32)
        for start in range(0, count, RANK):
            j = start + tl.arange(0, RANK)
            another = tl.load(chosen + j, mask=j < count, other=0)
            limit = tl.load(keys + another, mask=j < count, other=0)
            before = (limit[None, :] < key[:, None]) | ((limit[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
            rank += tl.sum((before & (j < count)[None, :]).to(tl.int32), axis=1)
        place = b * count + rank
        score = tl.load(scores + cell, mask=i < count, other=0.0)
        tl.store(index + place, cell.to(tl.int64), mask=i < count)
        tl.store(found + place, triton_tile.rounded(score, found.dtype.element_ty), mask=i < count)
        tl.store(classes + place, tl.load(labels + cell, mask=i < count, other=0).to(tl.int64), mask=i < count)


def activation_queries(a: Args, index: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Needs 12 bytes of scratch per cell, and 4 per query."""
    (B, C, h, w), count = a.logits.shape, a.count
    P = h * w
    if count == 0:
        return
    a_of, k_of, keys, chosen = (
        index.new_empty((B, size), dtype=dtype)
        for size, dtype in ((P, torch.float32), (P, torch.int32), (P, torch.int32), (count, torch.int32))
    )
    tile = config("activation_queries.score", a.logits)
    blocks, once = tiles(P, tile["BLOCK"]), a.logits.numel() * a.logits.element_size()
    cost = Cost(read=once, again=once, written=a_of.nbytes + k_of.nbytes, flops=20 * a.logits.numel())
    launch(
        _score, (B * blocks,), a.logits, a_of, k_of, C, P, w, blocks, *a.logits.stride(), cost=cost, fp_fusion=False, **tile
    )  # fmt: skip

    tile = config("activation_queries.select", a.logits)
    neighbours, ranked = (3 * h - 2) * (3 * w - 2) - P, tiles(count, tile["RANK"]) + 1
    cost = Cost(
        read=a_of.nbytes + k_of.nbytes,
        again=B * (8 * neighbours + (triton_tile.STEPS.value + 1) * 4 * P + 8 * count * (ranked + 1)),
        written=keys.nbytes + chosen.nbytes + index.nbytes + scores.nbytes + labels.nbytes,
        flops=B * (20 * P + 4 * count * count),
    )
    launch(_select, (B,), a_of, k_of, keys, chosen, index, scores, labels, h, w, count, cost=cost, **tile)

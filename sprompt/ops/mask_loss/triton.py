"""Triton kernels of mask_loss and mask_loss_backward. M masks, logits h x w, the loss H = u h by W = u w (u: upsample).

The pixels of the loss are visited by quads. Quad (i, j) holds the u x u pixels that lie between the cells i - 1, i and j - 1,
j, so four loads give u^2 logits. There are h + 1 rows of quads; the first and the last row have fewer pixels. For u = 1 the
quads are the cells."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.soft_targets import for_triton, quad_edge
from sprompt.ops.triton_launch import Cost, config, launch, tiles
from sprompt.ops.triton_tile import corners, fraction, rounded, soft_target, target_row

#: Other choices of tiles, for a tuner to time.
CANDIDATES = {
    "sums": [
        {"BLOCK": 256, "TILES": 4, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 512, "TILES": 2, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 256, "TILES": 16, "num_warps": 8, "num_stages": 1},
        {"BLOCK": 512, "TILES": 8, "num_warps": 8, "num_stages": 1},
        {"BLOCK": 128, "TILES": 8, "num_warps": 4, "num_stages": 1},
    ],
    "backward": [
        {"BLOCK": 64, "ROWS": 8, "num_warps": 2, "num_stages": 1},
        {"BLOCK": 64, "ROWS": 4, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 64, "ROWS": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 32, "ROWS": 8, "num_warps": 2, "num_stages": 1},
        {"BLOCK": 128, "ROWS": 8, "num_warps": 4, "num_stages": 1},
        {"BLOCK": 256, "ROWS": 8, "num_warps": 8, "num_stages": 1},
    ],
}  # fmt: skip


@triton.jit
def _mask_loss_sums(
    logits,  # (M, h, w), any strides
    targets,  # (M, H, W) u8 or float, or words (M, n), any strides
    partial,  # (M, chunks, 4) f32, contiguous
    h, w, chunks,
    logits_m, logits_y, logits_x, targets_m, targets_y, targets_x,  # strides
    RATIO: tl.constexpr, U: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """partial[m, c] = sums over the pixels of chunk c of max(z, 0) - z t + log(1 + e^-|z|), p t, p^2 and t^2, p =
    sigmoid(z). One program per (mask, chunk of TILES x BLOCK quads)."""
    EDGE: tl.constexpr = 1 if U > 1 else 0
    m = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.program_id(0) % chunks
    H, W, across = h * U, w * U, w + EDGE
    quads = (h + EDGE) * across
    bce = tl.zeros((BLOCK,), tl.float32)
    pt = tl.zeros((BLOCK,), tl.float32)
    pp = tl.zeros((BLOCK,), tl.float32)
    tt = tl.zeros((BLOCK,), tl.float32)
    for first in range(c * TILES * BLOCK, tl.minimum((c + 1) * TILES * BLOCK, quads), BLOCK):
        quad = first + tl.arange(0, BLOCK)
        i, j = quad // across, quad % across
        inside = quad < quads
        c00, c01, c10, c11 = corners(logits + m * logits_m, i, j, h, w, logits_y, logits_x, inside, U)
        for a in range(U):
            down = fraction(a, U)
            left, right = c00 * (1 - down) + c10 * down, c01 * (1 - down) + c11 * down
            y = (i - EDGE) * U + (U // 2 + a)
            live = inside & (y >= 0) & (y < H)
            row = target_row(y, W, targets_y, RATIO)
            for b in range(U):
                along = fraction(b, U)
                x = (j - EDGE) * U + (U // 2 + b)
                real = live & (x >= 0) & (x < W)
                t = soft_target(targets + m * targets_m, row, x, W, targets_x, real, RATIO)
                z = left * (1 - along) + right * along
                e = tl.exp(-tl.abs(z))
                p = tl.where(z >= 0, 1.0, e) / (1.0 + e)
                # For small e, 1 + e would keep too few digits.
                small = e * (1 - e * (0.5 - e * (1 / 3 - e * 0.25)))
                rest = tl.where(e < 0.03125, small, tl.log(1.0 + e))
                bce += tl.where(real, tl.where(z > 0, z, 0.0) - z * t + rest, 0.0)
                pt += tl.where(real, p * t, 0.0)
                pp += tl.where(real, p * p, 0.0)
                tt += t * t
    out = partial + (m * chunks + c) * 4
    tl.store(out, tl.sum(bce))
    tl.store(out + 1, tl.sum(pt))
    tl.store(out + 2, tl.sum(pp))
    tl.store(out + 3, tl.sum(tt))


@triton.jit
def _mask_loss_finish(
    partial,  # (M, chunks, 4) f32, contiguous
    bce, dice,  # (M) f32
    sums,  # (M, 3) f32, contiguous: sum p t, sum p^2, sum t^2
    chunks, pixels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bce = sum / P, dice = 1 - 2 sum p t / (sum p^2 + sum t^2 + 2e-3). One program per mask."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, 4)
    total = tl.zeros((4,), tl.float32)
    for first in range(0, chunks, BLOCK):
        c = first + tl.arange(0, BLOCK)
        at = (m * chunks + c[:, None]) * 4 + column[None, :]
        total += tl.sum(tl.load(partial + at, mask=c[:, None] < chunks, other=0.0), axis=0)
    cross = tl.sum(tl.where(column == 0, total, 0.0))
    pt = tl.sum(tl.where(column == 1, total, 0.0))
    pp = tl.sum(tl.where(column == 2, total, 0.0))
    tt = tl.sum(tl.where(column == 3, total, 0.0))
    tl.store(bce + m, cross / tl.cast(tl.maximum(pixels, 1), tl.float32))
    tl.store(dice + m, 1 - 2 * pt / ((pp + 1e-3) + (tt + 1e-3)))
    tl.store(sums + m * 3, pt)
    tl.store(sums + m * 3 + 1, pp)
    tl.store(sums + m * 3 + 2, tt)


def mask_loss(a: Args, bce: Tensor, dice: Tensor, sums: Tensor) -> None:
    logits, targets, ratio, upsample = a
    M, h, w = logits.shape
    target = for_triton(targets, ratio)
    tile = config("mask_loss.sums", logits)
    edge = quad_edge(upsample)
    quads = (h + edge) * (w + edge) if h * w > 0 else 0
    chunks = tiles(quads, tile["BLOCK"] * tile["TILES"])
    pixels = h * w * upsample**2
    partial = logits.new_empty((M, chunks, 4), dtype=torch.float32)
    read = logits.nbytes + target.touched
    loads = M * (quads * (4 if upsample > 1 else 1) * logits.element_size() + pixels * target.load)
    launch(
        _mask_loss_sums,
        (M * chunks,),
        logits,
        target.tensor,
        partial,
        h,
        w,
        chunks,
        *logits.stride(),
        *target.strides,
        cost=Cost(read=read, again=loads - read, written=partial.nbytes, flops=M * pixels * 35),
        RATIO=ratio,
        U=upsample,
        **tile,
    )
    launch(
        _mask_loss_finish,
        (M,),
        partial,
        bce,
        dice,
        sums,
        chunks,
        pixels,
        cost=Cost(read=partial.nbytes, written=5 * 4 * M, flops=partial.numel()),
        BLOCK=32,
        num_warps=1,
    )


@triton.jit
def _slope(z, t, mean, at_t, at_p):
    """The gradient of a pixel's logit: mean (p - t) + (at_t t + at_p p) p (1 - p). 1 - p is computed without cancellation."""
    e = tl.exp(-tl.abs(z))
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    p, q = tl.where(z >= 0, near, far), tl.where(z >= 0, far, near)
    return mean * (p - t) + (at_t * t + at_p * p) * p * q


@triton.jit
def _mask_loss_backward(
    grad_bce, grad_dice,  # (M) f32, any stride
    logits,  # (M, h, w), any strides
    targets,  # (M, H, W) u8 or float, or words (M, n), any strides
    sums,  # (M, 3) f32, any strides
    grad,  # (M, h, w), contiguous
    h, w, strips, blocks, pixels,
    grad_bce_m, grad_dice_m, logits_m, logits_y, logits_x, targets_m, targets_y, targets_x, sums_m, sums_x,  # strides
    RATIO: tl.constexpr, U: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad[m, i, j] = sum over the fine pixels of (weight of cell (i, j) in the pixel's logit) * (gradient of that
    logit). One program per (mask, strip of ROWS rows of cells, block of columns). A lane walks down the two columns of quads
    beside its column of cells. A row of quads adds its upper share to the row of cells above it, which is then complete, and
    its lower share to the next row. Cells at the border also get the share of cells outside the map. Every sum has the same
    order in every launch."""
    m = (tl.program_id(0) // (strips * blocks)).to(tl.int64)
    first = tl.program_id(0) // blocks % strips * ROWS
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = j < w
    H, W = h * U, w * U
    of_bce = tl.load(grad_bce + m * grad_bce_m).to(tl.float32)
    of_dice = tl.load(grad_dice + m * grad_dice_m).to(tl.float32)
    pt = tl.load(sums + m * sums_m)
    below = (tl.load(sums + m * sums_m + sums_x) + 1e-3) + (tl.load(sums + m * sums_m + 2 * sums_x) + 1e-3)
    mean, at_t, at_p = of_bce / tl.cast(pixels, tl.float32), -2 * of_dice / below, 4 * of_dice * (pt / below) / below
    plane, target = logits + m * logits_m, targets + m * targets_m
    out = grad + m * h * w
    if U == 1:
        i = first + tl.arange(0, ROWS)[:, None]
        real = (i < h) & inside[None, :]
        at = tl.cast(i, tl.int64) * logits_y + tl.cast(j, tl.int64)[None, :] * logits_x
        z = tl.load(plane + at, mask=real, other=0.0).to(tl.float32)
        t = soft_target(target, target_row(i, W, targets_y, RATIO), j[None, :], W, targets_x, real, RATIO)
        slope = _slope(z, t, mean, at_t, at_p)
        tl.store(out + (tl.cast(i, tl.int64) * w + j[None, :]), rounded(slope, grad.dtype.element_ty), mask=real)
    else:
        side = tl.arange(0, 2)[None, :]  # the quads left and right of a cell
        at = j[:, None] - 1 + side
        alone = tl.where(side == 0, j[:, None] == 0, j[:, None] == w - 1)
        at_left = tl.cast(tl.maximum(at, 0), tl.int64) * logits_x
        at_right = tl.cast(tl.minimum(at + 1, w - 1), tl.int64) * logits_x
        mask = inside[:, None] & (side >= 0)
        above = plane + tl.cast(tl.maximum(first - 1, 0), tl.int64) * logits_y
        left = tl.load(above + at_left, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(above + at_right, mask=mask, other=0.0).to(tl.float32)
        pending = tl.zeros((BLOCK, 2), tl.float32)
        for i in range(
            first, tl.minimum(first + ROWS, h) + 1
        ):  # the row of quads between the rows i - 1 and i of cells
            row = plane + tl.cast(tl.minimum(i, h - 1), tl.int64) * logits_y
            next_left = tl.load(row + at_left, mask=mask, other=0.0).to(tl.float32)
            next_right = tl.load(row + at_right, mask=mask, other=0.0).to(tl.float32)
            upper = tl.zeros((BLOCK, 2), tl.float32)
            lower = tl.zeros((BLOCK, 2), tl.float32)
            for a in range(U):
                y = (i - 1) * U + (U // 2 + a)
                live = mask & (y >= 0) & (y < H)
                begin = target_row(y, W, targets_y, RATIO)
                down = fraction(a, U)
                z_left = left * (1 - down) + next_left * down
                z_right = right * (1 - down) + next_right * down
                share = tl.zeros((BLOCK, 2), tl.float32)
                for b in range(U):
                    along = fraction(b, U)
                    x = at * U + (U // 2 + b)
                    real = live & (x >= 0) & (x < W)
                    t = soft_target(target, begin, x, W, targets_x, real, RATIO)
                    slope = _slope(z_left * (1 - along) + z_right * along, t, mean, at_t, at_p)
                    weight = tl.where(alone, 1.0, tl.where(side == 0, along, 1 - along))
                    share += tl.where(real, slope * weight, 0.0)
                upper += share * (1 - down)
                lower += share * down
            done = tl.sum(pending + tl.where(i == h, upper + lower, upper), axis=1)
            cell = tl.cast(i - 1, tl.int64) * w + j
            tl.store(out + cell, rounded(done, grad.dtype.element_ty), mask=inside & (i > first))
            pending = tl.where(i == 0, upper + lower, lower)
            left, right = next_left, next_right


def mask_loss_backward(a: Args, grad: Tensor) -> None:
    grad_bce, grad_dice, logits, targets, sums, ratio, upsample = a
    M, h, w = logits.shape
    target = for_triton(targets, ratio)
    tile = config("mask_loss.backward", logits)
    strips, blocks = tiles(h, tile["ROWS"]), tiles(w, tile["BLOCK"])
    H, W = h * upsample, w * upsample
    if upsample == 1:
        cells, pixels = h * w, h * w
    else:  # Neighbouring strips both read a row of quads, and neighbouring lanes both read a column.
        cells = (h + 2 * strips) * 4 * w
        pixels = (H + (strips - 1) * upsample) * (2 * W - upsample)
    numbers = 5 * 4 * M  # three sums and two gradients of losses
    read = logits.nbytes + target.touched + numbers
    loads = M * (cells * logits.element_size() + pixels * target.load) + strips * blocks * numbers
    launch(
        _mask_loss_backward,
        (M * strips * blocks,),
        grad_bce,
        grad_dice,
        logits,
        target.tensor,
        sums,
        grad,
        h,
        w,
        strips,
        blocks,
        H * W,
        grad_bce.stride(0),
        grad_dice.stride(0),
        *logits.stride(),
        *target.strides,
        *sums.stride(),
        cost=Cost(read=read, again=loads - read, written=grad.nbytes, flops=M * pixels * 35),
        RATIO=ratio,
        U=upsample,
        **tile,
    )

"""Triton kernels of match_cost. B images, N masks (n), G targets (g), logits h x w, the loss H = u h by W = u w (u:
upsample).

The pixels of the loss are visited by quads. Quad (i, j) holds the u x u pixels that lie between the cells i - 1, i and j - 1,
j, so four loads give u^2 logits. There are h + 1 rows of quads; the first and the last row have fewer pixels. For u = 1 the
quads are the cells."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.soft_targets import for_triton, quad_edge
from sprompt.ops.triton_launch import Cost, config, interpreted, launch, padded, tiles
from sprompt.ops.triton_tile import INTERPRETED, corners, dot, fraction, soft_target, target_row

#: Other choices of tiles, for a tuner to time.
CANDIDATES = {
    "sums": [
        {"BLOCK_N": 128, "BLOCK_G": 64, "BLOCK_Q": 16, "TILES": 16, "num_warps": 8, "num_stages": 1},
        {"BLOCK_N": 128, "BLOCK_G": 64, "BLOCK_Q": 16, "TILES": 8, "num_warps": 16, "num_stages": 1},
        {"BLOCK_N": 128, "BLOCK_G": 64, "BLOCK_Q": 16, "TILES": 32, "num_warps": 16, "num_stages": 1},
        {"BLOCK_N": 128, "BLOCK_G": 64, "BLOCK_Q": 32, "TILES": 8, "num_warps": 8, "num_stages": 1},
        {"BLOCK_N": 64, "BLOCK_G": 64, "BLOCK_Q": 16, "TILES": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_N": 64, "BLOCK_G": 64, "BLOCK_Q": 16, "TILES": 16, "num_warps": 8, "num_stages": 1},
        {"BLOCK_N": 64, "BLOCK_G": 64, "BLOCK_Q": 32, "TILES": 8, "num_warps": 8, "num_stages": 1},
        {"BLOCK_N": 64, "BLOCK_G": 64, "BLOCK_Q": 32, "TILES": 8, "num_warps": 4, "num_stages": 1},
        {"BLOCK_N": 32, "BLOCK_G": 64, "BLOCK_Q": 32, "TILES": 8, "num_warps": 4, "num_stages": 1},
    ],
}


@triton.jit
def _three(x):
    """Splits a float32 into three bfloat16 of decreasing size with the same sum (8 + 8 + 8 bits)."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(p, t, EXACT: tl.constexpr):
    """float32 p (N, Q) times t^T (Q, G) on the tensor cores, from the bfloat16 parts p0 + p1 + p2 = p and t0 + t1 + t2 = t. p1
    t2, p2 t1 and p2 t2 are left out; together they are below 2^-23 of a product. EXACT: t = t0. The other parts would add
    zeros, so equal targets of any type give equal bits. Small parts are added first. The tensor cores add few terms before a
    sum is rounded."""
    p0, p1, p2 = _three(p)
    sums = tl.zeros((p.shape[0], t.shape[0]), tl.float32)
    if EXACT:
        t0 = tl.trans(t.to(tl.bfloat16))
    else:
        t0, t1, t2 = _three(t)
        t0, t1, t2 = tl.trans(t0), tl.trans(t1), tl.trans(t2)
        sums = dot(p0, t2, sums, "ieee")
        sums = dot(p1, t1, sums, "ieee")
        sums = dot(p0, t1, sums, "ieee")
    sums = dot(p2, t0, sums, "ieee")
    sums = dot(p1, t0, sums, "ieee")
    return dot(p0, t0, sums, "ieee")


@triton.jit
def _match_sums(
    logits,  # (B, N, h, w), any strides
    targets,  # (B, G, H, W) u8 or float, or words (B, G, n), any strides
    counts,  # (B) i64, any stride, or None
    pt,  # (B, chunks, N, G) f32, contiguous: sum p t
    of_p,  # (B, chunks, 2, N) f32, contiguous: sum p and sum p^2
    of_t,  # (B, chunks, 2, G) f32, contiguous: sum t and sum t^2
    N, G, h, w, chunks, blocks_n, blocks_g,
    logits_b, logits_n, logits_y, logits_x, targets_b, targets_g, targets_y, targets_x, counts_b,  # strides
    RATIO: tl.constexpr, U: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The sums over one chunk of TILES x BLOCK_Q quads, p = sigmoid(z). One program per (image, chunk, block of targets, block
    of masks). Logits are upsampled once for a block of targets. EXACT: bfloat16 holds every target."""
    EDGE: tl.constexpr = 1 if U > 1 else 0
    block_n = tl.program_id(0) % blocks_n
    block_g = tl.program_id(0) // blocks_n % blocks_g
    c = tl.program_id(0) // (blocks_n * blocks_g) % chunks
    b = (tl.program_id(0) // (blocks_n * blocks_g) // chunks).to(tl.int64)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g = block_g * BLOCK_G + tl.arange(0, BLOCK_G)
    count = G
    if counts is not None:
        count = tl.load(counts + b * counts_b)
    H, W, across = h * U, w * U, w + EDGE
    quads = (h + EDGE) * across
    planes = (logits + b * logits_b) + tl.cast(n, tl.int64)[:, None] * logits_n
    target = (targets + b * targets_b) + tl.cast(g, tl.int64)[:, None] * targets_g
    mine, theirs = (n < N)[:, None], ((g < G) & (g < count))[:, None]
    products = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    p_sum = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    pp_sum = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
    t_sum = tl.zeros((BLOCK_G, BLOCK_Q), tl.float32)
    tt_sum = tl.zeros((BLOCK_G, BLOCK_Q), tl.float32)
    for first in range(c * TILES * BLOCK_Q, tl.minimum((c + 1) * TILES * BLOCK_Q, quads), BLOCK_Q):
        quad = first + tl.arange(0, BLOCK_Q)
        i, j = quad // across, quad % across
        inside = quad < quads
        c00, c01, c10, c11 = corners(
            planes, i[None, :], j[None, :], h, w, logits_y, logits_x, mine & inside[None, :], U
        )
        for a in range(U):
            down = fraction(a, U)
            left, right = c00 * (1 - down) + c10 * down, c01 * (1 - down) + c11 * down
            y = (i - EDGE) * U + (U // 2 + a)
            live = inside & (y >= 0) & (y < H)
            row = target_row(y[None, :], W, targets_y, RATIO)
            for e in range(U):
                along = fraction(e, U)
                x = (j - EDGE) * U + (U // 2 + e)
                real = (live & (x >= 0) & (x < W))[None, :]
                t = soft_target(target, row, x[None, :], W, targets_x, theirs & real, RATIO)
                z = left * (1 - along) + right * along
                p = tl.where(real, 1.0 / (1.0 + tl.exp(-z)), 0.0)
                p_sum += p
                pp_sum += p * p
                t_sum += t
                tt_sum += t * t
                if INTERPRETED:  # in the interpreter the products of parts would take most of the time
                    products += tl.dot(p, tl.trans(t), input_precision="ieee")
                else:
                    products += _product(p, t, EXACT)
    chunk = b * chunks + c
    tl.store(pt + (chunk * N + n[:, None]) * G + g[None, :], products, mask=mine & (g < G)[None, :])
    if block_g == 0:
        tl.store(of_p + chunk * 2 * N + n, tl.sum(p_sum, axis=1), mask=n < N)
        tl.store(of_p + (chunk * 2 + 1) * N + n, tl.sum(pp_sum, axis=1), mask=n < N)
    if block_n == 0:
        tl.store(of_t + chunk * 2 * G + g, tl.sum(t_sum, axis=1), mask=g < G)
        tl.store(of_t + (chunk * 2 + 1) * G + g, tl.sum(tt_sum, axis=1), mask=g < G)


@triton.jit
def _match_finish(
    pt,  # (B, chunks, N, G) f32, contiguous
    of_p,  # (B, chunks, 2, N) f32, contiguous
    of_t,  # (B, chunks, 2, G) f32, contiguous
    class_logits,  # (B, N, K), any strides, or None
    labels,  # (B, G) i64, any strides, or None
    counts,  # (B) i64, any stride, or None
    cost,  # (B, N, G) f32, contiguous
    class_weight, bce_weight, dice_weight,
    N, G, K, chunks, pixels, blocks_g,
    class_b, class_n, class_k, labels_b, labels_g, counts_b,  # strides
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """cost[b, n, g] = class_weight class - bce_weight (P - sum p - sum t + 2 sum p t) / P
                       - dice_weight 2 sum p t / (sum p^2 + sum t^2 + 2e-3), 0 for g >= counts[b];
    class = 0.75 q^2 log(1 - q + 1e-12) - 0.25 (1 - q)^2 log(q + 1e-12), q = sigmoid(logit of label g).
    One program per (image, mask, block of targets). The sums of BLOCK_C chunks are added together, then these totals in
    order."""
    g = tl.program_id(0) % blocks_g * BLOCK_G + tl.arange(0, BLOCK_G)
    row = (tl.program_id(0) // blocks_g).to(tl.int64)
    b, n = row // N, row % N
    real = g < G
    if counts is not None:
        real = real & (g < tl.load(counts + b * counts_b))
    common = tl.zeros((BLOCK_G,), tl.float32)
    t = tl.zeros((BLOCK_G,), tl.float32)
    tt = tl.zeros((BLOCK_G,), tl.float32)
    p = tl.zeros((BLOCK_C,), tl.float32)
    pp = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        chunk = b * chunks + c
        both = (c < chunks)[:, None] & real[None, :]
        common += tl.sum(tl.load(pt + (chunk * N + n)[:, None] * G + g[None, :], mask=both, other=0.0), axis=0)
        at = of_t + (chunk * 2)[:, None] * G + g[None, :]
        t += tl.sum(tl.load(at, mask=both, other=0.0), axis=0)
        tt += tl.sum(tl.load(at + G, mask=both, other=0.0), axis=0)
        p += tl.load(of_p + chunk * 2 * N + n, mask=c < chunks, other=0.0)
        pp += tl.load(of_p + (chunk * 2 + 1) * N + n, mask=c < chunks, other=0.0)
    area = tl.cast(pixels, tl.float32)
    apart = (tl.sum(p) + t - 2 * common) / tl.maximum(area, 1.0)  # 1 - agreement
    agree = tl.where(area > 0, 1 - apart, 0.0)
    dice = 2 * common / ((tl.sum(pp) + 1e-3) + (tt + 1e-3))
    total = -bce_weight * agree - dice_weight * dice
    if class_logits is not None:
        label = tl.load(labels + b * labels_b + tl.cast(g, tl.int64) * labels_g, mask=real, other=0)
        label = tl.minimum(tl.maximum(label, 0), K - 1)
        z = tl.load(class_logits + b * class_b + n * class_n + label * class_k, mask=real, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(z))
        near, far = 1.0 / (1.0 + e), e / (1.0 + e)
        q, rest = tl.where(z >= 0, near, far), tl.where(z >= 0, far, near)
        focal = 0.75 * q * q * tl.log(rest + 1e-12) - 0.25 * rest * rest * tl.log(q + 1e-12)
        total += class_weight * focal
    tl.store(cost + row * G + g, tl.where(real, total, 0.0), mask=g < G)


def match_cost(a: Args, cost: Tensor) -> None:
    if cost.numel() == 0:
        return
    mask_logits, targets, ratio, class_logits, labels, counts, *weights, upsample = a
    B, N, h, w = mask_logits.shape
    G, K = targets.shape[1], class_logits.shape[2] if class_logits is not None else 0
    target = for_triton(targets, ratio)
    tile = dict(config("match_cost.sums", mask_logits))
    if interpreted():  # its time grows with the number of tiles: the same chunks with an eighth of the tiles
        tile["BLOCK_Q"], tile["TILES"] = 8 * tile["BLOCK_Q"], tile["TILES"] // 8
    tile["BLOCK_N"] = min(tile["BLOCK_N"], padded(N))
    tile["BLOCK_G"] = min(tile["BLOCK_G"], padded(G))
    edge = quad_edge(upsample)
    quads = (h + edge) * (w + edge) if h * w > 0 else 0
    chunks = tiles(quads, tile["BLOCK_Q"] * tile["TILES"])
    blocks_n, blocks_g = tiles(N, tile["BLOCK_N"]), tiles(G, tile["BLOCK_G"])
    pixels = h * w * upsample**2
    shapes = ((B, chunks, N, G), (B, chunks, 2, N), (B, chunks, 2, G))
    pt, of_p, of_t = (mask_logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    written = pt.nbytes + of_p.nbytes + of_t.nbytes
    # Worst case: every target is real.
    counted = 8 * B if counts is not None else 0
    programs = chunks * blocks_n * blocks_g
    loads = (
        B * N * quads * (4 if upsample > 1 else 1) * mask_logits.element_size() * blocks_g
        + B * G * pixels * target.load * blocks_n
        + programs * counted
    )
    read = mask_logits.nbytes + target.touched + counted if chunks > 0 else 0
    counts_b = counts.stride(0) if counts is not None else 0
    launch(
        _match_sums,
        (B * programs,),
        mask_logits,
        target.tensor,
        counts,
        pt,
        of_p,
        of_t,
        N,
        G,
        h,
        w,
        chunks,
        blocks_n,
        blocks_g,
        *mask_logits.stride(),
        *target.strides,
        counts_b,
        cost=Cost(read=read, again=loads - read, written=written, flops=2 * B * N * G * pixels + 30 * B * N * pixels),
        RATIO=ratio,
        U=upsample,
        EXACT=target.tensor.dtype not in (torch.float32, torch.float16),
        **tile,
    )
    block = min(padded(G), 128)
    blocks = tiles(G, block)
    classes = labelled = 0  # bytes that all programs together load
    if class_logits is not None and labels is not None:
        classes, labelled = B * N * G * class_logits.element_size(), B * N * G * 8
    again = (
        (blocks - 1) * of_p.nbytes
        + (N - 1) * of_t.nbytes
        + (N * blocks - 1) * counted
        + labelled
        - (labels.nbytes if labels is not None else 0)
    )
    launch(
        _match_finish,
        (B * N * blocks,),
        pt,
        of_p,
        of_t,
        class_logits,
        labels,
        counts,
        cost,
        *weights,
        N,
        G,
        K,
        chunks,
        pixels,
        blocks,
        *(class_logits.stride() if class_logits is not None else (0, 0, 0)),
        *(labels.stride() if labels is not None else (0, 0)),
        counts_b,
        cost=Cost(
            read=written + classes + counted + (labels.nbytes if labels is not None else 0),
            again=again,
            written=cost.nbytes,
            flops=pt.numel() + 2 * of_t.numel() + 40 * cost.numel(),
        ),
        BLOCK_C=16,
        BLOCK_G=block,
        num_warps=1 if block <= 32 else 4,
    )

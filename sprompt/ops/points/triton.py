"""Triton kernels of sample_points. B images, N maps of h x w cells, T points. point_cost is in triton_cost.py, point_loss in
triton_loss.py."""

import triton
import triton.language as tl
from torch import Tensor

from sprompt.ops import triton_tile
from sprompt.ops.declare import Args
from sprompt.ops.points.triton_cost import CANDIDATES as COST_CANDIDATES
from sprompt.ops.points.triton_cost import point_cost as point_cost
from sprompt.ops.points.triton_loss import CANDIDATES as LOSS_CANDIDATES
from sprompt.ops.points.triton_loss import point_loss as point_loss
from sprompt.ops.points.triton_loss import point_loss_backward as point_loss_backward
from sprompt.ops.points.triton_taps import (
    Source,
    add_shares,
    convert,
    coordinates,
    exponent,
    fixed_point,
    loaded,
    map_strides,
    room_of,
    taps,
    values,
)
from sprompt.ops.triton_launch import Cost, config, interpreted, launch, padded, tiles

#: Other tiles for a tuner to try.
CANDIDATES: dict[str, list[dict[str, int]]] = (
    {
        name: [
            {"BLOCK_N": n, "BLOCK_T": t, "num_warps": w, "num_stages": 1}
            for n, t, w in ((1, 256, 4), (1, 512, 4), (2, 128, 4), (4, 128, 4), (8, 64, 4))
        ]
        for name in ("sample", "scatter")
    }
    | COST_CANDIDATES
    | LOSS_CANDIDATES
)


@triton.jit
def _block(N, T, blocks_n, blocks_t, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Image (i64), maps (BLOCK_N, 1) i64 and points (1, BLOCK_T) of a program. Programs of the same maps are neighbours."""
    b = (tl.program_id(0) // (blocks_n * blocks_t)).to(tl.int64)
    n = tl.program_id(0) // blocks_t % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    return b, n.to(tl.int64)[:, None], i[None, :]


@triton.jit
def _sample(
    maps,  # (B, N, h, w) float, or words (B, N, n) i32; any strides
    points,  # (B, T, 2) f32, any strides
    out,  # (B, N, T), contiguous, written
    N, T, h, w, blocks_n, blocks_t,
    maps_b, maps_n, maps_y, maps_x, points_b, points_t, points_c,  # strides
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program per (image, block of maps, block of points)."""
    b, n, i = _block(N, T, blocks_n, blocks_t, BLOCK_N, BLOCK_T)
    x, y = coordinates(None, points, b, i, i < T, points_b, points_t, points_c)
    column, row, fx, fy, inside = taps(x, y, h, w)
    real = (n < N) & (i < T)
    z = values(maps + b * maps_b + n * maps_n, column, row, fx, fy, inside & real, h, w, maps_y, maps_x)
    tl.store(out + (b * N + n) * T + i, triton_tile.rounded(z, out.dtype.element_ty), mask=real)


@triton.jit
def _limits(
    grad,  # (B, N, T), any strides
    limits,  # (B, N) i32, contiguous, written: e, where every finite |grad| is below 2^e
    odd,  # (B, N) i32, contiguous, written: whether some grad is not finite
    N, T, grad_b, grad_n, grad_t,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per map."""
    m = tl.program_id(0).to(tl.int64)
    g = grad + m // N * grad_b + m % N * grad_n
    most = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, T, BLOCK):
        i = first + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(g + i.to(tl.int64) * grad_t, mask=i < T, other=0.0).to(tl.float32))
        finite = size < float("inf")
        most = tl.maximum(most, tl.where(finite, size, 0.0))
        broken = broken | tl.where(finite, 0, 1)
    tl.store(limits + m, exponent(tl.max(most, axis=0)))
    tl.store(odd + m, tl.max(broken, axis=0))


@triton.jit
def _scatter(
    grad,  # (B, N, T), any strides
    points,  # (B, T, 2) f32, any strides
    limits,  # (B, N) i32, contiguous; for MARK: odd, as _limits writes it
    cells,  # (B, N, h, w), contiguous: i64, added to; for MARK: the result
    N, T, h, w, room, blocks_n, blocks_t,
    grad_b, grad_n, grad_t, points_b, points_t, points_c,  # strides
    MARK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of every point to its four cells. MARK: writes NaN where a share is not finite; blocks of maps without
    such gradients are left out. One program per (image, block of maps, block of points)."""
    b, n, i = _block(N, T, blocks_n, blocks_t, BLOCK_N, BLOCK_T)
    limit = tl.load(limits + b * N + n, mask=n < N, other=0)
    work = 1
    if MARK:
        work = tl.max(tl.max(limit, axis=1), axis=0)
    if work > 0:
        x, y = coordinates(None, points, b, i, i < T, points_b, points_t, points_c)
        column, row, fx, fy, inside = taps(x, y, h, w)
        real = (n < N) & (i < T) & inside
        place = grad + b * grad_b + n * grad_n + i.to(tl.int64) * grad_t
        g = tl.load(place, mask=real, other=0.0).to(tl.float32)
        add_shares(cells + (b * N + n) * h * w, g, column, row, fx, fy, real, h, w, limit, room, MARK)


# -- launches


def _tile(kernel: str, like: Tensor, N: int, T: int) -> dict[str, int]:
    tile = config(f"points.{kernel}", like)
    if interpreted():  # its time grows with the number of programs
        tile["BLOCK_N"] *= 16
    return tile | {"BLOCK_N": min(tile["BLOCK_N"], padded(N, 1)), "BLOCK_T": min(tile["BLOCK_T"], padded(T, 1))}


def sample_points(a: Args, out: Tensor) -> None:
    B, N, T = out.shape
    tile, points = _tile("sample", a.maps, N, T), Source(None, a.points)
    blocks_n, blocks_t = tiles(N, tile["BLOCK_N"]), tiles(T, tile["BLOCK_T"])
    cells, taken = loaded(a.maps, B * N * T), points.bytes(0, B * T)
    launch(
        _sample, (B * blocks_n * blocks_t,), a.maps, a.points, out, N, T, a.height, a.width, blocks_n, blocks_t,
        *map_strides(a.maps), *points.strides,
        cost=Cost(cells.read + taken, out.nbytes, cells.again + max(blocks_n - 1, 0) * taken, 15 * out.numel()),
        fp_fusion=False, **tile,
    )  # fmt: skip


def sample_points_backward(a: Args, out: Tensor) -> None:
    """Needs 8 bytes of scratch per cell."""
    (B, N, T), (h, w) = a.grad.shape, out.shape[2:]
    room, points = room_of(T), Source(None, a.points)
    sums, limits = fixed_point(a.grad, B * N, h * w)
    odd = limits.new_empty(limits.shape)
    block = config("points.limits", a.grad)
    cost = Cost(read=a.grad.nbytes, written=limits.nbytes + odd.nbytes, flops=a.grad.numel())
    launch(_limits, (B * N,), a.grad, limits, odd, N, T, *a.grad.stride(), cost=cost, **block)

    tile = _tile("scatter", a.grad, N, T)
    blocks_n, blocks_t = tiles(N, tile["BLOCK_N"]), tiles(T, tile["BLOCK_T"])
    taken, shares = points.bytes(0, B * T), 4 * 8 * a.grad.numel()
    known = blocks_t * limits.nbytes

    def scatter(limit: Tensor, cells: Tensor, mark: bool, cost: Cost) -> None:
        launch(
            _scatter, (B * blocks_n * blocks_t,), a.grad, a.points, limit, cells, N, T, h, w, room, blocks_n, blocks_t,
            *a.grad.stride(), *points.strides, cost=cost, fp_fusion=False, MARK=mark, **tile,
        )  # fmt: skip

    read = a.grad.nbytes + taken + min(shares, sums.nbytes) + known
    again = max(blocks_n - 1, 0) * taken + max(shares - sums.nbytes, 0)
    scatter(limits, sums, False, Cost(read, shares, again, 15 * a.grad.numel()))
    convert(sums, limits, out.flatten(0, 1).flatten(1), room)
    # Gradients that are not finite are rare; reading them again is not in the Cost.
    scatter(odd, out, True, Cost(read=known))

"""deform_attn."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops import deform_attn
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Sample, random, refusals

Shapes = tuple[tuple[int, int], ...]
THREE: Shapes = ((3, 5), (6, 4), (9, 11))


def _draw(
    B: int, Q: int, H: int, D: int, shapes: Shapes, T: int, seed: int, low: float = -0.2, high: float = 1.2
) -> tuple[Tensor, Tensor, Tensor]:
    """values, points between `low` and `high`, and weights with sum 1, float32."""
    g, V = random(seed), len(shapes)
    values = torch.randn(B, sum(h * w for h, w in shapes), H, D, generator=g)
    points = torch.rand(B, Q, H, V, T, 2, generator=g) * (high - low) + low
    weights = torch.randn(B, Q, H, V * T, generator=g).softmax(-1).reshape(B, Q, H, V, T)
    return values, points, weights


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def sample(
        name: str, drawn: tuple[Tensor, Tensor, Tensor], shapes: Shapes, narrow: bool = True, **kwargs: Any
    ) -> Sample:
        values, points, weights = (t.to(device) for t in drawn)
        if narrow:
            points, weights = points.to(dtype), weights.to(dtype)
        return Sample(name, (values.to(dtype), shapes, points, weights), kwargs)

    draw = functools.partial(_draw, seed=seed)
    values, points, weights = draw(2, 5, 2, 8, THREE, 4)
    broken = points.clone()
    broken[0, 1], broken[0, 2, :, 1, 2, 0], broken[1, 3, 0, 0, 0] = float("nan"), float("nan"), float("inf")
    # Where the map is linear, its derivative is the same on both sides of a centre. On the border the weights are 0.
    column, row = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    linear = (2 * column - row).reshape(1, 32, 1, 1) * torch.tensor([1.0, -0.5, 0.25])
    centres = torch.tensor([[1.5 / 8, 1.5 / 4], [5.5 / 8, 2.5 / 4], [2.5 / 8, 1.5 / 4]])
    border = torch.tensor([[0.5 / 8, 0.5 / 4], [7.5 / 8, 3.5 / 4], [-0.5 / 8, 0.3], [0.6, 4.5 / 4], [0.0, 1.0]])
    exact = torch.cat((centres, border)).reshape(1, 1, 1, 1, 8, 2)
    on_cells = torch.tensor([0.5, -1.0, 2.0, 0, 0, 0, 0, 0.0]).reshape(1, 1, 1, 1, 8)
    zeros = weights.clone()
    zeros[:, ::2], zeros[..., 1] = 0, 0
    listed, numbers = (points.flatten(3, 4)[:, :, :, :9], weights.flatten(3)[..., :9]), (2, 0, 7)
    return [
        sample("three levels", (values, points, weights), THREE),
        sample("points and weights in float32", (values, points, weights), THREE, narrow=False),
        sample("one level", draw(1, 7, 3, 16, ((7, 10),), 5), ((7, 10),)),
        sample("32 channels", draw(1, 40, 1, 32, ((6, 7), (3, 3)), 2, low=0, high=1), ((6, 7), (3, 3))),
        sample("64 channels", draw(1, 3, 1, 64, ((4, 5),), 2), ((4, 5),)),
        sample("37 channels", draw(2, 3, 2, 37, ((4, 5), (2, 2)), 3), ((4, 5), (2, 2))),
        sample("one point of 512 channels", draw(1, 9, 1, 512, ((4, 5),), 1), ((4, 5),)),  # a deformable convolution
        sample("one channel", draw(2, 3, 2, 1, ((4, 5), (2, 2)), 3), ((4, 5), (2, 2))),
        sample("maps of one cell, row and column", draw(1, 9, 2, 4, ((1, 1), (1, 6), (5, 1)), 2), ((1, 1), (1, 6), (5, 1))),
        sample("points far outside", draw(1, 9, 2, 4, THREE, 2, low=-1e30, high=1e30), THREE),
        sample("points around the border", draw(1, 20, 2, 4, ((2, 3), (3, 1)), 4, low=-0.5, high=1.5), ((2, 3), (3, 1))),
        sample("NaN and infinite points", (values, broken, weights), THREE),
        sample("centres of cells", (linear, exact, on_cells), ((4, 8),)),
        sample("weights of 0", (values, points, zeros), THREE),
        sample("numbers of points per level", (values, *listed), THREE, per_level=numbers),
        sample("one point for all heads", (values, points[:, :, :1].expand_as(points), weights), THREE),
        sample("no images", draw(0, 5, 2, 8, THREE, 4), THREE),
        sample("no queries", draw(2, 0, 2, 8, THREE, 4), THREE),
        sample("no heads", draw(2, 5, 0, 8, THREE, 4), THREE),
        sample("no channels", draw(2, 5, 2, 0, THREE, 4), THREE),
        sample("no heads and no channels", draw(2, 5, 0, 0, THREE, 4), THREE),
        sample("no points", draw(2, 5, 2, 8, THREE, 0), THREE),
        sample("no levels", draw(2, 5, 2, 8, (), 4), ()),
        sample("a level without cells", draw(2, 5, 2, 8, ((0, 4), (3, 2)), 4), ((0, 4), (3, 2))),
    ]  # fmt: skip


def _oracle(
    values: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, *, per_level: Sequence[int] | None = None
) -> Tensor:
    """grid_sample, level by level and head by head."""
    B, _, H, D = values.shape
    Q, V = points.shape[1], len(shapes)
    numbers = per_level or (points.shape[4] if V else 0,) * V
    points, weights = points.flatten(3).unflatten(3, (-1, 2)) if points.numel() else points, weights.flatten(3)
    out = values.new_zeros(B, Q, H, D)
    first = place = 0
    for (h, w), T in zip(shapes, numbers, strict=True):
        if min(B, H, D, Q, T, h, w) > 0:
            maps = values[:, first : first + h * w].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
            grid = points[:, :, :, place : place + T].transpose(1, 2).reshape(B * H, Q, T, 2)
            grid = torch.where(grid.isfinite(), 2 * grid - 1, 9.0).clamp(-9, 9)
            sampled = F.grid_sample(maps, grid, align_corners=False).reshape(B, H, D, Q, T)
            out += torch.einsum("bhdqt,bqht->bqhd", sampled, weights[..., place : place + T])
        first, place = first + h * w, place + T
    return out.flatten(2)


_shapes = ((2, 3), (1, 2))
_values, _points, _weights = torch.zeros(2, 8, 3, 4), torch.zeros(2, 5, 3, 2, 4, 2), torch.zeros(2, 5, 3, 2, 4)
_listed = {"points": torch.zeros(2, 5, 3, 7, 2), "weights": torch.zeros(2, 5, 3, 7)}
_refused = refusals(deform_attn)


def _bad(name: str, message: str, error: type[Exception] = ValueError, **changed: Any) -> ErrorCase:
    """A good call with these arguments changed."""
    good = {"values": _values, "shapes": _shapes, "points": _points, "weights": _weights}
    return _refused(name, message, error=error, **{**good, **changed})


SPECS = [
    OpSpec(
        deform_attn, _samples, ("deform_attn",), gradients=("values", "points", "weights"), oracle=_oracle,
        errors=(
            _bad("a list", "values must be a tensor, got list", TypeError, values=[1]),
            _bad("integers", "values must have dtype float32, .*, got int64", TypeError, values=_values.long()),
            _bad("heads not split", r"values must have shape \(B, S, H, D\), got \(2, 8, 12\); split", values=_values.flatten(2)),
            _bad("shapes as a tensor", r"shapes must be a list of \(h, w\), got Tensor; a tensor", TypeError, shapes=torch.tensor(_shapes)),
            _bad("one shape", r"shapes must be a list of \(h, w\), got \(2, 3\); give one pair", shapes=(2, 3)),
            _bad("three numbers", r"shapes must be a list of \(h, w\), got \[\(2, 3, 1\)\]", shapes=[(2, 3, 1)]),
            _bad("half a cell", "shapes must hold whole numbers of at least 0, got 2.5", TypeError, shapes=((2, 2.5),)),
            _bad("less than no cells", "shapes must hold whole numbers of at least 0, got -1", shapes=((2, -1),)),
            _bad("other shapes", "values must have as many cells as shapes, 6, got 8; join", shapes=((2, 3),)),
            _bad("half points", "points must have dtype float32, got bfloat16; convert", TypeError, points=_points.bfloat16()),
            _bad("float64 points", "points must have dtype .*, got float64", TypeError, values=_values.half(), points=_points.double()),
            _bad("integer weights", "weights must have dtype float32, got int64", TypeError, weights=_weights.long()),
            _bad("one level", r"points must have shape \(B, Q, H, V, T, 2\), got \(2, 5, 3, 1, 4, 2\)", points=_points[:, :, :, :1]),
            _bad("one coordinate", r"points must have shape \(B, Q, H, V, T, 2\), got", points=_points[..., :1]),
            _bad("points of other images", r"points must have shape \(B, Q, H, V, T, 2\), got", points=_points[:1]),
            _bad("a list of points", r"points must have shape \(B, Q, H, V, T, 2\), got \(2, 5, 3, 7, 2\)", **_listed),
            _bad("other weights", r"weights must have shape \(B, Q, H, V, T\) = \(2, 5, 3, 2, 4\), got", weights=_weights[..., :3]),
            _bad("a number per_level", "per_level must be a list of numbers of points, got int", TypeError, per_level=7, **_listed),
            _bad("per_level too short", "per_level must have one number per level, 2, got 1", per_level=(7,), **_listed),
            _bad("half a point", "per_level must hold whole numbers of at least 0, got 3.5", TypeError, per_level=(3.5, 3.5), **_listed),
            _bad("other numbers", r"points must have shape \(B, Q, H, ΣT, 2\), got", per_level=(3, 3), **_listed),
            _bad("weights not listed", r"weights must have shape \(B, Q, H, ΣT\), got", per_level=(3, 4), points=_listed["points"]),
            _bad("another device", r"points must be on the device of values \(cpu\), got meta", points=_points.to("meta")),
        ),
    ),
]  # fmt: skip


# ---- benchmarks: the encoder and the decoder of Mask2Former and Deformable DETR, on maps of 800 x 1344 pixels

MAPS: Shapes = ((25, 42), (50, 84), (100, 168))
CELLS = sum(h * w for h, w in MAPS)
H, D, T = 8, 32, 4


def _between_centres(points: Tensor) -> Tensor:
    """The points, moved at least 0.02 cells away from centres of cells. There the derivative jumps, so that it depends on the
    rounding of a coordinate."""
    sizes = torch.tensor([[w, h] for h, w in MAPS], dtype=torch.float64)[:, None]
    at = points.double() * sizes - 0.5
    return ((at.floor() + 0.02 + 0.96 * (at - at.floor()) + 0.5) / sizes).float()


def _encoder(B: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    """One query per cell. Its points lie around it, up to some cells away on every level."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        values, points, weights = _draw(B, CELLS, H, D, MAPS, T, seed)
        centres = [
            torch.stack(((x + 0.5) / w, (y + 0.5) / h), -1)
            for h, w in MAPS
            for y, x in [torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")]
        ]
        centre = torch.cat([c.reshape(-1, 2) for c in centres])[:, None, None, None]
        sizes = torch.tensor([[w, h] for h, w in MAPS])[:, None]
        points = centre + 2 * torch.randn(points.shape, generator=random(seed + 1)) / sizes
        return Sample("", (values.to(device, dtype), MAPS, _between_centres(points).to(device), weights.to(device)))

    return make


def _decoder(B: int, Q: int = 300) -> Callable[[torch.device, torch.dtype, int], Sample]:
    """Few queries. The points of each lie in a box of random place and size."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        values, points, weights = _draw(B, Q, H, D, MAPS, T, seed, low=-0.5, high=0.5)
        box = torch.rand(2, B, Q, 1, 1, 1, 2, generator=random(seed + 1))
        points = box[0] + points * (0.1 + 0.4 * box[1])
        return Sample("", (values.to(device, dtype), MAPS, _between_centres(points).to(device), weights.to(device)))

    return make


def _eager(values: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """MultiScaleDeformableAttention of transformers, with points and weights in the dtype of values."""
    B, _, H, D = values.shape
    Q, V, T = points.shape[1], len(shapes), points.shape[4]
    levels = values.split([h * w for h, w in shapes], dim=1)
    grids = (2 * points - 1).to(values.dtype)
    sampled = []
    for v, (h, w) in enumerate(shapes):
        maps = levels[v].flatten(2).transpose(1, 2).reshape(B * H, D, h, w)
        grid = grids[:, :, :, v].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.to(values.dtype).transpose(1, 2).reshape(B * H, 1, Q, V * T)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1).view(B, H * D, Q)
    return out.transpose(1, 2).contiguous()


def _released(values: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """The package torch-ms-deform-attn."""
    from torch_ms_deform_attn import ms_deform_attn

    sizes = torch.tensor(shapes, device=values.device)
    starts = torch.tensor([0, *itertools.accumulate(h * w for h, w in shapes)][:-1], device=values.device)
    return ms_deform_attn(values, sizes, starts, points, weights)


def _row(shape: str, make: Any, B: int, Q: int, device: str, goals: dict[str, float]) -> Bench:
    samples = B * Q * H * len(MAPS) * T
    return Bench(
        deform_attn, shape, make, _eager, gradients=("values", "points", "weights"), device=device, goals=goals,
        libraries={"torch-ms-deform-attn": _released}, flops=8.0 * samples * D,
        bytes=4.0 * (B * CELLS * H * D + B * Q * H * D + 3 * samples),
    )  # fmt: skip


BENCHES = [
    _row(
        f"B 1, {CELLS} queries, 3 levels", _encoder(1), 1, CELLS, "cpu",
        {"forward": 15, "full": 20, "memory": 8, "torch-ms-deform-attn": 1.3},
    ),
    _row("B 2, 300 queries, 3 levels", _decoder(2), 2, 300, "cpu", {"forward": 30}),
    _row(f"B 12, {CELLS} queries, 3 levels", _encoder(12), 12, CELLS, "cuda", {"forward": 5, "full": 5}),
    _row("B 12, 300 queries, 3 levels", _decoder(12), 12, 300, "cuda", {"forward": 5, "full": 5}),
]  # fmt: skip

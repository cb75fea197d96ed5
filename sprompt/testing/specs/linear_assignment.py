"""linear_assignment."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

import sprompt
from sprompt.ops import linear_assignment
from sprompt.ops.checks import NotFiniteError
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    def counts(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    padded = normal(3, 9, 6)
    padded[0, :, 4:] = float("nan")
    padded[1, 3, :] = float("inf")
    wide = torch.randn(2, 12, 9, generator=g) * (8 * torch.randn(2, 12, 9, generator=g)).exp2()
    products = torch.rand(2, 18, 1, generator=g) * torch.rand(2, 1, 16, generator=g)
    ties = torch.randint(-1, 3, (3, 14, 14), generator=g)
    return [
        Sample("3 x (9x6), counts, anything in the padding", (padded, counts(4, 0, 6))),
        Sample("more columns than rows", (normal(2, 5, 17),)),
        Sample("more columns than rows, counts on both sides", (normal(3, 5, 9), counts(9, 4, 5))),
        Sample("square", (normal(2, 20, 20),)),
        Sample("no batch", (normal(12, 7),)),
        Sample("1x1", (normal(2, 1, 1), counts(1, 0))),
        Sample("one row", (normal(2, 1, 5),)),
        Sample("one column", (normal(2, 5, 1),)),
        Sample("small integers: many ties", (ties.to(device, dtype),)),
        Sample("all equal", (torch.full((1, 6, 4), -2.5, device=device, dtype=dtype),)),
        Sample("large range", (wide.clamp(-6e4, 6e4).to(device, dtype),)),
        Sample("products: long chains", (products.to(device, dtype),)),
        Sample("no columns", (normal(2, 5, 0), counts(0, 0))),
        Sample("no rows", (normal(2, 0, 5), counts(3, 5))),
        Sample("no images", (normal(0, 5, 3), counts())),
    ]  # fmt: skip


def scipy_rows(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    batch = cost[None] if cost.dim() == 2 else cost
    rows = torch.full((batch.shape[0], batch.shape[2]), -1, device=cost.device)
    for b, image in enumerate(batch.cpu().double()):
        real = image if counts is None else image[:, : int(counts[b])]
        row, column = linear_sum_assignment(real.numpy())
        rows[b, torch.from_numpy(column)] = torch.from_numpy(row).to(cost.device)
    return rows[0] if cost.dim() == 2 else rows


def _check_matching(rows: Tensor, cost: Tensor, counts: Tensor | None) -> list[float]:
    """Checks that rows are a one-to-one matching of the right size. Returns the totals by image, in float64."""
    batch, batch_rows = (cost[None], rows[None]) if cost.dim() == 2 else (cost, rows)
    assert batch_rows.shape == (batch.shape[0], batch.shape[2]) and rows.dtype == torch.int64
    totals = []
    for b, (image, matched) in enumerate(zip(batch.cpu().double(), batch_rows.cpu(), strict=True)):
        count = image.shape[1] if counts is None else int(counts[b])
        column = (matched >= 0).nonzero()[:, 0]
        assert len(column) == min(image.shape[0], count) and (column < count).all(), f"image {b}: {matched.tolist()}"
        used = matched[column].tolist()
        assert matched.min() >= -1 if len(matched) else not used
        assert len(set(used)) == len(used) and all(row < image.shape[0] for row in used), f"image {b}: {used}"
        totals.append(float(image[matched[column], column].sum()))
    return totals


def same_totals(actual: Tensor, expected: Tensor, sample: Sample) -> None:
    """Ties leave a choice, so only the totals must agree, within the rounding of a sum of this length."""
    bound = sample.bound(linear_assignment)
    cost, counts = bound["cost"], bound.get("counts")
    ours, theirs = (_check_matching(rows, cost, counts) for rows in (actual, expected))
    for b, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        image = (cost[None] if cost.dim() == 2 else cost)[b]
        real = (image if counts is None else image[:, : int(counts[b])]).double().abs()
        bound_of_sum = 1e-13 * real.numel() * (float(real.max()) if real.numel() else 0.0)
        assert abs(a - e) <= bound_of_sum, f"image {b}: total {a!r}, scipy's {e!r}"


_cost = torch.zeros(2, 4, 3)


def _holding(value: float) -> Tensor:
    cost = torch.zeros(5, 7, 4)
    cost[3, 5, 2] = cost[4, 0, 0] = value
    return cost


@functools.wraps(linear_assignment)
def _on_the_host(cost: Tensor) -> Tensor:
    """Runs on a backend that raises for bad values. An emulated CUDA kernel takes CPU tensors as well, but does not raise."""
    with sprompt.use_backend("reference" if sprompt.native.why_not() else "native"):
        return linear_assignment(cost)


def _count(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


_bad = refusals(linear_assignment)
_bad_on_the_host = refusals(_on_the_host)

SPECS = [
    OpSpec(
        linear_assignment, _samples, ("linear_assignment",), oracle=scipy_rows, compare=same_totals,
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        errors=(
            _bad("a list", "cost must be a tensor, got list", [[1.0]], error=TypeError),
            _bad("integers", "cost must have dtype float32, ", _cost.long(), error=TypeError),
            _bad("rank 4", r"cost must have shape \(B, N, G\) or \(N, G\), got \(1, 2, 4, 3\)", _cost[None]),
            _bad("rank 1", r"cost must have shape .*, got \(3,\)", _cost[0, 0]),
            _bad("counts int32", "counts must have dtype int64, got int32", _cost, _count(1, 1, dtype=torch.int32), error=TypeError),
            _bad("counts of 3", r"counts must have shape \(B,\) = \(2,\), got \(3,\)", _cost, _count(1, 1, 1)),
            _bad("counts, no batch", "counts must be None without a batch dimension", _cost[0], _count(1)),
            _bad("count too large", "counts must lie between 0 and 3, got 4", _cost, _count(1, 4)),
            _bad("count negative", "counts must lie between 0 and 3, got -1", _cost, _count(-1, 3)),
            *(_bad_on_the_host(
                value, f"cost must be finite in image 3, got {value} at row 5, column 2; ", _holding(float(value)), error=NotFiniteError
            ) for value in ("nan", "inf")),
        ),
    ),
]  # fmt: skip


def _images(B: int, N: int, G: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", (torch.randn(B, N, G, generator=random(seed)).to(device, dtype),))

    return make


def _eager(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    """The usual code of detectors: it copies the cost of each image to the host, and the indices back."""
    from scipy.optimize import linear_sum_assignment

    rows = cost.new_full((cost.shape[0], cost.shape[2]), -1, dtype=torch.int64)
    for b in range(cost.shape[0]):
        row, column = linear_sum_assignment(cost[b].detach().cpu().numpy())
        rows[b, torch.from_numpy(column).to(cost.device)] = torch.from_numpy(row).to(cost.device)
    return rows


def _scipy_loop(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    """The solver alone: one array for all images, and one tensor at the end."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    rows = np.full((cost.shape[0], cost.shape[2]), -1)
    for out, image in zip(rows, cost.cpu().numpy(), strict=True):
        row, column = linear_sum_assignment(image)
        out[column] = row
    return torch.from_numpy(rows)


def _batch_solver(module: str, name: str) -> Callable[..., Tensor]:
    """A solver that takes all images in one call. It returns a list of rows and a list of columns."""

    def solve(cost: Tensor, counts: Tensor | None = None) -> Tensor:
        import numpy as np

        found = getattr(importlib.import_module(module), name)(cost.numpy(), extend_cost=True, return_cost=False)
        rows = np.full((cost.shape[0], cost.shape[2]), -1)
        for out, row, column in zip(rows, *found, strict=True):
            out[column] = row
        return torch.from_numpy(rows)

    return solve


#: lapjvr is the fastest batch solver of lapx on all of these shapes.
_LIBRARIES = {
    "scipy": _scipy_loop, "lapx": _batch_solver("lap", "lapjvr_batch"), "lapcpp": _batch_solver("lapcpp", "lapjv_batch"),
}  # fmt: skip

BENCHES = [
    Bench(
        linear_assignment, f"{B} x ({N}x{G})", _images(B, N, G), _eager, vectorised=False, libraries=_LIBRARIES,
        agree=same_totals, bytes=B * (4 * N * G + 8 * G), goals=goals,
    )
    for B, N, G, goals in (
        (16, 100, 20, {"forward": 2.0, "scipy": 2.0}),
        (64, 100, 10, {"scipy": 2.0}),
        (4, 300, 300, {"forward": 1.5, "scipy": 1.5}),
        (1, 300, 300, {}),
        (1, 100, 20, {"scipy": 1.0}),  # one small image: most of the time is the overhead of the call
    )
] + [
    Bench(
        linear_assignment, f"{B} x ({N}x{G})", _images(B, N, G), _eager, vectorised=False, libraries={"scipy": _scipy_loop},
        agree=same_totals, bytes=B * (4 * N * G + 8 * G), goals={"forward": 5.0}, device="cuda",
    )
    for B, N, G in ((12, 100, 20), (4, 300, 300))
]  # fmt: skip

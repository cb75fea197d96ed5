"""Fake kernel and backends of linear_assignment."""

import torch
from torch import Tensor

from sprompt import cuda, native
from sprompt.ops import checks
from sprompt.ops.library import register_op
from sprompt.ops.linear_assignment import reference

#: Up to so many entries one thread is faster: an image of 100 x 20 takes it a few microseconds.
SMALL = 1 << 16


def assignment_scratch(N: int, G: int) -> int:
    """float64 numbers of scratch a worker: the costs with the longer side padded to whole vectors, and 7 such rows."""
    short, long = min(N, G), -(-max(N, G) // 8) * 8
    return (short + 7) * long


def _linear_assignment(cost: Tensor, counts: Tensor | None) -> Tensor:
    B, N, G = cost.shape
    rows = cost.new_empty((B, G), dtype=torch.int64)
    bad = cost.new_empty(1, dtype=torch.int64)
    threads = native.threads() if cost.numel() > SMALL else 1
    scratch = cost.new_empty((min(threads, max(B, 1)), assignment_scratch(N, G)), dtype=torch.float64)
    native._C.linear_assignment(cost, counts, rows, bad, scratch, scratch.shape[0])
    if int(bad) >= 0:
        _raise(cost, counts, int(bad))
    return rows


def _reference(cost: Tensor, counts: Tensor | None) -> Tensor:
    checks.counts_within("linear_assignment", counts, cost.shape[2])
    rows = reference.linear_assignment(cost, counts)
    if cost.device.type == "cpu" and rows.numel():
        bad = (rows[:, 0] == -2).nonzero()
        if bad.numel():
            _raise(cost, counts, int(bad[0]))
    return rows


def _raise(cost: Tensor, counts: Tensor | None, image: int) -> None:
    """The error of the first bad image."""
    checks.counts_within("linear_assignment", counts, cost.shape[2])
    real = cost[image] if counts is None else cost[image, :, : int(counts[image])]
    row, column = (int(i) for i in (~real.isfinite()).nonzero()[0])
    checks.bad_value(
        "linear_assignment", "cost", f"be finite in image {image}", f"{float(real[row, column])} at row {row}, column {column}",
        "look for a diverged loss or a division by zero upstream",
    )  # fmt: skip


def _fake(cost: Tensor, counts: Tensor | None) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)


def _why_not(*args: object) -> str:
    """Unlike other kernels, this one computes in float64."""
    return native.why_missing if native._C is None else ""


def _gpu_why_not(*args: object) -> str:
    float64 = torch.float64
    return cuda.why_not(
        *(a.new_empty(0, dtype=torch.float32) if isinstance(a, Tensor) and a.dtype == float64 else a for a in args)
    )


register_op(
    "linear_assignment", fake=_fake, reference=_reference, native_kernel=_linear_assignment, native_why_not=_why_not,
    gpu="cuda", gpu_why_not=_gpu_why_not,
)  # fmt: skip

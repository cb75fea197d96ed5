"""The declaration of linear_assignment."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


@op("cuda", computes=())  # compiled kernels take float64 too: all of them compute in it
def linear_assignment(cost: Tensor, counts: Tensor | None) -> Tensor:
    return new(cost, cost.shape[0], cost.shape[2], dtype=torch.int64)


linear_assignment.values(lambda a: checks.counts_within("linear_assignment", a.counts, a.cost.shape[2]))


@linear_assignment.native
def _(a: Args, rows: Tensor) -> None:
    bad = native._C.linear_assignment(a.cost, a.counts, rows, native.threads())
    if bad >= 0:
        refuse(a, bad)


def refuse(a: Args, image: int) -> None:
    """The error of an image with an entry that is not finite."""
    real = a.cost[image] if a.counts is None else a.cost[image, :, : int(a.counts[image])]
    row, column = (~real.isfinite()).nonzero()[0].tolist()
    got = f"{float(real[row, column])} at row {row}, column {column}"
    advice = "look for a diverged loss or a division by zero upstream"
    checks.bad_value("linear_assignment", "cost", f"be finite in image {image}", got, advice)

"""The declaration of linear_assignment."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op


@op("cuda", computes=())  # compiled kernels also take float64, because they compute in float64
def linear_assignment(cost: Tensor, counts: Tensor | None) -> Tensor:
    size = cost.shape
    if len(size) == 2:  # one image
        return new(cost, size[1], dtype=torch.int64)
    return new(cost, size[0], size[2], dtype=torch.int64)


@linear_assignment.values
def _(a: Args) -> None:
    if a.counts is not None:
        checks.counts_within("linear_assignment", a.counts, a.cost.shape[-1])


@linear_assignment.native
def _(a: Args, rows: Tensor) -> None:
    bad = native._C.linear_assignment(a.cost, a.counts, rows, native.threads())
    if bad >= 0:
        refuse(a, bad)


def images(cost: Tensor) -> Tensor:
    """The cost as (B, N, G). A cost (N, G) is one image."""
    return cost if cost.dim() == 3 else cost[None]


def refuse(a: Args, image: int) -> None:
    """Raises the error for an image with an entry that is not finite."""
    cost = images(a.cost)[image]
    real = cost if a.counts is None else cost[:, : int(a.counts[image])]
    row, column = (~real.isfinite()).nonzero()[0].tolist()
    got = f"{float(real[row, column])} at row {row}, column {column}"
    advice = "look for a diverged loss or a division by zero upstream"
    raise checks.NotFiniteError(f"linear_assignment: cost must be finite in image {image}, got {got}; {advice}")

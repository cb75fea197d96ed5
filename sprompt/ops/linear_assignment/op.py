"""The declaration of linear_assignment."""

import threading

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op

#: Up to so many entries one thread is faster: an image of 100 x 20 takes it a few microseconds.
SMALL = 1 << 16


class _Found(threading.local):
    """Each thread's word for the kernel's answer: an image with an entry that is not finite, or -1."""

    def __init__(self) -> None:
        self.bad = torch.empty(1, dtype=torch.int64, device="cpu")


_found = _Found()


@op("cuda", computes=())  # compiled kernels take float64 too: all of them compute in it
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
    size = a.cost.shape
    workers = min(native.threads(), size[0]) if len(size) == 3 and a.cost.numel() > SMALL else 1
    N, G = size[-2], size[-1]
    short, long = (N, G) if N < G else (G, N)
    numbers = (short + 7) * ((long + 7) // 8 * 8)  # the costs, the longer side in whole vectors, and 7 rows
    bad = _found.bad
    native._C.linear_assignment(
        a.cost, a.counts, rows, bad, native.scratch(workers, numbers, dtype=torch.float64), workers
    )
    image = int(bad.item())
    if image >= 0:
        refuse(a, image)


def images(cost: Tensor) -> Tensor:
    """(B, N, G), where (N, G) is one image."""
    return cost if cost.dim() == 3 else cost[None]


def refuse(a: Args, image: int) -> None:
    """The error of an image with an entry that is not finite."""
    cost = images(a.cost)[image]
    real = cost if a.counts is None else cost[:, : int(a.counts[image])]
    row, column = (~real.isfinite()).nonzero()[0].tolist()
    got = f"{float(real[row, column])} at row {row}, column {column}"
    advice = "look for a diverged loss or a division by zero upstream"
    checks.bad_value("linear_assignment", "cost", f"be finite in image {image}", got, advice)

"""The declaration of match_detections."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops.declare import Args, new, op


# No GPU kernel: each detection depends on the choices of those before it, and evaluations hold masks on the CPU.
@op(computes=())  # the compiled kernel computes in float64
def match_detections(iou: Tensor, thresholds: Tensor, ignored: Tensor | None, crowd: Tensor | None) -> Tensor:
    return new(iou, *iou.shape[:-2], thresholds.shape[0], iou.shape[-2], dtype=torch.int64)


def lists(x: Tensor, rank: int) -> Tensor:
    """x with its batch dimensions as one; `rank` is the number of the other dimensions."""
    if x.dim() == rank + 1:
        return x
    kept = x.shape[x.dim() - rank :]
    return x.reshape(x.shape[: x.dim() - rank].numel(), *kept)


@match_detections.native
def _(a: Args, match: Tensor) -> None:
    ignored, crowd = (None if flags is None else lists(flags, 1) for flags in (a.ignored, a.crowd))
    native._C.match_detections(lists(a.iou, 2), a.thresholds, ignored, crowd, lists(match, 2), native.threads())

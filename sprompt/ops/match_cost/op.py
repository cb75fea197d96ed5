"""The declaration of match_cost."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.declare import Args, new, op
from sprompt.ops.soft_targets import loss_dtype


@op("triton")
def match_cost(
    mask_logits: Tensor, targets: Tensor, ratio: int, class_logits: Tensor | None, labels: Tensor | None,
    counts: Tensor | None, class_weight: float, bce_weight: float, dice_weight: float, upsample: int,
) -> Tensor:  # fmt: skip
    return new(mask_logits, *mask_logits.shape[:2], targets.shape[1], dtype=loss_dtype(mask_logits, class_logits))


@match_cost.values
def _(a: Args) -> None:
    checks.counts_within("match_cost", a.counts, a.targets.shape[1])
    if a.class_logits is None or a.labels.numel() == 0:
        return
    last = a.class_logits.shape[2] - 1
    low, high = a.labels.aminmax()
    if int(low) >= 0 and int(high) <= last:
        return
    outside = (a.labels < 0) | (a.labels > last)
    if a.counts is not None:  # labels of padding may have any value
        outside &= torch.arange(a.labels.shape[1]) < a.counts[:, None]
    if bool(outside.any()):
        rule, label = f"lie between 0 and {last}", int(a.labels[outside][0])
        checks.bad_value("match_cost", "labels", rule, label, "class_logits has one column per class")


@match_cost.native
def _(a: Args, cost: Tensor) -> None:
    native._C.match_cost(native.rows(a.mask_logits), native.rows(a.targets), *a[2:], cost, native.threads())

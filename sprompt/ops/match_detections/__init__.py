"""COCO's matching of detections to targets."""

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.match_detections import op


def match_detections(
    iou: Tensor, thresholds: Tensor, ignored: Tensor | None = None, crowd: Tensor | None = None
) -> Tensor:
    """Matches detections to targets by COCO's greedy rule, at several thresholds of the IoU.

    At a threshold t, each detection in turn takes the free target of largest IoU ≥ min(t, 1 − 1e-10). If no such target is
    free, it takes the ignored target of largest IoU ≥ min(t, 1 − 1e-10) that is free. A target that is taken is no longer free.
    A crowd is ignored, and always free. The thresholds do not influence each other. The result equals that of `evaluateImg` in
    pycocotools.

    Args:
        iou: (..., D, G) float64, any strides, with the detections in order of decreasing score: `mask_iou(detections, targets,
            dtype=torch.float64)`. A quotient in float32, such as 7/10, misses its threshold. The IoU with a crowd is the
            intersection over the area of the detection.
        thresholds: (T,) float64, in any order.
        ignored: (..., G) bool: targets that count neither as found nor as missed; None means none.
        crowd: (..., G) bool; None means none.

    Returns: int64 (..., T, D): the target of each detection, −1 for none.
    Ties: of targets with equal IoU the last one is taken. An IoU of NaN is no match, so −1 and NaN pad lists of targets. A
    threshold of NaN has no matches. T, D or G of 0 are allowed.
    Exact, deterministic, not differentiable. Autocast changes nothing. The rule is sequential, so there is no GPU kernel. On a
    GPU the reference runs, with some launches for each detection: move iou to the CPU first.

    >>> iou = torch.tensor([[0.9, 0.6], [0.8, 0.55]], dtype=torch.float64)
    >>> match_detections(iou, torch.tensor([0.5, 0.75], dtype=torch.float64)).tolist()
    [[0, 1], [0, -1]]
    """
    name = "match_detections"
    checks.tensor(name, "iou", iou, (torch.float64,), "take mask_iou(..., dtype=torch.float64)")
    if iou.dim() < 2:
        checks.bad_value(name, "iou", "have shape (..., D, G)", tuple(iou.shape))
    checks.tensor(name, "thresholds", thresholds, (torch.float64,), "take torch.tensor(..., dtype=torch.float64)")
    checks.shape(name, "thresholds", thresholds, "(T,)", (None,))
    for arg, flags in (("ignored", ignored), ("crowd", crowd)):
        if flags is not None:
            checks.tensor(name, arg, flags, (torch.bool,))
            checks.shape(name, arg, flags, "(..., G)", (*iou.shape[:-2], iou.shape[-1]), "give one flag per target")
    checks.same_device(name, iou=iou, thresholds=thresholds, ignored=ignored, crowd=crowd)
    return op.match_detections(iou, thresholds, ignored, crowd)

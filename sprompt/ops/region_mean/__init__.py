"""The mean of a map over boxes or masks."""

from typing import Any

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.masks import as_bits
from sprompt.ops.region_mean import op


def _checked_map(op: str, features: Any) -> None:
    checks.tensor(op, "features", features, checks.FLOATS)
    checks.shape(op, "features", features, "(B, C, H, W)", (None,) * 4, "add a batch dimension with [None]")


def region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of a feature map over the cells of each box (Eq. 5).

    out[b, l, c] = mean of features[b, c, r0:r1, c0:c1] with c0 = ⌊x1⌋, c1 = max(⌈x2⌉, c0 + 1), clamped to [0, W]. Rows are
    computed in the same way. A box completely outside the map takes the nearest column or row of the map.

    Args:
        features: (B, C, H, W) float, any strides.
        boxes: (B, L, 4) float or integer: x1, y1, x2, y2 in cells of the map (pixels / stride), exclusive ends. NaN and
            infinity in a real box raise ValueError on a CPU. On a GPU NaN counts as 0, and infinity as the map's edge.
        counts: (B,) int64, the number of real boxes of each image; None means all. The other boxes are not read.

    Returns: (B, L, C) in the dtype of features. It is 0 for boxes behind counts and for a map without cells. Sums are in
    float32. Cells outside a box have no influence, even if they are NaN.
    Gradient to features. Where boxes overlap it is summed in float32, in the order of the boxes. Boxes behind counts give
    none. Deterministic. Autocast changes nothing.

    >>> features = torch.arange(12.0).reshape(1, 1, 3, 4)
    >>> region_mean(features, torch.tensor([[[0.5, 0.0, 1.5, 2.0], [3.0, 2.0, 3.0, 2.0]]])).tolist()
    [[[2.5], [11.0]]]
    """
    _checked_map("region_mean", features)
    checks.tensor("region_mean", "boxes", boxes, (*checks.FLOATS, *checks.INTEGERS))
    checks.shape(
        "region_mean", "boxes", boxes, "(B, L, 4)", (features.shape[0], None, 4), "pad the boxes and give counts"
    )
    checks.counts("region_mean", counts, features.shape[0])
    checks.same_device("region_mean", features=features, boxes=boxes, counts=counts)
    return op.region_mean(features, boxes.detach() if boxes.requires_grad else boxes, counts)


def mask_mean(features: Tensor, masks: BitMasks | Tensor) -> Tensor:
    """Mean of a feature map over the cells of each mask.

    out[b, l, c] = Σ_{p in mask} features[b, c, p] / |mask|, 0 where the mask is empty.

    Args:
        features: (B, C, H, W) float, any strides.
        masks: BitMasks (B, L) of H×W pixels, or dense (B, L, H, W). Floats are probabilities: a pixel is set where > 0.5 (strictly;
            NaN is not set). Bool and integers are set where not 0. For logits pass `x > 0`; mask_pool takes logits as they are.

    Returns: (B, L, C) in the dtype of features. Sums are in float32. The cost grows with the number of set cells. Cells
    outside a mask have no influence, even if they are NaN.
    Gradient to features. Where masks overlap it is summed in float32, in the order of the masks. Deterministic. Autocast
    changes nothing.

    >>> features = torch.arange(6.0).reshape(1, 1, 2, 3)
    >>> mask_mean(features, torch.tensor([[[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]])).tolist()
    [[[2.5], [0.0]]]
    """
    _checked_map("mask_mean", features)
    bits = as_bits("mask_mean", "masks", masks)
    size = (features.shape[2], features.shape[3])
    if bits.size != size:
        checks.bad_value("mask_mean", "masks", f"have the size of the map, {size}", bits.size, "resize them to the map")
    if len(bits.shape) != 2 or bits.shape[0] != features.shape[0]:
        rule = f"have batch dimensions (B, L) with B = {features.shape[0]}"
        checks.bad_value("mask_mean", "masks", rule, tuple(bits.shape), "give one list of masks per image")
    checks.same_device("mask_mean", features=features, masks=bits.words)
    return op.mask_mean(features, bits.words)

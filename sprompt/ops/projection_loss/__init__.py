"""Dice of the projections of a mask to the axes, against those of a box (Mask Auto-Labeler's multiple-instance loss)."""

from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.projection_loss import op

#: Rows and columns are counted in 32 bits.
LIMIT = 2**31


def projection_loss(masks: Tensor, boxes: Tensor) -> Tensor:
    """Dice of the row maxima plus dice of the column maxima of each mask and its box.

    With a the maxima of the mask's rows, b those of the box's rows: dice(a, b) = 1 − 2Σab / (Σa² + Σb² + 0.002); the same for
    columns. The loss is small if every row and column that crosses the box has a pixel of the mask, and no other has one.

    Args:
        masks: (B, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides: probabilities.
        boxes: (B, h, w) float, the masks of the boxes, with fractional borders or not.

    Returns: (B,), in float32 also for half-precision masks. Sums are in float32 or wider. B of 0 is allowed; maps without pixels
    have the loss 2.
    Gradient to masks, in their dtype: that of a maximum goes to one pixel, of equal ones to the one in the lowest column of its
    row, and in the lowest row of its column. A pixel that is both maxima gets the sum. Boxes get no gradient, even if they
    require one. Double backward is not supported.
    NaN counts as the largest number. So a NaN makes the loss of its map NaN, and the gradient at the pixels of all its maxima,
    and changes no other map. Deterministic. Autocast changes nothing.

    >>> box = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]])
    >>> diagonal = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    >>> [round(projection_loss(mask, box).item(), 3) for mask in (box, diagonal, torch.ones(1, 2, 3))]
    [0.001, 0.001, 0.201]
    """
    name = "projection_loss"
    checks.tensor(name, "masks", masks, checks.FLOATS)
    checks.shape(name, "masks", masks, "(B, h, w)", (None, None, None), "one mask: index it with [None]")
    checks.tensor(name, "boxes", boxes, checks.FLOATS)
    checks.shape(name, "boxes", boxes, "(B, h, w)", tuple(masks.shape), "resize the masks of the boxes")
    longest = max(masks.shape[1:])
    if longest >= LIMIT:
        checks.bad_value(name, "masks", f"have fewer than {LIMIT} rows and columns", longest)
    checks.same_device(name, masks=masks, boxes=boxes)
    return op.projection_loss(masks, boxes.detach() if boxes.requires_grad else boxes)[0]

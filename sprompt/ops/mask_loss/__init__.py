"""Cross-entropy and dice of predicted masks."""

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks, soft_targets
from sprompt.ops.mask_loss import op


def mask_loss(logits: Tensor, targets: BitMasks | Tensor, *, upsample: int = 1) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and squared-denominator dice of M masks, after bilinear upsampling.

    With z the logits upsampled by `upsample` (half-pixel centres), p = σ(z), t the target, sums over the P pixels:
    bce = Σ(max(z, 0) − z·t + log(1 + e^−|z|)) / P,   dice = 1 − 2Σpt / ((Σp² + 1e-3) + (Σt² + 1e-3)).

    Args:
        logits: (M, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides.
        targets: (M, h·upsample, w·upsample) bool or uint8 (any value but 0 counts as 1) or float, taken as they are; or
            BitMasks (M,) of 1, 2 or 4 times that size. BitMasks are reduced by half-pixel bilinear interpolation (4: the mean
            of the central 2×2 of each 4×4 block).
        upsample: whole number, at least 1.

    Returns: (bce (M,), dice (M,)), in float32 also for half-precision logits: a float16 loss times the scale of a GradScaler
    would be infinite. M of 0 gives empty results that are still connected to the logits; take their sum, not their mean. Masks
    without pixels have bce 0 and dice 1. A NaN in a mask's logits makes both losses of this mask NaN, and no other loss.
    Differentiable in the logits (gradient in their dtype). Every sum is in float32 or wider. Targets get no gradient, even if
    they require one. Double backward is not supported. Neither the upsampled logits nor the reduced targets are stored.
    Deterministic. Autocast changes nothing.

    >>> bce, dice = mask_loss(torch.tensor([[[20.0, -20.0], [20.0, -20.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    >>> round(bce.item(), 6), round(dice.item(), 3)
    (0.0, 0.0)
    """
    checks.tensor("mask_loss", "logits", logits, checks.FLOATS)
    checks.shape(
        "mask_loss", "logits", logits, "(M, h, w)", (None, None, None), "flatten images and masks into one dimension"
    )
    soft_targets.whole_upsample("mask_loss", upsample)
    size = (logits.shape[1] * upsample, logits.shape[2] * upsample)
    soft, ratio = soft_targets.as_targets("mask_loss", targets, (logits.shape[0],), "M,", size)
    checks.same_device("mask_loss", logits=logits, targets=soft)
    bce, dice, _ = op.mask_loss(logits, soft, ratio, upsample)
    return bce, dice

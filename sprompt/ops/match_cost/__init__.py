"""The cost of matching predicted masks with targets."""

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks, soft_targets
from sprompt.ops.match_cost import op


def match_cost(
    mask_logits: Tensor,
    targets: BitMasks | Tensor,
    class_logits: Tensor | None = None,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    weights: tuple[float, float, float] = (2.0, 1.0, 4.0),
    upsample: int = 1,
) -> Tensor:
    """Cost of every predicted mask for every target of its image, from one product Σpt and the row sums.

    z are the logits upsampled by `upsample` (bilinear, half-pixel centres), p = σ(z), t is the target, q is the probability of
    the target's class, and sums are over the P pixels:
    class = −¼(1 − q)² log(q + ε) + ¾q² log(1 − q + ε), ε = 1e-12 (focal, α = ¼, γ = 2; 1 − q is computed as σ(−logit));
    bce = −(Σpt + Σ(1 − p)(1 − t)) / P;   dice = −2Σpt / ((Σp² + 1e-3) + (Σt² + 1e-3));
    cost = weights[0]·class + weights[1]·bce + weights[2]·dice.

    Args:
        mask_logits: (B, N, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides.
        targets: (B, G, h·upsample, w·upsample) bool or uint8 (any value but 0 counts as 1) or float, taken as they are; or
            BitMasks (B, G) of 1, 2 or 4 times that size. BitMasks are reduced by half-pixel bilinear interpolation (4: the mean
            of the central 2×2 of each 4×4 block).
        class_logits: (B, N, K) float, or None for a cost without the class term. Its dtype may differ from that of mask_logits.
        labels: (B, G) int64 in [0, K), given with class_logits. Labels of padding are not read. On a CPU a label outside [0, K)
            raises ValueError. On a GPU it is clamped, because a check would wait for the device.
        counts: (B,) int64, the number of real targets of each image; None means all G.
        weights: of class, bce and dice.
        upsample: whole number, at least 1.

    Returns: float32 (B, N, G). The columns of padding (g ≥ counts[b]) are 0, so they are finite. N or G of 0 give an empty
    result. Masks without pixels have bce and dice cost 0. NaN logits of a mask make its row NaN in the real columns, and
    `linear_assignment` reports it.
    Not differentiable: the result is detached. The upsampled probabilities are never stored. Deterministic. Autocast
    changes nothing.

    >>> logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])
    >>> match_cost(logits, torch.tensor([[[[1, 0]]]]).bool()).round(decimals=2).tolist()
    [[[-5.0], [-0.0]]]
    """
    name = "match_cost"
    checks.tensor(name, "mask_logits", mask_logits, checks.FLOATS)
    checks.shape(
        name, "mask_logits", mask_logits, "(B, N, h, w)", (None, None, None, None), "one image: index it with [None]"
    )
    soft_targets.whole_upsample(name, upsample)
    B, N, h, w = mask_logits.shape
    soft, ratio = soft_targets.as_targets(name, targets, (B, None), "B, G", (h * upsample, w * upsample))
    if (class_logits is None) != (labels is None):
        given, missing = ("labels", "class_logits") if class_logits is None else ("class_logits", "labels")
        checks.bad_value(
            name, missing, f"be given with {given}", "None", "the class term needs both; pass neither to leave it out"
        )
    if class_logits is not None and labels is not None:
        checks.tensor(name, "class_logits", class_logits, checks.FLOATS)
        checks.shape(name, "class_logits", class_logits, "(B, N, K)", (B, N, None))
        if class_logits.shape[2] == 0:
            checks.bad_value(name, "class_logits", "have at least one class", tuple(class_logits.shape))
        checks.tensor(name, "labels", labels, (torch.int64,), "give the class of every target")
        checks.shape(name, "labels", labels, "(B, G)", (B, soft.shape[1]))
    checks.counts(name, counts, B)
    if not isinstance(weights, (tuple, list)) or len(weights) != 3:
        checks.bad_type(name, "weights", "be three numbers (class, bce, dice)", repr(weights))
    for weight in weights:
        checks.number(name, "weights", weight, "be three numbers (class, bce, dice)")
    checks.same_device(
        name, mask_logits=mask_logits, targets=soft, class_logits=class_logits, labels=labels, counts=counts
    )
    return op.match_cost(mask_logits, soft, ratio, class_logits, labels, counts, *(float(x) for x in weights), upsample)

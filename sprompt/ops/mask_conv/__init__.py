"""Dynamic 1×1 convolution, its sign as bits, hard mask pooling, and convolution and pooling in one read of the features."""

from typing import Any

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.mask_conv import op
from sprompt.ops.masks import as_bits


def mask_conv(features: Tensor, kernels: Tensor) -> Tensor:
    """Dynamic 1×1 convolution: every image has its own kernels.

    logits[b, n, y, x] = Σ_c kernels[b, n, c] · features[b, c, y, x]

    Args:
        features: (B, C, H, W) float. If the pixels are not contiguous, they are copied once.
        kernels: (B, N, C) float, any strides. One set for all images is `kernels[None].expand(B, N, C)`.

    Returns: logits (B, N, H, W), of the wider dtype of features and kernels. Sums are in float32. C = 0 gives zeros. NaN
    and infinity propagate within their pixel or kernel.
    Gradient to features and kernels. Deterministic. Autocast casts both to its dtype, as for torch.matmul.

    >>> features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    >>> mask_conv(features, torch.tensor([[[1.0, 0.0], [1.0, -1.0]]])).tolist()
    [[[[1.0, 2.0]], [[-2.0, -2.0]]]]
    """
    return op.mask_conv(*_features_and_kernels("mask_conv", features, kernels))


def mask_bits(features: Tensor, kernels: Tensor) -> BitMasks:
    """The sign of the dynamic 1×1 convolution as bits: the masks that masked attention reads.

    bit(b, n, p) = [mask_conv(features, kernels)[b, n, p] ≥ 0], without its logits in memory.

    Args:
        features: (B, C, H, W) float. If the pixels are not contiguous, they are copied once.
        kernels: (B, N, C) float, any strides.

    Returns: BitMasks (B, N) of size (H, W). The comparison is not strict: a logit of 0 or −0 is set, so C = 0 sets every pixel.
    σ(logit) < ½ is a bit of 0. A logit of NaN is not set. The comparison sees the logit as mask_conv returns it, rounded to the
    wider dtype of features and kernels: a tiny negative float16 logit that rounds to −0 is set.
    Not differentiable. Deterministic. Autocast casts both to its dtype, as for torch.matmul.

    >>> features = torch.tensor([[[[1.0, 2.0]], [[3.0, 2.0]]]])
    >>> mask_bits(features, torch.tensor([[[1.0, -1.0]]])).to_dense().int().tolist()
    [[[[0, 1]]]]
    """
    features, kernels = _features_and_kernels("mask_bits", features, kernels)
    return BitMasks(op.mask_bits(features, kernels), (features.shape[2], features.shape[3]))


def mask_pool(features: Tensor, masks: BitMasks | Tensor) -> Tensor:
    """Sum (not mean) of the features under each hard mask.

    pooled[b, n, c] = Σ_p [p in masks[b, n]] · features[b, c, p]

    Args:
        features: (B, C, H, W) float.
        masks: BitMasks (B, N) of size (H, W), or dense (B, N, H, W). Floats are logits: a pixel is set where > 0 (strictly; NaN
            is not set). Bool and integers are set where not 0. For probabilities pass `p > 0.5`; mask_mean takes them as they are.

    Returns: (B, N, C) in the dtype of the features. Sums are in float32 and rounded once. A float16 sum beyond 65504 is
    infinite, so pool large masks in bfloat16 or float32. An empty mask gives 0. A feature that is not finite makes the sums
    of its channel infinite or NaN in every mask that holds its pixel; other masks may become NaN in that channel.
    The cost grows with the number of set bits. Gradient to the features, none to the masks. Deterministic. Autocast changes
    nothing.

    >>> features = torch.arange(6.0).reshape(1, 2, 1, 3)
    >>> mask_pool(features, torch.tensor([[[[2.0, -1.0, 0.5]]]])).tolist()
    [[[2.0, 8.0]]]
    """
    checks.tensor("mask_pool", "features", features, checks.FLOATS)
    checks.shape("mask_pool", "features", features, "(B, C, H, W)", (None,) * 4)
    batch, _, height, width = features.shape
    bits = as_bits("mask_pool", "masks", masks, 0.0)
    if len(bits.shape) != 2 or bits.shape[0] != batch:
        checks.bad_value(
            "mask_pool",
            "masks",
            f"have batch dimensions (B, N) with B = {batch}",
            tuple(bits.shape),
            "give one list of masks per image",
        )
    if bits.size != (height, width):
        checks.bad_value(
            "mask_pool", "masks", f"have the size of the features, {(height, width)}", bits.size, "resize one of them"
        )
    checks.same_device("mask_pool", features=features, masks=bits.words)
    return op.mask_pool(features, bits.words)


def mask_update(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of K-Net: mask logits, and the sum of the features under logits > 0, in one read of the features.

    logits = mask_conv(features, kernels);  pooled = mask_pool(features, logits)

    Args:
        features: (B, C, H, W) float.
        kernels: (B, N, C) float, any strides.

    Returns: logits (B, N, H, W) and pooled (B, N, C), of the wider dtype of features and kernels. Both equal the results of the
    two functions above to the bit. The threshold applies, strictly, to the returned logits (rounded to their dtype). NaN is not
    set.
    Gradient as in K-Net, none through the threshold: features get kernelsᵀ ∂logits + [logits > 0]ᵀ ∂pooled, kernels get
    ∂logits featuresᵀ. Deterministic. Autocast casts both to its dtype. float16: see mask_pool on overflow.

    >>> logits, pooled = mask_update(torch.tensor([[[[1.0, -2.0, 3.0]]]]), torch.tensor([[[2.0], [-1.0]]]))
    >>> logits.tolist(), pooled.tolist()
    ([[[[2.0, -4.0, 6.0]], [[-1.0, 2.0, -3.0]]]], [[[4.0], [-2.0]]])
    """
    logits, pooled, _ = op.mask_update(*_features_and_kernels("mask_update", features, kernels))
    return logits, pooled


def _features_and_kernels(name: str, features: Any, kernels: Any) -> tuple[Tensor, Tensor]:
    checks.tensor(name, "features", features, checks.FLOATS)
    checks.tensor(name, "kernels", kernels, checks.FLOATS)
    checks.shape(name, "features", features, "(B, C, H, W)", (None,) * 4)
    batch, channels = features.shape[:2]
    advice = "drop 1x1 axes with .flatten(2); expand kernels that all images share"
    checks.shape(name, "kernels", kernels, "(B, N, C)", (None,) * 3, advice)
    if kernels.shape[0] != batch or kernels.shape[2] != channels:
        checks.bad_value(
            name, "kernels", f"have shape (B, N, C) with B = {batch} and C = {channels}", tuple(kernels.shape), advice
        )
    checks.same_device(name, features=features, kernels=kernels)
    return checks.as_matmul(features, kernels)  # type: ignore[return-value]  # as many as were given

"""Prompts: the mean of a map over boxes or masks, and the match of kernels with prompts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.masks import as_bits
from sprompt.ops.prompts import registration as registration

ASSIGNMENTS = ("cosine", "sequential", "random")


def _checked_map(op: str, features: Any) -> None:
    checks.tensor(op, "features", features, checks.FLOATS)
    checks.shape(op, "features", features, "(B, C, H, W)", (None,) * 4, "add a batch dimension with [None]")


def region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of a feature map over the cells of each box (Eq. 5).

    out[b, l, c] = mean of features[b, c, r0:r1, c0:c1] with c0 = ⌊x1⌋, c1 = max(⌈x2⌉, c0 + 1), clamped to [0, W]; rows
    likewise. A box wholly outside the map takes the nearest column or row of the map.

    Args:
        features: (B, C, H, W) float, any strides.
        boxes: (B, L, 4) float or integer: x1, y1, x2, y2 in cells of the map (pixels / stride), exclusive ends. NaN and
            infinity in a real box raise ValueError on a CPU; on a GPU NaN counts as 0, infinity as the map's edge.
        counts: (B,) int64, how many boxes of each image are real; None means all. What stands behind is not looked at.

    Returns: (B, L, C) in the dtype of features; 0 for boxes behind counts and for a map without cells. Sums are in float32.
    Cells outside a box have no influence, NaN or not. Gradient to features; where boxes overlap it is summed in float32, in
    the order of the boxes; none behind counts. Deterministic. Autocast changes nothing.

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
    return torch.ops.sprompt.region_mean(features, boxes.detach(), counts)


def mask_mean(features: Tensor, masks: BitMasks | Tensor) -> Tensor:
    """Mean of a feature map over the cells of each mask.

    out[b, l, c] = Σ_{p in mask} features[b, c, p] / |mask|, 0 where the mask is empty.

    Args:
        features: (B, C, H, W) float, any strides.
        masks: BitMasks (B, L) of H×W pixels, or dense (B, L, H, W), packed as `pack_masks` does.

    Returns: (B, L, C) in the dtype of features. Sums are in float32; the cost follows the number of set cells. Cells outside
    a mask have no influence, NaN or not. Gradient to features; where masks overlap it is summed in float32, in the order of the
    masks. Deterministic. Autocast changes nothing.

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
        checks.bad_value("mask_mean", "masks", rule, tuple(bits.shape), "one list of masks an image")
    checks.same_device("mask_mean", features=features, masks=bits.words)
    return torch.ops.sprompt.mask_mean(features, bits.words)


class PromptMatch(NamedTuple):
    """What `prompt_match` returns."""

    kernels: Tensor  # (B, N, C): the kernels with their prompts added
    index: Tensor  # type: ignore[assignment]  # (B, N) int64: the prompt of each kernel, -1 for none


def prompt_match(
    kernels: Tensor,
    prompts: Tensor,
    counts: Tensor | None = None,
    *,
    assign: str = "cosine",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> PromptMatch:
    """Gives every kernel one prompt and adds it (Eqs. 6–8).

    cosine: δ(n) = argmax_l ⟨K_n, P_l⟩ / (max(‖K_n‖, ε) · max(‖P_l‖, ε)), ε = 1e-8, over the counts[b] real prompts, in float32;
    K'_n = K_n + P_δ(n).
    sequential: kernel n reads slot t = ⌊n · 20 / N⌋ of 20; with L = counts[b] and r = ⌊20 / L⌋, slots t < rL hold prompt ⌊t / r⌋,
    the others prompts 0, 1, …; of more than 20 prompts the first 20 are used.
    random: kernel n takes what sequential gives kernel π(n); one permutation π per call, shared by the batch.

    Args:
        kernels: (B, N, C) float, or (N, C), shared by the batch.
        prompts: (B, L, C) float; of two float dtypes both are computed in the wider.
        counts: (B,) int64, how many prompts of each image are real; None means all. Padding is not looked at.
        dropout: chance, per image and kernel, that no prompt is added; others are not rescaled.
        generator: source of the permutation and the dropout, of the kernels' device; None is torch's own. torch.compile
            and torch.export take None only.

    Returns: PromptMatch(kernels (B, N, C), index int64 (B, N)). Ties, exact ones such as equal prompts, go to the lowest
    index. A NaN similarity counts as −∞, so it never wins over a number; where all are NaN the prompt is 0. Without a
    prompt (counts[b] = 0, L = 0, dropped) a kernel is returned as it is, with index −1.
    Gradient to kernels: the identity, summed over the batch if they are shared; to prompts: the sum over the kernels that took
    each, in float32, by increasing n; none through the match. Detach the prompts where a method says so. Deterministic, but
    for the drawn parts. Autocast changes nothing.

    >>> kernels = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> prompts = torch.tensor([[[0.0, 3.0], [5.0, 1.0]]])
    >>> prompt_match(kernels, prompts)
    PromptMatch(kernels=tensor([[[6., 1.],
             [0., 5.]]]), index=tensor([[1, 0]]))
    """
    checks.tensor("prompt_match", "kernels", kernels, checks.FLOATS)
    checks.tensor("prompt_match", "prompts", prompts, checks.FLOATS)
    checks.shape("prompt_match", "prompts", prompts, "(B, L, C)", (None, None, None), "pad the prompts and give counts")
    batch, _, channels = prompts.shape
    if kernels.dim() == 2:
        checks.shape("prompt_match", "kernels", kernels, "(N, C)", (None, channels), "prompts have C channels")
    else:
        advice = "kernels and prompts share the batch and the channels"
        checks.shape("prompt_match", "kernels", kernels, "(B, N, C) or (N, C)", (batch, None, channels), advice)
    checks.counts("prompt_match", counts, batch)
    checks.choice("prompt_match", "assign", assign, ASSIGNMENTS)
    checks.number("prompt_match", "dropout", dropout, "be a number between 0 and 1", 0, 1)
    checks.same_device("prompt_match", kernels=kernels, prompts=prompts, counts=counts)
    if generator is not None:
        _checked_generator(generator, kernels)
    if kernels.dtype != prompts.dtype:
        wider = torch.promote_types(kernels.dtype, prompts.dtype)
        kernels, prompts = kernels.to(wider), prompts.to(wider)
    number = kernels.shape[-2]
    order = keep = None
    if assign == "random":
        order = torch.randperm(number, generator=generator, device=kernels.device)
    if dropout > 0:
        keep = torch.rand((batch, number), generator=generator, device=kernels.device) >= dropout
    return PromptMatch(*torch.ops.sprompt.prompt_match(kernels, prompts, counts, keep, order, assign == "cosine"))


def _checked_generator(generator: Any, kernels: Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        checks.bad_type("prompt_match", "generator", "be a torch.Generator or None", type(generator).__name__)
    if generator.device.type != kernels.device.type:
        advice = "make it with torch.Generator(device)"
        checks.bad_value(
            "prompt_match", "generator", f"be on the device of kernels ({kernels.device})", generator.device, advice
        )

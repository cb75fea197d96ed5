"""Losses and matching cost at random points of masks, and the values of maps at points."""

import math
from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.masks import as_bits
from sprompt.ops.points import op

#: Offsets in a map, and indices of points, are 32 bits wide. Sides are exact in float32.
LIMIT, SIDE = 2**30, 2**24


def sample_points(maps: Tensor | BitMasks, points: Tensor) -> Tensor:
    """Values of maps at points, bilinear: the pixel coordinates of point (x, y) are (x·w − ½, y·h − ½).

    With x0 = ⌊x·w − ½⌋, f = x·w − ½ − x0 and y0, g alike, a value is interpolated along x, a + f·(b − a), and then along y.
    Cells outside of the map are 0. This is `grid_sample(maps, 2·points − 1, align_corners=False)` with zero padding.

    Args:
        maps: (B, N, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides; or BitMasks (B, N), whose
            pixels are 0 and 1.
        points: (B, T, 2) float, (x, y) in [0, 1] of the map's sides. The maps of an image share them. They are used in float32.
            A point outside of [0, 1] takes part in the bilinear falloff of the border. NaN points give 0.

    Returns: (B, N, T) in the dtype of the maps; float32 for BitMasks (float64 if the points are float64). B, N, T, h or w of 0
    are allowed, and maps without cells are 0 everywhere. A NaN cell makes the points around it NaN, and so does an infinite
    cell.
    Gradient to float maps: each cell sums its shares in float32, in a fixed order; the Triton kernels sum integers of fixed
    point, where shares that are not finite make a cell NaN. None to the points. Double backward is not supported. Deterministic.
    Autocast changes nothing.

    >>> sample_points(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[0.25, 0.5], [0.5, 0.5], [1.0, 0.5]]])).tolist()
    [[[1.0, 2.0, 1.5]]]
    """
    name = "sample_points"
    if isinstance(maps, BitMasks):
        if len(maps.shape) != 2:
            checks.bad_value(
                name, "maps", "be BitMasks of shape (B, N)", tuple(maps.shape), "give the masks of each image"
            )
        _small(name, "maps", maps.size)
        points = _coordinates(name, "points", points, "(B, T, 2)", (maps.shape[0], None, 2))
        checks.same_device(name, maps=maps.words, points=points)
        return op.sample_points(maps.words, _as_wide(points, points), *maps.size)
    checks.tensor(name, "maps", maps, checks.FLOATS, "pack masks with BitMasks.from_dense")
    checks.shape(name, "maps", maps, "(B, N, h, w)", (None,) * 4, "one image: index it with [None]")
    _small(name, "maps", maps.shape[2:])
    points = _coordinates(name, "points", points, "(B, T, 2)", (maps.shape[0], None, 2))
    checks.same_device(name, maps=maps, points=points)
    return op.sample_points(maps, _as_wide(points, maps), *maps.shape[2:])


def point_cost(
    mask_logits: Tensor | tuple[Tensor, Tensor],
    targets: BitMasks | Tensor,
    counts: Tensor | None = None,
    *,
    number: int = 12544,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    points: Tensor | None = None,
    weights: tuple[float, float] = (5.0, 5.0),
) -> Tensor:
    """Cost of every predicted mask for every target of its image, from T random points of the image (Mask2Former's matcher).

    z are the logits at the points, p = σ(z), t are the targets at the points (see `sample_points`), and sums are over the T
    points of the image:
    bce = Σ(log(1 + eᶻ) − z·t) / T;   dice = 1 − (2Σpt + 1) / (Σp + Σt + 1);   cost = weights[0]·bce + weights[1]·dice.
    Add the cost of classes to the result.

    Args:
        mask_logits: (B, N, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides; or the pair (features
            (B, C, h, w), kernels (B, N, C)) of the logits kernels · features. Of a pair only the features are sampled, and then
            multiplied, so the logits of whole maps never exist. Both parts may differ in dtype.
        targets: BitMasks (B, G) of any size, or dense masks (B, G, H, W), which are packed by `pack_masks`.
        counts: (B,) int64, the number of real targets of each image; None means all G.
        number: T, at least 1. All masks and targets of an image share its points.
        seed: int64 tensor without dimensions, on the device of the logits: the key of the draw. None draws a seed from
            generator.
        generator: on the device of the logits, for the seed; None means torch's own. torch.compile and torch.export accept
            only None.
        points: (B, T, 2) float, as for `sample_points`, to replace the draw; then number, seed and generator are not used.
        weights: of bce and dice.

    Point i of image b is drawn from Philox4x32-10 with counter (b, i) and key seed, so that it is the same on every device and
    backend: the first two words r₀, r₁ give (x, y) = (r₀ >> 8, r₁ >> 8)·2⁻²⁴.

    Returns: float32 (B, N, G). The columns of padding (g ≥ counts[b]) are 0, so they are finite. N or G of 0 give an empty
    result. No points (T = 0) give bce 0 and dice 0. A NaN logit at a point makes the row of its mask NaN in the real columns,
    and `linear_assignment` reports it. An infinite logit is NaN there.
    Not differentiable: the result is detached. Neither logits nor targets of all points are stored. Deterministic for a seed.
    Autocast changes nothing.

    >>> logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])
    >>> points = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]])
    >>> point_cost(logits, torch.tensor([[[[1, 0]]]]).bool(), points=points, weights=(1, 0)).round(decimals=2).tolist()
    [[[0.0], [9.0]]]
    """
    name = "point_cost"
    maps, kernels = _logits_or_pair(name, mask_logits)
    B = maps.shape[0]
    bits = _targets(name, targets, (B, None), "B, G")
    checks.counts(name, counts, B)
    checks.whole(name, "number", number, "be a whole number of at least 1", 1)
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        checks.bad_type(name, "weights", "be two numbers (bce, dice)", repr(weights))
    for weight in weights:
        checks.number(name, "weights", weight, "be two numbers (bce, dice)")
    checks.same_device(name, mask_logits=maps, kernels=kernels, targets=bits.words, counts=counts)
    if points is None:
        _below_limit(name, "number", number)
        seed = _seed(name, seed, generator, maps)
    else:
        points = _coordinates(name, "points", points, "(B, T, 2)", (B, None, 2))
        checks.same_device(name, mask_logits=maps, points=points)
        points, seed, number = _as_wide(points, maps, kernels), None, points.shape[1]
    return op.point_cost(maps, kernels, bits.words, *bits.size, counts, seed, points, number, *map(float, weights))


def point_loss(
    logits: Tensor,
    targets: BitMasks | Tensor,
    *,
    number: int = 12544,
    oversample: float = 3.0,
    importance: float = 0.75,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    points: Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice of M masks at points, most of them where the logits are least certain (PointRend).

    For every mask D = ⌊oversample · number⌋ points are drawn, and the K = ⌊importance · number⌋ points of least |z| are kept,
    z being the logit at the point. number − K further points are drawn and all used. With p = σ(z), t the target at a point
    (see `sample_points`), and sums over these `number` points:
    bce = Σ(log(1 + eᶻ) − z·t) / number;   dice = 1 − (2Σpt + 1) / (Σp + Σt + 1).

    Args:
        logits: (M, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides.
        targets: BitMasks (M,) of any size, or dense masks (M, H, W), which are packed by `pack_masks`.
        number: points of a mask, at least 1.
        oversample: at least 1.
        importance: between 0 and 1.
        seed: int64 tensor without dimensions, on the device of the logits: the key of the draw. None draws a seed from
            generator.
        generator: on the device of the logits, for the seed; None means torch's own. torch.compile and torch.export accept
            only None.
        points: (M, T, 2) float, as for `sample_points`: the final points. Nothing is drawn or selected, and number, oversample,
            importance, seed and generator are not used.
        candidates: (M, D + number − K, 2) float: these points replace the draw, in its order. Seed and generator are not used.

    Point i of mask m is drawn from Philox4x32-10 with counter (m, i) and key seed, so that it is the same on every device and
    backend: the first two words r₀, r₁ give (x, y) = (r₀ >> 8, r₁ >> 8)·2⁻²⁴. The further points have i = D, D + 1, …

    Returns: (bce (M,), dice (M,)), in float32 also for half-precision logits: a float16 loss times the scale of a GradScaler
    would be infinite. Ties of |z| go to the lowest i. NaN counts as least |z|, so a NaN logit near any drawn point makes both
    losses of its mask NaN, and no other loss. An infinite logit is NaN there. M of 0 gives empty results that are still
    connected to the logits; take their sum, not their mean. No points (T = 0) give bce 0 and dice 0.
    Differentiable in the logits (gradient in their dtype), not through the selection. Sums are in float32 or wider. If the
    incoming gradient of a mask is not finite, the whole gradient of this mask is NaN. If a loss of a mask is NaN, its gradient
    is NaN at least around the points. Double backward is not supported. Deterministic for a seed. Autocast changes nothing.

    >>> logits, target = torch.tensor([[[20.0, -20.0]]]), torch.tensor([[[True, False]]])
    >>> bce, dice = point_loss(logits, target, points=torch.tensor([[[0.25, 0.5], [0.75, 0.5]]]))
    >>> round(bce.item(), 6), round(dice.item(), 6)
    (0.0, 0.0)
    """
    name = "point_loss"
    checks.tensor(name, "logits", logits, checks.FLOATS)
    checks.shape(name, "logits", logits, "(M, h, w)", (None,) * 3, "flatten images and masks into one dimension")
    _small(name, "logits", logits.shape[1:])
    M = logits.shape[0]
    bits = _targets(name, targets, (M,), "M,")
    checks.whole(name, "number", number, "be a whole number of at least 1", 1)
    checks.number(name, "oversample", oversample, "be a number of at least 1", 1)
    checks.number(name, "importance", importance, "be a number between 0 and 1", 0, 1)
    _below_limit(name, "oversample", oversample * number)
    checks.same_device(name, logits=logits, targets=bits.words)
    drawn, kept = math.floor(oversample * number), math.floor(importance * number)
    given = points
    if points is not None:
        if candidates is not None:
            checks.bad_value(
                name, "candidates", "be None with points", "a tensor", "points are final: nothing is selected"
            )
        given = _coordinates(name, "points", points, "(M, T, 2)", (M, None, 2))
        number, drawn, kept = given.shape[1], 0, 0
    elif candidates is not None:
        form = "(M, D + number − K, 2)"
        given = _coordinates(name, "candidates", candidates, form, (M, drawn + number - kept, 2))
    if given is None:
        seed = _seed(name, seed, generator, logits)
    else:
        checks.same_device(name, logits=logits, **{"candidates" if points is None else "points": given})
        given, seed = _as_wide(given, logits), None
    bce, dice, _, _ = op.point_loss(logits, bits.words, *bits.size, seed, given, number, drawn, kept)
    return bce, dice


# -- arguments


def _logits_or_pair(name: str, given: Any) -> tuple[Tensor, Tensor | None]:
    """The maps to sample, and the kernels of a pair."""
    if not isinstance(given, (tuple, list)):
        checks.tensor(name, "mask_logits", given, checks.FLOATS, "or pass the pair (features, kernels)")
        checks.shape(name, "mask_logits", given, "(B, N, h, w)", (None,) * 4, "one image: index it with [None]")
        _small(name, "mask_logits", given.shape[2:])
        return given, None
    if len(given) != 2:
        checks.bad_type(name, "mask_logits", "be logits or the pair (features, kernels)", f"{len(given)} values")
    features, kernels = given
    checks.tensor(name, "features", features, checks.FLOATS)
    checks.tensor(name, "kernels", kernels, checks.FLOATS)
    checks.shape(name, "features", features, "(B, C, h, w)", (None,) * 4, "one image: index it with [None]")
    _small(name, "features", features.shape[2:])
    advice = "features and kernels share the batch and the channels"
    checks.shape(name, "kernels", kernels, "(B, N, C)", (features.shape[0], None, features.shape[1]), advice)
    return features, kernels


def _targets(name: str, targets: Any, batch: tuple[int | None, ...], letters: str) -> BitMasks:
    bits = as_bits(name, "targets", targets)
    if len(bits.shape) != len(batch) or any(b not in (None, n) for b, n in zip(batch, bits.shape, strict=True)):
        known = "" if None in batch else f" = {tuple(batch)}"
        advice = "give one target for each mask" if len(batch) == 1 else "give the targets of each image"
        checks.bad_value(name, "targets", f"be masks of batch shape ({letters}){known}", tuple(bits.shape), advice)
    _small(name, "targets", bits.size)
    return bits


def _small(name: str, arg: str, size: Any) -> None:
    if (size[0] + 2) * (size[1] + 2) >= LIMIT or size[0] >= SIDE or size[1] >= SIDE:
        rule = f"have fewer than {LIMIT} pixels a map with a border of one, and sides below {SIDE}"
        checks.bad_value(name, arg, rule, tuple(size), "split the maps into parts")


def _below_limit(name: str, arg: str, points: float) -> None:
    if points >= LIMIT:
        checks.bad_value(name, arg, f"give fewer than {LIMIT} points", int(points), "draw fewer points")


def _coordinates(name: str, arg: str, points: Any, form: str, sizes: tuple[int | None, ...]) -> Tensor:
    checks.tensor(name, arg, points, checks.FLOATS)
    checks.shape(name, arg, points, form, sizes, "the last axis holds x and y")
    _below_limit(name, arg, points.shape[1])
    return points.detach() if points.requires_grad else points


def _as_wide(points: Tensor, *inputs: Tensor | None) -> Tensor:
    """Points in the dtype of the computation: float32, or float64 if an input has it."""
    return points.to(
        torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32
    )


def _seed(name: str, seed: Any, generator: Any, like: Tensor) -> Tensor:
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            checks.bad_type(name, "generator", "be a torch.Generator or None", type(generator).__name__)
        if seed is not None:
            checks.bad_value(name, "generator", "be None with a seed", "both", "the seed decides all points")
        if generator.device.type != like.device.type:
            rule = f"be on the device of the logits ({like.device})"
            checks.bad_value(name, "generator", rule, generator.device, "make it with torch.Generator(device)")
    if seed is None:
        return torch.randint(2**63 - 1, (), generator=generator, device=like.device)
    checks.tensor(name, "seed", seed, (torch.int64,), "for example torch.randint(2**63 - 1, (), device=…)")
    checks.shape(name, "seed", seed, "()", (), "one seed serves all masks")
    checks.same_device(name, logits=like, seed=seed)
    return seed

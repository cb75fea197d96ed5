"""mean_field."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mean_field, pack_masks
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals, smooth

#: Labels may differ from those of float64 where its state is so close to ½.
NEAR = 1e-4


def scene(B: int, h: int, w: int, seed: int, noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Crops like those of a training: smooth colours with noise, a soft start, and a box with fractional borders."""
    g = random(seed)
    coarse = max(h // 8, 2), max(w // 8, 2)
    images = smooth(3 * B, coarse, h, w, seed).reshape(B, 3, h, w) + noise * torch.randn(B, 3, h, w, generator=g)
    start = (smooth(B, coarse, h, w, seed + 1) + 0.5).sigmoid()
    rows, columns = (
        (torch.arange(n) / (n - 1) * 10 - 1).clamp(0, 1) * (9 - torch.arange(n) / (n - 1) * 10).clamp(0, 1)
        if n > 1
        else torch.ones(1)
        for n in (h, w)
    )
    return images, start, (rows[:, None] * columns).expand(B, h, w).clone()


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def sample(name: str, inputs: tuple[Tensor, ...], **options: Any) -> Sample:
        return Sample(name, tuple(x.to(device, dtype) for x in inputs), options)

    def uniform(*shape: int) -> tuple[Tensor, ...]:
        B, h, w = shape
        images = 0.3 * torch.randn(B, 3, h, w, generator=g)
        return images, torch.rand(shape, generator=g) ** 0.3, torch.rand(shape, generator=g) ** 0.3 * 1.1

    side = (torch.arange(12) < 5).float().expand(1, 4, 12)
    halves = side[:, None].expand(1, 3, 4, 12), side, torch.ones(1, 4, 12)
    images, start, boxes = scene(2, 12, 40, seed + 1)
    boxes[0] = 0
    boxes[1, 3:9, 7:33] = 1
    images[1, 0, 5, 9], images[1, 2, 6, 20], images[1, :, 7, 30] = math.nan, math.inf, -math.inf
    start[1, 4, 10], start[1, 5, 12], start[1, 6, 14], start[1, 7, 16] = math.nan, math.inf, -1, 7
    boxes[1, 4, 11], boxes[1, 5, 13], boxes[1, 6, 15], boxes[1, 7, 17] = math.nan, -1, -0.0, math.inf
    holes = images, start, boxes
    return [
        sample("two crops", scene(2, 19, 34, seed), iterations=12),
        sample("noise, other settings", uniform(3, 9, 17), iterations=20, scale=0.4, low=0.05, high=0.8),
        sample("no iterations", uniform(2, 6, 33), iterations=0),
        sample("one iteration, wide colours", uniform(1, 5, 70), iterations=1, scale=5.0),
        sample("until nothing changes", halves, iterations=2**40),
        sample("limits far out", uniform(1, 7, 9), iterations=5, low=1e-6, high=1 - 1e-6),
        sample("limits of ½", uniform(1, 7, 9), iterations=5, low=0.5, high=0.5),
        sample("no numbers, empty box", holes, iterations=7),
        sample("a row", uniform(2, 1, 65), iterations=6),
        sample("a column", uniform(2, 40, 1), iterations=6),
        sample("one pixel", uniform(3, 1, 1), iterations=3),
        sample("no crops", uniform(0, 4, 5)),
        sample("no rows", uniform(2, 0, 5)),
        sample("no columns", uniform(2, 4, 0)),
    ]


def products(
    images: Tensor, start: Tensor, boxes: Tensor, *, iterations: int = 100, scale: float = 0.1, low: float = 0.1,
    high: float = 0.9,
) -> Tensor:  # fmt: skip
    """The state x (B, h, w) at the end, in float64 and by the formula's own products, neighbour by neighbour."""
    I, q, t = (x.detach().cpu().double().numpy() for x in (images, start, boxes))
    h, w = I.shape[2:]
    t = np.where(t >= np.finfo(np.float32).tiny, np.minimum(t, 1e300), 0.0)
    with np.errstate(invalid="ignore"):
        first = np.where(t > 0, q * t, 0.0)
    x = np.clip(np.where(np.isnan(first), low, first), low, high)
    for _ in range(iterations):
        before, inside, outside = x, x.copy(), 1 - x
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if dy == dx == 0:
                    continue
                here = np.s_[:, max(-dy, 0) : h - max(dy, 0), max(-dx, 0) : w - max(dx, 0)]
                there = np.s_[:, max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
                with np.errstate(invalid="ignore", over="ignore"):
                    far = ((I[(here[0], slice(None), *here[1:])] - I[(there[0], slice(None), *there[1:])]) ** 2).sum(1)
                    weight = np.nan_to_num(np.exp(-far / (2 * scale**2)), nan=0.0)
                inside[here] *= x[there] ** weight
                outside[here] *= (1 - x[there]) ** weight
        foreground = t * inside
        x = np.clip(foreground / (foreground + outside + 1e-6), low, high)
        if np.array_equal(x, before):
            break
    return torch.from_numpy(x)


def oracle(*inputs: Tensor, **options: Any) -> BitMasks:
    return pack_masks(products(*inputs, **options) > 0.5)


def same_but_near(actual: BitMasks, expected: BitMasks, sample: Sample) -> None:
    """Checks that labels agree with those of float64, except where its state is within rounding of ½."""
    assert actual.size == expected.size and actual.shape == expected.shape
    known = (products(*sample.args, **sample.kwargs) - 0.5).abs() > NEAR
    ours, theirs = (m.to_dense().cpu() for m in (actual, expected))
    assert torch.equal(ours[known], theirs[known]), f"{int((ours != theirs)[known].sum())} labels differ"


_images, _map = torch.zeros(2, 3, 4, 5), torch.ones(2, 4, 5)
_bad = refusals(mean_field)

SPECS = [
    OpSpec(
        mean_field, _samples, ("mean_field",), oracle=oracle, compare=same_but_near,
        errors=(
            _bad("a list", r"images must be a tensor, got list", [1.0], _map, _map, error=TypeError),
            _bad("integers", r"images must have dtype float32, .*, got int64", _images.long(), _map, _map, error=TypeError),
            _bad("one crop", r"images must have shape \(B, 3, h, w\), got \(3, 4, 5\); one crop", _images[0], _map, _map),
            _bad("gray", r"images must have shape \(B, 3, h, w\), got \(2, 1, 4, 5\)", _images[:, :1], _map, _map),
            _bad("a large start", r"start must have shape \(B, h, w\) = \(2, 4, 5\), got \(2, 8, 10\); resize", _images,
                torch.zeros(2, 8, 10), _map),
            _bad("bool boxes", r"boxes must have dtype float32, .*, got bool", _images, _map, _map > 0, error=TypeError),
            _bad("fewer boxes", r"boxes must have shape \(B, h, w\) = \(2, 4, 5\), got \(1, 4, 5\)", _images, _map, _map[:1]),
            _bad("a huge crop", r"images must have fewer than 268435456 pixels, got 268435456; resize the crops",
                _images[:, :, :1, :1].expand(2, 3, 2**14, 2**14), *[_map[:, :1, :1].expand(2, 2**14, 2**14)] * 2),
            _bad("half an iteration", r"iterations must be a whole number of at least 0, got 0.5", _images, _map, _map,
                iterations=0.5, error=TypeError),
            _bad("iterations beyond 64 bits", r"iterations must be at most 9223372036854775807, got 1180591620717411303424", _images,
                _map, _map, iterations=2**70),
            _bad("negative iterations", r"iterations must be a whole number of at least 0, got -1", _images, _map, _map, iterations=-1),
            _bad("scale 0", r"scale must be a number between 1e-06 and 1000000, got 0", _images, _map, _map, scale=0),
            _bad("low above", r"low must be a number between 1e-06 and 0.5, got 0.6", _images, _map, _map, low=0.6),
            _bad("high of 1", r"high must be a number between 0.5 and 0.999999, got 1.0", _images, _map, _map, high=1.0),
            _bad("devices differ", r"boxes must be on the device of images \(cpu\), got meta", _images, _map, _map.to("meta")),
        ),
    ),
]  # fmt: skip


# -- benchmarks: the crops of Mask Auto-Labeler, 4 a GPU


def _crops(B: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", tuple(x.to(device, dtype) for x in scene(B, 128, 128, seed)))

    return make


def _unfolded(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, 9, h, w): each pixel's neighbourhood; 0 outside."""
    B, C, h, w = x.shape
    return F.unfold(x, 3, padding=1).view(B, C, 9, h, w)


def unfolding(images: Tensor, start: Tensor, boxes: Tensor) -> Tensor:
    """The state at the end, as released code computes it: it unfolds the state, both labels of it, in every iteration."""
    near = _unfolded(images)
    weight = ((near - images[:, :, None]) ** 2).sum(1).div(-2 * 0.1**2).exp()
    weight = (weight * _unfolded(torch.ones_like(images[:, :1]))[:, 0])[:, None]
    x = (start * boxes).clamp(0.1, 0.9)
    for _ in range(100):
        both = torch.stack((x, 1 - x), 1).log()
        inside, outside = (weight * _unfolded(both)).sum(2).exp().unbind(1)
        inside = inside * boxes
        x = (inside / (inside + outside + 1e-6)).clamp(0.1, 0.9)
    return x


def _eager(images: Tensor, start: Tensor, boxes: Tensor) -> BitMasks:
    return pack_masks(unfolding(images, start, boxes), 0.5)


def _agree(actual: BitMasks, expected: BitMasks, sample: Sample) -> None:
    """Sums of another order decide pixels near ½ differently."""
    off = int((actual.to_dense() != expected.to_dense()).sum())
    assert off <= actual.pixels * len(actual) / 4096, f"{off} labels differ"


BENCHES = [
    Bench(
        mean_field, f"{B} x 128x128, 100 iterations", _crops(B), _eager, agree=_agree, device=device,
        flops=B * 128 * 128 * 100 * 110, bytes=B * 128 * 128 * (20 + 1 / 8), goals=goals,
    )
    for B, device, goals in ((4, "cpu", {"forward": 80.0}), (4, "cuda", {}), (32, "cuda", {}))
]  # fmt: skip

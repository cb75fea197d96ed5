"""resize_masks, with one map and with two, and the modes of BitMasks.resize."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.ops import pack_masks, resize_masks
from sprompt.ops.resize_masks import ResizedMasks
from sprompt.testing.spec import Bench, OpSpec, Sample, blobs, random, refusals

Make = Callable[[torch.device, torch.dtype, int], Sample]
#: Rounding error of the interpolation in float32, relative to the largest cell. Closer to the threshold, both bits are right.
NEAR = 1e-5


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    special = normal(2, 9, 40)
    special[:, 2, 3:9] = float("inf")
    special[:, 6, 30] = -float("inf")
    special[1, 4, 11:13] = float("nan")
    smooth = (8 * blobs(5, 20, 34, seed) - 4).to(device, dtype)
    return [
        Sample("blobs x 4", (smooth, (80, 136))),
        Sample("odd sizes", (normal(2, 3, 7, 11), (23, 37))),
        Sample("the padding cut off", (smooth, (75, 133)), {"crop": (18.75, 33.25)}),
        Sample("one cell of many", (normal(2, 6, 6), (5, 40)), {"crop": (0.3, 0.7)}),
        Sample("smaller", (normal(3, 50, 70), (13, 17))),
        Sample("much smaller", (normal(2, 40, 300), (3, 5)), {"threshold": 0.1}),
        Sample("wider and flatter", (normal(2, 30, 9), (7, 130))),
        Sample("the same size", (normal(2, 8, 33), (8, 33))),
        Sample("a third, at cell centres", (normal(2, 12, 30), (4, 10))),
        Sample("probabilities", (smooth.float().sigmoid().to(dtype), (41, 70)), {"threshold": 0.5}),
        Sample("infinities and NaN", (special, (36, 161))),
        Sample("infinities and NaN, the same size", (special, (9, 40))),
        Sample("threshold inf", (special, (18, 80)), {"threshold": float("inf")}),
        Sample("threshold of the size of the held cells", (special, (18, 80)), {"threshold": 3e38}),
        Sample("one cell", (normal(4, 1, 1), (3, 5))),
        Sample("one pixel", (normal(4, 5, 6), (1, 1))),
        Sample("no batch", (normal(5, 6), (10, 11))),
        Sample("no masks", (normal(0, 5, 6), (10, 11))),
        Sample("no pixels", (normal(2, 5, 6), (0, 11))),
        Sample("empty map, no pixels", (normal(2, 0, 6), (0, 0))),
    ]  # fmt: skip


def interpolated(soft: Tensor, size: tuple[int, int], crop: tuple[float, float] | None) -> Tensor:
    """The interpolated map (M, H, W) in float64. Without a crop by torch's own interpolation, with a crop by a product with the
    weights of both axes."""
    masks = soft.shape[:-2].numel()
    cells = soft.detach().double().reshape(masks, *soft.shape[-2:])
    if masks == 0 or 0 in size:
        return cells.new_zeros(masks, *size)
    if crop is None:
        return F.interpolate(cells[None], size, mode="bilinear", align_corners=False)[0]
    sides = []
    for cells_of_axis, pixels, extent in zip(cells.shape[1:], size, crop, strict=True):
        x, k = (torch.arange(n, dtype=torch.float64, device=cells.device) for n in (pixels, cells_of_axis))
        place = ((x + 0.5) * extent / pixels - 0.5).clamp(0, cells_of_axis - 1)
        sides.append((1 - (place[:, None] - k).abs()).clamp(min=0))
    return sides[0] @ cells @ sides[1].T


def same_but_near(actual: BitMasks, expected: BitMasks, sample: Sample) -> None:
    """Checks that bits agree with the float64 interpolation, except where it is within rounding of the threshold (or not
    finite)."""
    bound = sample.bound(resize_masks)
    soft, size, threshold = bound["soft"], tuple(bound["size"]), bound.get("threshold", 0.0)
    assert actual.size == size and actual.shape == soft.shape[:-2]
    finite = soft.detach().double().cpu()
    pixels = interpolated(finite, size, bound.get("crop"))
    ours, theirs = (m.to_dense().cpu().reshape(pixels.shape) for m in (actual, expected))
    largest = float(finite[finite.isfinite()].abs().max()) if finite.isfinite().any() else 0.0
    known = pixels.isfinite() & ((pixels - threshold).abs() > NEAR * max(largest, 1.0))
    assert torch.equal(ours[known], (pixels > threshold)[known])
    assert torch.equal(ours[known], theirs[known])


# -- via and sums


def resize_masks_general(
    soft: Tensor, size: Size, *, threshold: float = 0.0, crop: Any = None, via: Size | None = None, sums: bool = False
) -> BitMasks | ResizedMasks:
    """resize_masks with `via` or `sums`, which are another op."""
    if sums:
        return resize_masks(soft, size, threshold=threshold, crop=crop, via=via, sums=True)
    return resize_masks(soft, size, threshold=threshold, crop=crop, via=via)


def _general_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    special = normal(2, 9, 40)
    special[:, 2, 3:9] = float("inf")
    special[:, 6, 30] = -float("inf")
    special[1, 4, 11:13] = float("nan")
    smooth = (8 * blobs(4, 20, 34, seed) - 4).to(device, dtype)
    return [
        Sample("to the padded input, cut, to a smaller picture", (smooth, (41, 67)), {"via": (80, 136), "crop": (77, 133), "sums": True}),
        Sample("the picture has the size of the input", (smooth, (77, 133)), {"via": (80, 136), "crop": (77, 133), "sums": True}),
        Sample("to a larger picture, no sums", (normal(2, 3, 7, 11), (23, 37)), {"via": (14, 22)}),
        Sample("sums of one map", (smooth, (75, 133)), {"sums": True, "crop": (18.75, 33.25)}),
        Sample("a threshold of the probability 0.1", (smooth, (39, 70)), {"via": (60, 102), "threshold": -2.1972, "sums": True}),
        Sample("via smaller than the map: four cells", (normal(2, 30, 50), (40, 60)), {"via": (7, 13), "sums": True}),
        Sample("via of odd sizes, narrow", (normal(2, 30, 9), (41, 5)), {"via": (17, 31), "crop": (11, 30), "sums": True}),
        Sample("via of the map's size", (normal(2, 8, 33), (13, 40)), {"via": (8, 33), "crop": (5, 20)}),
        Sample("a third and back", (normal(2, 12, 30), (12, 30)), {"via": (4, 10), "sums": True}),
        Sample("infinities and NaN", (special, (36, 161)), {"via": (18, 80), "sums": True}),
        Sample("infinities and NaN, cut", (special, (9, 40)), {"via": (18, 70), "crop": (18, 61)}),
        Sample("one cell", (normal(4, 1, 1), (3, 5)), {"via": (2, 2), "sums": True}),
        Sample("one pixel, one via cell", (normal(4, 5, 6), (1, 1)), {"via": (9, 9), "crop": (1, 1), "sums": True}),
        Sample("no batch", (normal(5, 6), (10, 11)), {"via": (7, 7), "sums": True}),
        Sample("no masks", (normal(0, 5, 6), (10, 11)), {"via": (7, 7), "sums": True}),
        Sample("no pixels", (normal(2, 5, 6), (0, 11)), {"sums": True}),
        Sample("empty map, no pixels", (normal(2, 0, 6), (0, 0)), {"via": (3, 3), "sums": True}),
    ]  # fmt: skip


def two_maps(soft: Tensor, size: Size, via: Size, crop: Size | None) -> Tensor:
    """(M, H, W) float64: torch's own interpolation, twice, with a cut between."""
    cells = soft.detach().double().reshape(1, -1, *soft.shape[-2:])
    rows, columns = crop or via
    padded = F.interpolate(cells, via, mode="bilinear", align_corners=False)[..., :rows, :columns]
    return F.interpolate(padded, size, mode="bilinear", align_corners=False)[0]


def same_bits_and_sums(actual: BitMasks | ResizedMasks, expected: BitMasks | ResizedMasks, sample: Sample) -> None:
    """Checks bits where the float64 interpolation is finite and not within rounding of the threshold, and sums and areas of
    finite maps up to the pixels within rounding."""
    bound = sample.bound(resize_masks)
    soft, size, threshold = bound["soft"].detach().cpu(), tuple(bound["size"]), bound.get("threshold", 0.0)
    masks, wanted = (m.masks if isinstance(m, ResizedMasks) else m for m in (actual, expected))
    assert masks.size == size and masks.shape == soft.shape[:-2]
    if masks.words.numel() == 0:
        pixels = torch.zeros(soft.shape[:-2].numel(), *size, dtype=torch.float64)
    elif bound.get("via") is None:
        pixels = interpolated(soft, size, bound.get("crop"))
    else:
        pixels = two_maps(soft, size, bound["via"], bound.get("crop"))
    ours, theirs = (m.to_dense().cpu().reshape(pixels.shape) for m in (masks, wanted))
    finite = soft.double()[soft.isfinite()]
    largest = max(float(finite.abs().max()) if len(finite) else 0.0, 1.0)
    near = (pixels - threshold).abs() <= NEAR * largest
    known = pixels.isfinite() & ~near
    assert torch.equal(ours[known], (pixels > threshold)[known])
    assert torch.equal(ours[known], theirs[known])
    if not isinstance(actual, ResizedMasks):
        return
    assert actual.sums.dtype == torch.float32 and actual.areas.dtype == torch.int64
    assert actual.sums.shape == actual.areas.shape == soft.shape[:-2]
    assert torch.equal(actual.areas.cpu(), masks.area().cpu())
    whole = pixels.flatten(1).isfinite().all(1)
    exact = torch.where(ours, pixels, -float("inf")).sigmoid().flatten(1).sum(1)
    off = (actual.sums.cpu().double().flatten() - exact).abs()
    assert bool((off <= (2.0**-16 + 1e-6 * largest) * exact)[whole].all()), f"sums off by {off[whole].max():.3g}"


_soft = torch.zeros(2, 4, 6)


_bad = refusals(resize_masks)


# -- BitMasks.resize


def resize_bits(masks: BitMasks, size: Size, threshold: float = 0.5) -> BitMasks:
    """The method as a function, because torch.export takes no argument with the name self."""
    return masks.resize(size, threshold=threshold)


def cover_bits(masks: BitMasks, size: Size, mode: str) -> BitMasks:
    """The modes "nearest" and "any" of the method, which are another op."""
    return masks.resize(size, mode)


def _bits_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def noise(*shape: int) -> BitMasks:
        return pack_masks((torch.rand(shape, generator=g) < 0.5).to(device))

    smooth = pack_masks(blobs(5, 20, 34, seed, device))
    few = torch.zeros(4, 20, 70, dtype=torch.bool, device=device)  # uniform words, and words next to a single pixel
    few[1], few[2, 9, 31], few[3, 19, 69] = True, True, True
    return [
        Sample("blobs x 4", (smooth, (80, 136))),
        Sample("blobs to an odd size", (smooth, (75, 133))),
        Sample("odd sizes, two leading dimensions", (noise(2, 3, 7, 11), (23, 37))),
        Sample("smaller", (noise(3, 50, 70), (13, 17))),
        Sample("much smaller", (noise(2, 40, 300), (3, 5))),
        Sample("a third, at pixel centres", (noise(2, 12, 30), (4, 10))),
        Sample("a half, ties", (noise(3, 16, 128), (8, 64))),
        Sample("wider and flatter", (noise(2, 30, 9), (7, 130))),
        Sample("the same size", (noise(2, 8, 33), (8, 33))),
        *(Sample(f"{w} to {W} columns", (noise(3, 5, w), (7, W))) for w, W in ((31, 64), (32, 96), (33, 63), (64, 32), (65, 31), (96, 33))),
        Sample("nothing, everything, one pixel", (pack_masks(few), (41, 160))),
        Sample("everything but one pixel", (pack_masks(~few), (23, 64))),
        Sample("many masks of a word", (noise(70, 3, 3), (5, 6))),
        Sample("threshold 0", (noise(3, 9, 40), (25, 70)), {"threshold": 0.0}),
        Sample("threshold 0.9, one pixel", (pack_masks(few), (41, 160)), {"threshold": 0.9}),
        Sample("one pixel, to many", (noise(4, 1, 1), (3, 37))),
        Sample("to one pixel", (noise(4, 5, 6), (1, 1))),
        Sample("no batch", (noise(5, 6), (10, 11))),
        Sample("no masks", (noise(0, 5, 6), (10, 11))),
        Sample("no pixels", (noise(2, 5, 6), (0, 11))),
        Sample("of no pixels", (noise(2, 0, 6), (0, 0))),
    ]  # fmt: skip


def _interpolated_bits(masks: BitMasks, size: tuple[int, int]) -> Tensor:
    return interpolated(masks.to_dense(torch.float64), size, None).reshape(*masks.shape, *size)


def bits_oracle(masks: BitMasks, size: Size, threshold: float = 0.5) -> BitMasks:
    return pack_masks(_interpolated_bits(masks, size) > threshold)


def _cover_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The samples of resize_bits, in both modes in turn, and sizes around those of a word and of two."""
    samples = [s for s in _bits_samples(device, dtype, seed) if not s.kwargs]
    modes = ("any", "nearest")
    both = [Sample(f"{s.name}, {modes[i % 2]}", s.args, {"mode": modes[i % 2]}) for i, s in enumerate(samples)]
    noise = pack_masks((torch.rand(2, 9, 300, generator=random(seed)) < 0.02).to(device))
    return both + [
        Sample(f"few pixels, to {h}x{w}, {mode}", (noise, (h, w)), {"mode": mode})
        for h, w in ((4, 150), (9, 70), (2, 7), (20, 333))
        for mode in modes
    ]


def cover_oracle(masks: BitMasks, size: Size, mode: str) -> BitMasks:
    """By torch's own functions on dense masks."""
    if masks.words.numel() == 0 or 0 in size:
        return pack_masks(torch.zeros(*masks.shape, *size, device=masks.device))
    dense = masks.to_dense(torch.float32).reshape(1, -1, *masks.size)
    resized = F.interpolate(dense, size, mode="nearest") if mode == "nearest" else F.adaptive_avg_pool2d(dense, size)
    return pack_masks((resized[0] > 0).reshape(*masks.shape, *size))


def same_bits_but_near(actual: BitMasks, expected: BitMasks, sample: Sample) -> None:
    """Checks that masks are equal, except where the float64 interpolation is within rounding of 1/2."""
    assert actual.size == expected.size and actual.shape == expected.shape
    off = actual.to_dense() != expected.to_dense()
    threshold = sample.kwargs.get("threshold", 0.5)
    assert bool(((_interpolated_bits(*sample.args)[off] - threshold).abs() <= NEAR).all()), (
        f"{int(off.sum())} pixels differ"
    )


_bits, _no_bits = (BitMasks(torch.zeros(2, n, dtype=torch.int32), size) for n, size in ((1, (4, 6)), (0, (0, 6))))
_bad_bits = refusals(BitMasks.resize)
_via = {"via": (8, 12)}

SPECS = [
    OpSpec(
        resize_masks, _samples, ("resize_masks",), compare=same_but_near,
        errors=(
            _bad("a list", "soft must be a tensor, got list", [1.0], (2, 2), error=TypeError),
            _bad("bool", "soft must have dtype .*, got bool; use BitMasks.resize for bit masks", _soft > 0, (2, 2), error=TypeError),
            _bad("one row", r"soft must have shape \(..., h, w\), got \(6,\)", _soft[0, 0], (2, 2)),
            _bad("size a number", r"size must be \(H, W\), got 8", _soft, 8, error=TypeError),
            _bad("size of floats", "size must be two whole numbers, at least 0, got 8.0", _soft, (8.0, 8), error=TypeError),
            _bad("size negative", "size must be two whole numbers, at least 0, got -1", _soft, (8, -1)),
            _bad("2^31 pixels", "size must have at most 2147483647 pixels, got 65536x32768", _soft, (2**16, 2**15)),
            _bad("empty map", r"size must be empty for an empty map of 0x6, got \(2, 2\)", _soft[:, :0], (2, 2)),
            _bad("threshold NaN", "threshold must be a number, got nan", _soft, (2, 2), threshold=float("nan")),
            _bad("crop a number", r"crop must be \(ch, cw\) or None, got 2.0", _soft, (2, 2), crop=2.0, error=TypeError),
            _bad("crop of 0", r"crop must lie in \(0, 4\], the map's h, got 0.0", _soft, (2, 2), crop=(0.0, 2.0)),
            _bad("crop in pixels", r"crop must lie in \(0, 6\], the map's w, got 24; crop counts cells", _soft, (2, 2), crop=(4, 24)),
            _bad("crop NaN", r"crop must lie in \(0, 6\], the map's w, got nan", _soft, (2, 2), crop=(4, float("nan"))),
            _bad("crop of text", r"crop must lie in \(0, 4\], the map's h, got '4'", _soft, (2, 2), crop=("4", 2), error=TypeError),
        ),
    ),
    OpSpec(
        resize_masks_general, _general_samples, ("resize_masks_general",), compare=same_bits_and_sums,
        errors=(
            _bad("via a number", r"via must be \(h, w\) or None, got 8", _soft, (2, 2), via=8, error=TypeError),
            _bad("via of floats", "via must be two whole numbers, at least 1, got 8.0", _soft, (2, 2), via=(8.0, 8), error=TypeError),
            _bad("via of 0", "via must be two whole numbers, at least 1, got 0", _soft, (2, 2), via=(8, 0)),
            _bad("via of 2^31", "via must be at most 2147483647 on each side, got 2147483648", _soft, (2, 2), via=(8, 2**31)),
            _bad("crop a number", r"crop must be \(ch, cw\) or None, got 2", _soft, (2, 2), crop=2, error=TypeError, **_via),
            _bad("crop of 0", "crop must be a whole number from 1 to 8, the h of via, got 0", _soft, (2, 2), crop=(0, 2), **_via),
            _bad(
                "crop beyond via", "crop must be a whole number from 1 to 12, the w of via, got 13; with via, crop counts cells of via",
                _soft, (2, 2), crop=(4, 13), **_via,
            ),
            _bad(
                "crop of fractions", "crop must be a whole number from 1 to 8, the h of via, got 4.5", _soft, (2, 2), crop=(4.5, 2),
                error=TypeError, **_via,
            ),
            _bad("size a number", r"size must be \(H, W\), got 8", _soft, 8, error=TypeError, sums=True),
        ),
    ),
    OpSpec(
        resize_bits, _bits_samples, ("resize_bits",), dtypes=(), oracle=bits_oracle, compare=same_bits_but_near,
        errors=(
            _bad_bits("size a number", r"size must be \(H, W\), got 8", _bits, 8, error=TypeError),
            _bad_bits("size of floats", "size must be two whole numbers, at least 0, got 8.0", _bits, (8.0, 8), error=TypeError),
            _bad_bits("size negative", "size must be two whole numbers, at least 0, got -1", _bits, (8, -1)),
            _bad_bits("2^31 pixels", "size must have at most 2147483647 pixels, got 65536x32768", _bits, (2**16, 2**15)),
            _bad_bits("no pixels", r"size must be empty for an empty map of 0x6, got \(2, 2\)", _no_bits, (2, 2)),
            _bad_bits("threshold 1", r"threshold must lie in \[0, 1\), got 1.0; no interpolation", _bits, (2, 2), threshold=1.0),
            _bad_bits("threshold negative", r"threshold must lie in \[0, 1\), got -0.5", _bits, (2, 2), threshold=-0.5),
            _bad_bits("threshold of text", r"threshold must lie in \[0, 1\), got '1'", _bits, (2, 2), threshold="1", error=TypeError),
        ),
    ),
    OpSpec(
        cover_bits, _cover_samples, ("cover_bits",), dtypes=(), oracle=cover_oracle,
        errors=(
            _bad_bits("unknown mode", "mode must be one of 'bilinear', 'nearest', 'any', got 'cubic'", _bits, (2, 2), "cubic"),
            _bad_bits("no pixels", r"size must be empty for an empty map of 0x6, got \(2, 2\)", _no_bits, (2, 2), "any"),
        ),
    ),
]  # fmt: skip


# -- benchmarks


def _logits(
    count: int, height: int, width: int, size: tuple[int, int], crop: tuple[float, float] | None = None
) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        soft = (8 * blobs(count, height, width, seed) - 4).to(device, dtype)
        return Sample("", (soft, size), {} if crop is None else {"crop": crop})

    return make


def _random(count: int, height: int, width: int, size: tuple[int, int]) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", (torch.randn(count, height, width, generator=random(seed)).to(device, dtype), size))

    return make


def _eager(
    soft: Tensor, size: tuple[int, int], *, threshold: float = 0.0, crop: tuple[float, float] | None = None
) -> Tensor:
    """Typical inference code. With a crop it resizes to the padded size, then cuts the image out."""
    height, width = size
    if crop is not None:
        size = (round(height * soft.shape[-2] / crop[0]), round(width * soft.shape[-1] / crop[1]))
    pixels = F.interpolate(soft[None], size, mode="bilinear", align_corners=False)[0]
    return pixels[:, :height, :width] > threshold


def _agree(actual: BitMasks, expected: Tensor, sample: Sample) -> None:
    """Checks that masks differ from eager only close to the threshold. torch rounds coordinates to float32, and half results to
    half."""
    soft, size = sample.args
    near = (1e-4 if soft.dtype == torch.float32 else 2.0**-6) * float(soft.abs().max())
    for m in range(0, len(soft), max(1, len(soft) // 100)):  # about a hundred of a GPU's batch
        off = actual[m].to_dense() != expected[m]
        pixels = interpolated(soft[m : m + 1], size, sample.kwargs.get("crop"))[0]
        assert pixels[off].abs().sum() <= near * int(off.sum())
        assert int(off.sum()) <= 1e-3 * off.numel(), f"{int(off.sum())} of {off.numel()} pixels of mask {m} differ"


def _inference(count: int, size: Size) -> Make:
    """The logits of Mask2Former for a picture of 800x1333, padded to 800x1344, at the picture's own size."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        soft = (8 * blobs(count, 200, 336, seed) - 4).to(device, dtype)
        return Sample("", (soft, size), {"via": (800, 1344), "crop": (800, 1333), "sums": True})

    return make


def _eager_inference(soft: Tensor, size: Size, *, via: Size, crop: Size, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the released code does it, for all masks at once."""
    padded = F.interpolate(soft[None], via, mode="bilinear", align_corners=False)[..., : crop[0], : crop[1]]
    pixels = F.interpolate(padded, size, mode="bilinear", align_corners=False)[0]
    masks = pixels > 0
    return masks, (pixels.sigmoid() * masks).flatten(1).sum(1), masks.flatten(1).sum(1)


def _agree_inference(actual: ResizedMasks, expected: tuple[Tensor, Tensor, Tensor], sample: Sample) -> None:
    """Checks that masks differ from eager only close to the threshold, and that sums and areas differ by these pixels only."""
    masks, sums, areas = expected
    soft, size = sample.args
    near = (1e-4 if soft.dtype == torch.float32 else 2.0**-6) * float(soft.abs().max())
    for m in range(0, len(soft), max(1, len(soft) // 100)):
        off = actual.masks[m].to_dense() != masks[m]
        pixels = two_maps(soft[m], size, sample.kwargs["via"], sample.kwargs["crop"])[0]
        assert pixels[off].abs().sum() <= near * int(off.sum())
        assert int(off.sum()) <= 1e-3 * off.numel(), f"{int(off.sum())} of {off.numel()} pixels of mask {m} differ"
        assert abs(int(actual.areas[m] - areas[m])) <= int(off.sum())
        slack = int(off.sum()) + (1e-4 if soft.dtype == torch.float32 else 0.02) * float(actual.sums[m])
        assert abs(float(actual.sums[m]) - float(sums[m])) <= slack


def _bytes(count: int, source: int, target: int) -> float:
    return count * (4.0 * source + target / 8)


BENCHES = [
    Bench(
        resize_masks, "100 x (200x336 -> 800x1333)", _logits(100, 200, 336, (800, 1333)), _eager, agree=_agree,
        dtypes=(torch.float32, torch.bfloat16), bytes=_bytes(100, 67200, 1066400), goals={"forward": 8, "memory": 20},
    ),
    Bench(
        resize_masks, "100 x (200x336 -> 800x1333), random", _random(100, 200, 336, (800, 1333)), _eager, agree=_agree,
        bytes=_bytes(100, 67200, 1066400), goals={"forward": 8, "memory": 20},
    ),
    Bench(
        resize_masks, "50 x (800x1333 -> 200x336)", _logits(50, 800, 1333, (200, 336)), _eager, agree=_agree,
        bytes=_bytes(50, 1066400 // 2, 67200),  # two of every four rows are read
    ),
    *(
        Bench(
            resize_masks, f"100 x (200x336 -> 800x1344 -> {h}x{w}), sums", _inference(100, (h, w)), _eager_inference,
            agree=_agree_inference, bytes=_bytes(100, 67200, h * w), goals={"forward": 10, "memory": 20},
        )
        for h, w in ((480, 640), (800, 1333))
    ),
    Bench(
        resize_masks, "12 x 100 x (200x336 -> 800x1344 -> 480x640), sums", _inference(1200, (480, 640)), _eager_inference,
        agree=_agree_inference, dtypes=(torch.float32, torch.bfloat16), bytes=_bytes(1200, 67200, 307200),
        flops=24.0 * 1200 * 307200, device="cuda",  # 3 x 3 products and sums, then three a pixel
    ),
    Bench(
        resize_masks, "12 x 100 x (200x336 -> 800x1333), cropped", _logits(1200, 200, 336, (800, 1333), (200.0, 333.25)), _eager,
        agree=_agree, dtypes=(torch.float32, torch.bfloat16), bytes=_bytes(1200, 67200, 1066400),
        flops=9.0 * 1200 * 1066400, device="cuda",  # three blends a pixel
    ),
    Bench(
        resize_masks, "12 x 100 x (200x336 -> 800x1333), random", _random(1200, 200, 336, (800, 1333)), _eager,
        agree=_agree, dtypes=(torch.float32, torch.bfloat16), bytes=_bytes(1200, 67200, 1066400),
        flops=9.0 * 1200 * 1066400, device="cuda",  # three blends a pixel
    ),
    Bench(
        resize_masks, "120 x (800x1333 -> 200x336)", _logits(120, 800, 1333, (200, 336)), _eager, agree=_agree,
        dtypes=(torch.float32, torch.bfloat16), bytes=_bytes(120, 1066400 // 2, 67200), device="cuda",
    ),
]  # fmt: skip

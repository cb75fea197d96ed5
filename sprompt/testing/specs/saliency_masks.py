"""saliency_masks, saliency_maps."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import SaliencyMasks, saliency_maps, saliency_masks
from sprompt.testing.compare import assert_close
from sprompt.testing.spec import HALVES, Bench, OpSpec, Sample, blobs, random, refusals

#: Sizes with every remainder modulo 4 on both sides, and sides below 4.
SIZES = ((1, 1), (1, 9), (5, 2), (4, 8), (7, 6))


def whole_numbers(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Features of small whole numbers: every product and pooled seed is exact, in all dtypes."""
    return torch.randint(-3, 4, shape, generator=random(seed)).to(device, dtype)


def scene(batch: int, depth: int, height: int, width: int, seed: int, noise: float = 0.5) -> Tensor:
    """Features like those of a backbone after its ReLU: a dozen regions with one direction each, and noise."""
    g = random(seed)
    images = []
    for b in range(batch):
        regions = blobs(12, height, width, seed + 7919 * b)
        directions = torch.randn(12, depth, generator=g).relu()
        images.append(torch.einsum("kd,khw->dhw", directions, regions))
    mixed = torch.stack(images)
    return (mixed + noise * torch.randn(mixed.shape, generator=g)).relu()


def corner(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Valid cells of padded images: a different top left part of each image, and the whole first image."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return torch.stack([(y < height - b) & (x < width - 2 * b) for b in range(batch)]).to(device)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = [
        Sample(f"exact, {h}x{w}", (whole_numbers((2, 5, h, w), seed + h, device, dtype),), {"similarity": "dot"})
        for h, w in SIZES
    ]
    ints = whole_numbers((2, 6, 5, 9), seed, device, dtype)
    soft = scene(2, 16, 6, 8, seed).to(device, dtype)
    spoiled = ints.clone()
    spoiled[0, 1, 3, 3] = float("nan")
    spoiled[1, 0, 0, 7] = float("inf")
    holes = torch.rand((2, 6, 8), generator=random(seed)).to(device) < 0.8
    padding = corner(2, 5, 9, device)
    none = padding.clone()
    none[1] = False
    dead = soft.clone()
    dead[:, :, 2, 2:5] = 0
    dot: dict[str, Any] = {"similarity": "dot"}
    return [
        Sample("scene, soft", (soft,), {"return_soft": True, "max_masks": 7}),
        *samples,
        Sample("exact, greedy, soft", (ints,), {**dot, "nms": "greedy", "iou_threshold": 0.3, "return_soft": True}),
        Sample("exact, grid of 3x4", (soft.round(),), {**dot, "seeds": (3, 4), "threshold": 0.75, "sigma": 0.5}),
        Sample("grid finer than the map, soft", (soft[..., :2, :3],), {"seeds": (3, 4), "return_soft": True}),
        Sample("exact, padded; an image without valid cells", (ints,), {**dot, "valid": none, "return_soft": True}),
        Sample("padded, zero vectors", (dead[..., :5, :], ), {"valid": corner(2, 5, 8, device), "threshold": 0.6}),
        Sample("grid and holes", (soft,), {"seeds": (2, 3), "valid": holes, "return_soft": True, "nms": "greedy"}),
        Sample("exact, NaN and infinity", (spoiled,), {**dot, "return_soft": True}),
        Sample("exact, NaN outside", (spoiled,), {**dot, "valid": padding & spoiled.isfinite().all(1)}),
        Sample("exact, flat", (torch.ones_like(ints),), {}),
        Sample("exact, more masks than seeds", (ints[..., :2, :2],), {**dot, "max_masks": 9, "min_area": 1}),
        Sample("exact, no images", (ints[:0],), {"return_soft": True}),
        Sample("exact, no channels", (ints[:, :0],), {"return_soft": True}),
        Sample("exact, no rows", (ints[:, :, :0],), {"return_soft": True, "nms": "greedy"}),
        Sample("exact, no columns", (ints[..., :0],), {"return_soft": True}),
    ]  # fmt: skip


# ---- ground truth: the specification, step by step, in float64


def true_seeds(x: Tensor, valid: np.ndarray, seeds: Any) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Seeds (M, D) of x (D, H, W), NaN for seeds that are not valid, and their addresses."""
    height, width = valid.shape
    vectors, addresses = [], []
    if seeds != "pyramid":
        for row in range(seeds[0]):
            for column in range(seeds[1]):
                ys = slice(row * height // seeds[0], -(-(row + 1) * height // seeds[0]))
                xs = slice(column * width // seeds[1], -(-(column + 1) * width // seeds[1]))
                cells = x.numpy()[:, ys, xs][:, valid[ys, xs]]
                vectors.append(cells.mean(1) if cells.shape[1] else np.full(len(x), np.nan))
                addresses.append((0, row, column))
        return np.array(vectors).reshape(len(vectors), len(x)), addresses
    for scale in range(3):
        if height >> scale == 0 or width >> scale == 0 or len(x) == 0:
            continue
        s, side = 0.5**scale, 2**scale
        grid = F.interpolate(
            x[None], scale_factor=s, mode="bilinear", align_corners=False, recompute_scale_factor=False
        )[0]
        assert grid.shape[1:] == (height >> scale, width >> scale)
        for row, column in np.ndindex(*grid.shape[1:]):
            block = valid[row * side : (row + 1) * side, column * side : (column + 1) * side]
            vectors.append(grid[:, row, column].numpy() if block.all() else np.full(len(x), np.nan))
            addresses.append((scale, row, column))
    return np.array(vectors).reshape(len(vectors), len(x)), addresses


def true_maps(x: Tensor, valid: np.ndarray, seeds: np.ndarray, similarity: str) -> np.ndarray:
    """Norm(maps), (M, H, W). Zeros outside, and for maps that are flat or not finite."""
    pixels, inside = x.flatten(1).numpy(), valid.reshape(-1)
    maps = np.zeros((len(seeds), valid.size))
    for m, seed in enumerate(seeds):
        if not inside.any():
            continue
        with np.errstate(invalid="ignore"):  # NaN and infinity among them
            y = seed @ pixels[:, inside]
        if similarity == "cosine":
            y = y / (max(np.linalg.norm(seed), 1e-12) * np.maximum(np.linalg.norm(pixels[:, inside], axis=0), 1e-12))
        if np.isfinite(y).all() and y.max() - y.min() >= 1e-6:
            maps[m, inside] = (y - y.min()) / (y.max() - y.min())
    return maps.reshape(len(seeds), *valid.shape)


def true_order(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def true_nms(
    masks: np.ndarray, scores: np.ndarray, nms: str, iou_threshold: float, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Places and scores of the remaining masks of (M, P), best first."""
    order = true_order(scores)
    masks, scores = masks[order].astype(np.float64), scores[order]
    common = masks @ masks.T
    area = masks.sum(1)
    iou = common / np.maximum(area[:, None] + area[None] - common, 1)
    if nms == "greedy":
        kept: list[int] = []
        for j in range(len(masks)):
            if all(iou[i, j] <= iou_threshold for i in kept):
                kept.append(j)
        return order[kept], scores[kept]
    upper = np.triu(iou, 1)
    most = upper.max(0, initial=0.0)
    ratio = np.exp(-sigma * upper**2) / np.exp(-sigma * most**2)[:, None]
    ratio[np.tril_indices(len(masks))] = 1
    decayed = scores * ratio.min(0, initial=1.0)
    again = true_order(decayed)
    return order[again], decayed[again]


def _oracle(
    features: Tensor, *, seeds: Any = "pyramid", similarity: str = "cosine", threshold: float = 0.5, min_area: int = 2,
    nms: str = "matrix", iou_threshold: float = 0.5, sigma: float = 2.0, max_masks: int = 20, valid: Tensor | None = None,
    return_soft: bool = False,
) -> SaliencyMasks:  # fmt: skip
    batch, _, height, width = features.shape
    device = features.device
    masks = np.zeros((batch, max_masks, height, width), dtype=bool)
    soft, scores = np.zeros(masks.shape), np.zeros((batch, max_masks))
    places, boxes = np.full((batch, max_masks, 3), -1), np.zeros((batch, max_masks, 4), dtype=np.int64)
    counts = np.zeros(batch, dtype=np.int64)
    for b in range(batch):
        inside = np.ones((height, width), dtype=bool) if valid is None else valid[b].cpu().numpy()
        x = features[b].cpu().double()
        vectors, addresses = true_seeds(x, inside, seeds)
        maps = true_maps(x, inside, vectors, similarity)
        bits = maps >= np.float32(threshold)
        kept = [m for m in range(len(maps)) if bits[m].sum() >= min_area]
        # The exact mean of the map rounded to float32, because the op defines equal scores so.
        score = np.array(
            [np.float32(math.fsum(maps[m][bits[m]].astype(np.float32)) / bits[m].sum()) for m in kept], dtype=np.float64
        )
        places_left, values = true_nms(bits[kept].reshape(len(kept), height * width), score, nms, iou_threshold, sigma)
        counts[b] = min(len(places_left), max_masks)
        for k, (place, value) in enumerate(zip(places_left[:max_masks], values, strict=False)):
            m = kept[place]
            masks[b, k], soft[b, k], scores[b, k], places[b, k] = bits[m], maps[m], value, addresses[m]
            rows, columns = np.nonzero(bits[m].any(1))[0], np.nonzero(bits[m].any(0))[0]
            boxes[b, k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return SaliencyMasks(
        BitMasks.from_dense(on_device(masks)), on_device(scores), on_device(soft) if return_soft else None,
        on_device(places), on_device(boxes), on_device(counts),
    )  # fmt: skip


def _compare(actual: SaliencyMasks, expected: SaliencyMasks, sample: Sample) -> None:
    """Exact samples must have equal bits, seeds, boxes and counts. Other samples must have proposals in the same order if no
    value is within rounding of a decision. Each proposal must equal the true map of its own seed, except at cells within 1e-4
    of the threshold."""
    if sample.name.startswith("exact"):
        for field in ("seeds", "boxes", "counts"):
            assert torch.equal(getattr(actual, field), getattr(expected, field)), field
        assert torch.equal(actual.masks.words, expected.masks.words), "masks"
        assert_close(actual.scores, expected.scores, 1e-6, 1e-6)
        if actual.soft is not None:
            assert_close(actual.soft.double(), expected.soft, 2 * torch.finfo(actual.soft.dtype).eps, 1e-6)
        return
    features = sample.args[0].double().cpu()
    options = {"seeds": "pyramid", "similarity": "cosine", "threshold": 0.5, "valid": None, **sample.kwargs}
    assert actual.masks.words.shape == expected.masks.words.shape and actual.masks.size == expected.masks.size
    assert (actual.soft is None) == (expected.soft is None)
    assert (actual.scores[:, 1:] <= actual.scores[:, :-1]).all(), "scores must not increase"
    assert torch.equal(actual.boxes, actual.masks.boxes()), "boxes"
    for b in range(len(features)):
        inside = np.ones(features.shape[2:], bool) if options["valid"] is None else options["valid"][b].cpu().numpy()
        vectors, addresses = true_seeds(features[b], inside, options["seeds"])
        maps = torch.from_numpy(true_maps(features[b], inside, vectors, options["similarity"]))
        close = (maps - options["threshold"]).abs() < 1e-4
        if not close.any():
            assert actual.counts[b] == expected.counts[b], "counts"
            assert_close(actual.scores[b], expected.scores[b], 1e-4, 1e-5)
            where = (actual.seeds[b] != expected.seeds[b]).any(
                -1
            )  # only scores that are as good as equal may change places
            assert_close(actual.scores[b][where], expected.scores[b][where], 1e-5, 1e-5)
        for k in range(int(actual.counts[b])):
            m = addresses.index(tuple(actual.seeds[b, k].tolist()))
            differs = actual.masks[b, k].to_dense().cpu() ^ (maps[m] >= options["threshold"])
            assert not (differs & ~close[m]).any(), f"mask {k} of image {b}"
            if actual.soft is not None:
                assert_close(actual.soft[b, k].double().cpu(), maps[m], 2 * torch.finfo(actual.soft.dtype).eps, 1e-5)


def _map_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def vectors(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random(seed + 1)).to(device, dtype)

    features = scene(2, 33, 6, 9, seed).to(device, dtype)
    spoiled = features.clone()
    spoiled[1, 0, 0, 0] = float("nan")
    zero = vectors(2, 3, 33)
    zero[0, 1] = 0
    return [
        Sample("scene", (features, vectors(2, 4, 33))),
        Sample("dot", (features, vectors(2, 150, 33)), {"similarity": "dot"}),
        Sample("padded", (features, vectors(2, 5, 33)), {"valid": corner(2, 6, 9, device)}),
        Sample("NaN in one image, a zero seed", (spoiled, zero)),
        Sample("NaN outside", (spoiled, zero), {"valid": spoiled.isfinite().all(1), "similarity": "dot"}),
        Sample("one cell", (features[..., :1, :1], vectors(2, 2, 33))),
        Sample("no seeds", (features, vectors(2, 0, 33))),
        Sample("no images", (features[:0], vectors(0, 3, 33))),
        Sample("no channels", (features[:, :0], vectors(2, 3, 0))),
        Sample("no cells", (features[:, :, :0], vectors(2, 3, 33))),
    ]


def _maps_oracle(features: Tensor, seeds: Tensor, *, similarity: str = "cosine", valid: Tensor | None = None) -> Tensor:
    out = torch.zeros(*seeds.shape[:2], *features.shape[2:], dtype=torch.float64)
    for b in range(len(features)):
        inside = np.ones(features.shape[2:], dtype=bool) if valid is None else valid[b].cpu().numpy()
        out[b] = torch.from_numpy(true_maps(features[b].cpu(), inside, seeds[b].cpu().numpy(), similarity))
    return out.to(features.device)


# ---- the released code


def _eager(features: Tensor, **options: Any) -> SaliencyMasks:
    """Takes one image after the other. Only cosine and matrix NMS."""
    return _join([_eager_image(x[None], options.get("max_masks", 20), options.get("seeds")) for x in features])


def _eager_image(x: Tensor, most: int, windows: tuple[int, int] | None) -> tuple[Tensor, ...]:
    _, depth, height, width = x.shape
    keys = F.normalize(x[0].reshape(depth, -1), dim=0)
    queries, addresses = [], []
    scales = (1, 0.5, 0.25)
    grids = [F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) if s < 1 else x for s in scales]
    for number, grid in enumerate(grids if windows is None else [F.adaptive_avg_pool2d(x, windows)]):
        h, w = grid.shape[-2:]
        queries.append(grid[0].reshape(depth, -1).T)
        y, z = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
        addresses.append(torch.stack((torch.full_like(y, number), y, z), -1).reshape(-1, 3))
    similarity = F.normalize(torch.cat(queries), dim=1) @ keys
    low, high = similarity.min(1, keepdim=True)[0], similarity.max(1, keepdim=True)[0]
    soft = ((similarity - low) / (high - low)).reshape(-1, height, width)
    masks = soft >= 0.5
    areas = masks.sum((1, 2))
    keep = areas > 1
    soft, masks, areas, places = soft[keep], masks[keep], areas[keep], torch.cat(addresses)[keep]
    scores = (soft * masks.float()).sum((1, 2)) / areas
    order = torch.argsort(scores, descending=True, stable=True)
    masks, areas, scores, places = masks[order], areas[order], scores[order], places[order]
    scores = _eager_matrix_nms(masks, areas, scores)
    order = torch.argsort(scores, descending=True, stable=True)[:most]
    return masks[order], scores[order], places[order]


def _eager_matrix_nms(masks: Tensor, areas: Tensor, scores: Tensor) -> Tensor:
    n = len(scores)
    flat = masks.reshape(n, -1).float()
    common = flat @ flat.T
    grid = areas.expand(n, n)
    iou = (common / (grid + grid.T - common)).triu(diagonal=1)
    most = iou.max(0)[0].expand(n, n).T
    decay = torch.exp(-2.0 * iou**2) / torch.exp(-2.0 * most**2)
    return scores * decay.min(0)[0]


def _join(images: list[tuple[Tensor, ...]]) -> SaliencyMasks:
    masks, scores, places = (torch.stack(parts) for parts in zip(*images, strict=True))
    bits = BitMasks.from_dense(masks)
    counts = torch.full((len(images),), scores.shape[1], device=scores.device)
    return SaliencyMasks(bits, scores, None, places, bits.boxes(), counts)


def _eager_maps(features: Tensor, seeds: Tensor) -> Tensor:
    similarity = F.normalize(seeds, dim=2) @ F.normalize(features.flatten(2), dim=1)
    low, high = similarity.amin(2, keepdim=True), similarity.amax(2, keepdim=True)
    return ((similarity - low) / (high - low)).unflatten(2, tuple(features.shape[2:]))


_x = torch.zeros(1, 3, 4, 5)
_s = torch.zeros(1, 2, 3)


_masks_of, _maps_of = refusals(saliency_masks), refusals(saliency_maps)

SPECS = [
    OpSpec(
        saliency_masks, _samples, ("saliency_bits", "saliency_soft", "mask_boxes", "matrix_nms", "batched_mask_nms"),
        oracle=_oracle, compare=_compare,
        errors=(
            _masks_of("a list", "features must be a tensor, got list", [1], error=TypeError),
            _masks_of("integers", "features must have dtype float32", _x.int(), error=TypeError),
            _masks_of("no batch", r"features must have shape \(B, D, H, W\), got \(3, 4, 5\)", _x[0]),
            _masks_of("seeds by a wrong name", "seeds must be one of 'pyramid', got 'grid'", _x, seeds="grid"),
            _masks_of("seeds a number", r'seeds must be "pyramid" or a grid \(h, w\), got 3', _x, seeds=3, error=TypeError),
            _masks_of("seeds of 0", "seeds must be two whole numbers of at least 1, got 0", _x, seeds=(3, 0)),
            _masks_of("similarity", "similarity must be one of 'cosine', 'dot', got 'l2'", _x, similarity="l2"),
            _masks_of("threshold 0", r"threshold must lie in \(0, 1\], got 0", _x, threshold=0),
            _masks_of("threshold 2", r"threshold must lie in \(0, 1\], got 2", _x, threshold=2),
            _masks_of("min_area 0", "min_area must be a whole number of at least 1, got 0", _x, min_area=0),
            _masks_of("nms", "nms must be one of 'matrix', 'matrix_linear', 'greedy', got 'soft'", _x, nms="soft"),
            _masks_of("iou_threshold", "iou_threshold must lie between 0 and 1, got 2", _x, iou_threshold=2),
            _masks_of("sigma", "sigma must be a finite number of at least 0, got -1", _x, sigma=-1),
            _masks_of("max_masks", "max_masks must be a whole number of at least 1, got 2.5", _x, max_masks=2.5, error=TypeError),
            _masks_of("valid floats", "valid must have dtype bool, got float32", _x, valid=_x[:, 0], error=TypeError),
            _masks_of("valid cut", r"valid must have shape \(B, H, W\) = \(1, 4, 5\)", _x, valid=_x[:, 0, 1:] > 0),
            _masks_of("return_soft", "return_soft must be True or False, got 1", _x, return_soft=1, error=TypeError),
        ),
    ),
    OpSpec(
        saliency_maps, _map_samples, ("saliency_maps",), oracle=_maps_oracle, bound=lambda sample: (1e-5, 1e-5),
        errors=(
            _maps_of("no batch", r"features must have shape \(B, D, H, W\)", _x[0], _s),
            _maps_of("seeds a number", "seeds must be a tensor, got int", _x, 3, error=TypeError),
            _maps_of("seeds integers", "seeds must have dtype float32", _x, _s.long(), error=TypeError),
            _maps_of("seeds cut", r"seeds must have shape \(B, M, D\), got \(1, 2, 2\); give vec", _x, _s[..., 1:]),
            _maps_of("similarity", "similarity must be one of", _x, _s, similarity=""),
            _maps_of("valid", r"valid must have shape \(B, H, W\)", _x, _s, valid=_x > 0),
        ),
    ),
]  # fmt: skip


def _bench(height: int, width: int, noise: float, batch: int = 1, **options: Any) -> Any:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", (scene(batch, 2048, height, width, seed, noise).to(device, dtype),), options)

    return make


def _maps_bench(device: torch.device, dtype: torch.dtype, seed: int, batch: int = 1) -> Sample:
    seeds = torch.randn(batch, 100, 2048, generator=random(seed)).relu()
    return Sample("", (scene(batch, 2048, 25, 42, seed).to(device, dtype), seeds.to(device, dtype)))


def _agree(actual: SaliencyMasks, expected: SaliencyMasks, sample: Sample) -> None:
    """Compares the scores by rank, and the masks where both have the same seed. Eager rounds its maps to half types before it
    compares them. Ours does not, so it is compared with eager in float32."""
    features = sample.args[0]
    if features.dtype in HALVES:
        expected = _eager(features.float(), **sample.kwargs)
    assert_close(actual.scores, expected.scores, 1e-3, 1e-3)
    same = (actual.seeds == expected.seeds).all(-1)
    assert same.float().mean() >= 0.5, "fewer than half of the proposals come from the same seeds"
    differs = actual.masks.to_dense()[same] ^ expected.masks.to_dense()[same]
    assert differs.float().mean() <= 1e-3, "masks"


BENCHES = [
    Bench(
        saliency_masks, f"D 2048, {h}x{w}, {kind}", _bench(h, w, noise), _eager, vectorised=False, agree=_agree,
        flops=(h * w) ** 2 * 2048.0, bytes=2048.0 * h * w * 4, goals={"forward": 5.0},
    )
    for h, w, kind, noise in ((25, 42, "regions", 0.5), (25, 42, "noise", 3.0), (25, 34, "regions", 0.5))
] + [
    Bench(
        saliency_maps, "100 seeds, D 2048, 25x42", _maps_bench, _eager_maps, flops=2.0 * 100 * 2048 * 1050,
        bytes=4.0 * (2048 * 1150 + 100 * 1050),
    )
] + [
    Bench(
        saliency_masks, f"12 x D 2048, 25x42, {kind}", _bench(25, 42, noise, 12, **options), _eager, vectorised=False,
        agree=_agree, dtypes=(torch.float32, torch.bfloat16), device="cuda",
        flops=12 * 1050.0**2 * 2048, bytes=12 * 2048.0 * 1050 * 4,
    )
    for kind, noise, options in (
        ("regions", 0.5, {}), ("noise", 3.0, {}), ("regions, soft maps", 0.5, {"return_soft": True}),
    )
] + [
    Bench(
        saliency_masks, "12 x D 2048, 25x42, windows of a 10x10 grid", _bench(25, 42, 0.5, 12, seeds=(10, 10)), _eager,
        vectorised=False, agree=_agree, dtypes=(torch.float32, torch.bfloat16), device="cuda",
        flops=12 * 2.0 * 100 * 1050 * 2048, bytes=12 * 2048.0 * 1050 * 4,
    )
] + [
    Bench(
        saliency_maps, "12 x 100 seeds, D 2048, 25x42", partial(_maps_bench, batch=12), _eager_maps,
        dtypes=(torch.float32, torch.bfloat16), device="cuda", flops=12 * 2.0 * 100 * 2048 * 1050,
        bytes=12 * 4.0 * (2048 * 1150 + 100 * 1050),
    )
]  # fmt: skip

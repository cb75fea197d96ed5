"""mask_nms, batched_mask_nms, matrix_nms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import batched_mask_nms, mask_nms, matrix_nms, pack_masks
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Prepared, Sample, blobs, random, refusals, smooth


def saliency(count: int, height: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Soft maps of seeds in a smooth random feature map, (count, height, width): the typical input of saliency mask NMS. Many
    maps are near duplicates, large and small masks are mixed, and no mask is empty."""
    g = random(seed)
    coarse = torch.randn(1, 32, 5, 7, generator=g)
    features = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").flatten(2)[0]
    features = torch.nn.functional.normalize(features + 0.3 * torch.randn(features.shape, generator=g), dim=0)
    seeds = torch.randint(height * width, (count,), generator=g)
    maps = features[:, seeds].T @ features
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low)).reshape(count, height, width).to(device)


def _scores(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random scores in 64 steps, so that ties occur."""
    return (torch.randint(64, shape, generator=random(seed)) / 64).to(device, dtype)


def _cases(device: torch.device, dtype: torch.dtype, seed: int) -> list[tuple[str, Tensor | BitMasks, Tensor]]:
    """(name, masks (N, ...), scores (N,))."""
    g = random(seed)
    cases: list[tuple[str, Tensor | BitMasks, Tensor]] = []
    for n, height, width in ((33, 9, 11), (20, 1, 3), (18, 97, 101)):
        cases.append(
            (f"{n} blobs {height}x{width}", blobs(n, height, width, seed, device), _scores((n,), seed, device, dtype))
        )
    cases.append(("saliency maps", saliency(140, 13, 17, seed, device), _scores((140,), seed, device, dtype)))
    dense = (torch.rand(35, 8, 9, generator=g) < 0.5).to(device)
    cases.append(("random bits", pack_masks(dense), _scores((35,), seed, device, dtype)))
    tied = dense[torch.randint(5, (35,), generator=g).to(device)]  # duplicates of five masks, all with the same score
    tied[::7] = False
    cases.append(("duplicates, empty ones, one score", tied, torch.ones(35, device=device, dtype=dtype)))
    scores = torch.randn(35, generator=g).to(device, dtype)
    scores[:8] = torch.tensor([float("nan"), -torch.inf, 0.0, -0.0, float("nan"), torch.inf, -torch.inf, torch.inf])
    cases += [
        ("NaN, infinities and zeros", tied, scores),
        ("one mask", dense[:1], scores[2:3]),
        ("no masks", dense[:0], scores[:0]),
        ("all empty", torch.zeros_like(dense), scores),
        ("no pixels", dense[:, :0], scores),
    ]
    return cases


def _batch(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    masks = torch.stack([saliency(45, 10, 14, seed + b, device) for b in range(3)])
    scores = _scores((3, 45), seed, device, dtype)
    scores[2, 20:] = float("nan")
    return masks, scores, torch.tensor([45, 30, 0], device=device)


def _mask_nms_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = [Sample(name, (masks, scores)) for name, masks, scores in _cases(device, dtype, seed)]
    by_name = {sample.name: sample for sample in samples}
    for name, threshold in (
        ("33 blobs 9x11", 0.0),
        ("random bits", 0.3),
        ("33 blobs 9x11", 0.75),
        ("random bits", 1.0),
    ):
        samples.append(Sample(f"{name}, threshold {threshold}", (*by_name[name].args, threshold)))
    return samples


def _batched_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    masks, scores, counts = _batch(device, dtype, seed)
    return [
        Sample("batch", (masks, scores)),
        Sample("counts", (pack_masks(masks), scores, 0.4, counts)),
        Sample("counts, at most 4", (masks, scores, 0.6, counts, 4)),
        Sample("max_output above the number of masks", (masks, scores, 0.3, counts, 50)),
        Sample("at most 0", (masks, scores, 0.5, None, 0)),
        Sample("many images", (masks.repeat(4, 1, 1, 1), scores.repeat(4, 1), 0.5, counts.repeat(4))),
        Sample("no images", (masks[:0], scores[:0], 0.5, counts[:0])),
        Sample("no masks", (masks[:, :0], scores[:, :0], 0.5, None, 2)),
        *(
            Sample(name, (masks[None], scores[None]))
            for name, masks, scores in _cases(device, dtype, seed)
            if name in ("duplicates, empty ones, one score", "NaN, infinities and zeros", "no pixels")
        ),
    ]


def _matrix_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (name, masks, scores) in enumerate(_cases(device, dtype, seed)):
        finite = scores.nan_to_num(nan=float("nan"), posinf=3.0, neginf=-3.0)  # 0 * inf is NaN: no use to compare
        labels = torch.randint(3, scores.shape, generator=random(seed)).to(device)
        options = ({"sigma": (2.0, 0.5, 10.0)[number % 3]}, {"kernel": "linear"})[number % 2]
        samples.append(Sample(f"{name}, {options}", (masks, finite), options))
        if len(scores) == 35:
            samples.append(Sample(f"{name}, labels", (masks, finite), {**options, "labels": labels}))
    masks, scores, counts = _batch(device, dtype, seed)
    labels = torch.arange(45, device=device).expand(3, 45) % 2
    return [
        *samples,
        Sample("sigma 0", (masks[0], scores[0]), {"sigma": 0.0}),
        Sample("batch", (masks, scores)),
        Sample("counts", (pack_masks(masks), scores), {"counts": counts, "kernel": "linear"}),
        Sample("counts and labels", (masks, scores), {"counts": counts, "labels": labels}),
        Sample("many images", (masks.repeat(4, 1, 1, 1), scores.repeat(4, 1)), {"counts": counts.repeat(4)}),
        Sample("no images", (masks[:0], scores[:0]), {"counts": counts[:0]}),
    ]


# -- ground truths: loops over boolean arrays, pair by pair
def _pixels(masks: BitMasks | Tensor) -> Any:
    dense = masks.to_dense() if isinstance(masks, BitMasks) else masks
    return ((dense > 0.5) if dense.is_floating_point() else (dense != 0)).flatten(-2).cpu().numpy()


def _visit(scores: Any) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (np.inf if np.isnan(scores[i]) else -scores[i], i))


def _iou(a: Any, b: Any) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


def _greedy(pixels: Any, scores: Any, threshold: float) -> list[int]:
    kept: list[int] = []
    for j in _visit(scores):
        if pixels[j].any() and all(_iou(pixels[i], pixels[j]) <= threshold for i in kept):
            kept.append(j)
    return kept


def _mask_nms_oracle(masks: BitMasks | Tensor, scores: Tensor, iou_threshold: float = 0.5) -> Tensor:
    kept = _greedy(_pixels(masks), scores.double().cpu().numpy(), iou_threshold)
    return torch.tensor(kept, dtype=torch.int64, device=scores.device)


def _batched_oracle(
    masks: BitMasks | Tensor,
    scores: Tensor,
    iou_threshold: float = 0.5,
    counts: Tensor | None = None,
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    pixels = _pixels(masks)
    most = scores.shape[1] if max_output is None else max_output
    keep = np.full((scores.shape[0], most), -1, dtype=np.int64)
    found = np.zeros(scores.shape[0], dtype=np.int64)
    for b in range(scores.shape[0]):
        n = scores.shape[1] if counts is None else int(counts[b])
        kept = _greedy(pixels[b, :n], scores[b, :n].double().cpu().numpy(), iou_threshold)[:most]
        keep[b, : len(kept)] = kept
        found[b] = len(kept)
    return torch.from_numpy(keep).to(scores.device), torch.from_numpy(found).to(scores.device)


def _matrix_oracle(
    masks: BitMasks | Tensor,
    scores: Tensor,
    *,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    if scores.dim() == 2:
        rows = []
        for b in range(scores.shape[0]):
            n = scores.shape[1] if counts is None else int(counts[b])
            one = masks[b][:n]
            row = torch.zeros_like(scores[b])
            row[:n] = _matrix_oracle(
                one, scores[b, :n], kernel=kernel, sigma=sigma, labels=None if labels is None else labels[b, :n]
            )
            rows.append(row)
        return torch.stack(rows) if rows else torch.zeros_like(scores)
    pixels, values = _pixels(masks), scores.double().cpu().numpy()
    label = np.zeros(len(values)) if labels is None else labels.cpu().numpy()
    order = _visit(values)
    most: dict[int, float] = {}
    out = values.copy()
    for rank, j in enumerate(order):
        pairs = [(i, _iou(pixels[i], pixels[j])) for i in order[:rank] if label[i] == label[j]]
        most[j] = max((iou for _, iou in pairs), default=0.0)
        if kernel == "gaussian":
            ratios = [np.exp(-sigma * iou**2) / np.exp(-sigma * most[i] ** 2) for i, iou in pairs]
        else:
            ratios = [(1 - iou) / max(1 - most[i], 1e-6) for i, iou in pairs]
        out[j] = values[j] * min(ratios, default=1.0)
    return torch.from_numpy(out).to(scores.device, scores.dtype)


# -- the released code
def _dense(masks: BitMasks | Tensor) -> Tensor:
    return masks.to_dense() if isinstance(masks, BitMasks) else masks > 0.5


def _eager_greedy(masks: BitMasks | Tensor, scores: Tensor, iou_threshold: float = 0.5) -> Tensor:
    order = torch.sort(scores, descending=True, stable=True).indices
    flat = _dense(masks)[order].flatten(1).float()
    common = flat @ flat.T
    area = flat.sum(1)
    iou = common / (area[:, None] + area - common)
    keep = torch.ones(len(order), dtype=torch.bool, device=flat.device)
    for i in range(len(order) - 1):
        if keep[i]:
            keep[i + 1 :] &= ~(iou[i, i + 1 :] > iou_threshold)
    return order[keep]


def _eager_batched(masks: BitMasks | Tensor, scores: Tensor, iou_threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    keep = torch.full(scores.shape, -1, dtype=torch.int64, device=scores.device)
    counts = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    for b in range(len(scores)):
        kept = _eager_greedy(masks[b], scores[b], iou_threshold)
        keep[b, : len(kept)] = kept
        counts[b] = len(kept)
    return keep, counts


def _eager_matrix(masks: BitMasks | Tensor, scores: Tensor, *, kernel: str = "gaussian", sigma: float = 2.0) -> Tensor:
    order = torch.sort(scores, descending=True, stable=True).indices
    flat = _dense(masks)[order].flatten(1).float()
    n = len(order)
    common = flat @ flat.T
    area = flat.sum(1).expand(n, n)
    iou = (common / (area + area.T - common)).triu(diagonal=1)
    most = iou.max(0).values.expand(n, n).T
    f = (lambda t: torch.exp(-sigma * t**2)) if kernel == "gaussian" else (lambda t: 1 - t)
    decay = (f(iou) / f(most)).min(0).values
    return torch.empty_like(scores).scatter_(0, order, scores[order] * decay)


_m, _s = torch.zeros(3, 4, 5), torch.zeros(3)
_bm, _bs = _m[None], _s[None]
_c = torch.tensor([3])


_greedy_of, _batched_of, _matrix_of = refusals(mask_nms), refusals(batched_mask_nms), refusals(matrix_nms)
_Bad = Callable[..., ErrorCase]


def _shared_errors(bad: _Bad, m: Tensor, s: Tensor) -> tuple[ErrorCase, ...]:
    """The error cases of masks and scores, in the ranks that the op takes."""
    form, leading = r"masks must have batch dimensions \(", "scores must have the batch dimensions of masks, "
    return (
        bad("masks None", "masks must be a BitMasks or a dense tensor, got NoneType", None, s, error=TypeError),
        bad("masks complex", "masks must have dtype bool", m.cfloat(), s, error=TypeError),
        bad("masks of rank 1", r"masks must have shape \(..., H, W\), got", m.flatten(), s),
        bad("a single mask", form, torch.zeros(4, 5), s),
        bad("masks of rank 5", form, torch.zeros(1, 1, 3, 4, 5), s),
        bad("scores a list", "scores must be a tensor, got list", m, [0.5], error=TypeError),
        bad("scores int64", "scores must have dtype float32", m, s.long(), error=TypeError),
        bad("scores too few", leading, m, s[..., :2]),
        bad("scores of another rank", leading, m, s[None]),
        bad("two devices", r"scores must be on the device of masks \(cpu\), got meta", m, s.to("meta")),
    )


def _threshold_errors(bad: _Bad, m: Tensor, s: Tensor) -> tuple[ErrorCase, ...]:
    rule = "iou_threshold must lie between 0 and 1, got "
    return (
        bad("threshold NaN", rule + "nan", m, s, float("nan")),
        bad("threshold negative", rule + "-0.1", m, s, -0.1),
        bad("threshold above 1", rule + "1.5", m, s, 1.5),
        bad("threshold a string", rule + "'0.5'", m, s, "0.5", error=TypeError),
    )


def _counts_errors(bad: _Bad) -> tuple[ErrorCase, ...]:
    form, values = r"counts must have shape \(B,\) = \(1,\), got \(", "counts must lie between 0 and 3, got "
    return (
        bad("counts a list", "counts must be a tensor, got list", _bm, _bs, counts=[3], error=TypeError),
        bad("counts int32", "counts must have dtype int64, got int32", _bm, _bs, counts=_c.int(), error=TypeError),
        bad("counts of rank 2", r"counts must have shape \(B,\), got \(1, 1\)", _bm, _bs, counts=_c[None]),
        bad("counts too many", form + "2", _bm, _bs, counts=_c.repeat(2)),
        bad("a count above N", values + "4", _bm, _bs, counts=_c + 1),
        bad("a negative count", values + "-1", _bm, _bs, counts=_c - 4),
        bad("counts elsewhere", "counts must be on the device of masks", _bm, _bs, counts=_c.to("meta")),
    )


_rank = r"masks must have batch dimensions \("
_most = "max_output must be a whole number of at least 0, got "
_sigma = "sigma must be a finite number of at least 0, got "
_shape = r"labels must have the shape of scores, \(3,\), got \(1,\)"

SPECS = [
    OpSpec(
        mask_nms,
        _mask_nms_samples,
        ("mask_nms",),
        oracle=_mask_nms_oracle,
        dynamic=True,
        errors=(
            *_shared_errors(_greedy_of, _m, _s),
            *_threshold_errors(_greedy_of, _m, _s),
            _greedy_of("a batch", _rank + r"N,\), got \(1, 3\)", _bm, _bs),
        ),
    ),
    OpSpec(
        batched_mask_nms,
        _batched_samples,
        ("batched_mask_nms",),
        oracle=_batched_oracle,
        errors=(
            *_shared_errors(_batched_of, _bm, _bs),
            *_threshold_errors(_batched_of, _bm, _bs),
            *_counts_errors(_batched_of),
            _batched_of("no batch", _rank + r"B, N\), got \(3,\)", _m, _s),
            _batched_of("max_output negative", _most + "-1", _bm, _bs, max_output=-1),
            _batched_of("max_output a float", _most + "2.0", _bm, _bs, max_output=2.0, error=TypeError),
        ),
    ),
    OpSpec(
        matrix_nms,
        _matrix_samples,
        ("matrix_nms",),
        oracle=_matrix_oracle,
        # One float32 exponential and product. sigma * (iou^2 - c^2) is in float64.
        bound=lambda sample: (2e-6, 1e-7),
        errors=(
            *_shared_errors(_matrix_of, _m, _s),
            *_counts_errors(_matrix_of),
            _matrix_of("kernel", "kernel must be one of 'gaussian', 'linear', got 'box'", _m, _s, kernel="box"),
            _matrix_of("sigma negative", _sigma + "-1", _m, _s, sigma=-1),
            _matrix_of("sigma infinite", _sigma + "inf", _m, _s, sigma=float("inf")),
            _matrix_of("sigma a string", _sigma + "'2'", _m, _s, sigma="2", error=TypeError),
            _matrix_of("labels float", "labels must have dtype int64, got float32", _m, _s, labels=_s, error=TypeError),
            _matrix_of("labels too few", _shape, _m, _s, labels=_c),
            _matrix_of("labels elsewhere", "labels must be on the device", _m, _s, labels=_s.long().to("meta")),
            _matrix_of("counts, no batch", "counts must be None where there is no batch", _m, _s, counts=_c),
        ),
    ),
]


def _bench(source: Any, count: int, height: int, width: int, packed: bool = False, batch: int = 0) -> Any:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        maps = torch.cat([source(count, height, width, seed + b, device) for b in range(max(batch, 1))])
        # In the released code, pairs of empty masks are 0 / 0. Saliency proposals have at least two pixels.
        maps.flatten(1)[
            torch.arange(len(maps)), torch.randint(height * width, (len(maps),), generator=random(seed)).to(device)
        ] = 1
        scores = torch.rand(len(maps), generator=random(seed)).to(device, dtype)
        if batch:
            maps, scores = maps.unflatten(0, (batch, count)), scores.unflatten(0, (batch, count))
        return Sample("", (pack_masks(maps) if packed else maps, scores))

    return make


def _overlapping(*coarse: int) -> Any:
    """A function that makes overlapping bool masks: upsampled noise above 0.6."""

    def masks(count: int, height: int, width: int, seed: int, device: torch.device) -> Tensor:
        return smooth(count, coarse, height, width, seed, device) > 0.6

    return masks


def _predictions(scores: Tensor) -> Any:
    """The input of supervision: boxes, which it does not read, and a score."""
    return np.c_[np.zeros((len(scores), 4)), scores.numpy()]


_predictions_of, _rows_of = Prepared(_predictions), Prepared(lambda masks: _dense(masks).numpy())


def _supervision(masks: BitMasks | Tensor, scores: Tensor) -> Tensor:
    from supervision.detection.utils.iou_and_nms import mask_non_max_suppression

    kept = torch.from_numpy(mask_non_max_suppression(_predictions_of(scores), _rows_of(masks), 0.5)).nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True)]


def _eager_matrix_batch(masks: BitMasks, scores: Tensor) -> Tensor:
    return torch.stack([_eager_matrix(masks[b], scores[b]) for b in range(len(scores))])


def _agree_matrix(ours: Tensor, eager: Tensor, sample: Sample) -> None:
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def _pairs(count: int, height: int, width: int) -> dict[str, float]:
    """flops of the pair matrix as a product, and bytes of the packed masks, read once."""
    return {"flops": 2.0 * count * count * height * width, "bytes": count * height * width / 8}


BENCHES = [
    Bench(
        mask_nms, "1102 x (25x34) saliency maps, from dense", _bench(saliency, 1102, 25, 34), _eager_greedy, vectorised=False,
        flops=2.0 * 1102**2 * 850, bytes=1102 * 850 * 4, goals={"forward": 25},
    ),
    Bench(
        mask_nms, "1102 x (25x34) blobs, from dense", _bench(blobs, 1102, 25, 34), _eager_greedy, vectorised=False,
        flops=2.0 * 1102**2 * 850, bytes=1102 * 850 * 4, goals={"forward": 25},
    ),
    Bench(
        mask_nms, "500 x (200x272) blobs, from dense", _bench(blobs, 500, 200, 272), _eager_greedy, vectorised=False,
        libraries={"supervision": _supervision},
        flops=2.0 * 500**2 * 54400, bytes=500 * 54400 * 4, goals={"forward": 40},
    ),
    Bench(
        mask_nms, "500 x (200x272) blobs, from bits", _bench(blobs, 500, 200, 272, packed=True), _eager_greedy, vectorised=False,
        **_pairs(500, 200, 272), goals={"forward": 100},
    ),
    Bench(
        mask_nms, "1102 x (25x34) that overlap, from dense", _bench(_overlapping(6, 8), 1102, 25, 34), _eager_greedy,
        vectorised=False, flops=2.0 * 1102**2 * 850, bytes=1102 * 850, goals={"forward": 25},
    ),
    Bench(
        mask_nms, "500 x (200x272) that overlap, from bits", _bench(_overlapping(8, 10), 500, 200, 272, packed=True),
        _eager_greedy, vectorised=False, **_pairs(500, 200, 272), goals={"forward": 100},
    ),
    Bench(
        batched_mask_nms, "12 x 500 x (25x34) saliency maps, from dense", _bench(saliency, 500, 25, 34, batch=12), _eager_batched,
        vectorised=False, flops=12 * 2.0 * 500**2 * 850, bytes=12 * 500 * 850 * 4, goals={"forward": 25},
    ),
    Bench(
        matrix_nms, "1102 x (25x34) saliency maps, from dense", _bench(saliency, 1102, 25, 34), _eager_matrix,
        agree=_agree_matrix, flops=2.0 * 1102**2 * 850, bytes=1102 * 850 * 4, goals={"forward": 15},
    ),
    Bench(
        matrix_nms, "1102 x (25x34) blobs, from bits", _bench(blobs, 1102, 25, 34, packed=True), _eager_matrix, vectorised=False,
        agree=_agree_matrix, **_pairs(1102, 25, 34), goals={"forward": 15},
    ),
    Bench(
        matrix_nms, "1102 x (25x34) that overlap, from dense", _bench(_overlapping(6, 8), 1102, 25, 34), _eager_matrix,
        vectorised=False, agree=_agree_matrix, flops=2.0 * 1102**2 * 850, bytes=1102 * 850, goals={"forward": 15},
    ),
    Bench(
        mask_nms, "1362 x (25x42) saliency maps, from bits", _bench(saliency, 1362, 25, 42, packed=True), _eager_greedy,
        vectorised=False, **_pairs(1362, 25, 42), goals={"forward": 5}, device="cuda",
    ),
    Bench(
        mask_nms, "500 x (200x272) blobs, from bits", _bench(blobs, 500, 200, 272, packed=True), _eager_greedy, vectorised=False,
        **_pairs(500, 200, 272), goals={"forward": 5}, device="cuda",
    ),
    Bench(
        batched_mask_nms, "12 x 1362 x (25x42) saliency maps, from bits", _bench(saliency, 1362, 25, 42, packed=True, batch=12),
        _eager_batched, vectorised=False,
        flops=12 * 2.0 * 1362**2 * 1050, bytes=12 * 1362 * 1050 / 8, goals={"forward": 5}, device="cuda",
    ),
    Bench(
        matrix_nms, "12 x 1362 x (25x42) saliency maps, from bits", _bench(saliency, 1362, 25, 42, packed=True, batch=12),
        _eager_matrix_batch, vectorised=False, agree=_agree_matrix,
        flops=12 * 2.0 * 1362**2 * 1050, bytes=12 * 1362 * 1050 / 8, goals={"forward": 5}, device="cuda",
    ),
]  # fmt: skip

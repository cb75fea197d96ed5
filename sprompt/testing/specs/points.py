"""sample_points, point_cost, point_loss."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.backends import use_backend
from sprompt.masks import BitMasks
from sprompt.ops import pack_masks, point_cost, point_loss, sample_points
from sprompt.testing.spec import Bench, OpSpec, Prepared, Sample, blobs, random, refusals

#: (h, w), (H, W), number: maps and targets whose sides are not multiples of each other, one pixel, points that do not fill a vector.
SIZES = (
    ((6, 8), (24, 32), 40), ((1, 1), (1, 1), 3), ((9, 33), (50, 70), 97), ((5, 40), (5, 40), 16), ((17, 3), (7, 129), 33),
    ((1, 12), (31, 1), 1), ((30, 20), (3, 2), 600),
)  # fmt: skip


def _masks(shape: tuple[int, ...], size: tuple[int, int], device: torch.device, seed: int) -> BitMasks:
    """Noise of half the size, so that masks have areas and borders."""
    H, W = size
    coarse = torch.rand(*shape, (H + 1) // 2, (W + 1) // 2, generator=random(seed)) < 0.4
    with use_backend("reference"):  # the backend under test may not have pack_masks
        return pack_masks(coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :H, :W].to(device))


def _places(shape: tuple[int, ...], device: torch.device, seed: int, spread: float = 1.4) -> Tensor:
    """Points in and around [0, 1]², the corners of the map among them."""
    points = (torch.rand(*shape, 2, generator=random(seed)) - 0.5) * spread + 0.5
    corners = torch.tensor([[0, 0], [1, 1], [0, 1], [0.5, 0.5], [-3, 0.5], [1e30, 0.5]])
    points.flatten(0, -2)[: len(corners)] = corners[: points[..., 0].numel()]
    return points.to(device)


def _seed(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value * 0x123456789ABCDE - 3, device=device)


def _map_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (size, target, T) in enumerate(SIZES):
        maps = torch.randn(2, 1 + number % 3, *size, generator=random(seed + number)).to(device, dtype)
        points = _places((2, T), device, seed)
        samples.append(Sample(f"{size}, {T} points", (maps, points)))
        samples.append(
            Sample(f"bits {target}, {T} points", (_masks((2, 1 + number % 3), target, device, seed), points))
        )
    maps, points = torch.randn(3, 2, 5, 7, generator=random(seed)).to(device, dtype), _places((3, 9), device, seed)
    broken = points.clone()
    broken[0, 3:5], broken[1, 2, 0] = float("nan"), float("inf")
    return [
        *samples,
        Sample("points that are NaN or infinite", (maps, broken)),
        Sample("bits, points that are NaN or infinite", (_masks((3, 2), (5, 7), device, seed), broken)),
        Sample("one point many times", (maps, points[:, :1].expand(3, 50, 2).contiguous())),
        Sample("no points", (maps, _places((3, 0), device, seed))),
        Sample("no maps", (maps[:, :0], points)),
        Sample("no images", (maps[:0], points[:0])),
        Sample("no rows", (maps[:, :, :0], points)),
        Sample("no columns", (maps[..., :0], points)),
        Sample(
            "bits without pixels", (BitMasks(torch.zeros(3, 2, 0, dtype=torch.int32, device=device), (0, 4)), points)
        ),
    ]


def _cost_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (size, target, T) in enumerate(SIZES):
        g = random(seed + number)
        N, G, C = (5, 4, 1, 19)[number % 4], (3, 1, 7, 4, 2)[number % 5], (6, 1, 33)[number % 3]
        logits: Any = (3 * torch.randn(2, N, *size, generator=g)).to(device, dtype)
        if number % 2:
            features, kernels = torch.randn(2, C, *size, generator=g), torch.randn(2, N, C, generator=g)
            logits = features.to(device, dtype), kernels.to(device, dtype)
        options: dict[str, Any] = {"number": T, "seed": _seed(seed + number, device)}
        if number % 3 == 2:
            options = {"points": _places((2, T), device, seed)}
        if number % 4 == 2:
            options["counts"] = torch.tensor([G, G - 1], device=device)
        if number % 4 == 3:
            options["weights"] = (0.5, 3.0)
        samples.append(
            Sample(f"{size} on {target}, {T} points", (logits, _masks((2, G), target, device, seed)), options)
        )
    g = random(seed)
    logits = (3 * torch.randn(2, 6, 12, 20, generator=g)).to(device, dtype)
    logits[0, 0], logits[0, 1] = 60, -60
    pair = torch.randn(2, 4, 12, 20, generator=g).to(device, dtype), torch.randn(2, 6, 4, generator=g).to(device, dtype)
    bits, counts = _masks((2, 5), (23, 41), device, seed), torch.tensor([5, 2], device=device)
    drawn = {"number": 70, "seed": _seed(seed, device)}
    low = torch.zeros(2, 5, 23, 41, dtype=torch.bool, device=device)
    low[0, 1, 22, 40] = low[1, 0, 0, 0] = True
    return [
        *samples,
        Sample("saturated logits", (logits, bits, counts), drawn),
        Sample("many points, dense targets", (logits, low), {"number": 1500, "seed": _seed(seed + 1, device)}),
        Sample("a pair, many points", (pair, bits, counts), {"number": 1500, "seed": _seed(seed + 2, device)}),
        Sample("an image without targets", (logits, bits, counts - 2), drawn),
        Sample("no targets", (logits, bits[:, :0], counts * 0), drawn),
        Sample("no masks", (logits[:, :0], bits), drawn),
        Sample("no channels", ((pair[0][:, :0], pair[1][..., :0]), bits), drawn),
        Sample("no images", (logits[:0], bits[:0]), drawn),
        Sample("no rows", (logits[:, :, :0], bits), drawn),
        Sample("no points", (logits, bits), {"points": _places((2, 0), device, seed)}),
        Sample("a pair, points outside", (pair, bits), {"points": _places((2, 29), device, seed, 3.0)}),
    ]


def _loss_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (size, target, T) in enumerate(SIZES):
        logits = (3 * torch.randn(3, *size, generator=random(seed + number))).to(device, dtype)
        options: dict[str, Any] = {"number": T, "seed": _seed(seed + number, device)}
        if number % 3 == 1:
            options |= {"oversample": 1.5, "importance": 0.4}
        samples.append(Sample(f"{size} on {target}, {T} points", (logits, _masks((3,), target, device, seed)), options))
    logits = (3 * torch.randn(4, 12, 20, generator=random(seed))).to(device, dtype)
    flat = logits.clone()  # with ties, so a step of a numerical gradient must not change the selection
    flat[1], flat[2], flat[3] = 60, -60, -0.5
    bits = _masks((4,), (23, 41), device, seed)
    dense = torch.zeros(4, 23, 41, dtype=torch.bool, device=device)
    dense[0, 22, 40] = dense[1, :, :20] = True
    drawn = {"number": 40, "seed": _seed(seed, device)}
    return [
        *samples,
        Sample("random logits", (logits, bits), drawn),
        Sample("dense targets, nothing added", (logits, dense), drawn | {"importance": 1}),
        Sample("saturated logits, nothing selected", (flat, bits), drawn | {"importance": 0.0}),
        Sample("saturated logits, every candidate kept", (flat, bits), drawn | {"importance": 1, "oversample": 1}),
        Sample("points", (flat, bits), {"points": _places((4, 33), device, seed)}),
        Sample("candidates", (logits, bits), {"number": 20, "candidates": _places((4, 65), device, seed)}),
        Sample("no points", (logits, bits), {"points": _places((4, 0), device, seed)}),
        Sample("no masks", (logits[:0], bits[:0]), drawn),
        Sample("no rows", (logits[:, :0], bits), drawn),
        Sample(
            "targets without pixels",
            (logits, BitMasks(torch.zeros(4, 0, dtype=torch.int32, device=device), (4, 0))),
            drawn,
        ),
    ]


# -- ground truth in float64: Philox on uint64, grid_sample, one mask at a time


def drawn(seed: int, mask: int, first: int, count: int) -> np.ndarray:
    """The points (count, 2) of a mask, float64."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.full(count, mask & 0xFFFFFFFF, np.uint64), np.full(count, mask >> 32, np.uint64)]
    c += [np.arange(first, first + count, dtype=np.uint64), np.zeros(count, np.uint64)]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]), b & low, a >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return np.stack([(word >> np.uint64(8)).astype(float) / 2**24 for word in c[:2]], -1)


def _grid(maps: Tensor, points: Tensor | np.ndarray) -> Tensor:
    """(N, h, w), (T, 2) -> (N, T), float64 on the CPU. NaN points give 0; grid_sample does not say what it does with them."""
    maps, points = maps.double().cpu(), torch.as_tensor(points).double().cpu()
    if maps.numel() == 0 or len(points) == 0:
        return torch.zeros(len(maps), len(points), dtype=torch.float64)
    lost = ~(points.abs() < 1e6).all(1)
    grid = 2 * torch.where(lost[:, None], 9.0, points) - 1
    values = F.grid_sample(maps[None], grid[None, None], align_corners=False)[0, :, 0]
    return torch.where(lost, 0.0, values)


def _floats(masks: BitMasks | Tensor) -> Tensor:
    return masks.to_dense(torch.float64) if isinstance(masks, BitMasks) else masks.double()


def _sample_oracle(maps: Tensor | BitMasks, points: Tensor) -> Tensor:
    dense = _floats(maps)
    out = torch.zeros(*dense.shape[:2], points.shape[1], dtype=torch.float64)
    for b in range(len(dense)):
        out[b] = _grid(dense[b], points[b])
    return out.to(points.device)


def _binary_losses(z: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    p = 1 / (1 + np.exp(-z))
    bce = t * np.logaddexp(0, -z) + (1 - t) * np.logaddexp(0, z)
    return bce.sum() / max(len(z), 1), 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def _cost_oracle(
    mask_logits: Any, targets: BitMasks | Tensor, counts: Tensor | None = None, *, number: int = 12544,
    seed: Tensor | None = None, points: Tensor | None = None, weights: tuple[float, float] = (5.0, 5.0),
) -> Tensor:  # fmt: skip
    pair = isinstance(mask_logits, tuple)
    logits = torch.einsum("bchw,bnc->bnhw", *mask_logits) if pair else mask_logits
    cost = torch.zeros(*logits.shape[:2], targets.shape[1], dtype=torch.float64)
    for b in range(len(logits)):
        places = drawn(int(seed), b, 0, number) if points is None else points[b]
        z, t = _grid(logits[b], places).numpy(), _grid(_floats(targets)[b], places).numpy()
        for n in range(cost.shape[1]):
            for g in range(cost.shape[2] if counts is None else int(counts[b])):
                bce, dice = _binary_losses(z[n], t[g])
                cost[b, n, g] = weights[0] * bce + weights[1] * dice
    return cost.to(logits.device)


def _loss_oracle(
    logits: Tensor, targets: BitMasks | Tensor, *, number: int = 12544, oversample: float = 3.0, importance: float = 0.75,
    seed: Tensor | None = None, points: Tensor | None = None, candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    many, kept = int(oversample * number), int(importance * number)
    bce, dice = torch.zeros(2, len(logits), dtype=torch.float64)
    for m in range(len(logits)):
        if points is not None:
            places = points[m].double().cpu().numpy()
        elif candidates is not None:
            places = candidates[m].double().cpu().numpy()
        else:
            places = drawn(int(seed), m, 0, many + number - kept)
        if points is None:
            certainty = (
                _grid(logits[m][None], places[:many])[0].abs().numpy().round(7)
            )  # equal logits tie after rounding
            chosen = np.argsort(certainty, kind="stable")[:kept]
            places = np.concatenate((places[:many][chosen], places[many:]))
        z, t = _grid(logits[m][None], places)[0].numpy(), _grid(_floats(targets)[m][None], places)[0].numpy()
        bce[m], dice[m] = _binary_losses(z, t)
    return bce.to(logits.device), dice.to(logits.device)


def _bound(sample: Sample) -> tuple[float, float]:
    """Coordinates are rounded to 2⁻²⁴ of the side of the map, and a cell is 1 / side of it."""
    first = sample.args[0]
    sizes = [
        m.size if isinstance(m, BitMasks) else m.shape[-2:] for m in (first, sample.args[1]) if not isinstance(m, tuple)
    ]
    side = max(max(size) for size in [*sizes, first[0].shape[-2:] if isinstance(first, tuple) else (1,)])
    return 1e-5 + 3e-7 * side, 1e-6


# -- released code: transformers' Mask2FormerLoss and Mask2FormerHungarianMatcher


def _points_once(seed: Tensor, masks: int, count: int) -> Tensor:
    """The same points as ours, so that results can be compared. They are made before the timing; eager draws others in their
    place."""
    every = np.stack([drawn(int(seed), m, 0, count) for m in range(masks)])
    return torch.from_numpy(every).float().to(seed.device)


_prepared_points = Prepared(_points_once)
_prepared_masks = Prepared(lambda masks, dtype: masks.to_dense(dtype))


def _sample_point(maps: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(maps, 2.0 * points.unsqueeze(2) - 1.0, align_corners=False).squeeze(3)


def _eager_sample(maps: Tensor | BitMasks, points: Tensor) -> Tensor:
    dense = _prepared_masks(maps, torch.float32) if isinstance(maps, BitMasks) else maps
    return _sample_point(dense, points.to(dense.dtype))


def _eager_cost(
    mask_logits: Any, targets: BitMasks, counts: Tensor | None = None, *, number: int, seed: Tensor
) -> Tensor:
    logits = torch.einsum("bchw,bnc->bnhw", *mask_logits) if isinstance(mask_logits, tuple) else mask_logits
    masks, places = _prepared_masks(targets, torch.float32), _prepared_points(seed, len(logits), number)
    costs = []
    for b in range(len(logits)):
        torch.rand(1, number, 2, device=logits.device)
        both = places[b][None]
        t = _sample_point(masks[b][:, None], both.repeat(masks.shape[1], 1, 1)).squeeze(1)
        z = _sample_point(logits[b][:, None].float(), both.repeat(logits.shape[1], 1, 1)).squeeze(1)
        positive = F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="none")
        negative = F.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="none")
        bce = torch.matmul(positive / number, t.T) + torch.matmul(negative / number, (1 - t).T)
        p = z.sigmoid()
        dice = 1 - (2 * torch.matmul(p, t.T) + 1) / (p.sum(-1)[:, None] + t.sum(-1)[None, :] + 1)
        costs.append(5 * bce + 5 * dice)
    return torch.stack(costs)


def _eager_loss(logits: Tensor, targets: BitMasks, *, number: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    M, many, kept = len(logits), 3 * number, int(0.75 * number)
    masks, places = _prepared_masks(targets, torch.float32), _prepared_points(seed, len(logits), many + number - kept)
    logits = logits.float()
    with torch.no_grad():
        for count in (many, number - kept):
            torch.rand(M, count, 2, device=logits.device)
        first = places[:, :many]
        certainty = -torch.abs(_sample_point(logits[:, None], first))
        chosen = torch.topk(certainty[:, 0], k=kept, dim=1)[1]
        chosen += many * torch.arange(M, device=logits.device)[:, None]
        points = torch.cat((first.reshape(-1, 2)[chosen.view(-1)].view(M, kept, 2), places[:, many:]), 1)
        t = _sample_point(masks[:, None], points).squeeze(1)
    z = _sample_point(logits[:, None], points).squeeze(1)
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1)
    p = z.sigmoid().flatten(1)
    return bce, 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


_m, _z = torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 5)
_f, _k, _p = torch.zeros(2, 7, 4, 5), torch.zeros(2, 3, 7), torch.zeros(2, 9, 2)
_b, _b3 = (
    BitMasks(torch.zeros(2, 6, 1, dtype=torch.int32), (4, 5)),
    BitMasks(torch.zeros(3, 1, dtype=torch.int32), (4, 5)),
)
_bad_sample, _bad_cost, _bad_loss = refusals(sample_points), refusals(point_cost), refusals(point_loss)

_sample_errors = (
    _bad_sample("a list", r"maps must be a tensor, got list", [1], _p, error=TypeError),
    _bad_sample("bool maps", r"maps must have dtype float32, .*got bool; pack masks", _m.bool(), _p, error=TypeError),
    _bad_sample("one image", r"maps must have shape \(B, N, h, w\), got \(3, 4, 5\); one image", _m[0], _p),
    _bad_sample("bits of an image", r"maps must be BitMasks of shape \(B, N\), got \(6,\); give the masks", _b[0], _p),
    _bad_sample("no points", r"points must be a tensor, got NoneType", _m, None, error=TypeError),
    _bad_sample("integer points", r"points must have dtype float32, .*got int64", _m, _p.long(), error=TypeError),
    _bad_sample("points of other images", r"points must have shape \(B, T, 2\), got \(1, 9, 2\); the last axis", _m, _p[:1]),
    _bad_sample("three coordinates", r"points must have shape \(B, T, 2\), got \(2, 3, 3\)", _b, torch.zeros(2, 3, 3)),
    _bad_sample("devices differ", r"points must be on the device of maps \(cpu\), got meta", _m, _p.to("meta")),
    _bad_sample("huge maps", r"maps must have fewer than \d+ pixels .*, got ", torch.zeros(1, 1, 1, 1).expand(2, 1, 2**15, 2**15), _p),
)  # fmt: skip

_cost_errors = (
    _bad_cost("a number", r"mask_logits must be a tensor, got int; or pass the pair", 1, _b, error=TypeError),
    _bad_cost("integer logits", r"mask_logits must have dtype float32", _m.long(), _b, error=TypeError),
    _bad_cost("one image", r"mask_logits must have shape \(B, N, h, w\), got \(3, 4, 5\)", _m[0], _b),
    _bad_cost("three parts", r"mask_logits must be logits or the pair .*, got 3 values", (_f, _k, _k), _b, error=TypeError),
    _bad_cost("other channels", r"kernels must have shape \(B, N, C\), got \(2, 3, 5\); features and kernels", (_f, _k[..., :5]), _b),
    _bad_cost("features of an image", r"features must have shape \(B, C, h, w\), got \(7, 4, 5\)", (_f[0], _k), _b),
    _bad_cost("no targets", r"targets must be a BitMasks or a dense tensor, got NoneType", _m, None, error=TypeError),
    _bad_cost("targets of an image", r"targets must be masks of batch shape \(B, G\), got \(6,\); give the targets", _m, _b[0]),
    _bad_cost("targets of one image", r"targets must be masks of batch shape \(B, G\), got \(1, 6\)", _m, _b[:1]),
    _bad_cost("float counts", r"counts must have dtype int64, got float32", _m, _b, torch.ones(2), error=TypeError),
    _bad_cost("counts above G", r"counts must lie between 0 and 6, got 7", _m, _b, torch.tensor([7, 0])),
    _bad_cost("no number", r"number must be a whole number of at least 1, got 0", _m, _b, number=0),
    _bad_cost("half a number", r"number must be a whole number of at least 1, got 1.5", _m, _b, number=1.5, error=TypeError),
    _bad_cost("too many", r"number must give fewer than \d+ points, got", _m, _b, number=2**30),
    _bad_cost("one weight", r"weights must be two numbers \(bce, dice\), got \(1,\)", _m, _b, weights=(1,), error=TypeError),
    _bad_cost("a weight of NaN", r"weights must be two numbers \(bce, dice\), got nan", _m, _b, weights=(float("nan"), 1)),
    _bad_cost("a number as seed", r"seed must be a tensor, got int; for example", _m, _b, seed=3, error=TypeError),
    _bad_cost("an int32 seed", r"seed must have dtype int64, got int32", _m, _b, seed=torch.tensor(3).int(), error=TypeError),
    _bad_cost("two seeds", r"seed must have shape \(\), got \(2,\); one seed", _m, _b, seed=torch.tensor([1, 2])),
    _bad_cost("seed and generator", r"generator must be None with a seed, got both", _m, _b, seed=torch.tensor(1), generator=random(0)),
    _bad_cost("not a generator", r"generator must be a torch.Generator or None, got int", _m, _b, generator=1, error=TypeError),
    _bad_cost("seed elsewhere", r"seed must be on the device of logits \(cpu\), got meta", _m, _b, seed=torch.tensor(1, device="meta")),
    _bad_cost("points of one image", r"points must have shape \(B, T, 2\), got \(1, 9, 2\)", _m, _b, points=_p[:1]),
    _bad_cost("devices differ", r"kernels must be on the device of mask_logits \(cpu\), got meta", (_f, _k.to("meta")), _b),
)  # fmt: skip

_loss_errors = (
    _bad_loss("a list", r"logits must be a tensor, got list", [_z], _b3, error=TypeError),
    _bad_loss("a batch", r"logits must have shape \(M, h, w\), got \(2, 3, 4, 5\); flatten", _m, _b3),
    _bad_loss("fewer targets", r"targets must be masks of batch shape \(M,\) = \(3,\), got \(2,\); give one target", _z, _b3[1:]),
    _bad_loss("a flat target", r"targets must have shape \(\.\.\., H, W\), got \(20,\)", _z, torch.zeros(20)),
    _bad_loss("number True", r"number must be a whole number of at least 1, got True", _z, _b3, number=True, error=TypeError),
    _bad_loss("oversample below 1", r"oversample must be a number of at least 1, got 0.9", _z, _b3, oversample=0.9),
    _bad_loss("importance above 1", r"importance must be a number between 0 and 1, got 1.1", _z, _b3, importance=1.1),
    _bad_loss("too many", r"oversample must give fewer than \d+ points, got", _z, _b3, oversample=1e6),
    _bad_loss("points and candidates", r"candidates must be None with points, got a tensor; points", _z, _b3, points=_p, candidates=_p),
    _bad_loss("points of other masks", r"points must have shape \(M, T, 2\), got \(2, 9, 2\)", _z, _b3, points=_p),
    _bad_loss("fewer candidates", r"candidates must have shape .* = \(3, 13, 2\), got \(2, 9, 2\)", _z, _b3, number=4, candidates=_p),
    _bad_loss("a number as seed", r"seed must be a tensor, got int", _z, _b3, seed=3, error=TypeError),
    _bad_loss("devices differ", r"targets must be on the device of logits \(cpu\), got meta", _z, _b3.to("meta")),
)  # fmt: skip

SPECS = [
    OpSpec(
        sample_points, _map_samples, ("sample_points", "sample_points_backward"), gradients=("maps",),
        oracle=_sample_oracle, bound=_bound, errors=_sample_errors,
    ),
    OpSpec(point_cost, _cost_samples, ("point_cost",), oracle=_cost_oracle, bound=_bound, errors=_cost_errors),
    OpSpec(
        point_loss, _loss_samples, ("point_loss", "point_loss_backward"), gradients=("logits",), oracle=_loss_oracle,
        bound=_bound, errors=_loss_errors,
    ),
]  # fmt: skip


# -- benchmarks: one image of 800x1344, maps at a quarter of that, the published number of points

T = 12544
Make = Callable[[torch.device, torch.dtype, int], Sample]


def _targets(count: int, seed: int, device: torch.device) -> BitMasks:
    return pack_masks(blobs(count, 800, 1344, seed, device))


def _loss_bench(masks: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        logits = (3 * torch.randn(masks, 200, 336, generator=random(seed))).to(device, dtype)
        bits = _targets(30, seed, device)
        bits = BitMasks(bits.words.repeat(masks // 30, 1), bits.size)
        return Sample("", (logits, bits), {"number": T, "seed": _seed(seed + 1, device)})

    return make


def _cost_bench(images: int, pair: bool) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        g = random(seed)
        bits = _targets(20, seed, device)
        bits = BitMasks(bits.words.repeat(images, 1, 1), bits.size)
        if pair:
            features, kernels = (
                torch.randn(images, 256, 200, 336, generator=g),
                torch.randn(images, 100, 256, generator=g),
            )
            logits: Any = features.to(device, dtype), kernels.to(device, dtype) / 5
        else:
            logits = (3 * torch.randn(images, 100, 200, 336, generator=g)).to(device, dtype)
        return Sample("", (logits, bits), {"number": T, "seed": _seed(seed + 1, device)})

    return make


def _sample_bench(images: int, bits: bool) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        points = torch.rand(images, T, 2, generator=random(seed))
        if bits:
            masks = _targets(20, seed, device)
            maps: Any = BitMasks(masks.words.repeat(images, 1, 1), masks.size)
        else:
            maps = torch.randn(images, 30, 200, 336, generator=random(seed)).to(device, dtype)
        return Sample("", (maps, points.to(device)))

    return make


def _row(
    function: Any, shape: str, make: Make, eager: Any, images: int, masks: int, targets: int, **options: Any
) -> Bench:
    """`masks` maps of 200x336 floats and `targets` masks of 800x1344 bits an image, each sampled at T points or more."""
    return Bench(
        function, shape, make, eager, vectorised=False, bytes=images * (masks * 67200 * 4 + targets * 134400), **options
    )


BENCHES = [
    row
    for images, device, prefix in ((1, "cpu", ""), (12, "cuda", "12 images, "))
    for row in (
        _row(
            sample_points, f"{prefix}30 maps 200x336, {T} points", _sample_bench(images, False), _eager_sample, images, 30, 0,
            flops=images * 30 * T * 9, gradients=("maps",), device=device,
        ),
        _row(
            sample_points, f"{prefix}20 masks 800x1344, {T} points", _sample_bench(images, True), _eager_sample, images, 0, 20,
            flops=images * 20 * T * 9, device=device,
        ),
        _row(
            point_cost, f"{prefix}100x20, 200x336 on 800x1344", _cost_bench(images, False), _eager_cost, images, 100, 20,
            flops=images * T * (100 * 30 + 4 * 100 * 20), device=device, dtypes=(torch.float32, torch.bfloat16),
            goals={"forward": 15, "memory": 10},
        ),
        _row(
            point_cost, f"{prefix}100x20, pair of 256 channels", _cost_bench(images, True), _eager_cost, images, 256, 20,
            flops=images * T * (256 * 9 + 2 * 256 * 100 + 4 * 100 * 20), device=device, goals={"forward": 15, "memory": 10},
        ),
        _row(
            point_loss, f"{30 * images} x (200x336) on 800x1344", _loss_bench(30 * images), _eager_loss, images, 30, 30,
            flops=images * 30 * T * 100, device=device, dtypes=(torch.float32, torch.bfloat16), gradients=("logits",),
            goals={"full": 10, "memory": 10},
        ),
    )
]  # fmt: skip

"""activation_queries."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.ops import activation_queries
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals

Outputs = tuple[Tensor, Tensor, Tensor]


def _apart(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random logits whose scores differ by more than rounding, so that their order is exact."""
    g = random(seed)
    while True:
        logits = (2 * torch.randn(shape, generator=g)).to(dtype)
        scores = logits.double().softmax(1)[:, :-1].amax(1).flatten()
        ordered = scores.sort().values
        if scores.numel() < 2 or (ordered.diff() > 1e-5 * ordered[1:]).all():
            return logits


def _repeated(dtype: torch.dtype, seed: int, channels: int, height: int, width: int) -> Tensor:
    """Logits of many cells with few different vectors of logits: most scores are tied exactly."""
    kinds = _apart(dtype, seed, 1, channels, 1, 30)[0, :, 0]
    return kinds[:, torch.randint(0, 30, (height, width), generator=random(seed + 1))][None]


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    holes = _apart(dtype, seed + 1, 2, 5, 4, 6)
    holes[0, 1, 1, 2], holes[0, 4, 2, 2], holes[0, :, 3, 3] = math.nan, math.nan, math.nan
    holes[1, 0, 0, 0], holes[1, 4, 0, 1] = math.inf, math.inf
    holes[1, :, 1, 1], holes[1, :3, 2, 2], holes[1, :4, 3, 4], holes[1, 4, 2] = (-math.inf,) * 4
    cases = {
        "two images": (_apart(dtype, seed, 2, 6, 7, 9), 20),
        "one class, every cell": (_apart(dtype, seed + 2, 2, 2, 5, 4), 20),
        "one cell": (_apart(dtype, seed + 3, 1, 4, 1, 1), 1),
        "a row, 80 classes": (_apart(dtype, seed + 4, 1, 81, 1, 70), 33),
        "a column": (_apart(dtype, seed + 5, 1, 3, 19, 1), 7),
        "ties, several blocks": (_repeated(dtype, seed + 6, 3, 33, 40), 150),
        "NaN and infinite logits": (holes, 24),
        "equal logits": (torch.ones(1, 4, 3, 5, dtype=dtype), 9),
        "no queries": (_apart(dtype, seed, 2, 3, 2, 2), 0),
        "no images": (torch.zeros(0, 3, 4, 5, dtype=dtype), 6),
        "no cells": (torch.zeros(2, 3, 0, 5, dtype=dtype), 0),
    }
    return [Sample(name, (logits.to(device), count)) for name, (logits, count) in cases.items()]


def oracle(logits: Tensor, count: int) -> Outputs:
    """Builds the sparse volume M[k, i] of every image and looks at all neighbours, one cell at a time."""
    B, channels, h, w = logits.shape
    index, scores, labels = (np.zeros((B, count), dtype) for dtype in (np.int64, np.float64, np.int64))
    for b, z in enumerate(logits.cpu().double().numpy()):
        volume, best, label = np.zeros((channels - 1, h, w)), np.full((h, w), np.nan), np.zeros((h, w), np.int64)
        for y, x in np.ndindex(h, w):
            column = z[:, y, x]
            label[y, x] = np.argmax(np.where(np.isnan(column), -np.inf, column)[:-1])
            if not np.isnan(column).any() and np.isfinite(column.max()):
                powers = np.exp(column - column.max())
                best[y, x] = powers[label[y, x]] / powers.sum()
                volume[label[y, x], y, x] = best[y, x]
        cells = []
        for y, x in np.ndindex(h, w):
            near = volume[label[y, x], max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            maximum = best[y, x] >= 1e-6 and best[y, x] >= near.max()
            unknown = np.isnan(best[y, x])
            cells.append((unknown, not maximum, 0.0 if unknown else -best[y, x], y * w + x))
        index[b] = [cell for *_, cell in sorted(cells)][:count]
        scores[b], labels[b] = best.ravel()[index[b]], label.ravel()[index[b]]
    return torch.from_numpy(index), torch.from_numpy(scores), torch.from_numpy(labels)


_x = torch.zeros(2, 3, 4, 5)
_bad = refusals(activation_queries)

SPECS = [
    OpSpec(
        activation_queries, _samples, ("activation_queries",), oracle=oracle,
        errors=(
            _bad("a list", r"logits must be a tensor, got list", [[1.0]], 1, error=TypeError),
            _bad("integers", r"logits must have dtype float32, .*, got int64", _x.long(), 1, error=TypeError),
            _bad("one image", r"logits must have shape \(B, K \+ 1, h, w\), got \(3, 4, 5\); one image", _x[0], 1),
            _bad("background only", r"logits must have at least 2 channels, got 1; the last channel", _x[:, :1], 1),
            _bad("a huge map", r"logits must have fewer than 1073741824 cells a map, got 1073741824; split",
                _x[:, :, :1, :1].expand(2, 3, 2**15, 2**15), 1),
            _bad("too many queries", r"count must be at most h · w = 20, got 21; ask for fewer queries", _x, 21),
            _bad("negative count", r"count must be a whole number of at least 0, got -1", _x, -1),
            _bad("half a query", r"count must be a whole number of at least 0, got 0.5", _x, 0.5, error=TypeError),
        ),
    ),
]  # fmt: skip


# -- benchmarks: FastInst's queries of COCO, a picture of 640x864


def _maps(B: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", (torch.randn(B, 81, 40, 54, generator=random(seed)).to(device, dtype), 100))

    return make


def _eager(logits: Tensor, count: int) -> Outputs:
    """Max pooling of the volume of all classes."""
    scores, labels = logits.float().softmax(1)[:, :-1].max(1, keepdim=True)
    volume = torch.zeros_like(logits[:, :-1], dtype=torch.float32).scatter(1, labels, scores)
    maxima = (F.max_pool2d(volume, 3, 1, 1) == volume) & (volume >= 1e-6)
    index = (volume + maxima).amax(1).flatten(1).topk(count, 1).indices
    return index, scores.flatten(1).gather(1, index).to(logits.dtype), labels.flatten(1).gather(1, index)


def _agree(actual: Outputs, expected: Outputs, sample: Sample) -> None:
    """The eager code sorts by 1 + score, which is rounded, so close scores may change places. Both sides take the same cells,
    except cells with the score of the last place, and give them the same labels."""
    close = 1e-6 if sample.args[0].dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual[1].float(), expected[1].float(), rtol=0, atol=close)
    for b in range(actual[0].shape[0]):
        last = expected[1][b, -1].item()
        ours, theirs = (
            dict(zip(index.tolist(), zip(scores.tolist(), labels.tolist(), strict=True), strict=True))
            for index, scores, labels in (tuple(x[b] for x in outputs) for outputs in (actual, expected))
        )
        for cell in ours.keys() | theirs.keys():
            if cell in ours and cell in theirs:
                assert ours[cell][1] == theirs[cell][1], f"image {b}, cell {cell}: other labels"
            else:
                score = (ours.get(cell) or theirs[cell])[0]
                assert abs(score - last) <= close, f"image {b}: only one side takes cell {cell}"


BENCHES = [
    Bench(
        activation_queries, f"{B} x 81x40x54, 100 of 2160", _maps(B), _eager, agree=_agree, device=device, dtypes=dtypes,
        flops=B * 2160 * 81 * 20, bytes=4 * B * 2160 * 81 + 20 * B * 100, goals=goals,
    )
    for B, device, dtypes, goals in (
        (1, "cpu", (torch.float32,), {"forward": 5.0}),
        (12, "cuda", (torch.float32, torch.bfloat16), {}),
    )
]  # fmt: skip

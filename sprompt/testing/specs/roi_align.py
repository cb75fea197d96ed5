"""roi_align."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.ops import roi_align
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Sample, random, refusals

Sizes = Sequence[tuple[int, int]]
FOUR: Sizes = ((20, 26), (10, 13), (5, 7), (3, 4))  # of a picture of 80 x 104 pixels, with strides of 4, 8, 16 and 32


def _maps(B: int, C: int, sizes: Sizes, seed: int) -> list[Tensor]:
    g = random(seed)
    return [torch.randn(B, C, h, w, generator=g) for h, w in sizes]


def _boxes(B: int, N: int, height: int, width: int, seed: int, least: float = 4, most: float = 600) -> Tensor:
    """Boxes with centres in the picture and sides from `least` to `most` pixels, many of them small."""
    g = random(seed + 1)
    centre = torch.rand(B, N, 2, generator=g) * torch.tensor([width, height])
    side = least * (most / least) ** torch.rand(B, N, 2, generator=g)
    return torch.cat((centre - side / 2, centre + side / 2), -1)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def sample(name: str, maps: list[Tensor], boxes: Tensor, size: int, **kwargs: Any) -> Sample:
        kwargs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return Sample(name, ([m.to(device, dtype) for m in maps], boxes.to(device), size), kwargs)

    def one(C: int, h: int, w: int, B: int = 1) -> list[Tensor]:
        return _maps(B, C, [(h, w)], seed)

    maps, boxes = _maps(2, 8, FOUR, seed), _boxes(2, 6, 80, 104, seed)
    odd = boxes.clone()
    odd[0, 0, 2:] = odd[0, 0, :2]  # a point
    odd[0, 1] = odd[0, 1, [2, 1, 0, 3]]  # inverted
    odd[0, 2] = odd[0, 2, [2, 3, 0, 1]]
    odd[1, 0] = torch.tensor([10.0, 12, 10, 60])  # without width
    odd[1, 1] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    odd[1, 2] = torch.tensor([-3e38, 0, 3e38, 50])  # its width is not finite
    odd[1, 3] = torch.tensor([500.0, 10, 600, 60])  # outside of the picture
    broken = boxes.clone()
    broken[0, 1, 0], broken[0, 2, 3], broken[1, 3], broken[1, 4, 2] = math.nan, math.inf, math.nan, -math.inf
    padded = boxes.clone()
    padded[0, 4:], padded[1] = math.nan, 1e30
    # Samples exactly at -1 (inside) and at the size of the map (inside), one step further out, and at centres of cells.
    exact = torch.tensor([[[-1.0, -1, 3, 3], [4, 2, 8, 6], [-2, -2, 2, 2], [5, 4, 9, 8], [0, 0, 4, 4], [1, 1, 1, 1]]])
    unread = [m.clone() for m in maps]
    for m in unread:
        m[:, :, -1] = math.nan
        m[:, :, :, 0] = math.inf
    # Far from the last row and the first column of every map, and with samples at centres of cells.
    inner = torch.tensor([[[40.0, 8, 64, 36], [30, 4, 34, 8], [34, 10, 98, 42]]]).expand(2, 3, 4)
    return [
        sample("four levels", maps, boxes, 3),
        sample("7 x 7", maps, _boxes(2, 4, 80, 104, seed + 2), 7, counts=torch.tensor([4, 2])),
        sample("14 x 14", one(5, 40, 50), _boxes(1, 3, 160, 200, seed, 20, 200), 14, strides=(4,)),
        sample("rows behind counts", maps, padded, 2, counts=torch.tensor([4, 0])),
        sample("degenerate, inverted and huge boxes", maps, odd, 3),
        sample("boxes that are not finite", maps, broken, 3),
        sample("exact places", one(3, 6, 8), exact, 4, strides=(1,), sampling=1),
        sample("cells that are not read", unread, inner, 2),
        sample("one bin, three samples", maps, boxes, 1, sampling=3),
        sample("five samples, 37 channels", _maps(1, 37, FOUR[:2], seed), boxes[:1], 2, sampling=5, strides=(4, 8)),
        sample("two levels, odd strides", _maps(2, 4, ((27, 35), (12, 15)), seed), boxes, 3, strides=(3, 7)),
        sample("eight levels", _maps(1, 2, [(max(64 >> v, 1), max(80 >> v, 1)) for v in range(8)], seed),
               _boxes(1, 9, 256, 320, seed, 4, 12000), 2, strides=[4 << v for v in range(8)]),
        sample("16 channels", one(16, 20, 26), boxes[:1], 2, strides=(4,)),
        sample("a wide map", one(4, 3, 70), _boxes(1, 5, 12, 280, seed, 3, 300), 4, strides=(4,)),
        sample("maps of one cell, row and column", _maps(1, 3, ((1, 1), (1, 5), (6, 1)), seed),
               _boxes(1, 6, 16, 16, seed, 2, 500), 2, strides=(4, 8, 16)),
        sample("channels last", [m.to(memory_format=torch.channels_last) for m in maps], boxes, 3),
        sample("one box for all pictures", maps, boxes[:1].expand(2, 6, 4), 2),
        sample("no pictures", _maps(0, 8, FOUR, seed), boxes[:0], 3),
        sample("no boxes", maps, boxes[:, :0], 3),
        sample("no channels", _maps(2, 0, FOUR, seed), boxes, 3),
        sample("maps without cells", _maps(2, 3, ((20, 26), (10, 0), (0, 7), (3, 4)), seed), boxes, 3),
    ]  # fmt: skip


def _oracle(
    maps: Sequence[Tensor], boxes: Tensor, size: int, *, strides: Sequence[int] = (4, 8, 16, 32), sampling: int = 2,
    counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, one sample after the other."""
    (B, N), C = boxes.shape[:2], maps[0].shape[1]
    out = np.zeros((B, N, C, size, size))
    for b, n in np.ndindex(B, N):
        box = [float(x) for x in boxes[b, n]]
        if not all(map(math.isfinite, box)) or (counts is not None and n >= counts[b]):
            continue
        x1, y1, x2, y2 = box
        w, h = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
        v = min(max(math.floor(math.log2(math.sqrt(w * h) / 56 + 1e-6)), 0), len(maps) - 1)
        level, s, S = maps[v][b].cpu().numpy(), strides[v], size * sampling
        for i, j in np.ndindex(S, S):
            value = _bilinear(level, y1 / s - 0.5 + (i + 0.5) * h / s / S, x1 / s - 0.5 + (j + 0.5) * w / s / S)
            out[b, n, :, i // sampling, j // sampling] += value / sampling**2
    return torch.from_numpy(out).to(maps[0].device)


def _bilinear(level: np.ndarray, y: float, x: float) -> Any:
    _, h, w = level.shape
    if not (-1 <= y <= h and -1 <= x <= w) or h * w == 0:
        return 0.0
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    top, left, value = math.floor(y), math.floor(x), 0.0
    for i, of_row in ((top, top + 1 - y), (top + 1, y - top)):
        for j, of_column in ((left, left + 1 - x), (left + 1, x - left)):
            if of_row * of_column > 0:
                value = value + of_row * of_column * level[:, i, j]
    return value


def _bound(sample: Sample) -> tuple[float, float]:
    """A coordinate has a rounding error of about 4 units in the last place of the largest one, which is below 256 cells.
    Neighbouring cells differ by at most twice the largest value, and the mean over a bin does not exceed it."""
    return 2 * 4 * 256 * 2.0**-24, 1e-6


_fine, _coarse, _good_boxes = torch.zeros(2, 3, 8, 9), torch.zeros(2, 3, 4, 5), torch.zeros(2, 5, 4)
_wide = torch.zeros(1).expand(2, 3, 1, 2**23)
_refused = refusals(roi_align)


def _bad(name: str, message: str, error: type[Exception] = ValueError, **changed: Any) -> ErrorCase:
    """A good call with these arguments changed."""
    good = {"maps": [_fine, _coarse], "boxes": _good_boxes, "size": 7, "strides": (4, 8)}
    return _refused(name, message, error=error, **{**good, **changed})


SPECS = [
    OpSpec(
        roi_align, _samples, ("roi_align",), gradients=("maps",), oracle=_oracle, bound=_bound,
        errors=(
            _bad("one map", "maps must be a list of maps, got Tensor; one map: put it", TypeError, maps=_fine),
            _bad("no maps", "maps must be 1 to 8 maps, got 0", maps=[], strides=()),
            _bad("nine maps", "maps must be 1 to 8 maps, got 9", maps=[_fine] * 9),
            _bad("a list of numbers", "maps must be a tensor, got float", TypeError, maps=[1.0, 2.0]),
            _bad("integers", "maps must have dtype float32, .*, got int64", TypeError, maps=[_fine.long()] * 2),
            _bad("no pictures", r"maps must have shape \(B, C, h, w\), got \(3, 8, 9\)", maps=[_fine[0], _coarse[0]]),
            _bad("other channels", r"maps must have shape \(B, C, h, w\), got \(2, 2, 4, 5\); levels share", maps=[_fine, _coarse[:, :2]]),
            _bad("two dtypes", r"maps must have one dtype \(float32\), got float16; convert", TypeError, maps=[_fine, _coarse.half()]),
            _bad("two devices", r"maps must be on the device of maps\[0\] \(cpu\), got meta", maps=[_fine, _coarse.to("meta")]),
            _bad("a map too wide", r"maps must have sides below 8388608, got \(1, 8388608\)", maps=[_wide, _wide]),
            _bad("a list of boxes", "boxes must be a tensor, got list", TypeError, boxes=[_good_boxes]),
            _bad("integer boxes", "boxes must have dtype float32, .*, got int64", TypeError, boxes=_good_boxes.long()),
            _bad("flat boxes", r"boxes must have shape \(B, N, 4\), got \(10, 4\); give x1", boxes=_good_boxes.flatten(0, 1)),
            _bad("boxes of other pictures", r"boxes must have shape \(B, N, 4\), got \(1, 5, 4\)", boxes=_good_boxes[:1]),
            _bad("boxes elsewhere", r"boxes must be on the device of maps \(cpu\), got meta", boxes=_good_boxes.to("meta")),
            _bad("no bins", "size must be a whole number of at least 1, got 0", size=0),
            _bad("half a bin", "size must be a whole number of at least 1, got 3.5", TypeError, size=3.5),
            _bad("two sizes", r"size must be a whole number of at least 1, got \(7, 7\)", TypeError, size=(7, 7)),
            _bad("no samples", "sampling must be a whole number of at least 1, got 0", sampling=0),
            _bad("too many bins", "size must be at most 256, got 257; resize", size=257),
            _bad("too many samples", "sampling must give at most 1024 samples a side, got 1025; take fewer", size=205, sampling=5),
            _bad("a stride", "strides must be a list of whole numbers, got int", TypeError, strides=4),
            _bad("too few strides", "strides must have one number per map, 2, got 1", strides=(4,)),
            _bad("half a stride", "strides must hold whole numbers from 1 to 8388608, got 0.25", TypeError, strides=(0.25, 0.125)),
            _bad("stride 0", "strides must hold whole numbers from 1 to 8388608, got 0", strides=(4, 0)),
            _bad("a huge stride", "strides must hold whole numbers from 1 to 8388608, got 1180591620717411303424", strides=(4, 2**70)),
            _bad("counts as a list", "counts must be a tensor, got list", TypeError, counts=[1, 2]),
            _bad("counts of other pictures", r"counts must have shape \(B,\) = \(2,\), got \(3,\)", counts=torch.tensor([1, 2, 3])),
            _bad("counts too large", "counts must lie between 0 and 5, got 6", counts=torch.tensor([6, 1])),
        ),
    ),
]  # fmt: skip


# ---- benchmarks: the boxes of 100 queries on the maps of a picture of 800 x 1344 pixels

PICTURE = (800, 1344)
STRIDES = (4, 8, 16, 32)
CHANNELS, BOXES = 256, 100


def _detections(B: int, N: int, seed: int) -> Tensor:
    """Boxes like those of queries: some objects of all sizes, several boxes around each of them, some leave the picture."""
    g = random(seed)
    objects = _boxes(B, max(N // 8, 1), *PICTURE, seed, 16, 1000)
    of_query = torch.randint(objects.shape[1], (B, N, 1), generator=g).expand(B, N, 4)
    box = objects.gather(1, of_query)
    side = (box[..., 2:] - box[..., :2]).repeat(1, 1, 2)
    return box + 0.15 * side * torch.randn(B, N, 4, generator=g)


def _calls(B: int, size: int, channels_last: bool = False) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        maps = _maps(B, CHANNELS, [(PICTURE[0] // s, PICTURE[1] // s) for s in STRIDES], seed)
        if channels_last:
            maps = [m.to(memory_format=torch.channels_last) for m in maps]
        return Sample("", ([m.to(device, dtype) for m in maps], _detections(B, BOXES, seed).to(device), size))

    return make


def _levels(boxes: Tensor, maps: int) -> Tensor:
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1).sqrt()
    return (side / 56 + 1e-6).log2().floor().clamp(0, maps - 1).long()


def _eager(maps: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """grid_sample of the boxes of each level and picture, then the mean of four samples."""
    B, N, _ = boxes.shape
    C, S, level = maps[0].shape[1], 2 * size, _levels(boxes, len(maps))
    out = maps[0].new_zeros(B, N, C, size, size)
    steps = (torch.arange(S, device=boxes.device) + 0.5) / S
    for v, stride in enumerate(STRIDES):
        h, w = maps[v].shape[2:]
        for b in range(B):
            (chosen,) = (level[b] == v).nonzero(as_tuple=True)
            low, high = boxes[b, chosen].split(2, -1)
            at = low[:, None] / stride - 0.5 + (high - low).clamp(min=0)[:, None] / stride * steps[:, None]  # (n, S, 2)
            inside = (at >= -1) & (at <= at.new_tensor([w, h]))
            x, y = ((at + 0.5) / at.new_tensor([w, h]) * 2 - 1).unbind(-1)
            grid = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), -1).to(maps[v].dtype)
            sampled = F.grid_sample(
                maps[v][b, None], grid.reshape(1, -1, S, 2), padding_mode="border", align_corners=False
            )
            both = (inside[:, None, :, 0] & inside[:, :, None, 1]).reshape(1, 1, -1, S)
            bins = F.avg_pool2d(sampled * both, 2).reshape(C, len(chosen), size, size)
            out[b, chosen] = bins.transpose(0, 1)
    return out


def _torchvision(maps: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """torchvision.ops.roi_align for the boxes of each level, as in its MultiScaleRoIAlign."""
    from torchvision.ops import roi_align as of_level

    B, N, _ = boxes.shape
    level, image = _levels(boxes, len(maps)).flatten(), torch.arange(B, device=boxes.device).repeat_interleave(N)
    rois = torch.cat((image[:, None].to(boxes.dtype), boxes.flatten(0, 1)), 1)
    out = maps[0].new_zeros(B * N, maps[0].shape[1], size, size)
    for v, stride in enumerate(STRIDES):
        (chosen,) = (level == v).nonzero(as_tuple=True)
        out[chosen] = of_level(maps[v], rois[chosen], size, 1 / stride, 2, True)
    return out.unflatten(0, (B, N))


def _row(size: int, B: int, device: str, goals: dict[str, float], channels_last: bool = False) -> Bench:
    cells = sum(PICTURE[0] // s * (PICTURE[1] // s) for s in STRIDES)
    bins = B * BOXES * size * size * CHANNELS
    name = f"B {B}, {BOXES} boxes, {size}x{size}" + (", channels last" if channels_last else "")
    return Bench(
        roi_align, name, _calls(B, size, channels_last), _eager, vectorised=False, gradients=("maps",), device=device,
        goals=goals, libraries={"torchvision": _torchvision}, flops=32.0 * bins, bytes=4.0 * (B * cells * CHANNELS + bins),
    )  # fmt: skip


_CPU_GOALS = {"forward": 4.0, "full": 4.0, "torchvision": 1.5}
BENCHES = [
    _row(7, 1, "cpu", _CPU_GOALS),
    _row(14, 1, "cpu", _CPU_GOALS),
    _row(7, 1, "cpu", _CPU_GOALS, channels_last=True),
    _row(7, 12, "cuda", {"forward": 5, "full": 5}),
    _row(14, 12, "cuda", {"forward": 5, "full": 5}),
]

"""region_mean, mask_mean."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mask_mean, pack_masks, region_mean
from sprompt.testing.spec import Bench, OpSpec, Sample, blobs, random, refusals

MAPS = ((1, 1, 1), (5, 9, 1), (9, 25, 42), (16, 4, 8), (3, 11, 70))  # C, H, W


def _counts(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


# ---- region_mean


def random_boxes(batch: int, length: int, height: int, width: int, seed: int) -> Tensor:
    """Boxes in cells. The corners lie inside the map or up to half a map outside of it."""
    u = torch.rand(batch, length, 2, 2, generator=random(seed)) * 2 - 0.5
    corners = u * torch.tensor([width, height])
    return torch.cat((corners.amin(2), corners.amax(2)), -1)


def _region_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for c, h, w in MAPS:
        features = torch.randn(2, c, h, w, generator=random(seed)).to(device, dtype)
        samples.append(Sample(f"{c}x{h}x{w}", (features, random_boxes(2, 5, h, w, seed).to(device))))
    features = torch.randn(3, 10, 6, 9, generator=random(seed)).to(device, dtype)
    boxes = random_boxes(3, 4, 6, 9, seed).to(device)
    whole = torch.tensor(
        [[0, 0, 9, 6], [2, 1, 2, 1], [8, 5, 3, 2], [-7, -7, -3, -3], [20, 20, 30, 30], [0, 5, 9, 6]], device=device
    )
    edges = torch.tensor(
        [[0.5, 0.5, 8.5, 5.5], [1e30, -1e30, -1e30, 1e30], [-0.5, -0.5, 0.0, 0.0], [8.999, 5.999, 9.001, 6.001]]
    )
    padded = boxes.clone()
    padded[0, 2:] = float("nan")
    return [
        *samples,
        Sample("counts, padding of NaN", (features, padded), {"counts": _counts(device, 2, 0, 4)}),
        Sample("whole numbers", (features, whole.expand(3, 6, 4))),
        Sample("int32", (features, whole.int().expand(3, 6, 4))),
        Sample("float64 boxes", (features, edges.double().to(device).expand(3, 4, 4))),
        Sample("edges", (features, edges.to(device).expand(3, 4, 4))),
        Sample("channels last", (features.contiguous(memory_format=torch.channels_last), boxes)),
        Sample("no boxes", (features, boxes[:, :0])),
        Sample("no images", (features[:0], boxes[:0])),
        Sample("no channels", (features[:, :0], boxes)),
        Sample("no cells", (features[:, :, :0], boxes)),
    ]


def _cells(box: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """c0, r0, c1, r1 by the formula of the method. A box outside is moved to the nearest cell."""
    spans = []
    for low, high, size in ((box[0], box[2], width), (box[1], box[3], height)):
        first = min(max(math.floor(low), 0), size - 1)
        spans.append((first, min(max(math.ceil(high), first + 1), size)))
    (c0, c1), (r0, r1) = spans
    return c0, r0, c1, r1


def _region_oracle(features: Tensor, boxes: Tensor, counts: Tensor | None = None) -> Tensor:
    """numpy's mean of each slice."""
    import numpy as np

    batch, channels, height, width = features.shape
    map_, out = features.cpu().numpy(), np.zeros((batch, boxes.shape[1], channels))
    for b in range(batch):
        for l in range(boxes.shape[1] if counts is None else int(counts[b])):
            if height and width:
                c0, r0, c1, r1 = _cells(boxes[b, l].tolist(), height, width)
                out[b, l] = map_[b, :, r0:r1, c0:c1].mean((1, 2))
    return torch.from_numpy(out).to(features.device)


def _mean_bound(sample: Sample) -> tuple[float, float]:
    """The error of a float32 sum of n terms is at most n rounding units of the sum of their magnitudes."""
    n = sample.args[0].shape[-2:].numel()
    return (n + 2) * 2.0**-24, (n + 2) * 2.0**-24


_x = torch.zeros(2, 3, 4, 5)
_boxes = torch.zeros(2, 6, 4)
_bad_box = torch.tensor([[[0, 0, 1, 1], [0, 0, math.nan, 1]], [[0, 0, 1, 1], [math.inf, 0, 1, 1]]])
_bad_region = refusals(region_mean)

REGION_MEAN = OpSpec(
    region_mean, _region_samples, ("region_mean",), gradients=("features",), oracle=_region_oracle, bound=_mean_bound,
    errors=(
        _bad_region("a list", r"features must be a tensor, got list", [1], _boxes, error=TypeError),
        _bad_region("integer map", r"features must have dtype float32, .*, got int32", _x.int(), _boxes, error=TypeError),
        _bad_region("one map", r"features must have shape \(B, C, H, W\), got \(3, 4, 5\); add", _x[0], _boxes),
        _bad_region("boxes of one image", r"boxes must have shape \(B, L, 4\), got \(6, 4\)", _x, _boxes[0]),
        _bad_region("five numbers", r"boxes must have shape \(B, L, 4\), got \(2, 6, 5\)", _x, torch.zeros(2, 6, 5)),
        _bad_region("boxes of other images", r"boxes must have shape", _x, _boxes[:1]),
        _bad_region("bool boxes", r"boxes must have dtype .*, got bool", _x, _boxes.bool(), error=TypeError),
        _bad_region("a NaN box", r"boxes must be finite, got \[0.0, 0.0, nan, 1.0\] at \[0, 1\]", _x, _bad_box),
        _bad_region("an infinite box", r"boxes must be finite, got \[inf, 0.0, 1.0, 1.0\] at \[1, 1\]", _x, _bad_box, torch.tensor([1, 2])),
        _bad_region("int32 counts", r"counts must have dtype int64, got int32", _x, _boxes, torch.tensor([1, 2]).int(), error=TypeError),
        _bad_region("three counts", r"counts must have shape \(B,\) = \(2,\), got \(3,\)", _x, _boxes, torch.tensor([1, 2, 3])),
        _bad_region("too many", r"counts must lie between 0 and 6, got 7", _x, _boxes, torch.tensor([1, 7])),
        _bad_region("another device", r"boxes must be on the device of features \(cpu\), got meta", _x, _boxes.to("meta")),
    ),
)  # fmt: skip


# ---- mask_mean


def _mask_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for i, (c, h, w) in enumerate(MAPS):
        features = torch.randn(2, c, h, w, generator=random(seed)).to(device, dtype)
        masks = torch.rand(2, 5, h, w, generator=random(seed + 1)) < (0.0, 0.5, 0.3, 1.0, 0.05)[i]
        samples.append(Sample(f"{c}x{h}x{w}", (features, masks.to(device))))
    features = torch.randn(2, 10, 13, 21, generator=random(seed)).to(device, dtype)
    soft = blobs(6, 13, 21, seed, device).reshape(2, 3, 13, 21)
    soft[1, 2] = 0
    bits = pack_masks(soft)
    return [
        *samples,
        Sample("soft", (features, soft)),
        Sample("bits", (features, bits)),
        Sample("uint8", (features, bits.to_dense(torch.uint8))),
        Sample("channels last", (features.contiguous(memory_format=torch.channels_last), bits)),
        Sample("no masks", (features, bits[:, :0])),
        Sample("no images", (features[:0], bits[:0])),
        Sample("no channels", (features[:, :0], bits)),
        Sample("no cells", (features[..., :0], soft[..., :0])),
    ]


def _mask_oracle(features: Tensor, masks: BitMasks | Tensor) -> Tensor:
    """numpy's mean of the selected columns."""
    import numpy as np

    bits = masks if isinstance(masks, BitMasks) else pack_masks(masks)
    picked, map_ = bits.to_dense().cpu().numpy(), features.cpu().numpy()
    out = np.zeros((*bits.shape, features.shape[1]))
    for b, l in np.ndindex(*bits.shape):
        if picked[b, l].any():
            out[b, l] = map_[b][:, picked[b, l]].mean(1)
    return torch.from_numpy(out).to(features.device)


_masks = torch.zeros(2, 6, 4, 5)
_meta_bits = BitMasks(torch.zeros(2, 6, 1, dtype=torch.int32, device="meta"), (4, 5))
_bad_mask = refusals(mask_mean)

MASK_MEAN = OpSpec(
    mask_mean, _mask_samples, ("mask_mean",), gradients=("features",), oracle=_mask_oracle, bound=_mean_bound,
    errors=(
        _bad_mask("a number", r"features must be a tensor, got int", 1, _masks, error=TypeError),
        _bad_mask("one map", r"features must have shape \(B, C, H, W\)", _x[0], _masks),
        _bad_mask("no masks", r"masks must be a BitMasks or a dense tensor, got NoneType", _x, None, error=TypeError),
        _bad_mask("another size", r"masks must have the size of the map, \(4, 5\), got \(4, 4\); resize", _x, _masks[..., :4]),
        _bad_mask("masks of one image", r"masks must have batch dimensions \(B, L\) with B = 2, got \(6,\)", _x, _masks[0]),
        _bad_mask("masks of other images", r"masks must have batch dimensions \(B, L\) with B = 2, got \(1, 6\)", _x, _masks[:1]),
        _bad_mask("another device", r"masks must be on the device of features", _x, _meta_bits),
    ),
)  # fmt: skip


SPECS = [REGION_MEAN, MASK_MEAN]


# ---- benchmarks: the shapes of the method on P5

_B, _L, _C, _H, _W = 16, 20, 256, 25, 42
_B_GPU = 12
Make = Callable[[torch.device, torch.dtype, int], Sample]


def _bench(batch: int, height: int, width: int, boxes: bool) -> Make:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        features = torch.randn(batch, _C, height, width, generator=random(seed)).to(device, dtype)
        masks = (blobs(batch * _L, height, width, seed) > 0.5).reshape(batch, _L, height, width)
        bits = pack_masks(masks)  # on the CPU, so that every device gets the same boxes
        if boxes:
            return Sample("", (features, (bits.boxes().float() + 0.25).to(device)))
        return Sample("", (features, BitMasks(bits.words.to(device), bits.size)))

    return make


_region_bench, _mask_bench = _bench(_B, _H, _W, True), _bench(_B, _H, _W, False)


def _region_eager(features: Tensor, boxes: Tensor) -> Tensor:
    """A loop over boxes, like the released code."""
    out = [
        features[b, :, r0:r1, c0:c1].mean((1, 2))
        for b, rows in enumerate(boxes.tolist())
        for c0, r0, c1, r1 in (_cells(box, *features.shape[2:]) for box in rows)
    ]
    return torch.stack(out).unflatten(0, boxes.shape[:2])


def _region_vectorised(features: Tensor, boxes: Tensor) -> Tensor:
    """The boxes as masks of 0 and 1, and one product."""
    height, width = features.shape[2:]
    c0, r0 = boxes[..., 0].floor().clamp(0, width - 1), boxes[..., 1].floor().clamp(0, height - 1)
    c1, r1 = boxes[..., 2].ceil().clamp(max=width), boxes[..., 3].ceil().clamp(max=height)
    c1, r1 = torch.maximum(c1, c0 + 1), torch.maximum(r1, r0 + 1)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    columns = (x >= c0[..., None]) & (x < c1[..., None])
    rows = (y >= r0[..., None]) & (y < r1[..., None])
    inside = (rows[..., :, None] & columns[..., None, :]).flatten(2).to(features.dtype)
    area = ((c1 - c0) * (r1 - r0))[..., None].to(features.dtype)
    return inside @ features.flatten(2).mT / area


def _mask_eager(features: Tensor, masks: BitMasks) -> Tensor:
    dense = masks.to_dense()
    out = [
        features[b][:, m].mean(1) if m.any() else features.new_zeros(features.shape[1])
        for b, row in enumerate(dense)
        for m in row
    ]
    return torch.stack(out).unflatten(0, masks.shape)


def _mask_vectorised(features: Tensor, masks: BitMasks) -> Tensor:
    dense = masks.to_dense(features.dtype).flatten(2)
    return dense @ features.flatten(2).mT / dense.sum(-1, keepdim=True).clamp(min=1)


_all_floats = (torch.float32, torch.bfloat16, torch.float16)
_map_bytes = 4.0 * _B * _C * _H * _W

BENCHES = [
    Bench(
        region_mean, "B 16, L 20, C 256, 25x42", _region_bench, _region_eager, vectorised=_region_vectorised,
        libraries={"one product": _region_vectorised}, dtypes=_all_floats, bytes=_map_bytes, gradients=("features",),
        goals={"forward": 10, "full": 5},
    ),
    Bench(
        mask_mean, "B 16, L 20, C 256, 25x42, blobs", _mask_bench, _mask_eager, vectorised=_mask_vectorised,
        libraries={"one product": _mask_vectorised}, dtypes=_all_floats, bytes=_map_bytes, gradients=("features",),
        goals={"forward": 10, "full": 5},
    ),
    *(
        Bench(
            function, f"B {_B_GPU}, L 20, C 256, {h}x{w}{note}", _bench(_B_GPU, h, w, function is region_mean), eager,
            vectorised=vectorised, libraries={"one product": vectorised}, dtypes=(torch.float32, torch.bfloat16), device="cuda",
            bytes=4.0 * _B_GPU * _C * h * w, gradients=("features",),
        )
        for function, eager, vectorised, note in (
            (region_mean, _region_eager, _region_vectorised, ""), (mask_mean, _mask_eager, _mask_vectorised, ", blobs"),
        )
        for h, w in ((25, 42), (100, 168))
    ),
]  # fmt: skip

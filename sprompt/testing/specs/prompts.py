"""region_mean, mask_mean, prompt_match."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import PromptMatch, mask_mean, pack_masks, prompt_match, region_mean
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Sample, blobs, random

MAPS = ((1, 1, 1), (5, 9, 1), (9, 25, 42), (16, 4, 8), (3, 11, 70))  # C, H, W


def _counts(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


# ---- region_mean


def random_boxes(batch: int, length: int, height: int, width: int, seed: int) -> Tensor:
    """Boxes in cells, corners anywhere from one half outside the map on each side."""
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
    whole = torch.tensor([[0, 0, 9, 6], [2, 1, 2, 1], [8, 5, 3, 2], [-7, -7, -3, -3], [20, 20, 30, 30], [0, 5, 9, 6]], device=device)
    edges = torch.tensor([[0.5, 0.5, 8.5, 5.5], [1e30, -1e30, -1e30, 1e30], [-0.5, -0.5, 0.0, 0.0], [8.999, 5.999, 9.001, 6.001]])
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
    ]  # fmt: skip


def _cells(box: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """c0, r0, c1, r1 by the formula of the method, moved to the nearest cell if outside."""
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
    """A sum of n terms in float32 is off by at most n units of rounding of the sum of their magnitudes."""
    n = sample.args[0].shape[-2:].numel()
    return (n + 2) * 2.0**-24, (n + 2) * 2.0**-24


_map = torch.zeros(2, 3, 4, 5)
_boxes = torch.zeros(2, 6, 4)
_bad_box = torch.tensor([[[0, 0, 1, 1], [0, 0, math.nan, 1]], [[0, 0, 1, 1], [math.inf, 0, 1, 1]]])

REGION_MEAN = OpSpec(
    region_mean, _region_samples, ("region_mean",), gradients=("features",), oracle=_region_oracle, bound=_mean_bound,
    errors=(
        ErrorCase("a list", lambda: region_mean([1], _boxes), TypeError, r"region_mean: features must be a tensor, got list"),
        ErrorCase("integer map", lambda: region_mean(_map.int(), _boxes), TypeError, r"region_mean: features must have dtype float32, .*, got int32"),
        ErrorCase("one map", lambda: region_mean(_map[0], _boxes), ValueError, r"region_mean: features must have shape \(B, C, H, W\), got \(3, 4, 5\); add"),
        ErrorCase("boxes of one image", lambda: region_mean(_map, _boxes[0]), ValueError, r"region_mean: boxes must have shape \(B, L, 4\), got \(6, 4\)"),
        ErrorCase("five numbers", lambda: region_mean(_map, torch.zeros(2, 6, 5)), ValueError, r"region_mean: boxes must have shape \(B, L, 4\), got \(2, 6, 5\)"),
        ErrorCase("boxes of other images", lambda: region_mean(_map, _boxes[:1]), ValueError, r"region_mean: boxes must have shape"),
        ErrorCase("bool boxes", lambda: region_mean(_map, _boxes.bool()), TypeError, r"region_mean: boxes must have dtype .*, got bool"),
        ErrorCase("a NaN box", lambda: region_mean(_map, _bad_box), ValueError, r"region_mean: boxes must be finite, got \[0.0, 0.0, nan, 1.0\] at \[0, 1\]"),
        ErrorCase("an infinite box", lambda: region_mean(_map, _bad_box, torch.tensor([1, 2])), ValueError, r"region_mean: boxes must be finite, got \[inf, 0.0, 1.0, 1.0\] at \[1, 1\]"),
        ErrorCase("int32 counts", lambda: region_mean(_map, _boxes, torch.tensor([1, 2], dtype=torch.int32)), TypeError, r"region_mean: counts must have dtype int64, got int32"),
        ErrorCase("three counts", lambda: region_mean(_map, _boxes, torch.tensor([1, 2, 3])), ValueError, r"region_mean: counts must have shape \(B,\) = \(2,\), got \(3,\)"),
        ErrorCase("too many", lambda: region_mean(_map, _boxes, torch.tensor([1, 7])), ValueError, r"region_mean: counts must lie between 0 and 6, got 7"),
        ErrorCase("another device", lambda: region_mean(_map, _boxes.to("meta")), ValueError, r"region_mean: boxes must be on the device of features \(cpu\), got meta"),
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
    """numpy's mean of the picked columns."""
    import numpy as np

    bits = masks if isinstance(masks, BitMasks) else pack_masks(masks)
    picked, map_ = bits.to_dense().cpu().numpy(), features.cpu().numpy()
    out = np.zeros((*bits.shape, features.shape[1]))
    for b, l in np.ndindex(*bits.shape):
        if picked[b, l].any():
            out[b, l] = map_[b][:, picked[b, l]].mean(1)
    return torch.from_numpy(out).to(features.device)


_masks = torch.zeros(2, 6, 4, 5)

MASK_MEAN = OpSpec(
    mask_mean, _mask_samples, ("mask_mean",), gradients=("features",), oracle=_mask_oracle, bound=_mean_bound,
    errors=(
        ErrorCase("a number", lambda: mask_mean(1, _masks), TypeError, r"mask_mean: features must be a tensor, got int"),
        ErrorCase("one map", lambda: mask_mean(_map[0], _masks), ValueError, r"mask_mean: features must have shape \(B, C, H, W\)"),
        ErrorCase("no masks", lambda: mask_mean(_map, None), TypeError, r"mask_mean: masks must be a BitMasks or a dense tensor, got NoneType"),
        ErrorCase("another size", lambda: mask_mean(_map, _masks[..., :4]), ValueError, r"mask_mean: masks must have the size of the map, \(4, 5\), got \(4, 4\); resize"),
        ErrorCase("masks of one image", lambda: mask_mean(_map, _masks[0]), ValueError, r"mask_mean: masks must have batch dimensions \(B, L\) with B = 2, got \(6,\)"),
        ErrorCase("masks of other images", lambda: mask_mean(_map, _masks[:1]), ValueError, r"mask_mean: masks must have batch dimensions \(B, L\) with B = 2, got \(1, 6\)"),
        ErrorCase("another device", lambda: mask_mean(_map, BitMasks(torch.zeros(2, 6, 1, dtype=torch.int32, device="meta"), (4, 5))), ValueError, r"mask_mean: masks must be on the device of features"),
    ),
)  # fmt: skip


# ---- prompt_match


def _match_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def draw(*shape: int, offset: int = 0) -> Tensor:
        return torch.randn(shape, generator=random(seed + offset)).to(device, dtype)

    samples = []
    for b, n, l, c in ((2, 20, 7, 16), (1, 1, 1, 1), (2, 33, 5, 19), (3, 4, 2, 8), (1, 70, 300, 12), (2, 6, 1, 5)):
        samples.append(Sample(f"{b}, {n} kernels, {l} prompts of {c}", (draw(b, n, c), draw(b, l, c, offset=1))))
    kernels, prompts = draw(3, 9, 24), draw(3, 6, 24, offset=1)
    counts = _counts(device, 3, 0, 6)
    padded = prompts.clone()
    padded[0, 3:], padded[1] = float("nan"), float("nan")
    many = draw(2, 23, 24, offset=2)
    return [
        *samples,
        Sample("counts, padding of NaN", (kernels, padded, counts)),
        Sample("shared kernels", (kernels[0], prompts, counts)),
        Sample("all dropped", (kernels, prompts), {"dropout": 1.0}),
        Sample("sequential", (kernels, prompts), {"assign": "sequential", "counts": counts}),
        Sample("sequential, 20 kernels, 23 prompts", (draw(20, 24), many), {"assign": "sequential"}),
        Sample("random, one kernel", (kernels[:, :1], prompts), {"assign": "random", "counts": counts}),
        Sample("half and float32 kernels", (kernels, prompts.float())),
        Sample("no prompts", (kernels, prompts[:, :0])),
        Sample("no kernels", (kernels[:, :0], prompts)),
        Sample("no images", (kernels[:0], prompts[:0], counts[:0])),
        Sample("shared kernels, no images", (kernels[0], prompts[:0])),
        Sample("no channels", (kernels[..., :0], prompts[..., :0])),
    ]


def match_extremes(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Calls whose match jumps at the smallest change, so that they have no place among those whose gradient is checked."""
    kernels = torch.randn(3, 9, 24, generator=random(seed)).to(device, dtype)
    prompts = torch.randn(3, 6, 24, generator=random(seed + 1)).to(device, dtype)
    equal = prompts[:, :1].repeat(1, 6, 1)
    equal[1] = -equal[1]
    holes = prompts.clone()
    holes[0, 1] = float("nan")
    holes[1] = float("nan")
    holes[2, 3:, 0] = float("inf")
    kernel_holes = kernels.clone()
    kernel_holes[0, 4] = float("nan")
    zeros = prompts.clone()
    zeros[:, 2] = 0
    return [
        Sample("equal prompts", (kernels, equal)),
        Sample("NaN and infinite prompts", (kernels, holes)),
        Sample("a NaN kernel", (kernel_holes, prompts)),
        Sample("zero prompt, zero kernel", (kernels * (torch.arange(9, device=device) > 4)[:, None], zeros)),
    ]


def _slot(turn: int, number: int, length: int) -> int:
    """The prompt of kernel `turn` of `number`, by writing the 20 slots out."""
    each, rest = 20 // length, 20 % length
    slots = [l for l in range(length) for _ in range(each)] + list(range(rest))
    return slots[turn * 20 // number]


def match_oracle(
    kernels: Tensor, prompts: Tensor, counts: Tensor | None = None, *, assign: str = "cosine", dropout: float = 0.0
) -> PromptMatch:
    """One kernel at a time in numpy; what is drawn must not matter (one kernel, or all dropped)."""
    import numpy as np

    batch, length, channels = prompts.shape
    k = kernels.expand(batch, *kernels.shape[-2:]).cpu().numpy().copy()
    p, index = prompts.cpu().numpy(), np.full((batch, kernels.shape[-2]), -1, dtype=np.int64)
    for b, n in np.ndindex(*index.shape):
        real = length if counts is None else int(counts[b])
        if real == 0 or dropout == 1:
            continue
        if assign == "cosine":
            with np.errstate(invalid="ignore"):
                norm = np.maximum(np.linalg.norm(k[b, n]), 1e-8) * np.maximum(np.linalg.norm(p[b, :real], axis=1), 1e-8)
                similarity = (p[b, :real] * k[b, n]).sum(1) / norm
            index[b, n] = np.argmax(np.where(np.isnan(similarity), -np.inf, similarity))
        else:
            index[b, n] = _slot(n, index.shape[1], real)
    out = k + np.where(index[..., None] >= 0, np.take_along_axis(p, np.maximum(index, 0)[..., None], 1), 0) if length else k
    return PromptMatch(torch.from_numpy(out), torch.from_numpy(index))


def compare_match(actual: PromptMatch, expected: PromptMatch, sample: Sample) -> None:
    """Indices equal, but where two prompts are equally similar up to rounding; kernels exactly kernel + prompt of the index."""
    kernels, prompts = (x.cpu() for x in sample.args[:2])
    index, wanted = actual.index.cpu(), expected.index.cpu()
    channels = prompts.shape[-1]
    if prompts.shape[1] == 0:
        assert torch.equal(index, torch.full_like(index, -1))
    assert torch.equal(index < 0, wanted < 0) and bool((index < max(prompts.shape[1], 1)).all())
    differ = index != wanted
    if differ.any():
        k = kernels.double().expand(*index.shape, channels)
        near, best = (
            F.cosine_similarity(k, prompts.double().gather(1, i.clamp(min=0)[..., None].expand(-1, -1, channels)), -1)
            for i in (index, wanted)
        )
        gap = (best - near).abs()[differ]
        assert bool((gap <= 4 * (channels + 4) * 2.0**-24).all()), f"less similar prompts taken, by {gap.max():.3g}"
    chosen = prompts.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels)) if prompts.shape[1] else 0
    sum_ = torch.where(index[..., None] >= 0, kernels + chosen, kernels.expand(*index.shape, channels))
    torch.testing.assert_close(actual.kernels.cpu(), sum_, rtol=0, atol=0, equal_nan=True)


_kernels = torch.zeros(2, 5, 8)
_prompts = torch.zeros(2, 3, 8)

PROMPT_MATCH = OpSpec(
    prompt_match, _match_samples, ("prompt_match",), gradients=("kernels", "prompts"), oracle=match_oracle,
    compare=compare_match, bound=lambda sample: (1e-5, 1e-5),
    errors=(
        ErrorCase("a list", lambda: prompt_match([1], _prompts), TypeError, r"prompt_match: kernels must be a tensor, got list"),
        ErrorCase("integer kernels", lambda: prompt_match(_kernels.long(), _prompts), TypeError, r"prompt_match: kernels must have dtype float32, .*, got int64"),
        ErrorCase("integer prompts", lambda: prompt_match(_kernels, _prompts.long()), TypeError, r"prompt_match: prompts must have dtype float32, .*, got int64"),
        ErrorCase("prompts of one image", lambda: prompt_match(_kernels, _prompts[0]), ValueError, r"prompt_match: prompts must have shape \(B, L, C\), got \(3, 8\)"),
        ErrorCase("one kernel", lambda: prompt_match(_kernels[0, 0], _prompts), ValueError, r"prompt_match: kernels must have shape \(B, N, C\) or \(N, C\)"),
        ErrorCase("kernels of other images", lambda: prompt_match(_kernels[:1], _prompts), ValueError, r"prompt_match: kernels must have shape \(B, N, C\) or \(N, C\), got \(1, 5, 8\); kernels and prompts share"),
        ErrorCase("batch in the middle", lambda: prompt_match(_kernels.transpose(0, 1), _prompts), ValueError, r"prompt_match: kernels must have shape"),
        ErrorCase("other channels", lambda: prompt_match(_kernels[0, :, :7], _prompts), ValueError, r"prompt_match: kernels must have shape \(N, C\), got \(5, 7\)"),
        ErrorCase("float counts", lambda: prompt_match(_kernels, _prompts, torch.ones(2)), TypeError, r"prompt_match: counts must have dtype int64, got float32"),
        ErrorCase("one count", lambda: prompt_match(_kernels, _prompts, torch.tensor([1])), ValueError, r"prompt_match: counts must have shape \(B,\) = \(2,\), got \(1,\)"),
        ErrorCase("negative count", lambda: prompt_match(_kernels, _prompts, torch.tensor([-1, 1])), ValueError, r"prompt_match: counts must lie between 0 and 3, got -1"),
        ErrorCase("unknown assignment", lambda: prompt_match(_kernels, _prompts, assign="euclid"), ValueError, r"prompt_match: assign must be one of 'cosine', 'sequential', 'random', got 'euclid'"),
        ErrorCase("dropout above 1", lambda: prompt_match(_kernels, _prompts, dropout=1.5), ValueError, r"prompt_match: dropout must be a number between 0 and 1, got 1.5"),
        ErrorCase("dropout of text", lambda: prompt_match(_kernels, _prompts, dropout="0.1"), TypeError, r"prompt_match: dropout must be a number between 0 and 1, got '0.1'"),
        ErrorCase("a seed", lambda: prompt_match(_kernels, _prompts, generator=3), TypeError, r"prompt_match: generator must be a torch.Generator or None, got int"),
        ErrorCase("another device", lambda: prompt_match(_kernels, _prompts.to("meta")), ValueError, r"prompt_match: prompts must be on the device of kernels \(cpu\), got meta"),
    ),
)  # fmt: skip

SPECS = [REGION_MEAN, MASK_MEAN, PROMPT_MATCH]


# ---- benchmarks: the shapes of the method on P5

_B, _N, _L, _C, _H, _W = 16, 100, 20, 256, 25, 42


def _blob_masks(device: torch.device, seed: int) -> Tensor:
    return (blobs(_B * _L, _H, _W, seed, device) > 0.5).reshape(_B, _L, _H, _W)


def _region_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    features = torch.randn(_B, _C, _H, _W, generator=random(seed)).to(device, dtype)
    return Sample("", (features, pack_masks(_blob_masks(device, seed)).boxes().float() + 0.25))


def _mask_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    features = torch.randn(_B, _C, _H, _W, generator=random(seed)).to(device, dtype)
    return Sample("", (features, pack_masks(_blob_masks(device, seed))))


def _region_eager(features: Tensor, boxes: Tensor) -> Tensor:
    """A loop over boxes, as the released code."""
    out = [
        features[b, :, r0:r1, c0:c1].mean((1, 2))
        for b, rows in enumerate(boxes.tolist())
        for c0, r0, c1, r1 in (_cells(box, *features.shape[2:]) for box in rows)
    ]
    return torch.stack(out).unflatten(0, boxes.shape[:2])


def _region_vectorised(features: Tensor, boxes: Tensor) -> Tensor:
    """The boxes as 0 and 1, one product."""
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
    out = [features[b][:, m].mean(1) if m.any() else features.new_zeros(features.shape[1]) for b, row in enumerate(dense) for m in row]
    return torch.stack(out).unflatten(0, masks.shape)


def _mask_vectorised(features: Tensor, masks: BitMasks) -> Tensor:
    dense = masks.to_dense(features.dtype).flatten(2)
    return dense @ features.flatten(2).mT / dense.sum(-1, keepdim=True).clamp(min=1)


def _match_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    kernels = torch.randn(_B, _N, _C, generator=random(seed)).to(device, dtype)
    return Sample("", (kernels, torch.randn(_B, _L, _C, generator=random(seed + 1)).to(device, dtype)))


def _shared_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    kernels, prompts = _match_bench(device, dtype, seed).args
    return Sample("", (kernels[0], prompts))


def _match_eager(kernels: Tensor, prompts: Tensor) -> PromptMatch:
    """A loop over kernels, as the released code."""
    kernels = kernels.expand(prompts.shape[0], *kernels.shape[-2:])
    out, index = [], []
    for b in range(kernels.shape[0]):
        for n in range(kernels.shape[1]):
            chosen = F.cosine_similarity(kernels[b, n][None], prompts[b]).argmax()
            index.append(chosen)
            out.append(kernels[b, n] + prompts[b, chosen])
    shape = kernels.shape[:2]
    return PromptMatch(torch.stack(out).unflatten(0, shape), torch.stack(index).unflatten(0, shape))


def _match_vectorised(kernels: Tensor, prompts: Tensor) -> PromptMatch:
    kernels = kernels.expand(prompts.shape[0], *kernels.shape[-2:])
    with torch.no_grad():
        unit_k, unit_p = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (kernels, prompts))
        index = (unit_k @ unit_p.mT).argmax(-1)
    return PromptMatch(kernels + prompts.gather(1, index[..., None].expand(-1, -1, prompts.shape[-1])), index)


_all_floats = (torch.float32, torch.bfloat16, torch.float16)
_map_bytes = 4.0 * _B * _C * _H * _W
_match_numbers = _B * _C * (2 * _N + _L)

BENCHES = [
    Bench(
        region_mean, "B 16, L 20, C 256, 25x42", _region_bench, _region_eager, vectorised=_region_vectorised,
        library=("one product", _region_vectorised), dtypes=_all_floats, bytes=_map_bytes, gradients=("features",),
        goals={"forward": 10, "full": 5},
    ),
    Bench(
        mask_mean, "B 16, L 20, C 256, 25x42, blobs", _mask_bench, _mask_eager, vectorised=_mask_vectorised,
        library=("one product", _mask_vectorised), dtypes=_all_floats, bytes=_map_bytes, gradients=("features",),
        goals={"forward": 10, "full": 5},
    ),
    Bench(
        prompt_match, "B 16, N 100, L 20, C 256", _match_bench, _match_eager, vectorised=_match_vectorised,
        library=("vectorised eager", _match_vectorised), agree=compare_match, dtypes=_all_floats,
        flops=2.0 * _B * _N * _L * _C, bytes=4.0 * _match_numbers, gradients=("kernels", "prompts"),
        goals={"forward": 150, "library": 4},
    ),
    Bench(
        prompt_match, "B 16, N 100 shared, L 20, C 256", _shared_bench, _match_eager, vectorised=_match_vectorised,
        library=("vectorised eager", _match_vectorised), agree=compare_match,
        flops=2.0 * _B * _N * _L * _C, bytes=4.0 * (_match_numbers - (_B - 1) * _N * _C), gradients=("kernels", "prompts"),
        goals={"forward": 150, "library": 4},
    ),
]  # fmt: skip

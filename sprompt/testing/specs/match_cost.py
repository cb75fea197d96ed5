"""match_cost."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import BitMasks
from sprompt.ops import match_cost, pack_masks
from sprompt.testing.spec import Bench, OpSpec, Sample, blobs, random, refusals
from sprompt.testing.specs.mask_loss import LAYOUTS, exact_targets, exact_upsampled, make_targets, prepared


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (h, w, upsample, kind) in enumerate(LAYOUTS):
        g = random(seed + number)
        B, N, G, K = 2, (5, 4, 1, 7)[number % 4], (3, 1, 4, 8, 2)[number % 5], (1, 6)[number % 2]
        logits = (3 * torch.randn(B, N, h, w, generator=g)).to(device, dtype)
        targets = make_targets(kind, (B, G), h * upsample, w * upsample, device, dtype, seed + number)
        options = {"upsample": upsample}
        if number % 3 != 1:
            options["class_logits"] = (2 * torch.randn(B, N, K, generator=g)).to(device, dtype)
            options["labels"] = torch.randint(0, K, (B, G), generator=g).to(device)
        if number % 2:
            options["counts"] = torch.tensor([G, G - 1], device=device)
        if number % 4 == 3:
            options["weights"] = (0.5, 3.0, 1.0)
        samples.append(Sample(f"{h}x{w}, up {upsample}, {kind}", (logits, targets), options))
    g = random(seed)
    logits = (3 * torch.randn(2, 6, 12, 20, generator=g)).to(device, dtype)
    logits[0, 0], logits[0, 1] = 60, -60
    classes = (2 * torch.randn(2, 6, 4, generator=g)).to(device, dtype)
    classes[0, 0], classes[0, 1] = 40, -40
    labels = torch.tensor([[3, 0, 1, 2, 0], [1, 2, 99, -5, 2**40]], device=device)
    soft = make_targets("float", (2, 5), 12, 20, device, dtype, seed)
    spots = torch.zeros(2, 5, 12, 20, dtype=torch.bool, device=device)
    spots[0, 1, 3, 7] = spots[0, 2, 11, 19] = spots[1, 0, 0, 0] = True
    bits = make_targets("bits 4", (2, 5), 24, 40, device, dtype, seed)
    counts = torch.tensor([5, 2], device=device)
    return [
        *samples,
        Sample("labels of padding are anything", (logits, soft, classes, labels, counts)),
        Sample("targets of one pixel and none", (logits, spots)),
        Sample("an image without targets", (logits, bits, classes, labels.clamp(0, 3), counts - 2), {"upsample": 2}),
        Sample("one weight", (logits, soft), {"weights": (0, 0, 1)}),
        Sample("no targets", (logits, soft[:, :0], classes, labels[:, :0], counts * 0)),
        Sample("no kernels", (logits[:, :0], bits, classes[:, :0], labels.clamp(0, 3)), {"upsample": 2}),
        Sample("no images", (logits[:0], soft[:0])),
        Sample("no rows", (logits[:, :, :0], soft[:, :, :0], classes, labels, counts)),
        Sample("no columns", (logits[..., :0], spots[..., :0])),
    ]


def _oracle(
    mask_logits: Tensor,
    targets: BitMasks | Tensor,
    class_logits: Tensor | None = None,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    weights: tuple[float, float, float] = (2.0, 1.0, 4.0),
    upsample: int = 1,
) -> Tensor:
    """Computes one pair at a time, in float64."""
    z = exact_upsampled(mask_logits, upsample)
    t = exact_targets(targets, *z.shape[2:])
    p = 1 / (1 + np.exp(-z))
    pixels = max(p.shape[2] * p.shape[3], 1)
    cost = np.zeros((*z.shape[:2], t.shape[1]))
    for b, n, g in np.ndindex(*cost.shape):
        if counts is not None and g >= int(counts[b]):
            continue
        x, y = p[b, n], t[b, g]
        agreement = (x * y + (1 - x) * (1 - y)).sum() / pixels
        overlap = 2 * (x * y).sum() / (((x * x).sum() + 1e-3) + ((y * y).sum() + 1e-3))
        cost[b, n, g] = -weights[1] * agreement - weights[2] * overlap
        if class_logits is not None and labels is not None:
            v = float(class_logits[b, n, int(labels[b, g])])
            q, rest = 1 / (1 + np.exp(-v)), 1 / (1 + np.exp(v))
            focal = 0.75 * q**2 * np.log(rest + 1e-12) - 0.25 * rest**2 * np.log(q + 1e-12)
            cost[b, n, g] += weights[0] * focal
    return torch.from_numpy(cost).to(mask_logits.device)


def _eager(
    mask_logits: Tensor,
    targets: BitMasks | Tensor,
    class_logits: Tensor,
    labels: Tensor,
    counts: Tensor | None = None,
    *,
    upsample: int = 1,
) -> Tensor:
    """The released code: upsamples all masks, then for each image a sigmoid, three products and the temporaries 1 − p, 1 −
    t."""
    upsampled = F.interpolate(mask_logits, scale_factor=upsample, mode="bilinear", align_corners=False)
    soft = prepared(targets, (upsampled.shape[2], upsampled.shape[3]), upsampled.dtype)
    costs = []
    for b in range(len(upsampled)):
        q = class_logits[b].sigmoid()
        negative = -(1 - q + 1e-12).log() * 0.75 * q.pow(2)
        positive = -(q + 1e-12).log() * 0.25 * (1 - q).pow(2)
        class_cost = positive[:, labels[b]] - negative[:, labels[b]]
        p, t = upsampled[b].sigmoid().flatten(1), soft[b].flatten(1).to(upsampled.dtype)
        common = torch.einsum("nc,mc->nm", p, t)
        mask_cost = -(common + torch.einsum("nc,mc->nm", 1 - p, 1 - t)) / p.shape[1]
        a = 2 * torch.einsum("nc,mc->nm", p, t)
        dice = -a / ((torch.sum(p * p, 1) + 1e-3)[:, None] + (torch.sum(t * t, 1) + 1e-3)[None])
        costs.append(2 * class_cost + mask_cost + 4 * dice)
    return torch.stack(costs).float()


def _vectorised(
    mask_logits: Tensor,
    targets: BitMasks | Tensor,
    class_logits: Tensor,
    labels: Tensor,
    counts: Tensor | None = None,
    *,
    upsample: int = 1,
) -> Tensor:
    z = F.interpolate(mask_logits, scale_factor=upsample, mode="bilinear", align_corners=False)
    t = prepared(targets, (z.shape[2], z.shape[3]), z.dtype).to(z.dtype).flatten(2)
    p = z.sigmoid().flatten(2)
    common = p @ t.mT
    agree = p.shape[2] - p.sum(2)[:, :, None] - t.sum(2)[:, None] + 2 * common
    dice = 2 * common / ((p * p).sum(2)[:, :, None] + (t * t).sum(2)[:, None] + 2e-3)
    q = class_logits.gather(2, labels[:, None].expand(-1, class_logits.shape[1], -1)).sigmoid()
    focal = 0.75 * q**2 * (1 - q + 1e-12).log() - 0.25 * (1 - q) ** 2 * (q + 1e-12).log()
    return (2 * focal - agree / p.shape[2] - 4 * dice).float()


_z, _t, _c = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 4, 5), torch.zeros(2, 3, 7)
_l = torch.zeros(2, 6, dtype=torch.int64)
_seven = torch.full((2, 6), 7)
_b = BitMasks(torch.zeros(2, 6, 1, dtype=torch.int32), (4, 5))
_bad = refusals(match_cost)

_errors = (
    _bad("a list", r"mask_logits must be a tensor, got list", [_z], _t, error=TypeError),
    _bad("bool logits", r"mask_logits must have dtype float32, .* got bool", _z > 0, _t, error=TypeError),
    _bad("one image", r"mask_logits must have shape \(B, N, h, w\), got \(3, 4, 5\); one image", _z[0], _t),
    _bad("a string of targets", r"targets must be a BitMasks or a dense tensor, got str", _z, "masks", error=TypeError),
    _bad("int32 targets", r"targets must have dtype bool, uint8, .* got int32; convert", _z, _t.int(), error=TypeError),
    _bad("targets of an image", r"targets must have shape \(B, G, h·upsample, w·upsample\), got \(6, 4, 5\)", _z, _t[0]),
    _bad("low targets", r"targets must have shape .*, got \(2, 6, 4, 5\)", _z, _t, upsample=3),
    _bad("bits of an image", r"targets must be BitMasks of shape \(B, G\), got \(6,\)", _z, _b[0]),
    _bad("bits of half", r"targets must be BitMasks of 1, 2 or 4 times the size of the loss, \(8, 10\), got \(4, 5\)", _z, _b, upsample=2),
    _bad("classes without labels", r"labels must be given with class_logits, got None", _z, _t, _c),
    _bad("labels without classes", r"class_logits must be given with labels, got None", _z, _t, None, _l),
    _bad("integer class logits", r"class_logits must have dtype float32", _z, _t, _c.long(), _l, error=TypeError),
    _bad("classes of other kernels", r"class_logits must have shape \(B, N, K\), got \(2, 2, 7\)", _z, _t, _c[:, 1:], _l),
    _bad("no classes", r"class_logits must have at least one class, got", _z, _t, _c[..., :0], _l),
    _bad("int32 labels", r"labels must have dtype int64, got int32", _z, _t, _c, _l.int(), error=TypeError),
    _bad("fewer labels", r"labels must have shape \(B, G\) = \(2, 6\), got \(2, 5\)", _z, _t, _c, _l[:, 1:]),
    _bad("a label of K", r"labels must lie between 0 and 6, got 7", _z, _t, _c, _seven),
    _bad("a real label of K", r"labels must lie between 0 and 6, got 7", _z, _t, _c, _seven, torch.tensor([0, 1])),
    _bad("float counts", r"counts must have dtype int64, got float32", _z, _t, error=TypeError, counts=torch.ones(2)),
    _bad("counts of an image", r"counts must have shape \(B,\) = \(2,\), got \(1,\)", _z, _t, counts=torch.ones(1).long()),
    _bad("counts above G", r"counts must lie between 0 and 6, got 7", _z, _t, counts=torch.tensor([7, 0])),
    _bad("counts below 0", r"counts must lie between 0 and 6, got -1", _z, _t, counts=torch.tensor([0, -1])),
    _bad("two weights", r"weights must be three numbers \(class, bce, dice\), got \(1, 2\)", _z, _t, error=TypeError, weights=(1, 2)),
    _bad("a weight of NaN", r"weights must be three numbers \(class, bce, dice\), got nan", _z, _t, weights=(1, 1, float("nan"))),
    _bad("upsample True", r"upsample must be a whole number of at least 1, got True", _z, _t, error=TypeError, upsample=True),
    _bad("upsample -2", r"upsample must be a whole number of at least 1, got -2", _z, _t, upsample=-2),
    _bad("devices differ", r"labels must be on the device of mask_logits \(cpu\), got meta", _z, _t, _c, _l.to("meta")),
)  # fmt: skip

SPECS = [
    OpSpec(
        match_cost, _samples, ("match_cost",), oracle=_oracle, errors=_errors,
    ),
]  # fmt: skip


def _bench(kind: str, images: int = 1) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        g = random(seed)
        logits = (3 * torch.randn(images, 100, 100, 168, generator=g)).to(device, dtype)
        classes, labels = (
            torch.randn(images, 100, 80, generator=g).to(device, dtype),
            torch.randint(0, 80, (images, 20), generator=g),
        )
        bits = pack_masks(blobs(20, 800, 1344, seed, device))[None]  # of one image; the other images get the same
        if kind == "bits 4":
            targets: BitMasks | Tensor = bits
        elif kind == "noise":
            targets = make_targets("float", (1, 20), 200, 336, device, dtype, seed)
        else:
            targets = F.interpolate(bits.to_dense(torch.float32), size=(200, 336), mode="bilinear")
            targets = pack_masks(targets) if kind == "bits 1" else targets.to(dtype)
        if isinstance(targets, BitMasks):
            targets = BitMasks(targets.words.repeat(images, 1, 1), targets.size)
        else:
            targets = targets.repeat(images, 1, 1, 1)
        return Sample("", (logits, targets, classes, labels.to(device)), {"upsample": 2})

    return make


BENCHES = [
    Bench(
        match_cost, f"100 x 20 on (100x168) up 2, {name}", _bench(kind), _eager, vectorised=_vectorised if kind != "bits 4" else False,
        dtypes=(torch.float32, torch.bfloat16) if kind == "float" else (torch.float32,),
        flops=2 * 100 * 20 * 67200 + 100 * 67200 * 30, bytes=100 * 16800 * 4 + 20 * 67200 * size, goals={"forward": 8, "memory": 10},
    )
    for kind, name, size in (
        ("float", "soft targets", 4.0), ("noise", "noise as targets", 4.0), ("bits 1", "bits", 1 / 8), ("bits 4", "bits of 800x1344", 2.0),
    )
] + [
    Bench(
        match_cost, f"12 images, 100 x 20 on (100x168) up 2, {name}", _bench(kind, 12), _eager,
        vectorised=_vectorised if kind != "bits 4" else False, dtypes=(torch.float32, torch.bfloat16), device="cuda",
        flops=12 * (2 * 100 * 20 * 67200 + 100 * 67200 * 30), bytes=12 * (100 * 16800 * 4 + 20 * 67200 * size),
        goals={"forward": 8, "memory": 10},
    )
    for kind, name, size in (("float", "soft targets", 4.0), ("bits 1", "bits", 1 / 8), ("bits 4", "bits of 800x1344", 2.0))
]  # fmt: skip

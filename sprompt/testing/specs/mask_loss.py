"""mask_loss, and the samples and ground truths of targets, which match_cost also uses."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.backends import use_backend
from sprompt.masks import BitMasks
from sprompt.ops import mask_loss, pack_masks
from sprompt.testing.spec import Bench, OpSpec, Prepared, Sample, blobs, random, refusals

#: (h, w, upsample, kind of target): every kind with different upsampling, and widths around the lengths of a vector and a word.
LAYOUTS = (
    (6, 8, 2, "float"), (1, 1, 2, "bits 4"), (3, 5, 1, "float"), (7, 17, 2, "bits 1"), (9, 33, 1, "bits 4"), (5, 40, 2, "bits 4"),
    (4, 7, 3, "bits 2"), (6, 9, 4, "bool"), (2, 70, 1, "bits 2"), (3, 12, 2, "uint8"), (35, 3, 2, "bits 2"), (70, 4, 1, "bits 1"),
    (1, 9, 5, "float"),
)  # fmt: skip


def make_targets(
    kind: str, shape: tuple[int, ...], height: int, width: int, device: torch.device, dtype: torch.dtype, seed: int
) -> BitMasks | Tensor:
    """Targets for a loss of height × width: "float", "bool", "uint8" (0 and 255) or "bits 1", "bits 2", "bits 4"."""
    g = random(seed)
    if kind == "float":
        return (
            ((torch.rand(*shape, height, width, generator=g) * 1.4 - 0.2).clamp(0, 1) * 4)
            .round()
            .div(4)
            .to(device, dtype)
        )
    ratio = int(kind.split()[1]) if kind.startswith("bits") else 1
    dense = torch.rand(*shape, ratio * height, ratio * width, generator=g) < 0.4
    if kind.startswith("bits"):
        with use_backend("reference"):  # the backend under test may not have pack_masks
            return pack_masks(dense.to(device))
    return (dense if kind == "bool" else dense.to(torch.uint8) * 255).to(device)


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for number, (h, w, upsample, kind) in enumerate(LAYOUTS):
        logits = (3 * torch.randn(3, h, w, generator=random(seed + number))).to(device, dtype)
        targets = make_targets(kind, (3,), h * upsample, w * upsample, device, dtype, seed + number)
        samples.append(Sample(f"{h}x{w}, up {upsample}, {kind}", (logits, targets), {"upsample": upsample}))
    logits = (3 * torch.randn(4, 5, 9, generator=random(seed))).to(device, dtype)
    logits[1], logits[2] = 60, -60
    targets = make_targets("float", (4,), 5, 9, device, dtype, seed)
    targets[1], targets[2] = 1, 1
    bits = make_targets("bits 4", (4,), 10, 18, device, dtype, seed)
    return [
        *samples,
        Sample("saturated, right and wrong", (logits, targets)),
        Sample("no masks", (logits[:0], targets[:0])),
        Sample("no masks, bits", (logits[:0], bits[:0]), {"upsample": 2}),
        Sample("no rows", (logits[:, :0], targets[:, :0]), {"upsample": 1}),
        Sample("no columns", (logits[:, :, :0], make_targets("bool", (4,), 10, 0, device, dtype, 0)), {"upsample": 2}),
        Sample("empty targets", (logits, torch.zeros(4, 5, 9, dtype=torch.bool, device=device))),
    ]


def exact_targets(targets: BitMasks | Tensor, height: int, width: int) -> np.ndarray:
    """Soft targets in float64, by their definition as F.interpolate of the dense mask."""
    if not isinstance(targets, BitMasks):
        return (targets if targets.is_floating_point() else targets != 0).double().cpu().numpy()
    dense = targets.to_dense(torch.float64).cpu()
    if 0 in (*dense.shape, height, width):
        return np.zeros((*targets.shape, height, width))
    flat = dense.reshape(1, -1, *targets.size)
    return F.interpolate(flat, size=(height, width), mode="bilinear").reshape(*targets.shape, height, width).numpy()


def exact_upsampled(logits: Tensor, upsample: int) -> np.ndarray:
    """Bilinear upsampling in float64, computed from the sampling positions."""
    maps = logits.double().cpu().numpy()
    for axis in (-2, -1):
        n = maps.shape[axis]
        place = np.clip((np.arange(n * upsample) + 0.5) / upsample - 0.5, 0, max(n - 1, 0))
        low = place.astype(int)
        high = np.minimum(low + 1, max(n - 1, 0))
        fraction = (place - low)[:, None] if axis == -2 else place - low
        maps = np.take(maps, low, axis) * (1 - fraction) + np.take(maps, high, axis) * fraction
    return maps


def _oracle(logits: Tensor, targets: BitMasks | Tensor, *, upsample: int = 1) -> tuple[Tensor, Tensor]:
    z = exact_upsampled(logits, upsample)
    t = exact_targets(targets, *z.shape[1:])
    bce, dice = np.zeros(len(z)), np.zeros(len(z))
    for m in range(len(z)):
        p = 1 / (1 + np.exp(-z[m]))
        terms = t[m] * np.logaddexp(0, -z[m]) + (1 - t[m]) * np.logaddexp(0, z[m])
        bce[m] = terms.sum() / max(terms.size, 1)
        dice[m] = 1 - 2 * (p * t[m]).sum() / (((p * p).sum() + 1e-3) + ((t[m] * t[m]).sum() + 1e-3))
    return torch.from_numpy(bce).to(logits.device), torch.from_numpy(dice).to(logits.device)


def _reduced(targets: BitMasks, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    dense = targets.to_dense(torch.float32).reshape(1, -1, *targets.size)
    return F.interpolate(dense, size=size, mode="bilinear").reshape(*targets.shape, *size).to(dtype)


_reduced_once = Prepared(_reduced)


def prepared(targets: BitMasks | Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The reduced targets. The released code reduces them once, before any loss, so this is not timed."""
    return _reduced_once(targets, size, dtype) if isinstance(targets, BitMasks) else targets.to(dtype)


def _eager(logits: Tensor, targets: BitMasks | Tensor, *, upsample: int = 1) -> tuple[Tensor, Tensor]:
    z = F.interpolate(logits[None], scale_factor=upsample, mode="bilinear", align_corners=False)[0]
    t = prepared(targets, (z.shape[1], z.shape[2]), z.dtype)
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none").flatten(1).mean(1)
    p, t = z.sigmoid().flatten(1), t.flatten(1)
    a = torch.sum(p * t, 1)
    b = torch.sum(p * p, 1) + 1e-3
    c = torch.sum(t * t, 1) + 1e-3
    return bce.float(), (1 - 2 * a / (b + c)).float()


_z, _t = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
_bits, _bits_of_3 = (BitMasks(torch.zeros(3, n, dtype=torch.int32), size) for n, size in ((1, (4, 5)), (6, (12, 15))))
_bad = refusals(mask_loss)

_errors = (
    _bad("a list", r"logits must be a tensor, got list", [_z], _t, error=TypeError),
    _bad("integer logits", r"logits must have dtype float32, ", _z.long(), _t, error=TypeError),
    _bad("a batch", r"logits must have shape \(M, h, w\), got \(1, 3, 4, 5\); flatten", _z[None], _t),
    _bad("no targets", r"targets must be a BitMasks or a dense tensor, got NoneType", _z, None, error=TypeError),
    _bad("int64 targets", r"targets must have dtype bool, uint8, float32.*got int64; convert", _z, _t.long(), error=TypeError),
    _bad("fewer targets", r"targets must have shape \(M, h·upsample, w·upsample\) = \(3, 4, 5\), got \(2, 4, 5\)", _z, _t[1:]),
    _bad("low targets", r"targets must have shape .* = \(3, 8, 10\), got \(3, 4, 5\)", _z, _t, upsample=2),
    _bad("fewer bits", r"targets must be BitMasks of shape \(M,\) = \(3,\), got \(2,\)", _z, _bits[1:]),
    _bad("bits of batches", r"targets must be BitMasks of shape \(M,\) = \(3,\), got \(1, 3\)", _z, _bits[None]),
    _bad("bits of 3 times", r"targets must be BitMasks of 1, 2 or 4 times the size of the loss, \(4, 5\), got \(12, 15\)", _z, _bits_of_3),
    _bad("upsample 0", r"upsample must be a whole number of at least 1, got 0", _z, _t, upsample=0),
    _bad("upsample 1.5", r"upsample must be a whole number of at least 1, got 1.5", _z, _t, error=TypeError, upsample=1.5),
    _bad("devices differ", r"targets must be on the device of logits \(cpu\), got meta", _z, _t.to("meta")),
)  # fmt: skip

SPECS = [
    OpSpec(
        mask_loss, _samples, ("mask_loss", "mask_loss_backward"), gradients=("logits",), oracle=_oracle, errors=_errors,
    ),
]  # fmt: skip


def _bench(kind: str, masks: int = 40) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        logits = (3 * torch.randn(masks, 100, 168, generator=random(seed))).to(device, dtype)
        bits = pack_masks(blobs(min(masks, 40), 800, 1344, seed, device))
        if kind == "bits 4":
            targets: BitMasks | Tensor = bits
        else:
            soft = F.interpolate(bits.to_dense(torch.float32)[None], size=(200, 336), mode="bilinear")[0]
            targets = pack_masks(soft) if kind == "bits 1" else soft.to(dtype)
        times = masks // len(bits.words)
        if isinstance(targets, BitMasks):
            return Sample("", (logits, BitMasks(targets.words.repeat(times, 1), targets.size)), {"upsample": 2})
        targets = targets.repeat(times, 1, 1)
        return Sample("", (logits, targets), {"upsample": 2})

    return make


BENCHES = [
    Bench(
        mask_loss, f"40 x (100x168) up 2, {name}", _bench(kind), _eager, gradients=("logits",),
        dtypes=(torch.float32, torch.bfloat16) if kind == "float" else (torch.float32,),
        flops=40 * 67200 * 45, bytes=40 * (16800 * 4 + 67200 * size), goals={"full": 4, "memory": 4},
    )
    for kind, name, size in (("float", "soft targets", 4.0), ("bits 1", "bits", 1 / 8), ("bits 4", "bits of 800x1344", 1.0))
] + [
    Bench(
        mask_loss, f"240 x (100x168) up 2, {name}", _bench(kind, 240), _eager, gradients=("logits",), device="cuda",
        dtypes=(torch.float32, torch.bfloat16), flops=240 * 67200 * 45, bytes=240 * (16800 * 4 + 67200 * size),
        goals={"full": 4, "memory": 4},
    )
    for kind, name, size in (("float", "soft targets", 4.0), ("bits 1", "bits", 1 / 8), ("bits 4", "bits of 800x1344", 1.0))
]  # fmt: skip

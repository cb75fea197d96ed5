"""projection_loss."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sprompt.ops import projection_loss
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals


def crops(B: int, h: int, w: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities, and boxes of random sides with fractional borders."""
    g = random(seed)
    masks = (3 * torch.randn(B, h, w, generator=g) - 3).sigmoid()
    sides = []
    for n in (h, w):
        begin, length = torch.rand(2, B, 1, generator=g) * n / 2
        place = torch.arange(n)
        sides.append((place - begin + 1).clamp(0, 1) * (begin + length + 1 - place).clamp(0, 1))
    return masks, sides[0][:, :, None] * sides[1][:, None]


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    shapes = ((2, 7, 9), (3, 33, 70), (2, 1, 40), (2, 41, 1), (4, 1, 1), (1, 16, 16), (3, 130, 5))
    samples = [
        Sample(f"{B} x {h}x{w}", tuple(x.to(device, dtype) for x in crops(B, h, w, seed + B * h * w)))
        for B, h, w in shapes
    ]
    signed = torch.randn(2, 3, 20, 19, generator=random(seed)).to(device, dtype)
    return [
        *samples,
        Sample("any numbers", (signed[0], signed[1])),
        Sample("no box", (signed[0].sigmoid(), torch.zeros_like(signed[0]))),
        Sample("no masks", (signed[0, :0], signed[1, :0])),
        Sample("no rows", (signed[0, :, :0], signed[1, :, :0])),
        Sample("no columns", (signed[0, :, :, :0], signed[1, :, :, :0])),
    ]


def oracle(masks: Tensor, boxes: Tensor) -> Tensor:
    loss = np.zeros(len(masks))
    for b, (mask, box) in enumerate(zip(masks.detach().cpu().numpy(), boxes.cpu().numpy(), strict=True)):
        for axis in (0, 1):
            m, t = (x.max(axis) if x.size else np.zeros(1) for x in (mask, box))
            loss[b] += 1 - 2 * (m * t).sum() / ((m**2).sum() + (t**2).sum() + 0.002)
    return torch.from_numpy(loss).to(masks.device)


_x = torch.zeros(3, 4, 5)
_bad = refusals(projection_loss)

SPECS = [
    OpSpec(
        projection_loss, _samples, ("projection_loss", "projection_loss_backward"), gradients=("masks",), oracle=oracle,
        errors=(
            _bad("a list", r"masks must be a tensor, got list", [1.0], _x, error=TypeError),
            _bad("integers", r"masks must have dtype float32, .*, got int64", _x.long(), _x, error=TypeError),
            _bad("one mask", r"masks must have shape \(B, h, w\), got \(4, 5\); one mask", _x[0], _x[0]),
            _bad("bool boxes", r"boxes must have dtype float32, .*, got bool", _x, _x > 0, error=TypeError),
            _bad("large boxes", r"boxes must have shape \(B, h, w\) = \(3, 4, 5\), got \(3, 8, 10\); resize", _x, torch.zeros(3, 8, 10)),
            _bad("too many columns", r"masks must have fewer than 2147483648 rows and columns, got 2147483648",
                *[_x[:, :, :1].expand(3, 4, 2**31)] * 2),
            _bad("devices differ", r"boxes must be on the device of masks \(cpu\), got meta", _x, _x.to("meta")),
        ),
    ),
]  # fmt: skip


# -- benchmarks: the batch of Mask Auto-Labeler


def _crops(B: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        return Sample("", tuple(x.to(device, dtype) for x in crops(B, 128, 128, seed)))

    return make


def _eager(masks: Tensor, boxes: Tensor) -> Tensor:
    loss = masks.new_zeros(len(masks), dtype=torch.float32)
    for axis in (1, 2):
        m, t = masks.max(axis)[0].float(), boxes.max(axis)[0].float()
        loss = loss + 1 - 2 * (m * t).sum(1) / ((m * m).sum(1) + (t * t).sum(1) + 0.002)
    return loss


BENCHES = [
    Bench(
        projection_loss, "32 x 128x128", _crops(32), _eager, gradients=("masks",), device=device, dtypes=dtypes,
        flops=32 * 128 * 128 * 8, bytes=32 * 128 * 128 * 8, goals=goals,
    )
    for device, dtypes, goals in (
        ("cpu", (torch.float32,), {"full": 3.0}), ("cuda", (torch.float32, torch.bfloat16), {})
    )
]  # fmt: skip

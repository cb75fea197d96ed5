"""Growth of cost: one curve for each op and axis, ours against the eager form of the op's first benchmark row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sprompt.ops import pack_masks
from sprompt.testing.spec import Bench, Sample, blobs, random
from sprompt.testing.specs import BENCHES


@dataclass(frozen=True)
class Curve:
    op: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int], Sample]

    @property
    def title(self) -> str:
        return f"{self.op}: {self.axis}"

    @property
    def bench(self) -> Bench:
        return next(b for b in BENCHES if b.function.__name__ == self.op)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=random(0))


def _masks_and_scores(count: int, side: int) -> Sample:
    return Sample("", (blobs(count, side, side, 0), torch.rand(count, generator=random(1))))


def _features(side: int) -> Sample:
    """Regions with similar vectors, like the features of a backbone."""
    regions = torch.nn.functional.interpolate(_randn(1, 512, 5, 5), size=(side, side))
    return Sample("", ((regions + 0.5 * _randn(1, 512, side, side)).relu(),))


def _pairs(side: int) -> Sample:
    return Sample("", (pack_masks(blobs(100, side, side, 0)), pack_masks(blobs(100, side, side, 1))))


def _update(images: int) -> Sample:
    """Masks with about one pixel in twenty set. Logits are whole numbers, so no rival rounds one to the other side of 0."""
    features = torch.randint(-2, 3, (images, 256, 50, 84), generator=random(0)).float()
    kernels = torch.randint(-1, 2, (images, 100, 256), generator=random(1)).float()
    features[:, 0], kernels[:, :, 0] = 1, -30
    return Sample("", (features, kernels))


def _loss(masks: int) -> Sample:
    return Sample("", (_randn(masks, 50, 84), torch.rand(masks, 100, 168, generator=random(1))), {"upsample": 2})


CURVES = (
    Curve("saliency_masks", "side of the feature map", (8, 16, 24, 32, 40), _features),
    Curve("mask_nms", "masks N (of 64x64)", (50, 200, 800, 2000), lambda n: _masks_and_scores(n, 64)),
    Curve("matrix_nms", "masks N (of 64x64)", (50, 200, 800, 2000), lambda n: _masks_and_scores(n, 64)),
    Curve("mask_iou", "image side (100 x 100 masks)", (64, 128, 256, 512), _pairs),
    Curve(
        "prompt_match",
        "prompts L (B 8, N 100)",
        (5, 20, 80, 320),
        lambda n: Sample("", (_randn(8, 100, 256), _randn(8, n, 256))),
    ),
    Curve(
        "prompt_match",
        "images B (N 100, L 20)",
        (1, 4, 16),
        lambda b: Sample("", (_randn(b, 100, 256), _randn(b, 20, 256))),
    ),
    Curve("mask_update", "images B (N 100, C 256, 50x84)", (1, 2, 4, 8), _update),
    Curve("mask_loss", "masks M (of 50x84, up 2)", (5, 20, 80, 320), _loss),
    Curve("rle_encode", "image side (50 masks)", (64, 256, 1024), lambda s: Sample("", (blobs(50, s, s, 0) > 0.5,))),
)

"""A program that `benchmarks.programs` measures, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Call
from sprompt.masks import Size
from sprompt.nn.resnet import ResNet
from sprompt.testing.spec import random


class Rivals(NamedTuple):
    """Calls that do the same work; one of them is "ours". `check` raises AssertionError if results differ, and describes the
    inputs. `parts` are the steps of "ours", in order, each on given inputs."""

    calls: dict[str, Call]
    check: Callable[[], str]
    parts: dict[str, Call] = {}  # noqa: RUF012  # a default that nothing changes


@dataclass(frozen=True)
class Program:
    name: str
    shape: str
    make: Callable[[torch.device], Rivals]
    #: The same rivals at toy size, for --quick.
    tiny: Callable[[torch.device], Rivals]
    #: Goals: {"time": released / ours, "memory": released / ours, "share": upper bound, as a share of the backbone's time}.
    goals: dict[str, float] = field(default_factory=dict)
    #: Number of images of one call.
    images: int = 1
    #: Whether it is also replayed from a CUDA graph on a GPU.
    captures: bool = False
    #: The things that `images` counts.
    unit: str = "images"


#: Terms of a loss, and gradients.
Step = tuple[dict[str, Tensor], tuple[Tensor, ...]]


def step(terms: dict[str, Tensor], leaves: Sequence[Tensor]) -> Step:
    """The gradients of the sum of the terms."""
    gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaves)
    return {name: term.detach() for name, term in terms.items()}, gradients


def same_step(found: Step, expected: Step, rival: str) -> None:
    """Asserts that terms agree within a thousandth, and gradients, as one vector, within a hundredth."""
    (terms, gradients), (known, theirs) = found, expected
    assert terms.keys() == known.keys(), f"terms {sorted(terms)}, {rival} {sorted(known)}"
    for name, term in terms.items():
        value, wanted = float(term), float(known[name])
        assert abs(value - wanted) <= 1e-3 * abs(wanted), f"{name} {value:.6g}, {rival} {wanted:.6g}"
    apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, theirs, strict=True))
    whole = sum(float(b.square().sum()) for b in theirs)
    assert apart <= 1e-4 * whole, f"gradients are {(apart / whole) ** 0.5:.2g} from those of {rival}"


class Made(nn.Module):
    """Replaces a backbone or a pixel decoder: its maps are made already."""

    strides = ResNet.strides

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def regions(channels: int, size: Size, images: int, seed: int) -> Tensor:
    """(images, channels, H, W): smooth regions and noise, like features of networks."""
    g = random(seed)
    coarse = torch.randn(images, channels, 10, 16, generator=g)
    return F.interpolate(coarse, size=size, mode="bilinear") + 0.3 * torch.randn(images, channels, *size, generator=g)

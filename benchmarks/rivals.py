"""A program that `benchmarks.programs` measures, and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Call
from sprompt.masks import Size
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


def regions(channels: int, size: Size, images: int, seed: int) -> Tensor:
    """(images, channels, H, W): smooth regions and noise, like features of networks."""
    g = random(seed)
    coarse = torch.randn(images, channels, 10, 16, generator=g)
    return F.interpolate(coarse, size=size, mode="bilinear") + 0.3 * torch.randn(images, channels, *size, generator=g)

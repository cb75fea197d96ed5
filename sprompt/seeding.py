"""Random numbers that depend only on a few whole numbers, such as (seed, epoch, picture). They are the same in every process
and after a restart."""

from __future__ import annotations

import random

import numpy as np
import torch


def _mixed(numbers: tuple[int, ...], kind: type[np.unsignedinteger]) -> int:
    return int(np.random.SeedSequence([int(n) % 2**64 for n in numbers]).generate_state(1, kind)[0])


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends only on these numbers, such as a seed, an epoch, a step and an index."""
    return torch.Generator(device).manual_seed(_mixed(numbers, np.uint64) >> 1)


def seed_all(*numbers: int) -> None:
    """Seeds the global generators of torch, numpy and random with these numbers."""
    mixed = _mixed(numbers, np.uint32)
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)

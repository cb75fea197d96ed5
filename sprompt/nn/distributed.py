"""Processes that train together. Without an initialised process group there is one process."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> tuple[int, int]:
    """This process among those of a launcher: its number and their count, by the launcher's variables. Known before the processes meet."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return rank() == 0


def rank() -> int:
    return dist.get_rank() if _together() else launched()[0]


def world() -> int:
    return dist.get_world_size() if _together() else 1


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, without gradient. Every process must call it, with the same shape and dtype."""
    total = tensor.detach()
    if world() > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total

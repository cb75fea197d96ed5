"""The processes of a launcher."""

from __future__ import annotations

import atexit

import torch.distributed as dist
from accelerate import PartialState

_registered = False


def processes(cpu: bool) -> PartialState:
    """Joins the process group of the launcher, and leaves it when this process ends. Later calls return the same state. A
    process group that still exists when the interpreter shuts down has threads that can abort the process."""
    global _registered
    state = PartialState(cpu=cpu)
    if state.num_processes > 1 and not _registered:
        atexit.register(_part)
        _registered = True
    return state


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

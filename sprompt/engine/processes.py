"""The processes of a launcher."""

from __future__ import annotations

import atexit

import torch.distributed as dist
from accelerate import PartialState

_registered = False


def processes(cpu: bool) -> PartialState:
    """Meets the other processes, once, and sees to it that they part when this one ends: threads of a process group that is left
    to the end of the interpreter can abort it."""
    global _registered
    state = PartialState(cpu=cpu)
    if state.num_processes > 1 and not _registered:
        atexit.register(_part)
        _registered = True
    return state


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

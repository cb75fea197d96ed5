"""Resuming a run: the check that its settings are the same, and the transfer of the state to every process."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn, optim

from sprompt.engine.checkpoint import Saved
from sprompt.engine.optim import load_optimiser, optimiser_tensors
from sprompt.settings import flat

#: Settings that a later version has, and the value that is the same as their absence. A setting that is off is null, and not listed.
_LATER = {"backbone": "resnet"}


def versions() -> dict[str, str]:
    """Versions of the software that writes a checkpoint. They are only for information and never compared."""
    return {"python": platform.python_version(), "torch": torch.__version__, "accelerate": accelerate.__version__}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raises ValueError if the settings of a run are not those that it began with. The message names the differing settings.

    A setting that is null, or has its value in `_LATER`, is the same as one that is absent: a run may go on with a later version.
    """

    def absent(name: str) -> str:
        return json.dumps(_LATER.get(name.rpartition(".")[2]))

    # in JSON a tuple equals a list, as it must after a checkpoint was read
    old, new = ({name: json.dumps(value) for name, value in flat(values).items()} for values in (before, now))
    differing = [
        f"{name} (was {old.get(name, 'absent')}, now {new.get(name, 'absent')})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent(name)) != new.get(name, absent(name))
    ]
    if differing:
        raise ValueError(
            f"{out}: a run goes on with the settings that it began with, got other {'; '.join(differing)}; "
            "give the old values, or choose another folder"
        )


def restore(
    accelerator: Accelerator, task: nn.Module, optimiser: optim.Optimizer, saved: Saved | None
) -> dict[str, Any] | None:
    """Loads the checkpoint that the first process has read. Returns the state in every process. Only the first process needs to
    see the folder.

    The other processes get the tensors of the optimiser here. They get weights and buffers when accelerate prepares the task.
    """
    state: dict[str, Any] | None = None
    if saved is not None:
        state = {name: saved.state[name] for name in ("step", "seconds", "meter")}
        task.load_state_dict(saved.task)
        load_optimiser(optimiser, task, saved.optimiser)
    if accelerator.num_processes == 1:
        return state
    tensors = optimiser_tensors(optimiser, task)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    state, shapes = broadcast_object_list([state, shapes])
    for name, shape in shapes.items():  # all float32
        empty = torch.empty(shape, device=accelerator.device)
        tensors[name] = broadcast(tensors.get(name, empty).to(accelerator.device))
    load_optimiser(optimiser, task, tensors)
    return state

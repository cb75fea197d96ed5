"""Guards of the training loop: against losses and gradients that are not finite, and for signals that ask it to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and on which pictures."""


class Interrupted(SystemExit):
    """The run got SIGINT or SIGTERM and stopped with a checkpoint. The exit status is 128 plus the number of the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _Step(NamedTuple):
    step: int
    wrong: Tensor  # () bool: the mean loss or the gradient is not finite; the same in all processes
    local_wrong: Tensor  # () bool: the loss of this process is not finite
    names: list[str]  # the pictures of this process


class Guard:
    """Finds losses and gradients that are not finite, without waiting for the device at every step.

    `add` returns the value for the optimiser's `found_inf`: 1 if the update must not happen. So a step that is not finite never
    changes the weights. `check` waits for the device. It raises TrainingError with the pictures of the first such step since
    the last check. All processes call both methods at the same steps.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def add(self, step: int, loss: Tensor, local_loss: Tensor, norm: Tensor, names: list[str]) -> Tensor:
        """`loss` is the mean over processes. `norm` is the norm of the gradient, which is the same in all processes."""
        wrong = ~(loss.isfinite() & norm.isfinite())
        self.steps.append(_Step(step, wrong, ~local_loss.isfinite(), names))
        return wrong.float()

    def check(self) -> None:
        steps, self.steps = self.steps, []
        wrong = torch.stack([s.wrong for s in steps]).tolist() if steps else []
        if not any(wrong):
            return
        first = steps[wrong.index(True)]
        reports = gather_object([(bool(first.local_wrong), first.names)])
        if any(local for local, _ in reports):
            what, names = "the loss", [name for local, names in reports if local for name in names]
        else:
            what, names = "the gradient", [name for _, names in reports for name in names]
        raise TrainingError(
            f"step {first.step}: {what} must be finite, got NaN or infinity, on {listed(names)}; the weights do not "
            "contain that step; look at these pictures and their masks, or lower the learning rate, and go on from the last "
            "checkpoint"
        )


def listed(names: list[str], most: int = 16) -> str:
    """The names of the pictures. After `most` names it gives only the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Signals:
    """Inside the `with` block, SIGINT and SIGTERM only set `number`, so that the loop can finish its step. A further SIGINT,
    more than a second after the first signal, raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            os.write(2, b"stopping after this step, with a checkpoint\n")  # a handler may not use a buffered file
        elif number == signal.SIGINT and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt

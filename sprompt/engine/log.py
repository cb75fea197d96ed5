"""The log of a run: log.jsonl, TensorBoard's files, and the means that they hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sprompt.atomic import atomic_write


class Meter:
    """Means over the steps since the last line of the log. The sums stay on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the scalars of one step, float32."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Returns the means and starts anew. Waits for the device once."""
        means = {name: total / self.counts[name] for name, total in self.state()["sums"].items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values. They hold float32 exactly."""
        values = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {"sums": dict(zip(self.sums, values, strict=True)), "counts": dict(self.counts)}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])


class Log:
    """log.jsonl with one line a logged step, and TensorBoard's files beside it.

    The log is opened at the step from which the run goes on. Lines of later steps come from a process that was killed. They are
    removed, from TensorBoard's files too.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        atomic_write(
            self.path, "".join(f"{json.dumps(line)}\n" for line in read_log(self.path) if line["step"] <= step)
        )
        self.file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line, which must hold "step". Its numbers go to TensorBoard as well. JSON has no NaN and no infinity;
        null replaces them."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Waits until the lines are on the disk. A checkpoint is written after this call, so no line before the checkpoint
        is lost."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. A missing file has no lines. An incomplete last line is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break
            try:
                line = json.loads(text)
                line["step"] + 0
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number} must be an object with a step, got {text[:80]!r}") from None
            lines.append(line)
    return lines

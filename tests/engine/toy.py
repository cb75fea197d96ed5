"""A task and data small enough to train in a moment: a linear map with dropout, fitted to numbers made from the picture's index.

As a script, `python toy.py OUT JSON`, it trains in OUT with TrainConfig(**JSON): what the tests of killed and of several processes start.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sprompt.engine import TrainConfig, train
from sprompt.nn.distributed import all_sum, world

PICTURES = 20


@dataclass(frozen=True)
class Numbers:
    """A batch, with the members that the training loop uses of a batch of pictures."""

    inputs: Tensor  # (B, 4)
    targets: Tensor  # (B, 1)
    weights: Tensor  # (B,), different for each picture, like the numbers of objects
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Numbers:
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


class Loader:
    """A loader with the contract of `Batches`. The permutation depends on (seed, epoch), and its start fills up the last
    batch. Rank r has the r-th slice."""

    def __init__(
        self, batch_size: int, whole: int, seed: int, rank: int, world: int, workers: int, *, broken: int = -1
    ) -> None:
        self.batch_size, self.seed, self.broken = batch_size, seed, broken
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.steps = -(-PICTURES // (batch_size * whole)) * whole

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Numbers]:
        order = torch.randperm(PICTURES, generator=torch.Generator().manual_seed(1000 * self.seed + epoch)).tolist()
        for step in range(start_step, self.steps):
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield self.batch([order[place % PICTURES] for place in places][self.share])

    def batch(self, indices: list[int]) -> Numbers:
        inputs = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(index)) for index in indices])
        for row, index in enumerate(indices):
            if index == self.broken:
                inputs[row] = torch.nan
        weights = torch.tensor([1.0 + index % 3 for index in indices])
        return Numbers(inputs, inputs.sum(1, keepdim=True) ** 2, weights, [f"picture {index}" for index in indices])


class Task(nn.Module):
    """Weighted squared error, normalised by the weights of all processes, as the losses are by their targets."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8).eval()
        self.norm.requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.dropout = dropout
        for seed, parameter in enumerate(self.parameters()):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))

    def train(self, mode: bool = True) -> Task:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = nn.functional.dropout(torch.tanh(self.norm(self.backbone(batch.inputs))), self.dropout)
        error = ((self.head(hidden) - batch.targets) ** 2).squeeze(1) * batch.weights
        loss = error.sum() / (all_sum(batch.weights.sum()) / world())
        return loss, {"error": loss.detach(), "monitor/step": torch.tensor(float(step))}


class Slow(Task):
    """A slow loader, so that a test has time to kill the run."""

    def forward(self, batch: Numbers, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(0.02)
        return super().forward(batch, step)


def config(**changes: Any) -> TrainConfig:
    few = dict(epochs=4, batch_size=4, learning_rate=0.02, warmup_steps=3, drops=(2,), workers=0, log_steps=1, clip=5.0)
    return TrainConfig(**{**few, **changes})


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    task = (Slow if settings.pop("slow", False) else Task)(settings.pop("dropout", 0.0))
    broken = settings.pop("broken", -1)
    if settings.pop("pids", False):
        Path(sys.argv[1]).mkdir(exist_ok=True)
        (Path(sys.argv[1]) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    train(task, partial(Loader, broken=broken), config(**settings), Path(sys.argv[1]), cpu=True, progress=False)
    if os.environ.get("RANK", "0") == "0":
        torch.save(task.state_dict(), Path(sys.argv[1]) / "weights.pt")

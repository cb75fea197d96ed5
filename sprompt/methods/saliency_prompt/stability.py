"""How steadily kernels are matched to proposals from one epoch to the next."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sprompt.data.files import read_json
from sprompt.data.loader import Batches
from sprompt.data.sample import Batch
from sprompt.data.transforms import Augment, collate
from sprompt.files import atomic_write
from sprompt.methods.saliency_prompt.pretrain import Pretraining

FILE = "matching.json"  # in a run folder: the kernels of the proposals after each epoch
_BATCH, _BATCHES = 8, 4  # pictures at once, and how often


class Stability:
    """The share of the proposals of 32 fixed pictures that the last decoder stage matches to the same kernel as an epoch before.

    Pictures are not augmented and kernels not prompted, so that the figure can be compared between ways to prompt them. It is low
    while kernels have not settled on what they look for.

    Args:
        task: what is trained, on any device.
        dataset: samples with masks.
        augment: how they are resized; nothing else of it is done.
        out: the run folder, whose `FILE` keeps what was matched, so that a run that goes on has it.
    """

    def __init__(self, task: Pretraining, dataset: Any, augment: Augment, out: Path) -> None:
        still = Augment(augment.shorts[1], augment.long, flip=0.0, keep_ratio=augment.keep_ratio)
        self.task, self.file = task, out / FILE
        self.batches: Batches[Any, Batch] = Batches(dataset, still, collate, batch_size=_BATCH, seed=0)

    def __call__(self, epoch: int, keep: bool = True) -> dict[str, float]:
        """What to log after so many epochs: nothing after the first. `keep`: write `FILE`, as one process of all does."""
        now = self.matched()
        epochs = read_json(self.file)["epochs"] if self.file.exists() else {}
        before = epochs.get(str(epoch - 1))
        if keep:
            atomic_write(self.file, json.dumps({"epochs": {**epochs, str(epoch): now}}) + "\n")
        if before is None or len(before) != len(now) or not now:
            return {}
        return {"monitor/same_kernel": sum(a == b for a, b in zip(before, now, strict=True)) / len(now)}

    @torch.no_grad()
    def matched(self) -> list[int]:
        """The kernel of each proposal, picture after picture."""
        task, found = self.task, []
        model, device = task.network, next(task.parameters()).device
        task.eval()
        for batch in islice(self.batches.epoch(0), _BATCHES):
            batch = batch.to(device)
            outputs = model.decode(model.encode(batch.images))
            losses = model.losses(outputs, batch.masks, torch.zeros_like(batch.labels), batch.counts)
            rows = losses.matched[-1].rows
            found += rows[torch.arange(rows.shape[1], device=device) < batch.counts[:, None]].tolist()
        return found

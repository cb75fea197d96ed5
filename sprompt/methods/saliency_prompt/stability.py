"""How steadily kernels are matched to proposals from one epoch to the next."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sprompt.atomic import atomic_write
from sprompt.data.loader import Batches
from sprompt.data.reading import read_json
from sprompt.data.sample import Batch
from sprompt.data.transforms import Augment, collate
from sprompt.methods.saliency_prompt.pretrain import Pretraining
from sprompt.models.protocol import features_of

FILE = "matching.json"  # in a run folder: the kernel matched to each proposal, after each epoch
_BATCH, _BATCHES = 8, 4  # pictures of a batch, number of batches


class Stability:
    """The share of proposals that the last decoder stage matches to the same kernel as one epoch before.

    It is measured on the proposals of 32 fixed pictures. Pictures are not augmented and kernels get no prompts, so the
    figure can be compared between settings of prompts. A low share means that the roles of the kernels are not settled.

    Args:
        task: the task in training, on any device.
        dataset: samples with masks.
        augment: the size of pictures; its random steps are off.
        out: the run folder; `FILE` in it keeps the matches, so that a resumed run has them.
    """

    def __init__(self, task: Pretraining, dataset: Any, augment: Augment, out: Path) -> None:
        still = Augment(augment.shorts[1], augment.long, flip=0.0, keep_ratio=augment.keep_ratio)
        self.task, self.file = task, out / FILE
        self.batches: Batches[Any, Batch] = Batches(dataset, still, collate, batch_size=_BATCH, seed=0)

    def __call__(self, epoch: int, keep: bool = True) -> dict[str, float]:
        """The value to log after epoch `epoch`; empty without matches of the epoch before. One process sets `keep` to write
        `FILE`."""
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
        """The index of the kernel matched to each proposal, picture after picture."""
        task, found = self.task, []
        model, device = task.network, next(task.parameters()).device
        task.eval()
        for batch in islice(self.batches.epoch(0), _BATCHES):
            batch = batch.to(device)
            outputs = model.decode(features_of(model, batch.images, batch.sizes))
            losses = model.losses(outputs, batch.masks, torch.zeros_like(batch.labels), batch.counts)
            rows = losses.matched[-1].rows
            found += rows[torch.arange(rows.shape[1], device=device) < batch.counts[:, None]].tolist()
        return found

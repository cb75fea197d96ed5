"""The random points of transformers' Mask2Former, so that this library's losses can be compared at the same points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sprompt.models.mask2former.loss import Points


class Draws:
    """A record of the points and pairs of transformers: those of every call of its matcher, and of its loss."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.pairs: list[list[tuple[Tensor, Tensor]]] = []
        self.starts: list[int] = []

    @staticmethod
    @contextmanager
    def of(model: Any, dtype: torch.dtype = torch.float32) -> Iterator[Draws]:
        """Records while the block runs. transformers then draws in this dtype."""
        draws, rand = Draws(), torch.rand

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            draws.drawn.append(rand(*args, **{**kwargs, "dtype": dtype}))
            return draws.drawn[-1]

        def matched(module: nn.Module, args: Any, found: Any) -> None:
            draws.pairs.append([(i.clone(), j.clone()) for i, j in found])
            draws.starts.append(len(draws.drawn))

        hook = model.criterion.matcher.register_forward_hook(matched)
        try:
            with mock.patch.object(torch, "rand", recorded):
                yield draws
        finally:
            hook.remove()

    def points(self, batch: int) -> Points:
        """The draws as our loss takes them. transformers begins with the last head and lists pairs by query; ours are by target."""
        cost, candidates = [], []
        for start, pairs in zip(self.starts, self.pairs, strict=True):
            cost.append(torch.cat([each.reshape(1, -1, 2) for each in self.drawn[start - batch : start]]))
            order, first = [], 0
            for _, targets in pairs:
                order += [first + int(place) for place in targets.argsort()]
                first += len(targets)
            candidates.append(torch.cat(self.drawn[start : start + 2], 1)[order])
        head = [*range(1, len(cost)), 0]
        return Points([cost[h] for h in head], [candidates[h] for h in head])

"""Joins a model's own queries with groups of extra queries, for one pass through a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.models.protocol import QueryGroup


class Joined(NamedTuple):
    """All queries, the own ones first."""

    content: Tensor  # (B, Q, C)
    positions: Tensor  # (B, Q, C)
    sees: Tensor | None  # bool (Q, Q), or None if there are no groups
    masks: dict[int, BitMasks]  # {first query of a group: the pixels that it reads}, of groups that bring their masks
    places: list[slice]  # of the own queries, then of each group


def join(content: Tensor, positions: Tensor, groups: Sequence[QueryGroup]) -> Joined:
    """Own queries attend to own queries only."""
    if not groups:
        return Joined(content, positions, None, {}, [slice(None)])
    own = content.shape[1]
    ends = [own]
    for group in groups:
        ends.append(ends[-1] + group.content.shape[1])
    places = [slice(0, own)] + [slice(a, b) for a, b in pairwise(ends)]
    sees = torch.zeros(ends[-1], ends[-1], dtype=torch.bool, device=content.device)
    sees[:own, :own] = True
    masks = {}
    for group, place in zip(groups, places[1:], strict=True):
        if group.sees.shape != (group.content.shape[1], ends[-1]):
            raise ValueError(
                f"groups: sees must have shape {(group.content.shape[1], ends[-1])}, one column for each own and extra query, got "
                f"{tuple(group.sees.shape)}"
            )
        sees[place] = group.sees
        if group.masks is not None:
            masks[place.start] = group.masks
    others = [torch.zeros_like(g.content) if g.position is None else g.position for g in groups]
    return Joined(
        torch.cat([content, *(g.content for g in groups)], 1), torch.cat([positions, *others], 1), sees, masks, places
    )

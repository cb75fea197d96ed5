"""What a training step asks of each picture: the targets of each group of queries, and the categories of the prompt queries.

The choice is made on the host, from a few numbers of each target, with random numbers of its own for each picture and step. So it is
the same for every number of processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from sprompt.methods.segprompt.config import SegPromptConfig
from sprompt.models.protocol import IF_MATCHED, NOTHING, OBJECT


@dataclass(frozen=True)
class Lists:
    """What the labels of a picture say about categories as a whole, for data that are not labelled exhaustively."""

    absent: frozenset[int] = frozenset()  # categories that are not in the picture, verified
    partial: frozenset[int] = frozenset()  # categories with objects that are not labelled


@dataclass(frozen=True)
class Choice:
    """Places of targets among those of the picture; categories are class numbers."""

    own: list[int]  # targets of the model's own queries
    prompted: list[int]  # targets of the prompt queries
    extracted: list[int]  # targets from which prompts are extracted
    categories: list[int]  # of the prompt queries, one for `copies` queries
    truth: list[int]  # of each category: NOTHING, OBJECT or IF_MATCHED
    supervised: frozenset[int]  # categories whose masks are compared


def choose(
    labels: Sequence[int],
    areas: Sequence[int],
    vocabulary: int,
    config: SegPromptConfig,
    random: torch.Generator,
    lists: Lists | None = None,
) -> Choice:
    """The choice for a picture with targets of these classes and areas."""
    kept = _capped(labels, config.copies, random)
    large = [place for place in kept if areas[place] > config.least_area]
    own = large if config.cap_targets else [p for p in range(len(labels)) if areas[p] > config.least_area]
    extracted = _representatives(large, labels, config.instances, random)
    lists = lists or Lists()

    present = {labels[p] for p in large} | lists.partial
    supervised = frozenset({labels[p] for p in extracted} - lists.partial - lists.absent)
    number = min(config.categories, vocabulary)
    categories = sorted(present)[:number]
    truth = [IF_MATCHED if c in supervised else OBJECT for c in categories]
    negative = sorted(lists.absent - present)[: number - len(categories)]
    # A category that is present but was cut off above is no negative.
    negative += _others(vocabulary, present | lists.absent, number - len(categories) - len(negative), random)
    categories += negative
    truth += [NOTHING] * len(negative)
    return Choice(own, kept, extracted, categories, truth, supervised)


def _shuffled(items: Sequence[int], random: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=random).tolist()]


def _capped(labels: Sequence[int], most: int, random: torch.Generator) -> list[int]:
    """Places of at most `most` targets of each class, drawn at random, in order."""
    kept: list[int] = []
    for label in sorted(set(labels)):
        places = [p for p, own in enumerate(labels) if own == label]
        kept += places if len(places) <= most else _shuffled(places, random)[:most]
    return sorted(kept)


def _representatives(places: Sequence[int], labels: Sequence[int], number: int, random: torch.Generator) -> list[int]:
    """At most `number` of the places: the first of each class before further ones, each at random."""
    first = list({labels[p]: p for p in reversed(places)}.values())[::-1]
    if len(places) <= number:
        return list(places)
    if len(first) >= number:
        return sorted(_shuffled(first, random)[:number])
    further = [p for p in places if p not in first]
    return sorted(first + _shuffled(further, random)[: number - len(first)])


def _others(vocabulary: int, excluded: Collection[int], number: int, random: torch.Generator) -> list[int]:
    """`number` classes that are not excluded, drawn at random; fewer if there are no more."""
    return _shuffled([c for c in range(vocabulary) if c not in excluded], random)[:number]

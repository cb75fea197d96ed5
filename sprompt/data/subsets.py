"""Parts of a labelled dataset, for learning from few labels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import torch

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.seeding import generator


def sample(total: int, fraction: float, seed: int = 0) -> list[int]:
    """⌊fraction · total⌋ random places from 0 to total − 1, sorted. With one seed, a smaller fraction is a subset of a larger
    one.

    The product is computed from the decimal number, so 0.29 of 100 is 29.

    >>> sample(10, 0.3), sample(10, 0.5)
    ([0, 7, 9], [0, 1, 2, 7, 9])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"subsets: fraction must be above 0 and at most 1, got {fraction}; 0.05 are 5 %")
    number = int(Fraction(str(fraction)) * total)
    if number < 1:
        raise ValueError(f"subsets: {fraction} of {total} pictures must be at least one; take a larger fraction")
    return sorted(torch.randperm(total, generator=generator(seed)).tolist()[:number])


def by_fraction(dataset: CocoDataset, fraction: float, seed: int = 0) -> CocoDataset:
    """A random part of the file's pictures. Drawn pictures without masks are then left out, unless the dataset keeps them."""
    return dataset.at_positions(sample(dataset.total, fraction, seed))


def from_list(dataset: CocoDataset, path: Path | str, percent: str = "10.0", run: str = "1") -> CocoDataset:
    """The pictures of a published list such as COCO_supervision.txt: JSON {percent: {run: [places in the file's images]}}."""
    if dataset.limited:
        raise ValueError(
            f"subsets: {path} counts all pictures of {dataset.source}, but another list limits them; give one list"
        )
    table = read_json(path, 1 << 28)
    for key, what in ((percent, "percentage"), (run, "run")):
        if not isinstance(table, dict) or key not in table:
            there = ", ".join(list(table)[:10]) if isinstance(table, dict) else "no table"
            raise DataError(f"{path}: must have the {what} {key!r}, got {there}; choose one that is there")
        table = table[key]
    places = table
    if not isinstance(places, list) or not all(type(p) is int for p in places):
        raise DataError(f"{path}: {percent}, {run} must be a list of whole numbers; is it the right file?")
    outside = [p for p in places if not 0 <= p < dataset.total]
    if outside or len(set(places)) != len(places):
        got = f"{outside[0]}" if outside else "one of them twice"
        raise DataError(
            f"{path}: {percent}, {run} must be different places below {dataset.total}, the pictures of {dataset.source}, "
            f"got {got}; is it the list for this file?"
        )
    return dataset.at_positions(sorted(places))

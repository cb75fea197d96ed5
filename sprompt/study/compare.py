"""Statistics over the cells of a study: means over seeds, differences seed by seed, and the epochs at which curves cross."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sprompt.study.variants import QUESTIONS, VARIANTS, Question

#: The results written by `sprompt.study.results.gather`; any entry may be missing.
Results = dict[str, Any]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "pooled")
ABOVE, BELOW, WITHIN = "above by more than the spread", "below by more than the spread", "within the spread"
ALONE, BASELINE = "one seed only", "baseline"
NONE = "–"


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float | None  # sample standard deviation over the seeds (divisor n − 1); None for one seed
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Estimate | None:
        """The estimate of the values that are not None; None if all are."""
        known = [v for v in values if v is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Row:
    """A variant in the comparison of a question."""

    name: str
    figures: dict[str, Estimate | None]  # by names of METRICS, from 0 to 1
    seeds: int
    difference: Estimate | None  # AP minus the baseline's, of equal seeds; None for the baseline, and without pairs
    above: int  # number of seeds with a difference above 0
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The table of a question for one share of the labels."""

    key: str  # a key of QUESTIONS
    question: Question
    fraction: float
    rows: list[Row]

    @property
    def best(self) -> int | None:
        """The index of the row with the best mean AP."""
        means = [(row.figures["AP"].mean, -i) for i, row in enumerate(self.rows) if row.figures["AP"]]
        return -max(means)[1] if means else None


# -- access to results
def cells(results: Results, variant: str, fraction: float) -> dict[int, dict[str, Any]]:
    """The finished cells of a variant, by ascending seed."""
    found = {c["seed"]: c for c in results.get("cells", []) if (c["variant"], c["fraction"]) == (variant, fraction)}
    return dict(sorted(found.items()))


def variants(results: Results) -> list[str]:
    """Names of the variants with finished cells, in the order of VARIANTS."""
    found = list(dict.fromkeys(cell["variant"] for cell in results.get("cells", [])))
    return [name for name in VARIANTS if name in found] + [name for name in found if name not in VARIANTS]


def fractions(results: Results) -> list[float]:
    return sorted({cell["fraction"] for cell in results.get("cells", [])})


def rate(found: dict[str, Any] | None, name: str) -> float | None:
    """A metric; None if it is missing, or −1, which is COCO's value for a metric without labels."""
    value = finite((found or {}).get(name))
    return None if value is None or value < 0 else value


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def seed_curves(
    results: Results, variant: str, fraction: float, pooled: bool = False
) -> list[tuple[float, list[float]]]:
    """(epoch, AP of each seed) for the epochs of fine-tuning that were tested for all seeds with a curve."""
    curves = []
    for cell in cells(results, variant, fraction).values():
        points = {p[0]: rate({"AP": p[2 if pooled else 1]}, "AP") for p in cell.get("curve") or []}
        if known := {epoch: value for epoch, value in points.items() if value is not None}:
            curves.append(known)
    shared = set.intersection(*map(set, curves)) if curves else set()
    return [(epoch, [curve[epoch] for curve in curves]) for epoch in sorted(shared)]


# -- comparisons
def compare(key: str, results: Results, fraction: float) -> Comparison:
    """All variants of a question that have cells, each compared with the baseline.

    The difference in AP is taken seed by seed. A variant is above or below by more than the spread if the mean difference over
    seeds is larger than the larger of the two standard deviations over seeds, its own and the baseline's.
    """
    question = QUESTIONS[key]
    base = cells(results, question.baseline, fraction)
    rows = []
    for name in question.variants:
        own = cells(results, name, fraction)
        if own:
            figures = {m: Estimate.of(rate(c.get("metrics"), m) for c in own.values()) for m in METRICS}
            pairs = [(rate(own[s].get("metrics"), "AP"), rate(base[s].get("metrics"), "AP")) for s in own if s in base]
            steps = [] if name == question.baseline else [a - b for a, b in pairs if a is not None and b is not None]
            spread = _spread(figures["AP"], Estimate.of(rate(c.get("metrics"), "AP") for c in base.values()))
            words = BASELINE if name == question.baseline else _words(Estimate.of(steps), spread)
            rows.append(Row(name, figures, len(own), Estimate.of(steps), sum(s > 0 for s in steps), words))
    return Comparison(key, question, fraction, rows)


def comparisons(results: Results) -> list[Comparison]:
    """The comparisons of every question with at least two variants, for each share of the labels.

    A comparison is left out if an earlier one has all its rows and all its pairs.
    """
    made: list[Comparison] = []
    for key in QUESTIONS:
        for fraction in fractions(results):
            comparison = compare(key, results, fraction)
            if len(comparison.rows) > 1 and not any(_repeats(comparison, earlier) for earlier in made):
                made.append(comparison)
    return made


def epoch_reaching(results: Results, variant: str, target: float, fraction: float) -> float | None:
    """The first tested epoch at which the mean AP over seeds is at least the target."""
    curve = seed_curves(results, variant, fraction)
    return next((epoch for epoch, values in curve if statistics.fmean(values) >= target - 1e-12), None)


# -- parts
def _repeats(comparison: Comparison, earlier: Comparison) -> bool:
    """Whether the earlier comparison has all rows of this one, and all its pairs of variant and baseline."""
    own, others = (({row.name for row in c.rows}, _pairs(c)) for c in (comparison, earlier))
    return comparison.fraction == earlier.fraction and own[0] <= others[0] and own[1] <= others[1]


def _pairs(comparison: Comparison) -> set[frozenset[str]]:
    return {frozenset((row.name, comparison.question.baseline)) for row in comparison.rows if row.difference}


def _spread(*estimates: Estimate | None) -> float:
    return max((e.sd for e in estimates if e and e.sd is not None), default=0.0)


def _words(difference: Estimate | None, spread: float) -> str:
    if difference is None:
        return NONE
    if difference.n < 2:
        return ALONE
    if abs(difference.mean) > spread:
        return ABOVE if difference.mean > 0 else BELOW
    return WITHIN

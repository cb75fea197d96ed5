"""The tables of a study, in the layout of the paper's tables, for the page and for documentation."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from typing import Any

from sprompt.study.compare import (
    METRICS,
    NONE,
    Comparison,
    Estimate,
    Results,
    comparisons,
    epoch_reaching,
    finite,
    fractions,
    rate,
    seed_curves,
    variants,
)  # fmt: skip
from sprompt.study.variants import VARIANTS

PRETRAINED = ("box/AP", "box/AP50", "box/AP75", "AP", "AP50", "AP75", "AR100")
MONITORS = {
    "prompt_ratio": ("prompt / kernel", "lengths of prompts over those of kernels"),
    "kernels_per_prompt": ("kernels per prompt", "that share it"),
    "prompts_used": ("prompts used", "share that any kernel takes"),
    "same_kernel": ("same kernel", "share of proposals matched to the kernel of the epoch before, prompts off"),
    "target_cosine": ("target cosine", "between targets of kernel supervision; near 1 they have collapsed"),
}


@dataclass(frozen=True)
class Grid:
    """A table, ready to print."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    best: int | None = None  # index of the highlighted row
    words: int | None = None  # index of a column of words; all other columns but the first hold numbers


def planned(results: Results) -> int | None:
    """The planned number of cells; None if the results do not say it."""
    data, study = results.get("data") or {}, results.get("study") or {}
    axes = [
        a
        for a in (study.get("variants"), data.get("fractions"), data.get("seeds"))
        if isinstance(a, (list, tuple)) and a
    ]
    return math.prod(map(len, axes)) if len(axes) == 3 else None


def title(variant: str) -> str:
    return VARIANTS[variant].title if variant in VARIANTS else variant


# -- printed
def comparison_grid(comparison: Comparison) -> Grid:
    head = ("", *(m.replace("pooled", "pooled AP") for m in METRICS), "seeds",
            f"difference to “{title(comparison.question.baseline)}”", "seeds above", "verdict")  # fmt: skip
    rows = []
    for row in comparison.rows:
        step = row.difference
        rows.append((
            title(row.name), *(points(row.figures[m]) for m in METRICS), str(row.seeds), points(step, sign=True),
            f"{row.above} of {step.n}" if step else NONE, row.verdict,
        ))  # fmt: skip
    name = f"{comparison.question.title}, {percent(comparison.fraction)} of the labels"
    return Grid(name, comparison.question.claim, head, rows, comparison.best, len(head) - 1)


def convergence(results: Results, fraction: float) -> Grid | None:
    """The epoch at which each variant reaches the final AP of training from scratch, and from the backbone.

    None if neither has a curve.
    """
    targets = {}
    for name in ("scratch", "backbone"):
        if curve := seed_curves(results, name, fraction):
            targets[name] = statistics.fmean(curve[-1][1])
    rows = []
    for name in variants(results) if targets else []:
        if curve := seed_curves(results, name, fraction):
            last, end = curve[-1][0], points(Estimate.of(curve[-1][1]))
            reached = [epoch_reaching(results, name, target, fraction) for target in targets.values()]
            when = ["never" if e is None else f"{e:g} ({percent(e / last if last else 1, 0)})" for e in reached]
            rows.append((title(name), str(len(curve[-1][1])), f"{last:g}", end, *when))
    if not rows:
        return None
    head = (
        "",
        "seeds",
        "epochs",
        "AP at the end",
        *(f"reaches the {100 * t:.2f} of “{title(n)}”" for n, t in targets.items()),
    )
    note = (
        "The first tested epoch of fine-tuning at which the mean curve reaches the AP that another start ends with, "
        "and its share of the epochs."
    )
    return Grid(f"Convergence (Figure 3), {percent(fraction)} of the labels", note, head, rows)


def progress(results: Results, fraction: float) -> Grid | None:
    """The mean AP after each tested epoch of fine-tuning; None without curves."""
    curves = {v: seed_curves(results, v, fraction) for v in variants(results)}
    epochs = sorted({epoch for curve in curves.values() for epoch, _ in curve})
    rows = []
    for name, curve in curves.items():
        means = {epoch: statistics.fmean(seeds) for epoch, seeds in curve}
        if means:
            shown = (f"{100 * means[e]:.1f}" if e in means else NONE for e in epochs)
            rows.append((title(name), *shown))
    note = "AP × 100 after so many epochs of fine-tuning, means over seeds."
    head = ("", *(f"{epoch:g}" for epoch in epochs))
    return Grid(f"AP by epoch, {percent(fraction)} of the labels", note, head, rows) if rows else None


def pretrained(results: Results) -> Grid | None:
    """The models before fine-tuning; None if none was tested."""
    found = _pretrained(results, "pretrained")
    shown = [m for m in PRETRAINED if any(rate(f, m) is not None for fs in found.values() for f in fs)]
    rows = [
        (title(v), *(points(Estimate.of(rate(f, m) for f in fs)) for m in shown), str(len(fs)))
        for v, fs in found.items()
    ]
    note = (
        "Average precision and recall of all classes taken as one, with prompts off: boxes as in the paper, then masks."
    )
    head = ("", *(m.replace("box/AP", "box AP") for m in shown), "seeds")
    return Grid("Before fine-tuning (Table 6)", note, head, rows) if shown else None


def monitors(results: Results) -> Grid | None:
    """The monitors of pre-training at its end; None if there are none."""
    found = _pretrained(results, "monitors")
    shown = [m for m in MONITORS if any(finite(f.get(m)) is not None for fs in found.values() for f in fs)]
    rows = []
    for name, seeds in found.items():
        ends = [Estimate.of(finite(f.get(m)) for f in seeds) for m in shown]
        if any(ends):
            rows.append((title(name), *(f"{end.mean:.3g}" if end else NONE for end in ends), str(len(seeds))))
    head = ("", *(MONITORS[m][0] for m in shown), "seeds")
    words = ". ".join(f"{MONITORS[m][0].capitalize()}: {MONITORS[m][1]}" for m in shown)
    note = f"At the end of pre-training, means over seeds. {words}."
    return Grid("Monitors of pre-training", note, head, rows) if rows else None


def proposals(results: Results) -> Grid | None:
    """The quality of the masks that pre-training learns."""
    rows = []
    for kind, found in (results.get("proposals") or {}).items():
        pictures, masks = (finite(found.get(n)) for n in ("pictures", "masks"))
        each = f"{masks / pictures:.1f}" if masks is not None and pictures else NONE
        counts = (NONE if n is None else f"{n:,.0f}" for n in (pictures, masks))
        shares = (rate(found, n) for n in ("precision", "recall"))
        rows.append((kind, *counts, each, *(NONE if s is None else percent(s, 1) for s in shares)))
    head = ("", "pictures", "masks", "masks a picture", "precision", "recall")
    note = "Precision: share of the masks with an IoU of at least 0.5 with a true one. Recall: share of the true ones."
    return Grid("Masks to learn from", note, head, rows) if rows else None


def grids(results: Results) -> list[Grid]:
    """All tables that the results suffice for."""
    found: list[Grid | None] = [comparison_grid(comparison) for comparison in comparisons(results)]
    found += [part(results, fraction) for fraction in fractions(results) for part in (convergence, progress)]
    found += [pretrained(results), monitors(results), proposals(results)]
    return [grid for grid in found if grid]


LEGEND = (
    "AP × 100: mean ± standard deviation over seeds; pooled AP takes all classes as one. Differences are taken seed by seed. "
    "The spread is the larger of two variants' standard deviations."
)


def markdown(results: Results) -> str:
    """All tables as Markdown, for documentation."""
    parts = [_plain(summary(results)), LEGEND]
    for grid in grids(results):
        sides = [":--" if i in (0, grid.words) else "--:" for i in range(len(grid.head))]
        lines = [[_plain(h) for h in grid.head], sides]
        for i, row in enumerate(grid.rows):
            lines.append([f"**{_plain(c)}**" if i == grid.best else _plain(c) for c in row])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"### {_plain(grid.title)}\n\n{_plain(grid.note)}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """One paragraph: the data, the backbone and the model, the progress of the study, and its machine."""
    data, done, plan = results.get("data") or {}, len(results.get("cells", [])), planned(results)
    words = {"unlabelled": "without labels", "train": "with labels to draw from", "val": "to test on"}
    counts = [f"{data[part]:,} {what}" for part, what in words.items() if data.get(part) is not None]
    classes, shares = data.get("classes") or [], data.get("fractions") or []
    said = [f"{data.get('name', 'unnamed data')}{': pictures ' if counts else ''}{', '.join(counts)}"]
    if classes:
        said.append(f"{len(classes)} class{'es' if len(classes) > 1 else ''}: {', '.join(map(str, classes[:10]))}")
        said[-1] += ", …" if len(classes) > 10 else ""
    if shares:
        said.append(f"Fine-tuned on {' and '.join(map(percent, shares))} of the labels")
        said[-1] += f" for {data['epochs']} epochs" if data.get("epochs") else ""
    study = results.get("study") or {}
    if "backbone" in study:
        said.append(f"Backbone: {study['backbone'] or 'trained on the pictures without labels'}")
    if model := study.get("model"):
        said.append(f"Model: {model}")
    if (longer := study.get("longer", 1)) > 1:
        said.append(f"Pre-trained {longer} times as long as the settings say")
    said.append(f"{done}{f' of {plan}' if plan else ''} cell{'s' if (plan or done) != 1 else ''} done")
    said[-1] += f", {len(results['failed'])} failed" if results.get("failed") else ""
    said[-1] += f", in {results['hours']:.3g} hours of processes" if results.get("hours") else ""
    said[-1] += f" on {results['machine']}" if results.get("machine") else ""
    text = ". ".join(said) + "."
    return text[:1].upper() + text[1:]


def points(estimate: Estimate | None, sign: bool = False) -> str:
    """Mean ± standard deviation, times 100."""
    if estimate is None:
        return NONE
    mean = f"{100 * estimate.mean:{'+' if sign else ''}.2f}".replace("-", "−")
    return mean if estimate.sd is None else f"{mean} ± {100 * estimate.sd:.2f}"


def percent(share: float, digits: int | None = None) -> str:
    """0.05 as 5 %. Without `digits` it has as many digits as needed."""
    return f"{100 * share:.4g} %" if digits is None else f"{100 * share:.{digits}f} %"


# -- parts
def _pretrained(results: Results, part: str) -> dict[str, list[dict[str, Any]]]:
    """This part of the cells by variant, once for each seed: the cells of all fractions start from the same model."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in results.get("cells", []):
        if cell.get(part):
            found.setdefault(cell["variant"], {})[cell["seed"]] = cell[part]
    return {name: [found[name][s] for s in sorted(found[name])] for name in variants(results) if name in found}


def _plain(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(str(text).split()))

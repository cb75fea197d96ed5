"""A static page of proposals, prompts, predictions, curves and runs. It opens from disk, in any browser, without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sprompt.data.errors import DataError
from sprompt.machine import machine
from sprompt.report import activation as kernel_activation
from sprompt.report import confusion, sections
from sprompt.report.album import Album
from sprompt.report.curves import curves, is_rate, key, metric_bars
from sprompt.report.page import Html, Section, check_place, join, tag, write_page
from sprompt.report.prompts import Matches
from sprompt.report.runs import Run, read_runs

CATEGORIES = 50  # largest number of categories in the table of metrics


def build(
    out: Path,
    *,
    proposals: tuple[Path, Path] | None = None,
    runs: Sequence[Path] = (),
    predictions: tuple[Path, Path | None, Path] | None = None,
    found: tuple[Path, Path] | None = None,
    activation: Path | Tensor | np.ndarray | None = None,
    prompts: Sequence[Matches] | None = None,
    pooled: bool = False,
    title: str = "Gallery",
    limit: int = 24,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Writes out/index.html and out/pictures/, and returns the page's path.

    A section without input is left out, and the page says how to make its input. An old page is replaced once the new page is
    complete.

    Args:
        proposals: (folder of the pictures, proposal file).
        runs: folders of training runs. Each may have log.jsonl, metrics.json and config.yaml.
        predictions: (folder of the pictures, COCO file of the labels or None, COCO results).
        found: (folder of the pictures, COCO results) of pictures without labels, for a section beside that of `predictions`.
        activation: maps (N, h, w) of the kernels, or the .npz file of `save_activation`.
        prompts: the result of `prompt_matches`.
        pooled: the classes of the predictions say nothing. A prediction finds labels of any class, and no class is confused.
        limit: upper bound of the pictures of a section; they are spread evenly over the input.
        tell: called with a line of text before each section is made.

    Raises DataError for an input that cannot be read, and ValueError if out/index.html is a page of another program. Single
    broken pictures and masks are left out; the page names them.
    """
    if limit < 1:
        raise ValueError(f"limit: must be at least 1, got {limit}")
    check_place(out)
    page = out / "index.html"
    for images in (proposals and proposals[0], predictions and predictions[0], found and found[0]):
        if images is not None and not images.is_dir():
            raise DataError(f"{images}: must be the folder of the pictures; check the path")
    read = read_runs(runs)
    logged = [run for run in read if run.log]
    album = Album(out)
    asked: list[tuple[str, Section | None, Callable[[], Section | None] | None]] = [
        ("proposals", _MISSING["proposals"], proposals and (lambda: sections.proposals(album, *proposals, limit))),
        ("prompts", _MISSING["prompts"], (lambda: sections.prompts(album, prompts[:limit])) if prompts else None),
        (
            "predictions",
            _MISSING["predictions"],
            predictions and (lambda: sections.predictions(album, *predictions, limit, pooled)),
        ),
        (
            "confusion",
            None,
            None if predictions is None or pooled else lambda: confusion.section(predictions[1], predictions[2]),
        ),
        (
            "predictions without labels",
            None,
            found and (lambda: sections.unlabelled(album, *found, limit, "found")),
        ),
        (
            "learning curves",
            _MISSING["curves"],
            (lambda: Section("curves", "Learning curves", curves(logged))) if logged else None,
        ),
        ("metrics", _MISSING["metrics"], (lambda: _metrics(read)) if any(run.metrics for run in read) else None),
        (
            "kernels",
            _MISSING["kernels"],
            None
            if activation is None
            else lambda: kernel_activation.section(album, kernel_activation.read_activation(activation)),
        ),
        ("runs", _MISSING["runs"], (lambda: _summary(read)) if read else None),
    ]
    every: list[Section | None] = []
    for name, missing, make in asked:
        if make is not None and tell is not None:
            tell(f"section: {name}")
        every.append(missing if make is None else make())
    made = [section for section in every if section is not None]
    names = [section.title.lower() for section in made if not section.missing]
    lead = f"{', '.join(names).capitalize()}." if names else "There is nothing to show yet."
    write_page(page, title, lead, made, f"Made by sprompt on {machine(torch.device('cpu'))}.")
    album.clear()
    return page


def _metrics(runs: Sequence[Run]) -> Section:
    """The section of metrics: bars of average precision, and a table of all numbers."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = [
        tag("tr", tag("th", name, scope="row"), [tag("td", _value(name, run.metrics), class_="n") for run in runs])
        for name in names
    ]
    table = _table(["", *(run.name for run in runs)], rows, numbers=True)
    bars = metric_bars(runs)
    body = join(
        key(runs) if len(runs) > 1 else None, bars,
        tag("details", tag("summary", "All numbers"), table, open=not bars), _categories(runs),
    )  # fmt: skip
    return Section("metrics", "Metrics", body)


def _categories(runs: Sequence[Run]) -> Html | None:
    """A table of the categories with the most objects: their AP, or their AR in a run whose classes did not count."""
    measured = [run for run in runs if run.categories]
    objects: Counter[str] = Counter()
    for run in measured:
        for name, category in run.categories.items():
            objects[name] = max(objects[name], category.objects)
    there = [name for name in objects if any(name in r.categories and r.categories[name].rate >= 0 for r in measured)]
    shown = sorted(there, key=lambda name: -objects[name])[:CATEGORIES]
    if not shown:
        return None
    rows = []
    for name in shown:
        rates = (run.categories[name].rate if name in run.categories else -1 for run in measured)
        cells = [f"{objects[name]:,}" if objects[name] else "", *(f"{rate:.3f}" if rate >= 0 else "" for rate in rates)]
        rows.append(tag("tr", tag("th", name, scope="row"), [tag("td", cell, class_="n") for cell in cells]))
    others = [f"{len(there) - len(shown):,} with objects"] if len(there) > len(shown) else []
    others += [f"{len(objects) - len(there):,} without objects"] if len(objects) > len(there) else []
    note = "The AP of a category, or its AR in a run whose classes did not count."
    if others:
        note += f" Other categories are in metrics.json: {', '.join(others)}."
    table = _table(["", "objects", *(run.name for run in measured)], rows, numbers=True)
    return tag("details", tag("summary", "Categories"), tag("p", note, class_="note"), table)


def _value(name: str, metrics: dict[str, float]) -> str:
    if name not in metrics:
        return ""
    if metrics[name] == -1:
        return "none"  # COCO writes -1 for a measure without labels
    return f"{metrics[name]:.3f}" if is_rate(name, metrics[name]) else f"{metrics[name]:,.6g}"


def _summary(runs: Sequence[Run]) -> Section:
    """The section of runs: their progress and their settings. Settings that differ are highlighted."""
    about = [
        ("steps", [f"{run.log[-1]['step']:,}" if run.log else "" for run in runs]),
        ("epochs", [_last(run, "epoch") for run in runs]),
        ("last loss", [_last(run, "loss") for run in runs]),
        ("pictures a second", [_last(run, "images_per_second") for run in runs]),
    ]
    words = list(dict.fromkeys(name for run in runs for name in run.words))
    about += [(name, [run.words.get(name, "") for run in runs]) for name in words]
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    settings = [(name, [run.config.get(name, "") for run in runs]) for name in names]
    head = ["", *(run.name for run in runs)]
    differing = [(name, values) for name, values in settings if len(set(values)) > 1]
    parts: list[Html] = [_table(head, [_row(name, values) for name, values in about if any(values)])]
    if differing:
        parts.append(tag("h3", "Settings that differ"))
        parts.append(_table(head, [_row(name, values) for name, values in differing]))
    if settings:
        rows = [_row(name, values, len(set(values)) > 1) for name, values in settings]
        parts.append(tag("details", tag("summary", "All settings"), _table(head, rows)))
    problems = [problem for run in runs for problem in run.problems]
    if problems:
        parts.append(tag("ul", [tag("li", problem) for problem in problems], class_="problems"))
    return Section("runs", "Runs", join(parts), "1 run" if len(runs) == 1 else f"{len(runs)} runs")


def _last(run: Run, name: str) -> str:
    values = [line[name] for line in run.log if isinstance(line.get(name), (int, float))]
    return f"{values[-1]:,.4g}" if values else ""


def _row(name: str, values: Sequence[str], differs: bool = False) -> Html:
    return tag(
        "tr", tag("th", name, scope="row"), [tag("td", v) for v in values], class_="differs" if differs else None
    )


def _table(head: Sequence[str], rows: Sequence[Html], numbers: bool = False) -> Html:
    cells = [
        tag("th", h, scope="col", class_="n" if numbers and i else None) if h else tag("td") for i, h in enumerate(head)
    ]
    table = tag("table", tag("thead", tag("tr", cells)), tag("tbody", rows))
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Table")


def _missing(anchor: str, title: str, how: str) -> Section:
    """A section without input. In `how` the words between backticks are commands or files."""
    parts = [tag("code", part) if i % 2 else part for i, part in enumerate(how.split("`"))]
    return Section(anchor, title, join(parts), missing=True)


_MISSING = {
    anchor: _missing(anchor, title, how)
    for anchor, title, how in (
        ("proposals", "Proposals", "`sprompt propose` finds masks in a folder of pictures and writes a proposal file."),
        (
            "prompts",
            "Prompts",
            "A run of `sprompt pretrain` shows which kernels take which prompt of its proposals.",
        ),
        (
            "predictions",
            "Predictions",
            "`sprompt predict` or `sprompt evaluate` writes COCO results. They are compared with labels if there are any.",
        ),
        (
            "curves",
            "Learning curves",
            "The folder of a run of `sprompt pretrain` or `sprompt finetune` has a `log.jsonl`.",
        ),
        (
            "metrics",
            "Metrics",
            "`sprompt evaluate` and `sprompt finetune` write `metrics.json` into the folder of the run.",
        ),
        (
            "kernels",
            "Kernel activation",
            "A model and labelled or unlabelled pictures give the mean mask of each kernel.",
        ),
        ("runs", "Runs", "Folders of runs show the progress of the runs, and their settings side by side."),
    )
}

"""The page of a study: tables and the claims they test, learning curves, all cells, predictions, and kernel maps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sprompt.data.draw import FALSE, TRUE, heat_map, hexadecimal, scaled
from sprompt.report import page as html
from sprompt.report.activation import placed, read_activation, spread
from sprompt.report.album import Album, dot, figure
from sprompt.report.compare import IOU
from sprompt.report.curves import Line, chart
from sprompt.report.page import Html, Section, join, tag
from sprompt.study.compare import (
    ABOVE,
    BELOW,
    Comparison,
    Estimate,
    Results,
    cells,
    comparisons,
    fractions,
    rate,
    seed_curves,
    variants,
)  # fmt: skip
from sprompt.study.predictions import Side
from sprompt.study.tables import (
    LEGEND,
    Grid,
    comparison_grid,
    convergence,
    monitors,
    percent,
    points,
    pretrained,
    progress,
    proposals,
    summary,
    title,
)  # fmt: skip

_MAPS = 36  # upper bound of the kernel maps of a variant
_BANDS = "A curve is the mean of the seeds over the epochs of fine-tuning; its band goes from the least to the largest value."


def write_page(
    out: Path, results: Results, maps: dict[str, np.ndarray] | None = None, sides: Sequence[Side] = ()
) -> Path:
    """Writes out/index.html and out/pictures/, and returns the page's path. It opens from disk.

    Args:
        results: the content of results.json. Sections without results are left out.
        maps: mean activation (N, h, w) of each kernel, by variant.
        sides: test pictures with the predictions of variants.

    Raises ValueError if out/index.html is a page of another program, and DataError for maps of another shape.
    """
    html.check_place(out)
    album = Album(out)
    sections = [
        *_questions(results), *_convergence(results), *_all_cells(results), *_before(results),
        *_predictions(album, sides), *_kernels(album, maps or {}), *_failed(results), *_settings(results),
    ]  # fmt: skip
    if not results.get("cells"):
        sections.insert(0, Section("cells", "Cells", tag("p", "No cell is done yet.", class_="note")))
    page = out / "index.html"
    name = (results.get("data") or {}).get("name", "")
    html.write_page(page, f"Study: {name}" if name else "Study", summary(results), sections, "Made by sprompt study.")
    album.clear()
    return page


# -- sections
def _questions(results: Results) -> Iterator[Section]:
    """A section for each question: its tables, and the curves of its variants."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons(results):
        found.setdefault(comparison.key, []).append(comparison)
    for key, asked in found.items():
        name, _, number = asked[0].question.title.partition(" (")
        parts = [tag("p", asked[0].question.claim, class_="note")]
        if key == next(iter(found)):
            parts.append(tag("p", f"{LEGEND} {_BANDS}", class_="note small"))
        for comparison in asked:
            parts.append(tag("h3", f"{percent(comparison.fraction)} of the labels"))
            parts.append(_table(comparison_grid(comparison)))
            parts.append(_curves(results, comparison))
        yield Section(key, name, join(parts), number.rstrip(")"))


def _curves(results: Results, comparison: Comparison) -> Html:
    charts, names = [], [row.name for row in comparison.rows]
    for label, pooled in (("AP", False), ("pooled AP", True)):
        lines = []
        for colour, name in enumerate(names):
            curve = [
                (epoch, [100 * v for v in seeds])
                for epoch, seeds in seed_curves(results, name, comparison.fraction, pooled)
            ]
            band = [(epoch, min(seeds), max(seeds)) for epoch, seeds in curve]
            many = any(len(seeds) > 1 for _, seeds in curve)
            lines.append(Line(title(name), [(e, statistics.fmean(s)) for e, s in curve], colour, band if many else ()))
        if any(line.points for line in lines):
            charts.append(chart(label, lines, unit="epoch"))
    if not charts:
        return Html()
    key = tag("p", [tag("span", title(name), class_=f"r{i}") for i, name in enumerate(names)], class_="key names")
    return join(key, tag("div", charts, class_="charts pair"))


def _convergence(results: Results) -> Iterator[Section]:
    parts = (("convergence", convergence, "Figure 3"), ("progress", progress, ""))
    for anchor, table, number in parts:
        tables = [grid for fraction in fractions(results) if (grid := table(results, fraction))]
        if tables:
            heads = [join(tag("h3", grid.title.partition(", ")[2]), _table(grid)) for grid in tables]
            name = tables[0].title.partition(", ")[0].partition(" (")[0]
            yield Section(anchor, name, join(tag("p", tables[0].note, class_="note"), heads), number)


def _all_cells(results: Results) -> Iterator[Section]:
    """The section of all cells: the AP of each seed as a dot, on one scale for all variants."""
    parts = []
    for fraction in fractions(results):
        found = {}
        for name in variants(results):
            of_seeds = {s: rate(c.get("metrics"), "AP") for s, c in cells(results, name, fraction).items()}
            if known := {seed: ap for seed, ap in of_seeds.items() if ap is not None}:
                found[name] = known
        top = max((ap for of_seeds in found.values() for ap in of_seeds.values()), default=0.0) or 1.0
        rows = [_strip(name, of_seeds, top) for name, of_seeds in found.items()]
        if rows:
            ends = tag("div", tag("span", "0"), tag("span", f"{100 * top:.2f}"), class_="ends")
            parts.append(join(tag("h3", f"{percent(fraction)} of the labels"), tag("div", rows, ends, class_="strip")))
    if parts:
        note = tag("p", "AP × 100 of every cell: a dot is a seed, a bar is the mean of the seeds.", class_="note")
        count = len(results["cells"])
        yield Section("cells", "All cells", join(note, parts), f"{count} cell{'s' if count > 1 else ''}")


def _strip(name: str, of_seeds: dict[int, float], top: float) -> Html:
    dots = [
        tag("i", style=f"left:{100 * ap / top:.2f}%", title=f"seed {seed}: {100 * ap:.2f}")
        for seed, ap in of_seeds.items()
    ]
    mean = tag("u", style=f"left:{100 * statistics.fmean(of_seeds.values()) / top:.2f}%")
    said = ", ".join(f"seed {seed}: {100 * ap:.2f}" for seed, ap in of_seeds.items())
    return join(
        tag("span", title(name), class_="who"), tag("div", dots, mean, class_="line", role="img", aria_label=said),
        tag("span", points(Estimate.of(of_seeds.values())), class_="n"),
    )  # fmt: skip


def _before(results: Results) -> Iterator[Section]:
    """The section before fine-tuning: the quality of the masks, and the pre-trained models."""
    found = (("proposals", proposals(results)), ("pretrained", pretrained(results)), ("monitors", monitors(results)))
    for anchor, grid in found:
        if grid:
            name, _, number = grid.title.partition(" (")
            yield Section(anchor, name, join(tag("p", grid.note, class_="note"), _table(grid)), number.rstrip(")"))


def _predictions(album: Album, sides: Sequence[Side]) -> Iterator[Section]:
    """The section of test pictures: the labels, then the predictions of each variant."""
    figures = []
    for number, side in enumerate(sides):
        plain = scaled(side.plain)
        shots = [album.shot(f"labels-{number:03}", side.labels, f"Labels of {side.name}", plain=plain, title="labels")]
        rows = []
        for place, (name, (picture, counts)) in enumerate(side.found.items()):
            said = "{} found, {} false, {} missed".format(*counts)
            words = f"{title(name)} on {side.name}: {said}"
            shots.append(
                album.shot(
                    f"found-{number * len(side.found) + place:03}", picture, words, plain=plain, title=title(name)
                )
            )
            rows.append(tag("span", f"{title(name)}: {said}"))
        ratio = len(shots) * side.plain.width / side.plain.height
        figures.append(figure(shots, ratio, side.name, tag("div", rows, class_="chips")))
    if figures:
        key = [
            tag("span", dot(hexadecimal(colour), style), words)
            for colour, style, words in (
                (TRUE, "solid", f"found: right class, IoU of at least {IOU}"),
                (FALSE, "hatched", "false"),
            )
        ]
        note = (
            "What the first fine-tuned model of each start finds on the same test pictures: predictions above the score that gives it "
            "the best F1 on them."
        )
        sheet = tag("div", figures, class_="sheet sides")
        yield Section(
            "predictions", "Predictions", join(tag("p", note, class_="note"), tag("p", key, class_="key"), sheet)
        )


def _kernels(album: Album, maps: dict[str, np.ndarray]) -> Iterator[Section]:
    """The section of kernel maps: heat maps of the kernels of every variant, the most local first."""
    parts, stored = [], 0
    for name, given in maps.items():
        of_kernels = read_activation(given)
        far = spread(of_kernels)
        order = np.argsort(far, kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, min(_MAPS, len(order))).round().astype(int)]
        figures = []
        for k in chosen.tolist():
            finite = of_kernels[k][np.isfinite(of_kernels[k])]
            peak = float(finite.max()) if finite.size else 0.0
            words = f"{title(name)}, kernel {k}: spread {far[k]:.2f}, peak {peak:.2f}"
            shot = album.map(f"map-{stored:04}", heat_map(of_kernels[k], 0.0, peak), f"Mean activation of {words}")
            figures.append(tag("figure", shot, data_title=words, title=words))
            stored += 1
        count = f"{len(figures)} of {len(far)}" if len(figures) < len(far) else f"{len(far)}"
        said = ", ".join(filter(None, (f"{count} kernels", placed(of_kernels))))
        sheet = tag("div", figures, class_="maps", style=f"--ar:{of_kernels.shape[2] / of_kernels.shape[1]:.3f}")
        parts.append(tag("div", tag("h3", title(name)), tag("p", said), sheet))
    if parts:
        note = tag(
            "p", "The mean mask of each kernel over the pictures, the most local first. Colours go up to the peak of a map. "
            "The spread is the distance of the activation from its centre, in widths of the picture; an even map has 0.41. If "
            "all kernels look at the same places, their centres are scattered by 0.", class_="note",
        )  # fmt: skip
        yield Section("kernels", "Kernel activation", join(note, tag("div", parts, class_="beside")), "Figure 6")


def _failed(results: Results) -> Iterator[Section]:
    failed = results.get("failed") or []
    if failed:
        items = [
            tag(
                "li",
                tag("b", entry.get("cell", "")),
                ": ",
                entry.get("why", ""),
                [" (", tag("code", log), ")"] if log else None,
            )
            for entry in failed
            for log in [entry.get("log")]
        ]
        yield Section("failed", "Failed", tag("ul", items, class_="problems"), f"{len(failed)}")


def _settings(results: Results) -> Iterator[Section]:
    settings: dict[str, Any] = {
        part: results[part] for part in ("study", "data", "machine", "hours", "version") if part in results
    }
    if settings:
        rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in _flat(settings)]
        table = tag(
            "div", tag("table", tag("tbody", rows)), class_="scroll", tabindex="0", role="region", aria_label="Settings"
        )
        yield Section("settings", "Settings", tag("details", tag("summary", "All settings"), table))


# -- parts
def _table(grid: Grid) -> Html:
    """A table with numbers aligned to the right, each mean before its standard deviation."""
    kinds = ["words" if i == grid.words else "n" if i else None for i in range(len(grid.head))]
    head = [
        tag("th", h, scope="col", class_=f"{k} long" if len(h) > 20 else k) if h else tag("td")
        for h, k in zip(grid.head, kinds, strict=True)
    ]
    rows = []
    for i, (name, *values) in enumerate(grid.rows):
        filled = [tag("td", _value(v), class_=k) for v, k in zip(values, kinds[1:], strict=True)]
        rows.append(tag("tr", tag("th", name, scope="row"), filled, class_="best" if i == grid.best else None))
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", rows))
    return tag("div", table, class_="scroll study", tabindex="0", role="region", aria_label=grid.title)


def _value(text: str) -> Html | str:
    if text in (ABOVE, BELOW):
        return tag("span", text, class_="t" if text == ABOVE else "f")
    mean, sign, sd = text.partition(" ± ")
    return join(mean, " ", tag("small", f"± {sd}")) if sign else text


def _flat(settings: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{before}{name}", text

"""Learning curves and bars as HTML. They adapt to the width of the page and to its light or dark colours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sprompt.report.page import Html, join, tag
from sprompt.report.runs import Run

Points = Sequence[tuple[float, "float | None"]]

_COLOURS = 6  # classes r0 to r5 of the style
_MOST = 600  # upper bound of the points of a drawn line
_QUIET = 30  # a line with at most this many points is not smoothed
_SPEED = ("lr", "learning_rate", "seconds", "images_per_second")


@dataclass(frozen=True)
class Line:
    name: str
    points: Points
    colour: int
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high) around the points


def smoothed(points: Points, share: float = 0.05) -> list[tuple[float, float | None]]:
    """Means over a window of about this share of the points. Gaps stay gaps.

    The window is symmetric where enough points exist, so the curve does not lag behind.
    """
    half = int(share * len(points) / 2)
    values = np.array([math.nan if y is None else y for _, y in points])
    there = ~np.isnan(values)
    sums, counts = np.cumsum([0, *np.where(there, values, 0)]), np.cumsum([0, *there])
    place = np.arange(len(points))
    reach = np.minimum(half, np.minimum(place, len(points) - 1 - place).clip(min=half // 2))
    low, high = (place - reach).clip(min=0), (place + reach + 1).clip(max=len(points))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return [(x, float(mean) if good else None) for (x, _), mean, good in zip(points, means, there, strict=True)]


def curves(runs: Sequence[Run]) -> Html:
    """Charts of all numbers in the logs: a large one of the loss, then its terms by the part of the model, then monitors and
    speed."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    groups: dict[str, list[str]] = {}
    for name in names:
        if name != "loss":
            groups.setdefault(_group(name), []).append(name)
    order = sorted(groups, key=lambda g: (g == "Speed and learning rate", g == "Monitors", g != "Terms"))
    parts = [key(runs)] if len(runs) > 1 else []
    if "loss" in names:
        parts.append(tag("div", chart("loss", _lines(runs, "loss"), large=True), class_="charts"))
    for group in order:
        shown = [chart(_short(name, group), _lines(runs, name)) for name in groups[group]]
        parts.append(tag("h3", group))
        parts.append(tag("div", shown, class_="charts"))
    return join(parts)


def key(runs: Sequence[Run]) -> Html:
    """The legend: the colour of each run."""
    return tag("p", [tag("span", run.name, class_=f"r{i % _COLOURS}") for i, run in enumerate(runs)], class_="key")


def chart(title: str, lines: Sequence[Line], large: bool = False, unit: str = "step") -> Html:
    """A chart of lines over steps, or over the unit `unit`: each raw line thin, its smoothed line thick.

    A text for screen readers says where each line begins and ends.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return tag(
            "figure", tag("figcaption", tag("b", title), tag("span", " no finite value", class_="meta")), class_="chart"
        )
    noisy = title not in ("lr", "learning_rate") and max(len(line.points) for line in lines) > _QUIET
    means = [smoothed(line.points) if noisy else line.points for line in lines]
    x0 = min(line.points[0][0] for line in lines)
    x1 = max(max(line.points[-1][0] for line in lines), x0 + 1)
    shown = [y for line in lines for _, y in line.points if y is not None]
    low, high, ticks = _axis(shown + [y for line in lines for _, *ends in line.band for y in ends])

    def place(x: float, y: float) -> tuple[float, float]:
        return 1000 * (x - x0) / (x1 - x0), 1000 * (1 - (min(max(y, low), high) - low) / (high - low))

    drawn = [tag("path", d=f"M0 {place(x0, t)[1]:.1f}H1000", class_="grid") for t in ticks]
    for line in lines:
        if line.band:
            around = [(x, y) for x, y, _ in line.band] + [(x, y) for x, _, y in reversed(line.band)]
            drawn.append(tag("path", d=f"{_path(around, place)}Z", class_=f"band r{line.colour % _COLOURS}"))
    for line, mean in zip(lines, means, strict=True):
        shade = f"r{line.colour % _COLOURS}"
        if noisy:
            drawn.append(tag("path", d=_path(line.points, place), class_=f"raw {shade}"))
        drawn.append(tag("path", d=_path(mean, place), class_=f"mean {shade}"))
    svg = tag("svg", drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", aria_hidden="true")
    labels = [tag("span", number(t), class_="y", style=f"bottom:{100 * (t - low) / (high - low):.2f}%") for t in ticks]
    steps = [step for step in _ticks(x0, x1, 5 if large else 3) if step == round(step)]  # no half steps
    for step in steps:
        share = 100 * (step - x0) / (x1 - x0)
        labels.append(tag("span", f"{step:,.0f}", class_="x last" if share > 97 else "x", style=f"left:{share:.2f}%"))
    said = [(line.name, _ends(mean)) for line, mean in zip(lines, means, strict=True)]
    words = "; ".join(f"{name}: from {number(a)} to {number(b)}" for name, (a, b) in said)
    last = ", ".join(number(b) for _, (_, b) in said) if len(said) < 4 else ""
    hover = [
        {"name": line.name, "points": [[x, None if y is None else float(f"{y:.5g}")] for x, y in _thin(mean, 200)]}
        for line, mean in zip(lines, means, strict=True)
    ]
    plot = tag(
        "div", svg, labels, class_="plot", role="img", aria_label=f"{title} over {unit}s. {words}",
        data_lines=json.dumps(hover, separators=(",", ":")), data_x0=x0, data_x1=x1, data_unit=unit,
    )  # fmt: skip
    caption = tag("figcaption", tag("b", title), tag("span", f" {last}" if last else "", class_="meta"))
    return tag("figure", caption, plot, class_="chart large" if large else "chart")


def metric_bars(runs: Sequence[Run]) -> Html:
    """Bars of the average precision and recall of the runs, one group for each measure."""
    names = list(dict.fromkeys(n for run in runs for n, v in run.metrics.items() if is_rate(n, v)))
    names.sort(key=lambda n: n.rsplit("/", 1)[0] if "/" in n else "")
    scale = max((run.metrics[n] for run in runs for n in names if n in run.metrics), default=0.0)
    top = 1.0 if scale <= 1 else 100.0
    top = next((top * s for s in (0.1, 0.2, 0.4, 0.6) if scale <= top * s), top)
    groups = []
    for name in names:
        rows = [
            join(
                tag("span", run.name, class_="who", title=run.name),
                _bar(run.metrics[name] / top, f"r{i % _COLOURS}"),
                tag("b", f"{run.metrics[name]:.3f}"),
            )
            for i, run in enumerate(runs)
            if name in run.metrics
        ]
        groups.append(tag("div", tag("h3", name), tag("div", rows, class_="bars")))
    return tag("div", groups, class_="metrics") if groups else Html()


def is_rate(name: str, value: float) -> bool:
    """Whether a metric is an average precision or recall. COCO's −1 means that there is no value, so it is false for it."""
    return name.rsplit("/", 1)[-1].upper().startswith(("AP", "AR", "MAP")) and 0 <= value <= 100


def histogram(values: Sequence[float], low: float, high: float, bins: int, title: str) -> Html:
    """A histogram: columns for `bins` equal parts of the range low to high."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    most = max(*counts, 1)
    columns = [
        tag("span", title=f"{number(low + i * (high - low) / bins)}: {c}", style=f"height:{100 * c / most:.1f}%")
        for i, c in enumerate(counts)
    ]
    said = f"{title}: {len(values)} values, most of them near {number(low + (counts.index(max(counts)) + 0.5) * (high - low) / bins)}"
    ends = tag("div", tag("span", number(low)), tag("span", title), tag("span", number(high)), class_="ends")
    return join(tag("div", columns, class_="columns", role="img", aria_label=said), ends)


def number(value: float) -> str:
    """A number as short text, for an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# -- parts
def _lines(runs: Sequence[Run], name: str) -> list[Line]:
    return [Line(run.name, points, i) for i, run in enumerate(runs) if (points := run.curve(name))]


def _group(name: str) -> str:
    if name in _SPEED:
        return "Speed and learning rate"
    if name.startswith("monitor/"):
        return "Monitors"
    return name.split("/", 1)[0] if "/" in name else "Terms"


def _short(name: str, group: str) -> str:
    return name.split("/", 1)[1] if "/" in name and (group == "Monitors" or name.startswith(f"{group}/")) else name


def _bar(share: float, shade: str) -> Html:
    return tag(
        "span", tag("div", class_=f"bar {shade}", style=f"width:{100 * min(max(share, 0), 1):.1f}%"), class_="track"
    )


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low end, high end, ticks) of an axis. Rare spikes far above 98 % of the values are cut off."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if high > low + 1.6 * (usual - low) > low:
        high = low + 1.15 * (usual - low)
    high += 0.04 * (high - low)
    if 0 <= low < 0.5 * high:
        low = 0.0
    if not high > low:
        low, high = low - max(abs(low) * 0.1, 1e-12), high + max(abs(high) * 0.1, 1e-12)
    ticks = _ticks(low, high, 4)
    return low, high, ticks


def _ticks(low: float, high: float, about: int) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s for s in (1, 2, 5, 10) if s * power >= rough * 0.999) * power
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _thin(points: Points, most: int) -> Points:
    every = math.ceil(len(points) / most)
    return points if every <= 1 else [*points[::every], *([] if (len(points) - 1) % every == 0 else [points[-1]])]


def _path(points: Points, place: Callable[[float, float], tuple[float, float]]) -> str:
    parts, begun = [], False
    for x, y in _thin(points, _MOST):
        if y is None:
            begun = False
            continue
        px, py = place(x, y)
        parts.append(f"{'L' if begun else 'M'}{px:.1f} {py:.1f}")
        begun = True
    return "".join(parts)


def _ends(points: Points) -> tuple[float, float]:
    values = [y for _, y in points if y is not None]
    return values[0], values[-1]

"""The pictures of a study for documentation: learning curves and kernel maps as PNG files, predictions as JPEG files."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sprompt.atomic import atomic_write
from sprompt.report.activation import placed, read_activation, spread
from sprompt.study.compare import Results, comparisons, seed_curves
from sprompt.study.predictions import Side
from sprompt.study.tables import percent, title
from sprompt.study.variants import VARIANTS

_MAPS = 8  # number of kernels of a variant, spread evenly from the most local to the least local
_SIDES = 5  # number of test pictures


def draw_curves(results: Results, out: Path) -> bool:
    """AP over the epochs of fine-tuning, one panel for each question and share of the labels.

    A line is the mean of the seeds, its band the range from the least to the largest value. Returns False and writes no file if
    no cell has a curve.
    """
    asked = [c for c in comparisons(results) if any(seed_curves(results, row.name, c.fraction) for row in c.rows)]
    if not asked:
        return False
    rows = -(-len(asked) // 2)
    figure = Figure(figsize=(11, 3.9 * rows), layout="constrained")
    for place, comparison in enumerate(asked):
        axes = figure.add_subplot(rows, 2, place + 1)
        for row in comparison.rows:
            curve = seed_curves(results, row.name, comparison.fraction)
            if not curve:
                continue
            epochs, seeds = [epoch for epoch, _ in curve], [[100 * v for v in values] for _, values in curve]
            shade = _shade(row.name)
            axes.plot(epochs, [statistics.fmean(s) for s in seeds], label=title(row.name), color=shade)
            axes.fill_between(epochs, [min(s) for s in seeds], [max(s) for s in seeds], color=shade, alpha=0.15, lw=0)
        axes.set_title(f"{comparison.question.title}, {percent(comparison.fraction)} of the labels", fontsize=9)
        axes.set_xlabel("epochs of fine-tuning", fontsize=8)
        axes.set_ylabel("AP", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    _save(figure, out)
    return True


def draw_maps(maps: dict[str, np.ndarray], out: Path) -> bool:
    """A row of kernel maps for each variant, with colours up to the peak of each map. Returns False and writes no file without
    maps."""
    if not maps:
        return False
    figure = Figure(figsize=(1.25 * _MAPS, 1.45 * len(maps)), layout="constrained")
    rows = figure.subfigures(len(maps), 1, squeeze=False)[:, 0]
    for part, (name, given) in zip(rows, maps.items(), strict=True):
        of_kernels = read_activation(given)
        order = np.argsort(spread(of_kernels), kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, min(_MAPS, len(order))).round().astype(int)]
        part.suptitle(f"{title(name)}: {placed(of_kernels)}", fontsize=8, x=0.005, ha="left")
        for column, kernel in enumerate(chosen.tolist()):
            axes = part.add_subplot(1, _MAPS, column + 1)
            axes.imshow(of_kernels[kernel], vmin=0, cmap="viridis")
            axes.set_axis_off()
    _save(figure, out)
    return True


def draw_predictions(sides: Sequence[Side], out: Path) -> bool:
    """A row for each of the first test pictures: its labels, then the predictions of each variant.

    Returns False and writes no file without pictures.
    """
    if not sides:
        return False
    rows = [
        {"labels": side.labels} | {title(name): picture for name, (picture, _) in side.found.items()}
        for side in sides[:_SIDES]
    ]
    columns = len(rows[0])
    figure = Figure(figsize=(2 * columns, 2.1 * len(rows)), layout="constrained")
    for row, tiles in enumerate(rows):
        for column, (name, picture) in enumerate(tiles.items()):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            axes.imshow(np.asarray(picture))
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name, fontsize=8)
    _save(figure, out)
    return True


def _shade(variant: str) -> tuple[float, ...]:
    """The colour of a variant's curves, the same in every panel and study; black for a variant that is not in VARIANTS."""
    names = list(VARIANTS)
    return matplotlib.colormaps["tab20"](names.index(variant)) if variant in names else (0.0, 0.0, 0.0)


def _save(figure: Figure, out: Path) -> None:
    file = io.BytesIO()
    options = {"quality": 85} if out.suffix == ".jpg" else {"optimize": True}
    figure.savefig(file, format=out.suffix[1:], dpi=110, pil_kwargs=options)
    atomic_write(out, file.getvalue())

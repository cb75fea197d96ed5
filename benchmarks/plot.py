"""Pictures of the benchmark: speed against eager as bars, and growth of cost with masks, prompts, image side and batch.

python -m benchmarks.plot bars benchmarks/results/cpu.json      -> benchmarks/results/cpu.png
python -m benchmarks.plot growth                                -> benchmarks/results/growth.png, growth.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks import growth, measure
from sprompt.machine import machine
from sprompt.testing.spec import Bench

RESULTS = Path(__file__).parent / "results"
OURS, EAGER, GOAL = "#1f6f8b", "#b0b0b0", "#c0392b"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bars_parser = commands.add_parser("bars", help="one bar for each row of a JSON file of benchmarks.run")
    bars_parser.add_argument("json", type=Path)
    growth_parser = commands.add_parser("growth", help="measure and draw how time grows")
    growth_parser.add_argument("--device", default="cpu")
    growth_parser.add_argument("--seconds", type=float, default=1.0, help="seconds of timing of each point (default 1)")
    for p in (bars_parser, growth_parser):
        p.add_argument("--out", type=Path, help="the picture")
    options = parser.parse_args()
    if options.command == "bars":
        out = options.out or options.json.with_suffix(".png")
        bars(json.loads(options.json.read_text()), out)
    else:
        out = options.out or RESULTS / "growth.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        device = torch.device(options.device)
        series = {"machine": machine(device), "series": measure_growth(device, options.seconds)}
        out.with_suffix(".json").write_text(json.dumps(series, indent=1) + "\n")
        draw_growth(series, out)
    print(out)


def bars(result: dict[str, Any], out: Path) -> None:
    """Bars of the speed relative to eager, with a mark for the goal of a row, if it has one."""
    rows = [r for r in result["rows"] if r["mode"] != "memory" and "ratio" in r]
    labels = [f"{r['op']}  {r['shape']}  {r['dtype']}  {r['mode']}" for r in rows]
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(rows) + 1.4))
    places = range(len(rows))[::-1]
    axes.barh(places, [r["ratio"] for r in rows], color=[OURS if r["ratio"] >= 1 else GOAL for r in rows], height=0.7)
    for place, r in zip(places, rows, strict=True):
        axes.text(r["ratio"] * 1.05, place, f"{r['ratio']:.1f}×", va="center", fontsize=7)
        if r["goal"]:
            axes.plot([r["goal"]] * 2, [place - 0.4, place + 0.4], color=GOAL, linewidth=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max([r["ratio"] for r in rows] + [10]) * 3)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set_xlabel("times faster than eager PyTorch (red mark: goal)")
    axes.set_title(result["machine"], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def measure_growth(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    series = []
    for curve in growth.CURVES:
        points: list[dict[str, Any]] = []
        for size in curve.sizes:
            bench = curve.bench
            sample = curve.make(size).map(lambda t: t.to(device))
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda s=sample, f=bench.function: f(*s.args, **s.kwargs),
                "eager": lambda s=sample, f=bench.eager: f(*s.args, **s.kwargs),
            }
            check(bench, calls, sample)
            times = measure.interleaved(calls, device, seconds)
            points.append({"size": size, **{name: statistics.median(t) for name, t in times.items()}})
        series.append({"title": curve.title, "axis": curve.axis, "points": points})
    return series


def check(bench: Bench, calls: dict[str, Callable[[], Any]], sample: Any) -> None:
    from benchmarks.row import agree

    agree(bench, sample, torch.float32, calls["ours"](), calls["eager"]())


def draw_growth(result: dict[str, Any], out: Path) -> None:
    series = result["series"]
    columns = 3
    lines = -(-len(series) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False)
    for axes, curve in zip(grid.flat, series, strict=False):
        sizes = [p["size"] for p in curve["points"]]
        for name, colour in (("eager", EAGER), ("ours", OURS)):
            axes.plot(sizes, [p[name] for p in curve["points"]], marker="o", color=colour, label=name)
        axes.set(title=curve["title"], xlabel=curve["axis"], ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(series) :]:
        axes.set_visible(False)
    figure.suptitle(result["machine"], fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()

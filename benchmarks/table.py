"""The benchmark's rows on the terminal, with rich if it is installed, and in Markdown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HEADER = ("op", "shape", "dtype", "mode", "eager", "compiled", "libraries", "ours", "eager/ours", "goal", "floor/ours")
MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows the row that is being timed, on standard error."""
    width = 0

    def show(text: str) -> None:
        nonlocal width
        if sys.stderr.isatty():
            print(f"\r{text[:100]:<{width}}", end="", file=sys.stderr, flush=True)
            width = max(width, len(text[:100]))

    yield show
    if width:
        print("\r" + " " * width + "\r", end="", file=sys.stderr, flush=True)


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{1e3 * value:.0f} µs"


def size(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    first = (row["op"], row["shape"], row["dtype"], row["mode"])
    if row["error"]:
        return (*first, row["error"], "", "", "", "", "", "")
    unit, values = (size, row["peak_bytes"]) if row["mode"] == "memory" else (milliseconds, row["ms"])
    libraries = "; ".join(_library(name, found, unit, values) for name, found in row["libraries"].items())
    compiled = unit(values["compiled"]) if "compiled" in values else ""
    goal = row["goal"]
    goal_text = "" if goal is None else f"≥ {goal:g}×" + ("" if row.get("ratio", 0) >= goal else " missed")
    share = f"{row['floor_share']:.2f}" if row.get("floor_share") else ""
    ours = unit(values["ours"])
    if (
        "device" in values
    ):  # ours replayed from a graph; eager cannot be captured, so the other times include Python's launches
        ours += f" (graph {unit(values['device'])})"
    return (
        *first,
        unit(values["eager"]),
        compiled,
        libraries,
        ours,
        times(row.get("ratio")),
        goal_text,
        share,
    )


def _library(name: str, found: dict[str, Any], unit: Callable[[float], str], values: dict[str, float]) -> str:
    if found.get("missing"):
        return f"{name}: " + ("" if found["missing"] == name else f"{found['missing']} ") + "not installed"
    text = f"{name} {unit(values[name])}"
    if found.get("ratio") is not None:
        text += f" = {times(found['ratio'])}"
        if found.get("goal"):
            text += f" (goal {found['goal']:g}×)"
    return text


def _heading(result: dict[str, Any]) -> str:
    found = result["ceilings"]
    lines = [result["machine"]]
    if found:
        lines.append(
            f"ceilings: copy {found['copy']:.0f} GB/s (read + write), product {found['float32']:.0f} GFLOP/s float32, "
            f"{found['bfloat16']:.0f} GFLOP/s bfloat16"
        )
    if not result.get("compiled", True):
        lines.append("torch.compile was not measured")
    if any(row.get("cached") for row in result["rows"]):
        lines.append("no share of the floor where the inputs fit the GPU's L2 cache")
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    styles: list[str | None] = []
    for row in result["rows"]:
        missed = row["goal"] is not None and row.get("ratio", 0) < row["goal"]
        lost = row.get("ratio", 1) < 1
        styles.append("red" if row["error"] or lost else "yellow" if missed else None)
    draw(_heading(result), HEADER, [cells(row) for row in result["rows"]], styles)
    if result["empty_calls"]:
        print(f"{EMPTY}: " + "  ".join(map(_empty_call, result["empty_calls"])))


EMPTY = "An empty call, in multiples of a torch.mul of tiny tensors (recording a gradient)"


def _empty_call(line: dict[str, Any]) -> str:
    recording = f" ({line['recording']:.0f})" if "recording" in line else ""
    return f"{line['op']} {line['call']:.0f}{recording}"


def draw(heading: str, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> None:
    """Prints a table on the terminal, with a style of rich for each row."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(heading)
        for row in (header, *rows):
            print("  ".join(row))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(heading, highlight=False)
    drawn = Table(*header)
    for row, style in zip(rows, styles, strict=True):
        drawn.add_row(*row, style=style)
    console.print(drawn)


def markdown(result: dict[str, Any]) -> str:
    lines = [_heading(result).replace("\n", "  \n"), "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    told = [row for row in result["rows"] if row["mode"] != "memory" or row["goal"]]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in told]
    if result["empty_calls"]:
        lines += [
            "",
            f"{EMPTY}: " + ", ".join(map(_empty_call, result["empty_calls"])) + ".",
        ]
    return "\n".join(lines)


def replace_markdown(file: Path, result: dict[str, Any]) -> None:
    replace_between(file, MARKERS, markdown(result))


def replace_between(file: Path, markers: tuple[str, str], generated: str) -> None:
    text = file.read_text()
    begin, end = markers
    if begin not in text or end not in text:
        raise SystemExit(f"{file} has no {begin} … {end} markers")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    file.write_text(f"{head}{begin}\n{generated}\n{end}{tail}")

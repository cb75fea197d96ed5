"""Times whole programs against released code and against the reference backend: a step of training, results, proposals.

Results are compared first. A row with different results gets no time, and the command then ends with status 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, table
from benchmarks.apart import apart, each_in_process
from benchmarks.program_rows import PROGRAMS, Program
from benchmarks.run import commit, write
from sprompt.machine import machine
from sprompt.methods.saliency_prompt.precision import exact_products

MARKERS = ("<!-- programs -->", "<!-- /programs -->")
RIVALS = ("released", "reference", "ours", "captured")
HEADER = (
    "program", "shape", *RIVALS[:3], "released/ours", "goal", "peak released", "peak ours", "released/ours", "goal", "remarks",
)  # fmt: skip


def main() -> int:
    names = list(dict.fromkeys(program.name for program in PROGRAMS))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=names, metavar="NAME", help=f"only this one of {names}")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument("--seconds", type=float, default=6.0, help="least seconds of timing for each row (default: 6)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--markdown", type=Path, help=f"replace the table between {' '.join(MARKERS)} in this file (docs/benchmarks.md)"
    )
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    result: dict[str, Any] = {"machine": apart(device, machine, device), "commit": commit(), "quick": options.quick}
    result["rows"] = []
    with table.progress() as show:
        for name in options.row or names:
            numbers = [number for number, program in enumerate(PROGRAMS) if program.name == name]
            how = (numbers, device, 0.1 if options.quick else options.seconds, options.quick)
            found = rows(*how) if device.type == "cpu" else each_in_process(rows, *how)
            for number in numbers:
                show(f"{name} {PROGRAMS[number].shape}")
                line = next(found)
                if isinstance(line, str):
                    line = untimed(PROGRAMS[number], options.quick) | {"error": line}
                result["rows"].append(line)
                write(options.json, result)
    lines = [cells(line) for line in result["rows"]]
    table.draw(result["machine"], HEADER, lines, [style(line) for line in result["rows"]])
    print(markdown(result))
    if options.markdown:
        table.replace_between(options.markdown, MARKERS, markdown(result))
    return 1 if any(line["error"] for line in result["rows"]) else 0


def rows(numbers: Sequence[int], device: torch.device, seconds: float, quick: bool) -> Iterator[dict[str, Any]]:
    """The lines of these programs. It ends the process after an error of CUDA, since such a process can use no GPU any more."""
    with exact_products(device):
        for number in numbers:
            line = row(PROGRAMS[number], device, seconds, quick)
            yield line
            if "CUDA error" in line["error"]:
                os._exit(0)


def untimed(program: Program, quick: bool) -> dict[str, Any]:
    shape, goals = (f"toy size of: {program.shape}", {}) if quick else (program.shape, program.goals)
    return {"program": program.name, "shape": shape, "error": "", "goals": goals, "unit": program.unit}


def row(program: Program, device: torch.device, seconds: float, quick: bool) -> dict[str, Any]:
    """One line of the table: times in ms, peaks in bytes. If there are none, `error` has the reason."""
    line = untimed(program, quick)
    try:
        calls, check, parts = (program.tiny if quick else program.make)(device)
        line["remark"] = check()
    except AssertionError as failure:
        return line | {"error": f"results disagree: {failure}"}
    except Exception as failure:  # a failed row must not end the run
        return line | {"error": f"{type(failure).__name__}: {failure}".splitlines()[0][:300]}
    if device.type == "cuda" and program.captures and (captured := measure.replay([calls["ours"]])):
        calls = {**calls, "captured": captured}
    times = measure.interleaved({**calls, **{f"part: {name}": part for name, part in parts.items()}}, device, seconds)
    line["ms"] = {rival: statistics.median(times[rival]) for rival in calls}
    line["parts"] = {name: statistics.median(times[f"part: {name}"]) for name in parts}
    line["rounds"] = len(times["ours"])
    line["per_second"] = 1e3 * program.images / line["ms"]["ours"]
    line["peak_bytes"] = {
        rival: measure.peak_bytes(call, device) for rival, call in calls.items() if rival != "captured"
    }
    peaks = line["peak_bytes"]
    line["ratios"] = {
        rival: {
            "time": measure.median_ratio(times[rival], times["ours"]),
            "memory": None if peaks["ours"] is None else peaks[rival] / max(peaks["ours"], 4096),
        }
        for rival in ("released", "reference")
        if rival in times
    }
    if "backbone" in times:  # all steps after the backbone are the library's own work
        line["share"] = statistics.median(
            rest / all_ for rest, all_ in zip(times["kernels"], times["backbone"], strict=True)
        )
    return line


def missed(line: dict[str, Any]) -> list[str]:
    """Names of the goals that a row misses."""
    if line["error"]:
        return list(line["goals"])
    reached = line["ratios"].get("released", {})
    return [
        goal
        for goal, wanted in line["goals"].items()
        if (line["share"] > wanted if goal == "share" else reached[goal] is not None and reached[goal] < wanted)
    ]


def style(line: dict[str, Any]) -> str | None:
    return "red" if line["error"] else "yellow" if missed(line) else None


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    first = (line["program"], line["shape"])
    if line["error"]:
        return (*first, line["error"], *[""] * (len(HEADER) - 3))
    lost, released = missed(line), line["ratios"].get("released", {"time": None, "memory": None})

    def goal(name: str) -> str:
        wanted = line["goals"].get(name)
        return "" if wanted is None else f"≥ {wanted:g}×" + (" missed" if name in lost else "")

    peaks = line["peak_bytes"]
    return (
        *first,
        *(table.milliseconds(line["ms"].get(rival)) for rival in RIVALS[:3]),
        table.times(released["time"]),
        goal("time"),
        table.size(peaks["released"]) if "released" in peaks else "",
        table.size(peaks["ours"]),
        table.times(released["memory"]),
        goal("memory"),
        remarks(line),
    )


def remarks(line: dict[str, Any]) -> str:
    told = [f"{line['per_second']:.3g} {line['unit']}/s"]
    if "captured" in line["ms"]:
        told.append(f"replayed from a CUDA graph {table.milliseconds(line['ms']['captured'])}")
    if "share" in line:
        wanted = line["goals"].get("share")
        goal = "" if wanted is None else f" (goal < {wanted:.0%}{', missed' if missed(line) else ''})"
        own, backbone = (table.milliseconds(line["ms"][part]) for part in ("kernels", "backbone"))
        told.append(f"backbone {backbone}, the rest {own} = {line['share']:.1%} of it{goal}")
    if line["parts"]:
        whole = sum(line["parts"].values())
        told.append(", ".join(f"{name} {ms / whole:.0%}" for name, ms in line["parts"].items()))
    return "; ".join([*told, line["remark"]])


def markdown(result: dict[str, Any]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *(cells(line) for line in result["rows"])]
    return "\n".join([result["machine"], "", *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    sys.exit(main())

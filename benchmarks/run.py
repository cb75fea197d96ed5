"""Times every op against eager PyTorch, torch.compile of eager, and libraries that a user could take instead.

Outputs are compared first. A row with different outputs gets no time, and the command then ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, table
from benchmarks.apart import apart, each_in_process
from benchmarks.empty_calls import empty_calls
from benchmarks.row import NOT_INSTALLED, empty_row, row
from sprompt.machine import machine
from sprompt.testing.specs import BENCHES

MODES = ("forward", "full", "memory", "backward")
#: Ops that are timed first on a GPU, since GPU time may be short.
FLAGSHIPS = ("saliency_masks", "match_cost", "mask_update", "mask_nms", "resize_masks")

#: A row to be timed: number of its bench in BENCHES, dtype, mode.
Job = tuple[int, torch.dtype, str]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument(
        "--mode", action="append", choices=MODES, help="only this mode (may be repeated); default: all modes of a row"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="only this dtype")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of timing for each row (default: 2)")
    parser.add_argument("--budget", type=float, help="seconds; rows that would start later are left out and named")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes most of the time)")
    parser.add_argument(
        "--quick", action="store_true", help="forward only, first dtype, half a second for each row, no torch.compile"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="replace the table between the benchmark markers of this file (docs/benchmarks.md), or create the file",
    )
    options = parser.parse_args()

    if options.quick:
        options.mode, options.seconds, options.no_compile = options.mode or ["forward"], 0.5, True
    known = {bench.function.__name__ for bench in BENCHES}
    for op in options.op or ():
        if op not in known:
            parser.error(f"--op must be one of {', '.join(sorted(known))}, got {op}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.device_count():
        parser.error("--device cuda: torch finds no CUDA device")

    result: dict[str, Any] = {"machine": "", "commit": commit(), "ceilings": {}, "compiled": not options.no_compile}
    result |= {"rows": [], "empty_calls": [], "left_out": []}
    end = time.monotonic() + (options.budget or float("inf"))
    with table.progress() as show:
        describe(result, device)
        for line in rows(options, device, end, show):
            if line.get("late"):
                result["left_out"].append(title(line))
            else:
                put_floor(line, result["ceilings"])
                result["rows"].append(line)
            write(options.json, result)
        # other programs may slow a measurement, so the better of two counts, one before and one after the rows
        describe(result, device)
        for line in result["rows"]:
            put_floor(line, result["ceilings"])
        if not options.op:
            show("empty calls")
            result["empty_calls"] = apart(device, empty_calls, device) or []
    table.show(result)
    for late in result["left_out"]:
        print(f"left out, the budget was over: {late}")
    write(options.json, result)
    if options.markdown:
        if not options.markdown.exists():
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text("\n".join(table.MARKERS) + "\n")
        table.replace_markdown(options.markdown, result)
    wrong = [r for r in result["rows"] if r["error"] and not r["error"].endswith(NOT_INSTALLED)]
    return 1 if wrong else 0


def describe(result: dict[str, Any], device: torch.device) -> None:
    """Puts the machine and the best ceilings seen so far into the result."""
    result["machine"] = result["machine"] or apart(device, machine, device) or str(device)
    for name, rate in (apart(device, measure.ceilings, device) or {}).items():
        result["ceilings"][name] = max(rate, result["ceilings"].get(name, 0.0))


def rows(
    options: argparse.Namespace, device: torch.device, end: float, show: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The lines of the table, each as soon as it is measured. Lines that would start after `end` are marked late."""
    wanted = jobs(options, device)
    how = (device, options.seconds, not options.no_compile, end)
    if device.type == "cpu":
        for job in wanted:
            show(title(untimed(job)))
            yield from timed_rows([job], *how)
        return
    for op in dict.fromkeys(BENCHES[number].function.__name__ for number, _, _ in wanted):
        left = [job for job in wanted if BENCHES[job[0]].function.__name__ == op]
        show(title(untimed(left[0])))
        for job, line in zip(left, each_in_process(timed_rows, left, *how), strict=True):
            yield untimed(job) | {"error": line} if isinstance(line, str) else line


def timed_rows(
    wanted: Sequence[Job], device: torch.device, seconds: float, compiled: bool, end: float
) -> Iterator[dict[str, Any]]:
    sample, made = None, None
    for job in wanted:
        number, dtype, mode = job
        if time.monotonic() > end:
            yield untimed(job) | {"late": True}
            continue
        try:
            if sample is None or made != (number, dtype):
                sample, made = BENCHES[number].make(device, dtype, 0), (number, dtype)
            yield row(BENCHES[number], sample, dtype, mode, device, seconds, compiled)
        except Exception as failure:  # a failed row must not end the run
            text = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
            yield untimed(job) | {"error": text}
            if "CUDA error" in text:
                os._exit(0)  # the other jobs get a new process


def jobs(options: argparse.Namespace, device: torch.device) -> list[Job]:
    """The rows that the options select. On a GPU the flagships come first, and of each op its forward rows."""
    found = [
        (number, dtype, mode)
        for number, bench in enumerate(BENCHES)
        if bench.device == device.type and (not options.op or bench.function.__name__ in options.op)
        for dtype in (bench.dtypes[:1] if options.quick else bench.dtypes)
        if not options.dtype or str(dtype).removeprefix("torch.") in options.dtype
        for mode in MODES
        if mode in (options.mode or MODES)
        if mode not in ("backward", "full") or bench.gradients
    ]
    if device.type == "cpu":
        return found
    ops = list(dict.fromkeys(BENCHES[number].function.__name__ for number, _, _ in found))
    order = [*(op for op in FLAGSHIPS if op in ops), *(op for op in ops if op not in FLAGSHIPS)]
    return sorted(found, key=lambda job: (order.index(BENCHES[job[0]].function.__name__), job[2] != "forward"))


def untimed(job: Job) -> dict[str, Any]:
    number, dtype, mode = job
    return empty_row(BENCHES[number], dtype, mode)


def title(line: dict[str, Any]) -> str:
    return f"{line['op']} {line['shape']} {line['dtype']} {line['mode']}"


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Writes the result. It is called after every row, so an interrupted run keeps its rows."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


def commit() -> str:
    """The measured commit, with a mark if files differ from it; empty outside of a repository."""
    asked = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def put_floor(line: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Adds the lower bound of the time of a forward, and its share of our time if the inputs come from memory."""
    if line["mode"] != "forward" or line["error"] or not ceilings:
        return
    line["floor_ms"] = measure.floor(line["flops"], line["bytes"], line["dtype"], ceilings)
    if not line.get("cached"):
        line["floor_share"] = line["floor_ms"] / line["ms"].get("device", line["ms"]["ours"])


if __name__ == "__main__":
    sys.exit(main())

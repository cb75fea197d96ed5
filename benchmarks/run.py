"""Times every op against eager PyTorch, torch.compile of eager, and libraries that a user could take instead.

Outputs are compared first. A row with different outputs gets no time, and the command then ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import measure, table
from sprompt import backends
from sprompt.machine import machine
from sprompt.testing.calls import with_gradients
from sprompt.testing.compare import assert_close, held_bytes, tensors
from sprompt.testing.spec import HALVES, Bench, Sample
from sprompt.testing.specs import BENCHES, SPECS

#: The goal of eager / ours on a GPU, for every op.
GPU_GOAL = 5.0
NOT_INSTALLED = "which is not installed"
MODES = ("forward", "full", "memory", "backward")
#: Ops that are timed first on a GPU, since GPU time may be short.
FLAGSHIPS = ("saliency_masks", "match_cost", "mask_update", "mask_nms", "resize_masks")
#: The process of an op is given up after so many seconds without a new row.
SILENCE = 120.0

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


# -- processes: after an illegal access a process cannot use CUDA any more, so on a GPU every op has its own process


def processes() -> Any:
    """Forks of a process that has imported torch and the ops, but has run nothing, so a fork starts at once.

    Only the forks import the specs. A thread that worked before a fork is missing after it, and a wait for it would never end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sprompt.ops", "benchmarks.measure", "benchmarks.table"])
    return context


def _answer(connection: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in function(*args):
        connection.send(value)


def _once(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    yield function(*args)


def in_process(function: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """Runs the generator function(*args) in a process of its own and yields its values. If it fails, the last value is a
    sentence."""
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    silent = False
    try:
        while not silent:
            if ours.poll(SILENCE):
                yield ours.recv()
            else:
                silent = True
                process.kill()
    except EOFError:
        pass
    process.join()
    if silent:
        yield f"nothing was heard of its process for {SILENCE:.0f} s"
    elif process.exitcode:
        yield f"its process ended with status {process.exitcode}"


def apart(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """The result of function(*args); on a GPU it runs in a process of its own. None if the process fails."""
    if device.type == "cpu":
        return function(*args)
    values = list(in_process(_once, function, *args))
    return values[0] if len(values) == 1 else None


def rows(
    options: argparse.Namespace, device: torch.device, end: float, show: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The lines of the table, each as soon as it is measured. Lines that would start after `end` are marked late."""
    wanted = jobs(options, device)
    how = (device, options.seconds, not options.no_compile, end)
    if device.type == "cpu":
        for job in wanted:
            show(title(empty_row(job)))
            yield from timed_rows([job], *how)
        return
    for op in dict.fromkeys(BENCHES[number].function.__name__ for number, _, _ in wanted):
        left = [job for job in wanted if BENCHES[job[0]].function.__name__ == op]
        while left:  # a job that ends its process becomes an error; the jobs after it get a new process
            show(title(empty_row(left[0])))
            for line in in_process(timed_rows, left, *how):
                if isinstance(line, str):
                    line = empty_row(left[0]) | {"error": line}
                yield line
                left = left[1:]
                if not left:
                    break


def timed_rows(
    wanted: Sequence[Job], device: torch.device, seconds: float, compiled: bool, end: float
) -> Iterator[dict[str, Any]]:
    sample, made = None, None
    for job in wanted:
        number, dtype, _ = job
        if time.monotonic() > end:
            yield empty_row(job) | {"late": True}
            continue
        try:
            if sample is None or made != (number, dtype):
                sample, made = BENCHES[number].make(device, dtype, 0), (number, dtype)
            yield row(job, sample, device, seconds, compiled)
        except Exception as failure:  # a failed row must not end the run
            text = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
            yield empty_row(job) | {"error": text}
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


def title(line: dict[str, Any]) -> str:
    return f"{line['op']} {line['shape']} {line['dtype']} {line['mode']}"


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Writes the result. It is called after every row, so an interrupted run keeps its rows."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


def empty_row(job: Job) -> dict[str, Any]:
    bench, dtype, mode = BENCHES[job[0]], job[1], job[2]
    name = str(dtype).removeprefix("torch.")
    return {
        "op": bench.function.__name__, "shape": bench.shape, "dtype": name, "mode": mode, "error": "",
        "flops": bench.flops, "bytes": bench.bytes,
        "goal": bench.goals.get(f"{mode} {name}", bench.goals.get(mode) if dtype not in HALVES else None),
        "libraries": {},
    }  # fmt: skip


def commit() -> str:
    """The measured commit, with a mark if files differ from it; empty outside of a repository."""
    asked = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    try:
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def row(job: Job, sample: Sample, device: torch.device, seconds: float, compiled: bool) -> dict[str, Any]:
    """One line of the table: times in ms, peaks in bytes. If there are none, `error` has the reason.

    `libraries` maps a name to its ratio to ours and the goal of that ratio, or to the missing module.
    """
    bench, dtype, mode = BENCHES[job[0]], job[1], job[2]
    line = empty_row(job)
    if device.type == "cuda":
        line["goal"] = GPU_GOAL if mode == "forward" else None
        line["bytes"] = held_bytes((sample.args, sample.kwargs, bench.function(*sample.args, **sample.kwargs)))
    rivals: dict[str, Callable[..., Any]] = {"ours": bench.function, "eager": bench.eager}
    if mode in ("forward", "memory"):
        rivals |= bench.libraries
        line["libraries"] = {name: {"goal": bench.goals.get(name)} for name in bench.libraries}
    try:
        for rival in list(rivals)[1:]:
            try:
                theirs = rivals[rival](*sample.args, **sample.kwargs)
            except ModuleNotFoundError as missing:
                if rival == "eager":
                    raise
                line["libraries"][rival]["missing"] = missing.name
                rivals.pop(rival)
                continue
            agree(bench, sample, dtype, bench.function(*sample.args, **sample.kwargs), theirs)
        if mode in ("backward", "full"):
            for ours, eager in zip(
                gradient(bench, bench.function, sample)(), gradient(bench, bench.eager, sample)(), strict=True
            ):
                assert_close(ours, eager, *closeness(dtype, gradients=True))
    except AssertionError as failure:
        line["error"] = f"outputs disagree with {rival}: {failure}"
        return line
    except ModuleNotFoundError as missing:
        line["error"] = f"eager needs {missing.name}, {NOT_INSTALLED}"
        return line
    if compiled and mode != "memory" and bench.vectorised is not False:
        torch._dynamo.reset()
        source = bench.vectorised if callable(bench.vectorised) else bench.eager
        try:
            rivals["compiled"] = torch.compile(source)
            agree(
                bench,
                sample,
                dtype,
                bench.function(*sample.args, **sample.kwargs),
                rivals["compiled"](*sample.args, **sample.kwargs),
            )
        except Exception as failure:  # a baseline that does not compile, or gives other results, is left out and named
            line["compiled_error"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            rivals.pop("compiled")

    calls = {rival: timed(bench, function, sample, mode) for rival, function in rivals.items()}
    turns = 1
    if mode == "memory":
        line["peak_bytes"] = {rival: measure.peak_bytes(call, device) for rival, call in calls.items()}
        peaks = line["peak_bytes"]
        if peaks["ours"] is not None:
            line["ratio"] = peaks["eager"] / max(peaks["ours"], 4096)
        return line
    if device.type == "cuda":
        with measure.side_stream():  # a capture needs one, and a backward runs on the stream of its forward
            calls, turns, line["timing"] = on_gpu(bench, rivals, sample, mode)
            line["cached"] = measure.fits_l2(sample, turns)
            times = measure.interleaved(calls, device, seconds)
    else:
        times = measure.interleaved(calls, device, seconds)
    times = {rival: [t / turns for t in each] for rival, each in times.items()}
    line["ms"] = {rival: statistics.median(t) for rival, t in times.items()}
    line["rounds"] = len(times["ours"])
    line["ratio"] = measure.median_ratio(times["eager"], times["ours"])
    if "compiled" in times:
        line["compiled_ratio"] = measure.median_ratio(times["compiled"], times["ours"])
    for name in line["libraries"].keys() & times.keys():
        line["libraries"][name]["ratio"] = measure.median_ratio(times[name], times["ours"])
    return line


def on_gpu(
    bench: Bench, rivals: dict[str, Callable[..., Any]], sample: Sample, mode: str
) -> tuple[dict[str, Callable[[], Any]], int, str]:
    """(calls over several copies of the sample, number of copies, kind of launch).

    If all rivals can be captured, each is replayed as a graph, without the cost of Python ("graph"). Otherwise calls are
    launched one by one ("calls"); if ours can be captured, its replay is added as "device".
    """
    slowest = max(
        measure.once(timed(bench, function, sample, mode), sample_device(sample)) for function in rivals.values()
    )
    samples = measure.copies(sample, most=max(1, int(50 / slowest)))
    calls = {rival: [timed(bench, function, s, mode) for s in samples] for rival, function in rivals.items()}
    replays = {rival: measure.replay(each) for rival, each in calls.items()}
    if all(replays.values()):
        return replays, len(samples), "graph"  # type: ignore[return-value]  # all() has excluded None
    in_turn: dict[str, Any] = {}
    for rival, each in calls.items():
        in_turn[rival] = lambda each=each: [call() for call in each]
    if replays["ours"]:
        in_turn["device"] = replays["ours"]
    return in_turn, len(samples), "calls"


def sample_device(sample: Sample) -> torch.device:
    return tensors((sample.args, sample.kwargs))[0].device


def put_floor(line: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Adds the lower bound of the time of a forward, and its share of our time if the inputs come from memory."""
    if line["mode"] != "forward" or line["error"] or not ceilings:
        return
    line["floor_ms"] = measure.floor(line["flops"], line["bytes"], line["dtype"], ceilings)
    if not line.get("cached"):
        line["floor_share"] = line["floor_ms"] / line["ms"].get("device", line["ms"]["ours"])


def closeness(dtype: torch.dtype, gradients: bool = False) -> tuple[float, float]:
    """(relative, absolute) tolerance: rivals sum in other orders, and in half types they round intermediate results."""
    if dtype in HALVES:
        return (6e-2 if gradients else 3e-2), 1e-3
    return 2e-4, 1e-6


def agree(bench: Bench, sample: Sample, dtype: torch.dtype, ours: Any, theirs: Any) -> None:
    if bench.agree is not None:
        bench.agree(ours, theirs, sample)
    else:
        assert_close(ours, theirs, *closeness(dtype))


def gradient(bench: Bench, function: Callable[..., Any], sample: Sample) -> Callable[[], Any]:
    """A call of the backward only: the forward has run before, and its graph is kept."""
    leaves, outputs = forward_with_leaves(bench, function, sample)
    weights = [torch.ones_like(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, weights, retain_graph=True)


def forward_with_leaves(
    bench: Bench, function: Callable[..., Any], sample: Sample
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    bound = sample.bound(bench.function)
    for parameter in bench.gradients:
        bound[parameter] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(), bound[parameter])
    given = list(bound.items())
    positional, named = given[: len(sample.args)], given[len(sample.args) :]
    outputs = [t for t in tensors(function(*(value for _, value in positional), **dict(named))) if t.requires_grad]
    return tensors([bound[parameter] for parameter in bench.gradients]), outputs


def timed(bench: Bench, function: Callable[..., Any], sample: Sample, mode: str) -> Callable[[], Any]:
    if mode == "backward":
        return gradient(bench, function, sample)
    if mode == "full" or (mode == "memory" and bench.gradients):

        def full() -> Any:
            leaves, outputs = forward_with_leaves(bench, function, sample)
            return torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

        return full
    return lambda: function(*sample.args, **sample.kwargs)


def empty_calls(device: torch.device) -> list[dict[str, Any]]:
    """The cost of a call with almost no work: checks, choice of a backend, allocation. It is measured with and without a
    gradient.

    The unit is the time of a torch.mul of two tiny tensors on one thread.
    """
    lines = []
    a = torch.ones(1, 4, 8, device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for spec in SPECS:
        if device.type == "cuda" and spec.ops[0] in backends.HOST_ONLY:
            continue
        samples = spec.samples(device, spec.dtypes[0] if spec.dtypes else torch.float32, 0)
        full = [s for s in samples if all(t.numel() for t in tensors((s.args, s.kwargs)))]
        smallest = min(full, key=lambda s: sum(t.numel() for t in tensors((s.args, s.kwargs))))
        recorded, leaves = with_gradients(spec, smallest)
        calls = {
            "mul": lambda: torch.mul(a, a),
            "call": lambda: spec.function(*smallest.args, **smallest.kwargs),  # noqa: B023  # called within this turn
        }
        if leaves:
            calls["recording"] = lambda: spec.function(**recorded.kwargs)  # noqa: B023  # called within this turn
        times = measure.interleaved(calls, device, 0.2)
        line = {"op": spec.name, "sample": smallest.name, "microseconds": 1e3 * statistics.median(times["call"])}
        line |= {
            name: measure.median_ratio(times[name], times["mul"]) for name in ("call", "recording") if name in times
        }
        lines.append(line)
    torch.set_num_threads(before)
    return lines


if __name__ == "__main__":
    sys.exit(main())

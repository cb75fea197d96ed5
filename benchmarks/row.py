"""One row: an op and its rivals on one sample. Outputs are compared first; a row with different outputs gets no time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import measure
from sprompt.testing.compare import assert_close, held_bytes, tensors
from sprompt.testing.spec import HALVES, Bench, Sample

#: The goal of eager / ours on a GPU, for every op.
GPU_GOAL = 5.0
NOT_INSTALLED = "which is not installed"


def empty_row(bench: Bench, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {
        "op": bench.function.__name__, "shape": bench.shape, "dtype": name, "mode": mode, "error": "",
        "flops": bench.flops, "bytes": bench.bytes,
        "goal": bench.goals.get(f"{mode} {name}", bench.goals.get(mode) if dtype not in HALVES else None),
        "libraries": {},
    }  # fmt: skip


def row(
    bench: Bench, sample: Sample, dtype: torch.dtype, mode: str, device: torch.device, seconds: float, compiled: bool
) -> dict[str, Any]:
    """One line of the table: times in ms, peaks in bytes. If there are none, `error` has the reason.

    `libraries` maps a name to its ratio to ours and the goal of that ratio, or to the missing module.
    """
    line = empty_row(bench, dtype, mode)
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

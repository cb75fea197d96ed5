"""Measuring: interleaved times, peak memory, and the ceilings of the machine. Milliseconds and bytes throughout."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sprompt.testing.compare import tensors
from sprompt.testing.spec import Sample

Call = Callable[[], Any]


def once(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one call, the mean of `repeats` calls in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) * 1e3 / repeats


def interleaved(
    calls: dict[str, Call], device: torch.device, seconds: float, rounds: int = 51
) -> dict[str, list[float]]:
    """Times the calls in turn, A B C A B C …, so that a slow moment of the machine affects all of them.

    Each call has two warm-up calls. Then at least 5 rounds follow (2 if a round takes a second), and more until `seconds` are
    over. A call shorter than 0.3 ms is repeated within its turn.
    """
    repeats, round_ms = {}, 0.0
    for name, call in calls.items():
        call()
        milliseconds = once(call, device)
        repeats[name] = max(1, min(200, int(0.3 / max(milliseconds, 1e-4))))
        round_ms += milliseconds
    least = 5 if round_ms < 1000 else 2
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or (
        time.perf_counter() < end and len(next(iter(times.values()))) < rounds
    ):
        for name, call in calls.items():
            times[name].append(once(call, device, repeats[name]))
    return times


#: Total bytes of the inputs of one timed replay: several times the largest L2 cache of a GPU.
PAST_L2 = 400_000_000


def copies(sample: Sample, most: int = 64) -> list[Sample]:
    """The sample, and copies of it in other memory. If calls use them in turn, a GPU's L2 cache cannot hold the inputs."""
    count = max(1, min(64, most, PAST_L2 // max(_held(sample), 1)))
    return [sample, *(sample.map(torch.clone) for _ in range(count - 1))]


def fits_l2(sample: Sample, count: int) -> bool:
    """Whether the GPU's L2 cache may still hold a part of `count` copies at their next turn."""
    return count * _held(sample) < 2 * torch.cuda.get_device_properties().L2_cache_size


def _held(sample: Sample) -> int:
    return sum(t.nbytes for t in tensors((sample.args, sample.kwargs)))


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Runs its block on a separate stream, so that a failed capture cannot spoil the current one."""
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    torch.cuda.set_stream(side)
    try:
        yield
    finally:
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()


def replay(calls: list[Call]) -> Call | None:
    """The calls one after the other as a CUDA graph on the current stream; None if they synchronise.

    A replay has no launches from Python, so it does not measure their cost.
    """
    stream = torch.cuda.current_stream()
    for call in calls:
        call()
    torch.cuda.synchronize()
    # After a capture that fails half-way torch cannot begin another, so calls that synchronise are found before the capture.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


# -- memory


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak memory of one call in bytes, above the memory in use before it, with the scratch buffers of kernels; None if
    unknown.

    On a CPU it is Linux's high-water mark of resident memory, reset before the call. Freed blocks go back to the system at
    once.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _returning_memory() as libc:
        if libc is None:
            return None
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
        del result
        return max(0, peak - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def _returning_memory() -> Iterator[Any]:
    """Makes malloc map every block of 64 kB or more separately, so that a freed block goes back to the system."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt
    try:
        libc = ctypes.CDLL("libc.so.6")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield None
        return
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.mallopt(trim_threshold, 1 << 16)
    try:
        yield libc
    finally:  # back to glibc's defaults
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


# -- ceilings


def ceilings(device: torch.device) -> dict[str, float]:
    """The rates that the machine reaches at this moment: copy in GB/s (read + write), products in GFLOP/s."""
    source = torch.ones(1 << 26 if device.type == "cpu" else 1 << 28, device=device)
    target = torch.empty_like(source)
    milliseconds = statistics.median(interleaved({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"])
    found = {"copy": 2 * source.nbytes / milliseconds / 1e6}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        # without bfloat16 instructions the product of a CPU is hundreds of times slower, so its matrices are small
        side = 8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 384
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls: dict[str, Call] = {"mm": lambda a=a, b=b: a @ b}  # type: ignore[misc]  # a lambda with defaults
        milliseconds = statistics.median(interleaved(calls, device, 0.5)["mm"])
        found[name] = 2 * side**3 / milliseconds / 1e6
    return found


def floor(flops: float, least_bytes: float, dtype: str, found: dict[str, float]) -> float:
    """Lower bound of the time in milliseconds: the larger of the times for arithmetic and for memory."""
    rate = found["float32"] if dtype == "float32" else max(found["bfloat16"], found["float32"])
    return max(flops / rate / 1e6, least_bytes / found["copy"] / 1e6)

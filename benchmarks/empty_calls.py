"""The cost of a call with almost no work."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from sprompt import backends
from sprompt.testing.calls import with_gradients
from sprompt.testing.compare import tensors
from sprompt.testing.specs import SPECS


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
        calls: dict[str, measure.Call] = {
            "mul": partial(torch.mul, a, a),
            "call": partial(spec.function, *smallest.args, **smallest.kwargs),
        }
        if leaves:
            calls["recording"] = partial(spec.function, **recorded.kwargs)
        times = measure.interleaved(calls, device, 0.2)
        line = {"op": spec.name, "sample": smallest.name, "microseconds": 1e3 * statistics.median(times["call"])}
        line |= {
            name: measure.median_ratio(times[name], times["mul"]) for name in ("call", "recording") if name in times
        }
        lines.append(line)
    torch.set_num_threads(before)
    return lines

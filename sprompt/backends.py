"""Chooses the code that runs an op. Every op has an ordered list of backends per device; the first one that can run is used.

`SPROMPT_BACKEND=reference|native|triton|cuda` and `with use_backend("reference"):` force one backend. A forced backend that
cannot run raises and says why. An automatic fallback because a package or a build is missing warns once. `with trace_backends()
as ran:` records which backends ran. All these settings hold for the whole process, because autograd may run a backward on
another thread.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

NAMES = ("reference", "native", "triton", "cuda")
GPU = ("cuda", "triton")
#: Backends by device type, in the order in which they are tried. "gpu" stands for the op's backends in GPU, in the op's own
#: order. The reference takes everything, so a backend behind it runs only if it is forced. Triton's interpreter needs that.
ORDER = {"cpu": ("native", "reference", "gpu"), "cuda": ("gpu", "reference")}
if os.environ.get("SPROMPT_EMULATE_CUDA", "0") != "0":  # for tests: the GPU backends, emulated and interpreted
    ORDER["cpu"] = ("gpu", "native", "reference")


#: Ops without GPU kernels: RLE strings come from files and are parsed on the CPU, and an evaluation holds its masks there.
HOST_ONLY = ("rle_decode", "match_detections")


class Backend(NamedTuple):
    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str]  # takes the op's arguments; returns an empty string if the backend can run


_table: dict[str, dict[str, Backend]] = {}  # op -> backend name -> Backend
_forced: str | None = None
_forced_ops: frozenset[str] | None = None  # None: every op
_traces: list[list[tuple[str, str]]] = []
_warned = False


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


if os.environ.get("SPROMPT_BACKEND"):
    _forced = _check_name(os.environ["SPROMPT_BACKEND"], "SPROMPT_BACKEND")


@contextmanager
def use_backend(name: str, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Forces one backend for every op inside the block. An op that this backend cannot run raises and says why. With `ops`,
    only these ops are forced; the other ops choose automatically."""
    global _forced, _forced_ops
    before = _forced, _forced_ops
    _forced, _forced_ops = _check_name(name, "use_backend"), None if ops is None else frozenset(ops)
    try:
        yield
    finally:
        _forced, _forced_ops = before


@contextmanager
def trace_backends() -> Iterator[list[tuple[str, str]]]:
    """Records (op, backend) for every op that runs inside the block.

    >>> with trace_backends() as ran:
    ...     area = mask_area(masks)
    >>> ran
    [('mask_area', 'native')]
    """
    ran: list[tuple[str, str]] = []
    _traces.append(ran)
    try:
        yield ran
    finally:
        _traces.remove(ran)


def add(op: str, name: str, run: Callable[..., Any]) -> None:
    _table.setdefault(op, {})[name] = Backend(name, run, _why_not(name))


def _why_not(name: str) -> Callable[..., str]:
    """The function that says why a backend's kernels cannot take the arguments. It is in the backend's module."""
    if name == "reference":
        return lambda *args: ""
    module = {"native": "sprompt.native", "triton": "sprompt.ops.triton_launch", "cuda": "sprompt.cuda"}[name]
    return lambda *args: importlib.import_module(module).why_not(*args)


def order(device: str, op: str | None = None) -> tuple[str, ...]:
    """The backends that an op (None: any) can have on a device, in the order in which they are tried."""
    gpu = GPU if op is None else [name for name in _table[op] if name in GPU]
    return tuple(each for name in ORDER.get(device, ("reference",)) for each in (gpu if name == "gpu" else (name,)))


def automatic(device: str, op: str | None = None) -> tuple[str, ...]:
    """The backends that are tried if none is forced. The reference takes everything, so it ends the list."""
    names = order(device, op)
    return names[: names.index("reference") + 1]


def ops() -> list[str]:
    return sorted(_table)


def registered(op: str) -> list[str]:
    """Every backend that an op has, whether it can run here or not."""
    return sorted(_table[op])


def available(op: str, device: str) -> dict[str, str]:
    """Every backend of an op for a device type, with the reason why it cannot run (empty: it can)."""
    backends = _table[op]
    return {
        name: backends[name].why_not() if name in backends else f"there is no {name} kernel of {op}"
        for name in automatic(device)
    }


def choose(op: str, device: torch.device, float64: bool) -> Backend:
    """The first backend of an op that can run on tensors of a device, in float64 if `float64` is true."""
    if _forced is None and not _traces:
        return _automatic.get((op, device, float64)) or _choose(op, device, float64)
    if _forced is not None and (_forced_ops is None or op in _forced_ops):
        chosen = _forced_backend(op, device, float64)
    else:
        chosen = _choose(op, device, float64)
    for trace in _traces:
        trace.append((op, chosen.name))
    return chosen


#: Cache of the automatic choices. A choice depends on nothing that changes within a process.
_automatic: dict[tuple[str, torch.device, bool], Backend] = {}


def _probe(device: torch.device, float64: bool) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float64 if float64 else torch.float32, device=device)


def _choose(op: str, device: torch.device, float64: bool) -> Backend:
    probe = _probe(device, float64)
    found = (_table[op][name] for name in order(device.type, op) if name in _table[op])
    chosen = next(backend for backend in found if not backend.why_not(probe))
    if chosen.name == "reference":
        _warn_if_missing(op, device.type)
    _automatic[op, device, float64] = chosen
    return chosen


def _forced_backend(op: str, device: torch.device, float64: bool) -> Backend:
    name = str(_forced)
    if name not in order(device.type):
        raise RuntimeError(f"{op}: backend {name} was asked for, but it does not run on {device.type}")
    if name not in _table[op]:
        raise RuntimeError(f"{op}: backend {name} was asked for, but there is no {name} kernel of {op}")
    reason = _table[op][name].why_not(_probe(device, float64))
    if reason:
        raise RuntimeError(f"{op}: backend {name} was asked for, but {reason}")
    return _table[op][name]


def _warn_if_missing(op: str, device: str) -> None:
    """Warns once per process if the reference runs because a package or a build is missing, not because of the arguments."""
    global _warned
    if _warned or os.environ.get("SPROMPT_NO_EXT", "0") != "0":
        return
    for name in automatic(device, op)[:-1]:
        backend = _table[op].get(name)
        missing = backend.why_not() if backend is not None else ""
        if missing:
            _warned = True
            where = "the CPU" if device == "cpu" else f"{device}, of {op}"
            warnings.warn(f"sprompt runs its slow reference on {where}: {missing}", stacklevel=4)
            return

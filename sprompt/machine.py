"""The machine that this process runs on: its processor, its instructions for bfloat16, and its load."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from sprompt import native

#: Instruction sets that the kernels ask about, as Linux spells them.
FEATURES = (
    "avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "abm",
    "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd", "avx512_vpopcntdq", "avx512_bf16",
)  # fmt: skip

#: The file in which Linux describes the processor.
CPUINFO = Path("/proc/cpuinfo")


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16. Without them torch can take a hundred times as long as in
    float32. True if the instructions of the CPU are not known."""
    flags = _cpuinfo()[1]
    return not flags or not flags.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def busy() -> str | None:
    """A line of warning if more threads want to run on this machine than it has cores. None otherwise, or if the load is not
    known."""
    cores = os.cpu_count()
    if cores is None or not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) <= cores:
        return None
    return (
        f"the machine is busy: its load is {load:.1f} on {cores} cores; training with several threads can then take three times as long; "
        "write OMP_NUM_THREADS=1 in front of the command to take one thread"
    )


def cpu() -> tuple[str, str]:
    """Name and instruction sets of the processor."""
    name, flags = _cpuinfo()
    return name, " ".join(f for f in FEATURES if f in flags) or " ".join(sorted(flags)) or "unknown"


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Name and all flags of the processor. Without the file CPUINFO, the name that Python knows and no flags."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    known = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in reversed(lines) if ":" in line}
    return known.get("model name", platform.machine()), frozenset(known.get("flags", known.get("Features", "")).split())


def machine(device: torch.device) -> str:
    """One line for tables of measurements: the processor or GPU, threads, instruction set, torch, Python."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"
    level = native._C.level() if native._C is not None else "no compiled kernels"
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{cpu()[0]}, {native.threads()} threads, {level}, {software}"

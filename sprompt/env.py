"""`python -m sprompt.env`: what this installation is, ready to paste into a bug report."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from sprompt import native


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """One line: the processor or GPU, threads, instruction set, torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    level = native._C.level() if native._C is not None else "no compiled kernels"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {level}, torch {torch.__version__}, Python {platform.python_version()}"

"""Launches Triton kernels: the only function that starts them, their configurations, and records of launches for use without a
GPU.

The triton.py of each op's folder calls `launch` with a Cost: the bytes and operations that follow from the grid and the tiles
of the launch. `with recording() as launches:` keeps every launch. With run=False no kernel runs. So sprompt/testing/compiled.py
can compile kernels ahead of time, and count their traffic at any size, on a machine without a GPU.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    from triton import knobs
except ImportError:
    triton = None

OPS_FOLDER = Path(__file__).parent
#: Without a GPU (the interpreter), the configurations of this architecture are used. recording() may choose another.
DEFAULT_ARCH = 90


class Cost(NamedTuple):
    """The traffic and the operations of one launch. Every global load and store is in `read`, `again` or `written`."""

    read: int = 0  #: bytes read for the first time
    written: int = 0  #: bytes written
    again: int = 0  #: bytes that another program of the launch also reads: caches serve them if they fit
    flops: int = 0  #: multiplications and additions


class Launch(NamedTuple):
    kernel: Any  #: the @triton.jit function
    grid: tuple[int, ...]
    args: tuple[Any, ...]  #: in the order of its parameters
    constants: dict[str, Any]  #: its tl.constexpr parameters
    num_warps: int
    num_stages: int
    cost: Cost
    fp_fusion: bool = True  #: whether a product and a sum may become one rounding


_records: list[list[Launch]] = []
_run = True
_arch: int | None = None


@contextmanager
def recording(run: bool = True, arch: int | None = None) -> Iterator[list[Launch]]:
    """Keeps every launch inside the block. run=False: no kernel runs, outputs stay unwritten, and tensors may be on the CPU.
    arch: the configurations of this architecture (80, 90, 100) are used on any device."""
    global _run, _arch
    launches: list[Launch] = []
    before = _run, _arch
    _records.append(launches)
    _run, _arch = _run and run, arch if arch is not None else _arch
    try:
        yield launches
    finally:
        _records.remove(launches)
        _run, _arch = before


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), which takes tensors on the CPU."""
    return triton is not None and bool(knobs.runtime.interpret)


def why_not(*args: object) -> str:
    """Why the Triton kernels cannot take these arguments; empty if they can."""
    if triton is None:
        return "triton is not installed; type `pip install triton`"
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.dtype == torch.float64:
                return "the Triton kernels compute in float32; float64 runs on the reference"
            if not arg.is_cuda and _run and not interpreted():
                return "the Triton kernels need a CUDA device (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    return ""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    cost: Cost,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Starts `kernel` on the current stream of the first tensor's device. Does nothing if the grid is empty. fp_fusion=False:
    every product is rounded before it is added. Kernels with exactly defined bits need this."""
    if 0 in grid:
        return
    for record in _records:
        record.append(Launch(kernel, grid, args, constants, num_warps, num_stages, cost, fp_fusion))
    if not _run:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options, **constants)
    else:
        kernel[grid](*args, **options, **constants)


# -- configurations


@functools.lru_cache(None)
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_ARCH
    gpu = torch.cuda.get_device_properties(device)
    shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stubs lack it
    if shared < 227 * 1024:  # entries of sm_90 and later use up to 227 KB, entries of sm_80 up to 99 KB
        return 80
    return 10 * gpu.major + gpu.minor


@functools.lru_cache(None)
def entries(folder: str) -> dict[str, list[dict[str, int]]]:
    """The configs.json of an op's folder: kernel -> entries."""
    return json.loads((OPS_FOLDER / folder / "configs.json").read_text())


@functools.lru_cache(1024)
def _pick(name: str, arch: int, bits: int, size: int) -> dict[str, int]:
    """The best entry of a kernel. An entry fits if it is for this element size, for this or an older architecture, and for
    sizes of at least `size`. Of these the function takes the newest architecture, then the smallest "upto"."""
    folder, kernel = name.split(".")
    fits = [
        entry
        for entry in entries(folder)[kernel]
        if entry.get("bits", bits) == bits
        and entry.get("arch", 80) <= max(arch, 80)
        and size <= entry.get("upto", size)
    ]
    best = min(fits, key=lambda entry: (-entry.get("arch", 80), entry.get("upto", 1 << 62), "bits" not in entry))
    return {key: value for key, value in best.items() if key not in ("arch", "bits", "upto")}


#: For a tuner: the configuration per kernel that it tries instead of configs.json, and the kernels that were looked up.
trial: dict[str, dict[str, int]] = {}
looked_up: set[str] = set()


def config(name: str, like: Tensor, size: int = 0) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of the kernel "folder.kernel", from the configs.json of the op's folder. The file
    has a list of entries per kernel. An entry holds for an architecture ("arch" and newer), an element size ("bits": 16 or 32)
    and sizes up to "upto". If an entry leaves one of these out, it holds for all values. `python -m benchmarks.tune` times
    candidates on a GPU and writes the file."""
    looked_up.add(name)
    if name in trial:
        return dict(trial[name])
    arch = _arch if _arch is not None else _architecture(like.device)
    return dict(_pick(name, arch, like.element_size() * 8, size))


def precision(like: Tensor) -> str:
    """How float32 products are formed: exactly, unless torch's own switch for matrix products allows tf32."""
    if like.dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    try:  # torch 2.9 and later, where reading allow_tf32 raises once fp32_precision was set
        allowed = matmul.fp32_precision == "tf32"
    except (AttributeError, AssertionError):
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def tiles(size: int, block: int) -> int:
    """The number of blocks that cover `size`."""
    return -(-size // block)


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and at least `least` (tl.dot needs 16)."""
    return max(least, 1 << max(size - 1, 0).bit_length())

"""What the Triton kernels compile to and what they move, without a GPU: every launch of the paper-sized benchmark rows.

`python -m sprompt.testing.compiled` prints the table; `--write docs/gpu_kernels.md` keeps it.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sprompt import backends
from sprompt.ops.launch import Launch, recording
from sprompt.ops.library import FAKES
from sprompt.testing.spec import Bench

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


class Resources(NamedTuple):
    """Of one kernel on one architecture. Spills show as a stack frame or local memory."""

    registers: int  #: a thread
    stack: int  #: bytes a thread
    local: int  #: bytes a thread
    shared: int  #: bytes a block
    tensor_cores: str  #: wgmma, tcgen05, mma or ""


class _LaunchOnly(TorchDispatchMode):
    """Of an op with a Triton kernel the launches are recorded; one without gives zeros; neither runs."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "sprompt":
            return function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("sprompt::")
        kernels = backends._table[name]
        outputs = kernels["triton"].run(*args) if "triton" in kernels else FAKES[name](*args)
        for leaf in torch.utils._pytree.tree_leaves(outputs):
            leaf.zero_()
        return outputs


def launches_of(bench: Bench, dtype: torch.dtype, arch: int) -> list[Launch]:
    """Every launch of the row, forward and (if it has gradients) backward."""
    sample = bench.make(torch.device("cpu"), dtype, 0)
    bound = sample.bound(bench.function)
    leaves = [bound[name].requires_grad_() for name in bench.gradients]
    with recording(run=False, arch=arch) as launches, _LaunchOnly():
        output = bench.function(**bound)
        outputs = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.zeros_like(t) for t in outputs])
    return launches


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisibility of the arguments, as Triton's own just-in-time compilation specialises them."""
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    by_name = dict(zip((name for name in launch.kernel.arg_names if name not in constants), launch.args, strict=True))
    for place, name in enumerate(launch.kernel.arg_names):
        value = by_name.get(name)
        if (
            name in constants
            or value is None
            or (isinstance(value, int) and not isinstance(value, bool) and value == 1)
        ):
            types[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations are aligned on a GPU
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            types[name] = "i1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    return types, constants, attributes


def resources(launch: Launch, arch: int) -> Resources:
    """Compiles a launch for `arch` as it would be on a GPU, and reads what it takes."""
    types, constants, attributes = _signature(launch)
    return _compiled(
        launch.kernel, tuple(types.items()), tuple(constants.items()), tuple((k, str(v)) for k, v in attributes.items()),
        arch, launch.num_warps, launch.num_stages, launch.fp_fusion,
    )  # fmt: skip


@functools.lru_cache(None)
def _compiled(
    kernel: Any,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    aligned: tuple[tuple[tuple[int, ...], str], ...],
    arch: int,
    num_warps: int,
    num_stages: int,
    fp_fusion: bool,
) -> Resources:
    attributes = {place: [["tt.divisibility", 16]] for place, _ in aligned}
    source = ASTSource(fn=kernel, signature=dict(types), constexprs=dict(constants), attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _usage(made.asm["cubin"])
    code = made.asm["ptx"]
    found = [
        name for name, mark in (("wgmma", "wgmma"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")) if mark in code
    ]
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], made.metadata.shared, found[0] if found else "")


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}

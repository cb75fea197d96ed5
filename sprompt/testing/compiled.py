"""Compiles the GPU kernels and counts their memory traffic, without a GPU.

Triton: compiles every launch of the benchmark rows at the paper's sizes ahead of time, and compares its Cost with the least
bytes of the op. CUDA C++: compiles every kernel with nvcc; warnings are errors. `python -m sprompt.testing.compiled --write
docs/gpu_kernels.md` writes both tables.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
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
from sprompt.ops.declare import OPS
from sprompt.ops.triton_launch import Launch, recording
from sprompt.testing.compare import held_bytes
from sprompt.testing.spec import HALVES, Bench, Sample
from sprompt.testing.specs import BENCHES

ROOT = Path(__file__).resolve().parents[2]
MARKERS = ("<!-- kernels -->", "<!-- /kernels -->")
ARCHITECTURES = (80, 90, 100)
#: Rates of an H200: bytes per second of a copy (read and written), operations per second of half types on tensor cores, and of
#: float32.
COPY, TENSOR, PLAIN = 4.3e12, 790e12, 60e12
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.float64: "fp64", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


class Resources(NamedTuple):
    """Resources of one kernel on one architecture. Spills show up as a stack frame or local memory."""

    registers: int  #: per thread
    spilled: int  #: bytes of stack and local memory per thread
    shared: int  #: bytes per block, without dynamic shared memory
    tensor_cores: str = ""  #: wgmma, tcgen05, mma or ""
    half_products: bool = False  #: whether it multiplies tiles of half types


class OpRun(NamedTuple):
    """One op of a benchmark row."""

    op: str
    least: int  #: bytes of its tensors, each read or written once
    launches: list[Launch]


class LaunchOnly(TorchDispatchMode):
    """Runs no sprompt op. If an op has a Triton kernel, its launches are recorded. Outputs are zeros."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.runs: list[OpRun] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "sprompt":
            return function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("sprompt::")
        op = OPS[name]
        if "triton" not in backends.registered(name):
            return torch.utils._pytree.tree_map_only(Tensor, Tensor.zero_, op.outputs(*args))
        with recording(run=False, arch=self.arch) as launches, backends.use_backend("triton", [name]):
            outputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.zero_, op.run(*args))
        self.runs.append(OpRun(name, held_bytes((args, outputs)), launches))
        return outputs


def rows() -> list[Bench]:
    """The benchmark rows for a GPU whose function has Triton kernels."""
    folders = {path.parent.name for path in (ROOT / "sprompt" / "ops").glob("*/triton.py")}
    return [
        bench
        for bench in BENCHES
        if bench.device == "cuda" and bench.function.__module__.removeprefix("sprompt.ops.") in folders
    ]


def runs_of(bench: Bench, sample: Sample, arch: int) -> list[OpRun]:
    """Every Triton op of the row, forward and backward (if it has gradients), with its launches."""
    bound = sample.bound(bench.function)
    leaves = [bound[name].requires_grad_() for name in bench.gradients]
    with LaunchOnly(arch) as mode:
        output = bench.function(**bound)
        outputs = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if leaves and outputs:
            torch.autograd.grad(outputs, leaves, [torch.zeros_like(t) for t in outputs])
    return mode.runs


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and divisibility of the arguments, specialised like Triton's just-in-time compilation."""
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
    """Compiles a launch for `arch` as on a GPU, and returns its resources."""
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
    code, tree = made.asm["ptx"], made.asm["ttir"]
    found = [
        name for name, mark in (("wgmma", "wgmma"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")) if mark in code
    ]
    halves = re.search(r"tt\.dot .*tensor<\w+x(bf16|f16)> \*", tree) is not None
    registers, spilled = _usage(made.asm["cubin"])
    return Resources(registers, spilled, made.metadata.shared, found[0] if found else "", halves)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


# -- CUDA C++


def nvcc() -> str:
    """Path of the CUDA compiler, or an empty string if there is none."""
    return shutil.which("nvcc") or ""


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*/*_cuda.cu"))


def cuda_resources(source: Path) -> dict[tuple[str, int], Resources]:
    """Resources by kernel and architecture. A compiler warning raises an error."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc(), "-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", *targets, "-Werror=all-warnings",
            "-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/kernels.o",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile without warnings:\n{done.stderr}")
    found = {}
    entries = re.split(r"Compiling entry function ", done.stderr)[1:]
    for entry in entries:
        symbol, arch = re.match(r"'(\w+)' for 'sm_(\d+)'", entry).groups()  # type: ignore[union-attr]  # it always matches
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        stack, stores, loads = map(int, spills.groups())  # type: ignore[union-attr]  # it always matches
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))  # type: ignore[union-attr]  # it always matches
        shared = re.search(r"(\d+) bytes smem", entry)
        found[_readable(symbol), int(arch)] = Resources(
            registers, stack + stores + loads, int(shared.group(1)) if shared else 0
        )
    return found


def _readable(symbol: str) -> str:
    """The name of a mangled kernel in an unnamed namespace, and its template arguments in mangled form."""
    name = re.search(r"_GLOBAL__N__\w*?_cu_[0-9a-f]{8}(?:_\d+)?(?=\d)", symbol)
    rest = symbol[name.end() :] if name else symbol
    length = re.match(r"\d+", rest)
    if length is None:
        return symbol
    begin = length.end()
    kernel, tail = rest[begin : begin + int(length.group())], rest[begin + int(length.group()) :]
    template = re.match(r"I(.*?)EE?v", tail)
    return kernel + (f"<{template.group(1)}>" if template else "")


# -- tables


def floor_share(bench: Bench, run: OpRun, dtype: torch.dtype, arch: int = 90) -> float:
    """floor/ours from bytes and operations, at an H200's rates. floor is the lower bound of the op's time. ours is the time of
    all launches, one after the other, at full bandwidth or full arithmetic rate. A real GPU can only be slower than `ours`."""
    used = [resources(one, arch) for one in run.launches]
    least_rate = TENSOR if dtype in HALVES and any(u.half_products for u in used) else PLAIN
    # For a backward no least number of operations is given, so its own operations count.
    flops = bench.flops if run.op == bench.function.__name__ else sum(one.cost.flops for one in run.launches)
    floor = max(run.least / COPY, flops / least_rate)
    ours = 0.0
    for one, u in zip(run.launches, used, strict=True):
        rate = TENSOR if u.tensor_cores else PLAIN
        ours += max((one.cost.read + one.cost.written) / COPY, one.cost.flops / rate)
    return floor / ours


def markdown() -> str:
    """The tables, as Markdown: resources of the Triton kernels, bytes and operations of their ops, resources of the CUDA C++
    kernels."""
    kernels = [
        "| kernel | dtype | sm | registers | spilled | shared | tensor cores | warps | tiles |", "|" + "---|" * 9,
    ]  # fmt: skip
    ops = ["| op | at | dtype | least MB | moved MB | read again MB | GFLOP | floor/ours at best |", "|" + "---|" * 8]
    for bench in rows():
        for dtype in bench.dtypes:
            name, sample = str(dtype).removeprefix("torch."), bench.make(torch.device("cpu"), dtype, 0)
            for arch in ARCHITECTURES:
                for run in runs_of(bench, sample, arch):
                    kernels += [_kernel_line(launch, name, arch) for launch in run.launches]
                    if arch == 90:
                        ops.append(_op_line(bench, run, dtype))
    return "\n".join([*dict.fromkeys(kernels), "", *ops, "", *_cuda_lines()])


def _kernel_line(launch: Launch, dtype: str, arch: int) -> str:
    used = resources(launch, arch)
    sizes = ", ".join(
        f"{k} {v}"
        for k, v in launch.constants.items()
        if isinstance(v, int) and not isinstance(v, bool) and k.isupper()
    )
    kernel = f"{launch.kernel.fn.__module__.split('.')[2]}.{launch.kernel.__name__.lstrip('_')}"
    return (
        f"| {kernel} | {dtype} | {arch} | {used.registers} | {used.spilled} | {used.shared} "
        f"| {used.tensor_cores} | {launch.num_warps} | {sizes} |"
    )


def _op_line(bench: Bench, run: OpRun, dtype: torch.dtype) -> str:
    costs = [launch.cost for launch in run.launches]
    return (
        f"| {run.op} | {bench.shape} | {str(dtype).removeprefix('torch.')} | {run.least / 1e6:.2f} "
        f"| {sum(c.read + c.written for c in costs) / 1e6:.2f} | {sum(c.again for c in costs) / 1e6:.2f} "
        f"| {sum(c.flops for c in costs) / 1e9:.2f} | {floor_share(bench, run, dtype):.2f} |"
    )


def _cuda_lines() -> list[str]:
    lines = ["| kernel (CUDA C++) | " + " | ".join(f"sm_{a}: registers, spilled, shared" for a in ARCHITECTURES) + " |"]
    lines.append("|" + "---|" * (1 + len(ARCHITECTURES)))
    for source in cuda_sources() if nvcc() else ():
        found = cuda_resources(source)
        for kernel in dict.fromkeys(name for name, _ in found):
            cells = [f"{u.registers}, {u.spilled}, {u.shared}" for u in (found[kernel, arch] for arch in ARCHITECTURES)]
            lines.append(f"| {source.parent.name}.{kernel} | " + " | ".join(cells) + " |")
    return list(dict.fromkeys(lines))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sprompt.testing.compiled", description=__doc__)
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this file")
    options = parser.parse_args()
    text = markdown()
    if options.write is None:
        print(text)
        return
    begin, end = MARKERS
    head, rest = options.write.read_text().split(begin, 1)
    options.write.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    main()

"""Fills Triton's cache for a GPU that this machine does not have. It replays every launch of the specs' samples and of the GPU
rows of the benchmark through Triton's just-in-time compiler, with a target instead of a driver. `python -m
sprompt.testing.replay --arch 90`; the cache is TRITON_CACHE_DIR. `--check` prints how many kernels the cache lacks, and
compiles nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from sprompt.ops.triton_launch import Launch, trial
from sprompt.testing.calls import differentiable_outputs
from sprompt.testing.compiled import LaunchOnly
from sprompt.testing.layouts import LAYOUTS, can_be_far, far
from sprompt.testing.spec import Bench, OpSpec, Sample
from sprompt.testing.specs import BENCHES, SPECS

CPU = torch.device("cpu")
#: Seeds for samples(). A few are enough: kernels are specialised by shapes, and hardly any spec draws shapes at random.
SEEDS = (0, 1, 13)


class Target:
    """The parts of a driver that Triton needs to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def layouts(sample: Sample) -> Iterator[Sample]:
    yield from (sample.map(layout) for layout in LAYOUTS)
    if can_be_far(sample):
        yield far(sample)


def launches(what: OpSpec | Bench, sample: Sample, arch: int) -> Iterator[Launch]:
    """The launches of one call, forward and backward. No kernel runs, so errors from unwritten results are ignored."""
    bound = sample.bound(what.function)
    leaves = []
    for name in what.gradients:
        if isinstance(bound.get(name), Tensor) and bound[name].is_floating_point():
            bound[name] = bound[name].detach().requires_grad_()
            leaves.append(bound[name])
    with LaunchOnly(arch) as mode:
        try:
            outputs = differentiable_outputs(what.function(**bound))
            if leaves and outputs:
                for gradient in (torch.zeros_like, lambda o: torch.zeros((), dtype=o.dtype).expand(o.shape)):
                    torch.autograd.grad(outputs, leaves, [gradient(o) for o in outputs], retain_graph=True)
        except (RuntimeError, ValueError, IndexError):
            pass
    for run in mode.runs:
        yield from run.launches


def all_launches(arch: int) -> Iterator[Launch]:
    for spec in SPECS:
        dtypes = spec.dtypes or (torch.float32,)
        for dtype in dtypes:
            for seed in SEEDS:
                for sample in spec.samples(CPU, dtype, seed):
                    yield from launches(spec, sample, arch)
                    if seed == 1:
                        for other in layouts(sample):
                            yield from launches(spec, other, arch)
    for bench in BENCHES:
        if bench.device == "cuda":
            for dtype in bench.dtypes:
                yield from launches(bench, bench.make(CPU, dtype, 0), arch)


def candidates(folder: str, arch: int) -> Iterator[Launch]:
    """The launches that benchmarks/tune.py tries for the kernels of an op's folder."""
    tried = importlib.import_module(f"sprompt.ops.{folder}.triton").CANDIDATES
    for bench in BENCHES:
        if bench.device == "cuda" and bench.function.__module__ == f"sprompt.ops.{folder}":
            for dtype in bench.dtypes:
                sample = bench.make(CPU, dtype, 0)
                for kernel, configs in tried.items():
                    for config in configs:
                        trial[f"{folder}.{kernel}"] = config
                        yield from launches(bench, sample, arch)
                    trial.clear()


def slim(launch: Launch) -> Launch:
    """The launch with tensors of a few bytes. Only their dtypes and the alignment of their addresses matter."""
    args = (
        torch.empty(32, dtype=a.dtype)[a.data_ptr() % 16 // a.element_size() :] if isinstance(a, Tensor) else a
        for a in launch.args
    )
    return launch._replace(args=tuple(args))


def compile_one(launch: Launch) -> None:
    """Compiles the kernel, and the C function that passes its arguments, into the cache."""
    made = warm_up(launch)
    with contextlib.suppress(ImportError):  # the function is compiled, but loading it needs a driver
        CudaLauncher(made.src, made.metadata)


def compile_all(launches: list[Launch]) -> None:
    for launch in launches:
        compile_one(launch)


def warm_up(launch: Launch) -> Any:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": launch.fp_fusion}
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **options, **launch.constants)


def distinct(arch: int, tuned: list[str]) -> list[Launch]:
    """One launch for every specialisation of every kernel."""
    found: dict[tuple[Any, Any], Launch] = {}
    current = None

    def keep(*, key: Any, fn: Any, **_: Any) -> bool:
        found.setdefault((fn.jit_function, key), slim(current))  # type: ignore[arg-type]  # a launch while kernels warm up
        return True  # stops before compilation

    knobs.runtime.jit_cache_hook = keep
    for current in itertools.chain(all_launches(arch), *(candidates(folder, arch) for folder in tuned)):
        warm_up(current)
    knobs.runtime.jit_cache_hook = None
    return list(found.values())


def stub_driver(folder: str) -> str:
    """Writes an empty libcuda.so.1 to link launchers against. Returns its folder."""
    subprocess.run(
        ["cc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"],
        check=True,
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sprompt.testing.replay", description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="architecture of the GPU (default: 90)")
    parser.add_argument(
        "--tune", nargs="*", default=[], help="folders of ops whose other tile sizes are compiled as well"
    )
    parser.add_argument("--check", action="store_true", help="only count the kernels that the cache lacks")
    options = parser.parse_args()
    triton.runtime.driver.set_active(Target(options.arch))
    found = distinct(options.arch, options.tune)
    missing: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: missing.append(not cache_hit)
    with tempfile.TemporaryDirectory() as folder:
        knobs.nvidia.libcuda_path = stub_driver(folder)
        if options.check:
            for launch in found:
                warm_up(launch)
            print(f"{sum(missing)} of {len(missing)} kernels are not in the cache")
            raise SystemExit(1 if any(missing) else 0)
        workers = os.cpu_count() or 1
        children = [
            multiprocessing.get_context("fork").Process(target=compile_all, args=(found[i::workers],))
            for i in range(workers)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise SystemExit("some kernels do not compile")
    print(f"{len(found)} kernels")


if __name__ == "__main__":
    main()

"""The GPU kernels, tested without a GPU: their compiled code for every architecture, and the bytes that they move at the
paper's sizes."""

import re
from pathlib import Path

import pytest
import torch

from sprompt.ops import triton_launch
from sprompt.testing.spec import Bench

if triton_launch.triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if triton_launch.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sprompt.testing import compiled

ROWS = [
    pytest.param(bench, dtype, id=f"{bench.function.__name__} {bench.shape} {str(dtype).removeprefix('torch.')}")
    for bench in compiled.rows()
    for dtype in bench.dtypes
]
#: Lower bound of floor/ours, as computed from bytes and operations only.
GOAL = 0.6
#: Ops below GOAL, with the reason.
BELOW = {
    "mask_update sm_100": "Triton does not yet lower the fused kernel there: the features are read twice",
    "saliency_bits": "half types: maps of 25x42 are copied once to aligned rows, and the Gram matrix is written and read",
    "saliency_soft": "the same copy, for 20 maps an image",
    "mask_attention": "float32: the floor counts the products of set bits; a tile multiplies all its keys with all its queries",
    "saliency_maps": "the same copy; products are written and read again by the second pass",
    "sample_points_backward": "sums of fixed point, 8 bytes a cell, are added to, read, and converted",
    "point_loss": "the keys of the candidates are written and read; the logits are read for the selection and for the losses",
    "point_loss_backward": "sums of fixed point, 8 bytes a cell, are added to, read, and converted",
}
TENSOR_CORES = {80: ("mma",), 90: ("wgmma",), 100: ("tcgen05", "mma")}
#: Bytes of shared memory that a block may have. The bound of sm_80 is that of sm_86 and sm_89, which run the same kernels.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize(("bench", "dtype"), ROWS)
def test_triton_kernels(bench: Bench, dtype: torch.dtype) -> None:
    """The kernels do not spill and multiply half types on tensor cores (wgmma on sm_90). Bytes and operations are near the
    lower bound."""
    sample = bench.make(torch.device("cpu"), dtype, 0)
    for arch in compiled.ARCHITECTURES:
        for run in compiled.runs_of(bench, sample, arch):
            for one in run.launches:
                used = compiled.resources(one, arch)
                told = f"{run.op}, {one.kernel.__name__} on sm_{arch}: {used}"
                assert used.spilled == 0, told
                assert used.shared <= SHARED[arch], told
                assert not used.half_products or used.tensor_cores in TENSOR_CORES[arch], told
            share = compiled.floor_share(bench, run, dtype, arch)
            known = {run.op, f"{run.op} sm_{arch}"} & set(BELOW)
            assert share >= GOAL or known, f"{run.op} on sm_{arch}: floor/ours is at best {share:.2f}"


def test_every_triton_kernel_is_in_the_table() -> None:
    """Every kernel has a row. docs/gpu_kernels.md is made from the rows."""
    table = (compiled.ROOT / "docs" / "gpu_kernels.md").read_text()
    for path in sorted((compiled.ROOT / "sprompt" / "ops").glob("*/*.py")):
        for kernel in set(re.findall(r"\blaunch\(\s*_(\w+)", path.read_text())):
            assert f"| {path.parent.name}.{kernel} |" in table, f"{path}: no row with device='cuda' reaches _{kernel}"


@pytest.mark.parametrize("source", compiled.cuda_sources(), ids=lambda path: path.stem)
def test_cuda_kernels_compile_without_warnings_or_spills(source: Path) -> None:
    if not compiled.nvcc():
        pytest.skip("nvcc is not installed")
    found = compiled.cuda_resources(source)
    assert found and {arch for _, arch in found} == set(compiled.ARCHITECTURES)
    for (kernel, arch), used in found.items():
        assert used.spilled == 0, f"{kernel} on sm_{arch}: {used}"
        assert used.shared <= 48 * 1024, f"{kernel} on sm_{arch}: {used}"

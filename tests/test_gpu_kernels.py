"""The GPU kernels without a GPU: what they compile to for every architecture, and what they move at the paper's sizes."""

from pathlib import Path

import pytest
import torch

from sprompt.ops import launch
from sprompt.testing.spec import Bench
from sprompt.testing.specs import BENCHES

if launch.triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if launch.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sprompt.testing import compiled

ROWS = [
    pytest.param(bench, dtype, id=f"{bench.function.__name__} {bench.shape} {str(dtype).removeprefix('torch.')}")
    for bench in BENCHES
    if bench.device == "cuda"
    for dtype in bench.dtypes
]
#: floor/ours >= 0.6 by the bytes alone.
MOST_MOVED = 1 / 0.6
#: Ops that move more, with the reason.
MOVES_MORE: dict[str, str] = {}


@pytest.mark.parametrize(("bench", "dtype"), ROWS)
@pytest.mark.parametrize("arch", compiled.ARCHITECTURES)
def test_triton_kernels_compile_without_spills(bench: Bench, dtype: torch.dtype, arch: int) -> None:
    """Products of half types run on tensor cores: wgmma on sm_90."""
    for run in compiled.runs_of(bench, dtype, arch):
        for one in run.launches:
            used = compiled.resources(one, arch)
            told = f"{run.op}, {one.kernel.__name__}: {used}"
            assert used.spilled == 0, told
            assert used.shared <= {80: 163, 90: 227, 100: 227}[arch] * 1024, told
            if used.half_products:
                assert used.tensor_cores in {80: ("mma",), 90: ("wgmma",), 100: ("tcgen05", "mma")}[arch], told


@pytest.mark.parametrize(("bench", "dtype"), ROWS)
def test_bytes_are_near_the_least(bench: Bench, dtype: torch.dtype) -> None:
    """Counted from the launches' own arithmetic; what caches serve (Cost.again) is not counted."""
    for run in compiled.runs_of(bench, dtype, 90):
        moved = sum(one.cost.read + one.cost.written for one in run.launches)
        assert moved > 0.3 * run.least, f"{run.op} says that it moves {moved} bytes of at least {run.least}"
        if run.op not in MOVES_MORE:
            assert moved <= MOST_MOVED * run.least, (
                f"{run.op} moves {moved} bytes, {moved / run.least:.2f} times the least"
            )


@pytest.mark.parametrize("source", compiled.cuda_sources(), ids=lambda path: path.parent.name)
def test_cuda_kernels_compile_without_warnings_or_spills(source: Path) -> None:
    if not compiled.nvcc():
        pytest.skip("nvcc is not installed")
    found = compiled.cuda_resources(source)
    assert found and {arch for _, arch in found} == set(compiled.ARCHITECTURES)
    for (kernel, arch), used in found.items():
        assert used.spilled == 0, f"{kernel} on sm_{arch}: {used}"
        assert used.shared <= 48 * 1024, f"{kernel} on sm_{arch}: {used}"


def test_every_triton_kernel_has_a_row() -> None:
    """No kernel is left out of the tables above."""
    rooms = sorted(Path(launch.__file__).parent.glob("*/triton.py"))
    reached = {
        (one.kernel.fn.__module__, one.kernel.__name__)
        for bench in BENCHES
        if bench.device == "cuda"
        for run in compiled.runs_of(bench, bench.dtypes[0], 90)
        for one in run.launches
    }
    for path in rooms:
        text = path.read_text()
        launched = {
            part.split(",")[0].strip() for part in text.replace("\n", " ").replace("  ", "").split("launch(")[1:]
        }
        for kernel in (name for name in launched if name.startswith("_")):
            assert any(kernel == name for _, name in reached), (
                f"{path.parent.name}: no row with device='cuda' reaches {kernel}"
            )

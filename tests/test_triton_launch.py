"""Launching Triton kernels: the choice of configurations, recording, and what the tuner writes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from sprompt.ops import triton_launch

TABLE = {
    "product": [
        {"BLOCK": 1, "num_warps": 4},
        {"arch": 90, "BLOCK": 2},
        {"arch": 90, "bits": 16, "BLOCK": 3},
        {"arch": 90, "bits": 16, "upto": 64, "BLOCK": 4},
        {"arch": 100, "BLOCK": 5},
    ]
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "entries", lambda op: TABLE)
    triton_launch._pick.cache_clear()
    yield
    triton_launch._pick.cache_clear()


@pytest.mark.parametrize(
    ("arch", "dtype", "size", "block"),
    [
        (80, torch.float32, 0, 1), (86, torch.bfloat16, 10**9, 1), (75, torch.float32, 0, 1), (90, torch.float32, 7, 2),
        (90, torch.bfloat16, 65, 3), (90, torch.float16, 64, 4), (100, torch.bfloat16, 1, 5), (120, torch.float32, 1, 5),
    ],
)  # fmt: skip
def test_the_closest_entry_is_taken(table: None, arch: int, dtype: torch.dtype, size: int, block: int) -> None:
    with triton_launch.recording(run=False, arch=arch):
        assert triton_launch.config("op.product", torch.empty(0, dtype=dtype), size)["BLOCK"] == block


def test_every_room_has_an_entry_for_every_kernel_and_architecture() -> None:
    for op in tune.ops():
        for kernel in triton_launch.entries(op):
            for arch in (80, 90, 100):
                for dtype in (torch.float32, torch.bfloat16):
                    with triton_launch.recording(run=False, arch=arch):
                        found = triton_launch.config(f"{op}.{kernel}", torch.empty(0, dtype=dtype), 1 << 40)
                    assert found and not {"arch", "bits", "upto"} & set(found), (op, kernel)


def test_candidates_name_kernels_that_have_a_configuration() -> None:
    if triton_launch.triton is None:
        pytest.skip("triton is not installed")
    for op in tune.ops():
        candidates = importlib.import_module(f"sprompt.ops.{op}.triton").CANDIDATES
        assert candidates and set(candidates) <= set(triton_launch.entries(op)), op


def test_a_recorded_launch_does_not_run() -> None:
    def kernel(*args: object) -> None:
        raise AssertionError("ran")

    tensor = torch.empty(3)
    with triton_launch.recording(run=False) as launches:
        triton_launch.launch(kernel, (2, 3), tensor, 5, cost=triton_launch.Cost(read=12), BLOCK=16)
        triton_launch.launch(kernel, (0, 3), tensor, 5, cost=triton_launch.Cost(), BLOCK=16)
    (one,) = launches
    assert one.grid == (2, 3) and one.args == (tensor, 5) and one.constants == {"BLOCK": 16} and one.cost.read == 12


def test_the_tuner_replaces_its_own_entry_only(tmp_path: Path) -> None:
    entries = tune.with_entry(TABLE["product"], 90, 16, {"BLOCK": 9})
    assert entries[0] == {"arch": 90, "bits": 16, "BLOCK": 9}
    assert entries[1:] == [TABLE["product"][0], TABLE["product"][1], TABLE["product"][4]]
    tune.write(tmp_path / "configs.json", {"product": entries, "other": [{"BLOCK": 1}]})
    assert json.loads((tmp_path / "configs.json").read_text()) == {"product": entries, "other": [{"BLOCK": 1}]}


def test_without_a_gpu_the_kernels_say_what_they_need() -> None:
    if triton_launch.triton is None or triton_launch.interpreted() or torch.cuda.is_available():
        pytest.skip("needs Triton, no interpreter and no GPU")
    assert triton_launch.why_not(torch.empty(1)).startswith("the Triton kernels need a CUDA device")


def test_tf32_follows_either_of_the_switches_of_torch() -> None:
    code = (
        "import torch; from sprompt.ops.triton_launch import precision; matmul = torch.backends.cuda.matmul\n"
        "found = [precision(torch.zeros(1))]\n"
        "matmul.allow_tf32 = True; found.append(precision(torch.zeros(1))); found.append(precision(torch.zeros(1).half()))\n"
        "matmul.allow_tf32 = False; found.append(precision(torch.zeros(1)))\n"
        "if hasattr(matmul, 'fp32_precision'): matmul.fp32_precision = 'tf32'\n"
        "else: matmul.allow_tf32 = True\n"
        "print(*found, precision(torch.zeros(1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "ieee", "tf32"]

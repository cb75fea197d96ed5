"""The bindings of the kernels follow from the declarations in csrc/<op>/<op>.h, and every argument arrives unchanged.

`probe` is an op of these tests only. The project's CMakeLists.txt and bindings build it in a source tree of its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt import native

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(native._C is None, reason="the kernels are not built")

WIDTH = 15  # numbers that probe writes for each view
# `probe` writes its arguments to `out`: count; for every view dtype, rank, 6 sizes, 6 strides and the first i32 element.
HEADER = """
#pragma once
#include "common/views.h"
namespace sprompt {
SPROMPT_KERNEL_OF(int64_t, probe_sum, int64_t a, int64_t b)
SPROMPT_KERNEL(probe, const Views& views, const View& out)
SPROMPT_KERNEL(probe_scalars, bool flag, float x, double y, int64_t n, int threads, const View& out)
}  // namespace sprompt
"""
KERNEL = """
#include "probe/probe.h"
namespace sprompt {
namespace SPROMPT_ISA {
void probe(const Views& views, const View& out) {
    int64_t* to = out.as<int64_t>();
    *to++ = views.count;
    for (int i = 0; i < views.count; ++i) {
        const View& view = views.view[i];
        *to++ = static_cast<int64_t>(view.dtype);
        *to++ = view.rank;
        for (int d = 0; d < max_rank; ++d) *to++ = view.size[d];
        for (int d = 0; d < max_rank; ++d) *to++ = view.stride[d];
        *to++ = view.data ? view.as<const int32_t>()[0] : -1;
    }
}
int64_t probe_sum(int64_t a, int64_t b) { return a + b; }
void probe_scalars(bool flag, float x, double y, int64_t n, int threads, const View& out) {
    double* to = out.as<double>();
    to[0] = flag, to[1] = x, to[2] = y, to[3] = static_cast<double>(n), to[4] = threads;
}
}  // namespace SPROMPT_ISA
}  // namespace sprompt
"""
LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import _C
print(sorted(name for name in vars(_C) if name.startswith(("probe", "later"))))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree whose only op is `probe`, and its build in build/."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None or shutil.which("c++") is None:
        pytest.skip("cmake, ninja or c++ is missing")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "csrc/common", tree / "csrc/common")
    for name in ("csrc/bindings.cpp", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc/probe").mkdir()
    (tree / "csrc/probe/probe.h").write_text(HEADER)
    (tree / "csrc/probe/probe_cpu.cpp").write_text(KERNEL)
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DSPROMPT_CUDA=off", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    run("cmake", "-S", str(tree), "-B", str(tree / "build"), "-G", "Ninja", *options)
    run("cmake", "--build", str(tree / "build"))
    return tree


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def probe(tree: Path) -> Any:
    """The compiled module of the tree `probe`. Its name is _C, so it does not replace sprompt._C."""
    import importlib.util

    (file,) = (tree / "build").glob("_C*")
    spec = importlib.util.spec_from_file_location("_C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_dtypes({torch.int32: 8, torch.int64: 9, torch.float32: 1})
    return module


def test_every_declaration_is_bound() -> None:
    for macro, module in (
        ("KERNEL", native._C),
        ("CUDA_KERNEL", getattr(native._C, "cuda", None)),
    ):
        declared = {
            name
            for header in ROOT.glob("csrc/*/*.h")
            if header.parent.name != "common"
            for name in re.findall(rf"^SPROMPT_{macro}\((\w+)", header.read_text(), re.MULTILINE)
        }
        assert declared
        missing = {name for name in declared if module is not None and not hasattr(module, name)}
        assert not missing, f"SPROMPT_{macro} declares what the module lacks: {missing}"


def test_an_op_is_added_by_its_own_folder(tree: Path, probe: Any) -> None:
    """An existing build finds a new op by itself. Neither CMakeLists.txt nor bindings.cpp is changed."""
    assert "later" not in run(sys.executable, "-c", LOAD, str(tree / "build"))
    (tree / "csrc/later").mkdir()
    declaration = HEADER.replace("probe_scalars", "later_scalars").replace("probe", "later")
    (tree / "csrc/later/later.h").write_text(declaration)
    (tree / "csrc/later/later_cpu.cpp").write_text(KERNEL.replace("probe", "later"))
    run("cmake", "--build", str(tree / "build"))
    names = ["later", "later_scalars", "later_sum", "probe", "probe_scalars", "probe_sum"]
    assert run(sys.executable, "-c", LOAD, str(tree / "build")) == f"{names}\n"


class Plain:
    """A tensor of an older torch, without DLPack's C functions."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape, self.stride, self.data_ptr = tensor.dtype, tensor.shape, tensor.stride, tensor.data_ptr


def seen(probe: Any, views: Any, given: int) -> list[list[int]]:
    out = torch.full((1 + given * WIDTH,), -7)
    probe.probe(views, out)
    assert out[0] == given
    return out[1:].view(-1, WIDTH).tolist()


def row(tensor: torch.Tensor | None) -> list[int]:
    if tensor is None:
        return [0, 0, *[0] * 12, -1]
    code = {torch.float32: 1, torch.int32: 8, torch.int64: 9}[tensor.dtype]
    pad = [0] * (6 - tensor.ndim)
    first = tensor.flatten()[:1].view(torch.int32)[0].item() if tensor.numel() else -1
    return [code, tensor.ndim, *tensor.shape, *pad, *tensor.stride(), *pad, first]


@pytest.mark.parametrize("kind", [list, tuple])
def test_tensors_arrive_whole(probe: Any, kind: type) -> None:
    base = torch.arange(5000, dtype=torch.int32)
    tensors = [
        base[3:],
        base[100:].as_strided((2, 1, 3, 2, 1, 2), (7, 0, 50, 3, 1000, 1)),
        base[17].clone(),
        base[7:].view(torch.int64 if base[7:].data_ptr() % 8 == 0 else torch.int32),
        torch.nn.Parameter(torch.arange(1.0, 5.0).view(2, 2).t()),
        None,
        base[5:9].expand(3, 4),
    ]
    rows = [row(tensor) for tensor in tensors]
    assert seen(probe, kind(tensors), len(tensors)) == rows
    assert seen(probe, kind(None if t is None else Plain(t) for t in tensors), len(tensors)) == rows
    assert seen(probe, kind(), 0) == []


def test_scalars_and_results(probe: Any) -> None:
    out = torch.empty(5, dtype=torch.float64)
    for dtypes in ({torch.float64: 2}, {}):
        probe.set_dtypes({torch.int32: 8, torch.int64: 9, torch.float32: 1, **dtypes})
        probe.probe_scalars(True, 0.5, 1 / 3, -(2**40), 7, out)
        assert out.tolist() == [1.0, 0.5, 1 / 3, -float(2**40), 7.0]
    assert probe.probe_sum(2**40, -1) == 2**40 - 1


def test_what_does_not_fit_is_refused(probe: Any) -> None:
    out, seven = torch.zeros(20, dtype=torch.int64), torch.zeros([1] * 7)
    one = torch.zeros(1)
    nowhere = Plain(one)
    nowhere.data_ptr = lambda: 0
    tensor = "argument 1 must be a tensor of at most 6 dimensions and of a type in common/views.h, or None, got"
    for views, message in (
        ([seven], f"probe(): {tensor} <class 'torch.Tensor'>"),
        ([Plain(seven)], f"probe(): {tensor} <class 'test_bindings.Plain'>"),
        ([one.to(torch.complex64)], f"probe(): {tensor} <class 'torch.Tensor'>"),
        ([3], f"probe(): {tensor} <class 'int'>"),
        ([nowhere], "probe(): argument 1 must be a tensor with memory of its own, got"),
        ([one] * 9, "probe(): argument 1 must be a list of at most 8 tensors, got"),
        (one, "probe(): argument 1 must be a list or tuple of tensors, got"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            probe.probe(views, out)
    assert not out.any()
    with pytest.raises(TypeError, match=re.escape("probe() takes 2 arguments, got 1")):
        probe.probe([])
    with pytest.raises(TypeError, match="argument 1 must be a bool, got 1"):
        probe.probe_scalars(1, 0.0, 0.0, 0, 0, out)
    with pytest.raises(TypeError, match="float"):
        probe.probe_scalars(True, 0.0, 0.0, 1.5, 0, out)
    with pytest.raises(TypeError, match="argument 5 must be an int of 32 bits"):
        probe.probe_scalars(True, 0.0, 0.0, 0, 2**31, out)
    with pytest.raises((RuntimeError, BufferError)):
        probe.probe([one.to_sparse()], out)


@pytest.mark.parametrize("images", (2**40, 2**51))
def test_too_little_memory_is_a_memory_error(images: int) -> None:
    """A kernel asks for more scratch memory than a machine can have, or for more bytes than int64 can count. The next call
    works."""
    features, kernels, logits = (torch.ones(1, *size) for size in ((4, 1), (512, 4), (512, 1)))
    with pytest.raises(MemoryError):
        native._C.mask_update(*(x.expand(images, -1, -1) for x in (features, kernels, logits)), None, None, 1)
    native._C.mask_update(features, kernels, logits, None, None, 1)
    assert logits.eq(4).all()


def test_memory_that_a_kernel_takes_is_filled_for_tests() -> None:
    """Scratch memory is also kept between calls. The sums over 3 masks of an earlier call do not show in a later call."""
    features, kernels = torch.ones(2, 4, 9), torch.ones(2, 3, 4)
    results = []
    for poison in (False, True, False):
        native._C.poison_scratch(poison)
        results.append(torch.zeros(2, 3, 9))
        native._C.mask_update(features, kernels, results[-1], None, None, 1)
    assert all(result.eq(4).all() for result in results)

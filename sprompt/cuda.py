"""The CUDA C++ kernels of the compiled module (sprompt._C.cuda): whether they can run, and on which stream."""

import functools

import torch
from torch import Tensor

from sprompt import native


def kernels() -> object:
    """The submodule, with one function per kernel. None if it was not built."""
    return getattr(native._C, "cuda", None)


def emulated() -> bool:
    """Whether the kernels were compiled for the host emulation (tests/emulation/cuda.h). It takes tensors on the CPU."""
    return native._C is not None and kernels() is not None and native._C.cuda.emulated


@functools.lru_cache(None)
def _runs_on(device: torch.device) -> str:
    """Why the kernels cannot run on a GPU; empty if they can. Code for sm_80 runs on sm_86. Code for sm_90 runs on no other
    architecture. For later architectures the driver compiles the PTX of the newest one."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(name) for name in native._C.cuda.architectures.split()]
    if any(arch // 10 == major and arch % 10 <= minor for arch in built) or 10 * major + minor >= max(built):
        return ""
    return f"sprompt was built for sm {native._C.cuda.architectures}, not {major}{minor}; set SPROMPT_CUDA_ARCHS and rebuild"


def why_not(*args: object) -> str:
    """Why the CUDA kernels cannot take these arguments; empty if they can."""
    if native._C is None:
        return native.why_missing
    if kernels() is None:
        return "sprompt was built without CUDA; build it where nvcc is found"
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.dtype == torch.float64:
                return "the CUDA kernels compute in float32; float64 runs on the reference"
            if not arg.is_cuda:
                if not emulated():
                    return "the CUDA kernels need a CUDA device"
            elif emulated():
                return "this build emulates the CUDA kernels on the CPU, for tests"
            else:
                return _runs_on(arg.device)
    return ""


def stream(like: Tensor) -> tuple[int, int]:
    """Where a kernel must run: the ordinal of the tensor's device, and torch's current stream there."""
    if not like.is_cuda:
        return 0, 0
    return like.device.index, torch._C._cuda_getCurrentRawStream(like.device.index)

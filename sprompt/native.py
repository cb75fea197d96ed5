"""The compiled module sprompt._C, or the reason why it is not there."""

import importlib
import os
import threading
from typing import Any

import torch

_C: Any
try:
    _C = importlib.import_module("sprompt._C")
except ImportError as error:
    asked = os.environ.get("SPROMPT_CPU")
    if isinstance(error, ModuleNotFoundError):
        why_missing = "sprompt._C is not built; build it with `pip install .`"
        refusal = f"SPROMPT_CPU={asked}: {why_missing}"
    else:
        why_missing = f"sprompt._C cannot be imported ({error}); build it anew with `pip install .`"
        refusal = str(error)
    if asked:  # a level was asked for by name: never fall back in silence
        raise ImportError(refusal) from None
    _C = None
else:
    why_missing = ""
    # Codes of sprompt::DType in csrc/common/views.h.
    _C.set_dtypes(
        {
            torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4, torch.uint8: 5,
            torch.int8: 6, torch.int16: 7, torch.int32: 8, torch.int64: 9, torch.bool: 10,
        }
    )  # fmt: skip


def why_not(*args: object) -> str:
    """Why the native kernels cannot take these arguments; empty if they can."""
    if _C is None:
        return why_missing
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dtype == torch.float64:
            return "the native kernels compute in float32; float64 runs on the reference"
    return ""


def threads() -> int:
    return torch.get_num_threads()


def rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with last stride 1, as kernels read rows; other strides are taken as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


#: Scratch of at most so many bytes is kept by the thread that used it, of so many shapes.
_KEPT_BYTES, _KEPT_SHAPES = 1 << 18, 64


_deterministic = torch._C._get_deterministic_algorithms  # torch.are_deterministic_algorithms_enabled, without its call


class _Kept(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[tuple[Any, ...], torch.Tensor] = {}


_kept = _Kept()


def scratch(*sizes: int, dtype: torch.dtype = torch.float32, slot: int = 0) -> torch.Tensor:
    """Memory on the CPU that one native call needs while it runs. A thread gets the same memory again, so two tensors for one call
    that may have the same sizes take different slots."""
    if _deterministic():  # which fills new memory, for tests that nothing unwritten is read
        return torch.empty(sizes, dtype=dtype, device="cpu")
    key = (sizes, dtype, slot)
    found = _kept.tensors.get(key)
    if found is None:
        found = torch.empty(sizes, dtype=dtype, device="cpu")
        if found.nbytes <= _KEPT_BYTES:
            if len(_kept.tensors) >= _KEPT_SHAPES:
                _kept.tensors.clear()
            _kept.tensors[key] = found
    return found

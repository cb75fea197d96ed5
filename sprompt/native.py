"""The compiled module sprompt._C, or the reason why it is not there."""

import os
from types import ModuleType

import torch

_C: ModuleType | None
try:
    from sprompt import _C  # type: ignore[attr-defined,no-redef]
except ImportError as error:
    if os.environ.get("SPROMPT_CPU"):  # a level was asked for by name: never fall back in silence
        raise
    _C = None
    why_missing = f"sprompt._C cannot be imported ({error}); build it with `pip install .`"
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

"""The compiled module sprompt._C, or the reason why it is missing."""

import importlib
import os
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
        why_missing = f"sprompt._C cannot be imported ({error}); rebuild it with `pip install .`"
        refusal = str(error)
    if asked:  # the user named a level: never fall back silently
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
    """The tensor with last stride 1, because kernels read contiguous rows. The other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()

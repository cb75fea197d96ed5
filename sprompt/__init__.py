"""sprompt: compiled kernels for query-based instance segmentation. A set of masks is bits.

>>> from sprompt.ops import pack_masks, mask_iou        # the kernel library, one function an op
>>> from sprompt import BitMasks                        # the masks that ops take and return
"""

import importlib
from typing import TYPE_CHECKING, Any

from sprompt import native as _native  # noqa: F401  (SPROMPT_CPU is refused when the package is imported)
from sprompt.backends import trace_backends, use_backend
from sprompt.masks import BitMasks

if TYPE_CHECKING:
    from sprompt import patch as patch
    from sprompt.engine.trained import load as load

__version__ = "0.1.0"
__all__ = ["BitMasks", "__version__", "load", "patch", "trace_backends", "use_backend"]


def __getattr__(name: str) -> Any:
    """`sprompt.load` and `sprompt.patch` are imported when they are first used: the kernels need none of their packages."""
    if name == "load":
        from sprompt.engine.trained import load

        return load
    if name == "patch":
        return importlib.import_module("sprompt.patch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

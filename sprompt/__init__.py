"""sprompt: compiled kernels for query-based instance segmentation. A set of masks is bits.

>>> from sprompt.ops import pack_masks, mask_iou        # the kernel library, one function an op
>>> from sprompt import BitMasks                        # the masks that ops take and return
"""

from typing import TYPE_CHECKING, Any

from sprompt import native as _native  # noqa: F401  (SPROMPT_CPU is refused when the package is imported)
from sprompt.backends import trace_backends, use_backend
from sprompt.masks import BitMasks

if TYPE_CHECKING:
    from sprompt.engine.trained import load as load

__version__ = "0.1.0"
__all__ = ["BitMasks", "__version__", "load", "trace_backends", "use_backend"]


def __getattr__(name: str) -> Any:
    """`sprompt.load` is imported when it is first used: the kernels need none of the packages that it needs."""
    if name == "load":
        from sprompt.engine.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

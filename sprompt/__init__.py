"""sprompt: compiled kernels for query-based instance segmentation. A set of masks is bits.

>>> from sprompt.ops import pack_masks, mask_iou        # the kernel library, one function an op
>>> from sprompt import BitMasks                        # what the ops take and give
"""

from sprompt import native as _native  # noqa: F401  (SPROMPT_CPU is refused when the package is imported)
from sprompt.backends import trace_backends, use_backend
from sprompt.masks import BitMasks

__version__ = "0.1.0"
__all__ = ["BitMasks", "__version__", "trace_backends", "use_backend"]

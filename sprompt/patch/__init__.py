"""Models of transformers on the kernels of this library, in one line and in place.

>>> import sprompt
>>> sprompt.patch.mask2former()  # doctest: +SKIP
>>> sprompt.patch.deformable_attention()  # doctest: +SKIP
>>> sprompt.patch.undo()  # puts back what was replaced
"""

from pathlib import Path

from sprompt.patch.deformable_attention import deformable_attention
from sprompt.patch.mask2former import mask2former
from sprompt.patch.replaced import undo

#: A local kernel for transformers' kernel interface (`KernelConfig`, `LocalLayerRepository`): docs/patch.md.
KERNEL = Path(__file__).parent / "kernel"

__all__ = ["KERNEL", "deformable_attention", "mask2former", "undo"]

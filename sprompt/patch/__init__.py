"""Models of transformers on the kernels of this library, in one line and in place.

>>> import sprompt
>>> sprompt.patch.undo()  # puts back what was replaced
"""

from sprompt.patch.mask2former import mask2former
from sprompt.patch.replaced import undo

__all__ = ["mask2former", "undo"]

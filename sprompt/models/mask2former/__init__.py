"""Mask2Former: learned queries that read the picture under their own masks, layer by layer."""

from sprompt.models.mask2former.config import Mask2FormerConfig
from sprompt.models.mask2former.model import Mask2Former

__all__ = ["Mask2Former", "Mask2FormerConfig"]

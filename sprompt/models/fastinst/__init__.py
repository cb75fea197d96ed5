"""FastInst: queries are the cells of a map where objects are most likely; a light decoder updates queries and pixels in turn."""

from sprompt.models.fastinst.config import FastInstConfig
from sprompt.models.fastinst.model import FastInst

__all__ = ["FastInst", "FastInstConfig"]

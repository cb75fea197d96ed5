"""SegPrompt (Zhu et al. 2023): category prompts teach a class-agnostic segmenter what an object is. Training only; the trained
model is the plain model."""

from sprompt.methods.segprompt.config import SegPromptConfig
from sprompt.methods.segprompt.task import SegPrompt

__all__ = ["SegPrompt", "SegPromptConfig"]

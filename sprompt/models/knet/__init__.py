"""K-Net: learned kernels that become the masks of one image, step by step."""

from sprompt.models.knet.config import KNetConfig
from sprompt.models.knet.model import KNet

__all__ = ["KNet", "KNetConfig"]

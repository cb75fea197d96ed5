"""Import and export of official K-Net checkpoints. Their tensors have the same names as the parameters here."""

from __future__ import annotations

from pathlib import Path

from sprompt.models import mmdet_files
from sprompt.models.knet.model import KNet
from sprompt.models.mmdet_files import export_checkpoint

__all__ = ["export_checkpoint", "import_checkpoint"]


def import_checkpoint(model: KNet, path: Path | str) -> str:
    """Copies an official checkpoint into a model; see `mmdet_files.import_checkpoint`."""
    return mmdet_files.import_checkpoint(model, path, "K-Net", ("conv_seg", "fc_cls"))

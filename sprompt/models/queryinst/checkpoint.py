"""Import and export of files of QueryInst's official release and of its port in mmdetection, which Saliency Prompt uses.

Their tensors have the same names as the parameters here. The two differ in the names of modules in their configuration only, which a
file may hold as text beside the tensors; it is not read.
"""

from __future__ import annotations

from pathlib import Path

from sprompt.models import mmdet_files
from sprompt.models.mmdet_files import export_checkpoint
from sprompt.models.queryinst.model import QueryInst

__all__ = ["export_checkpoint", "import_checkpoint"]


def import_checkpoint(model: QueryInst, path: Path | str) -> str:
    """Copies a file of a release into a model; see `mmdet_files.import_checkpoint`. The last layers of classes and masks start anew if
    the file has another number of classes."""
    return mmdet_files.import_checkpoint(model, path, "QueryInst", ("fc_cls", "conv_logits"))

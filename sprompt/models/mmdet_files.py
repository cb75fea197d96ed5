"""Files of releases on mmdetection, for models whose parameters have the names of these releases: K-Net and QueryInst."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprompt.atomic import replacing
from sprompt.models.fit import check_fit
from sprompt.nn.tensor_files import read_tensors, write_tensors

#: Parts of Saliency Prompt's release that only pre-training needs.
_PRETRAINING = {"patch2query", "gen_gt_kernel"}

#: Prefix of all names in a file that was written from inside DistributedDataParallel.
_WRAPPER = "module."


def import_checkpoint(model: Any, path: Path | str, title: str, classifiers: Collection[str]) -> str:
    """Copies a file of a release (.pth with or without "state_dict", or safetensors) into a model. Returns a sentence about it.

    The import is strict: the file must have every tensor of the model, with its shape, and no other tensor. There are exceptions. If
    the file has another number of classes, the classifiers start anew. Tensors that only pre-training needs are left out. So are the
    copies "ema_..." of a training with moving averages; the averages have the plain names. The step counters of batch norm may be
    missing. All names may have the prefix "module.". If the file does not fit, it raises ValueError and does not change the model.

    Args:
        title: the model's name.
        classifiers: names of the layers that have an output for each class.
    """
    held, _ = read_tensors(path)
    if all(name.startswith(_WRAPPER) for name in held):
        held = {name.removeprefix(_WRAPPER): tensor for name, tensor in held.items()}
    copies = {"ema_" + name.replace(".", "_") for name in held}
    copies &= held.keys()
    held = {name: tensor for name, tensor in held.items() if name not in copies}
    wanted = model.state_dict()
    left_out = sorted(name for name in held if _PRETRAINING & set(name.split(".")))
    tensors = {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in held.items()
    }
    for name in left_out:
        del tensors[name]
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith(".num_batches_tracked")}
    tensors = {**counters, **tensors}
    said = f"{path}: {len(held) - len(left_out)} tensors of {title}"

    last = [name for name in wanted if set(classifiers) & set(name.split("."))]
    in_file = {len(tensors[name]) for name in last if name in tensors and tensors[name].dim() > 0}
    other = len(in_file) == 1 and in_file != {model.num_classes}
    if other:
        for name in last:
            if name in tensors and tensors[name].shape[1:] == wanted[name].shape[1:]:
                tensors[name] = wanted[name]
    check_fit(path, tensors, wanted)
    if other:
        model.reset_classifier(model.num_classes)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in last}
        said += f"; classifiers start anew, as the file has {in_file.pop()} classes and the model {model.num_classes}"
    model.load_state_dict(tensors, strict=False)
    if left_out:
        said += f"; left out tensors that only pre-training needs: {', '.join(left_out)}"
    if copies:
        said += f"; left out {len(copies)} copies of weights that were averaged"
    return said


def export_checkpoint(model: Any, path: Path | str, classes: Sequence[str] | None = None) -> None:
    """Writes a model as the releases do: a .pth file with "meta" and "state_dict", or a safetensors file with the tensors alone."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    if Path(path).suffix == ".safetensors":
        write_tensors(path, tensors)
        return
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"export_checkpoint: classes must have {model.num_classes} names, got {len(classes)}")
    meta: dict[str, Any] = {} if classes is None else {"CLASSES": tuple(classes)}
    with replacing(path) as temporary:
        torch.save({"meta": meta, "state_dict": {name: tensor.cpu() for name, tensor in tensors.items()}}, temporary)

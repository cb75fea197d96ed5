"""The check that a file has the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def check_fit(path: Path | str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the tensors have exactly the wanted names, shapes and dtypes, and finite values."""
    problems = []
    for what, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("not of this model", tensors.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{what}: {_some(sorted(names))}")
    common = sorted(wanted.keys() & tensors.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in common
        if tensors[name].shape != wanted[name].shape
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    dtypes = [f"{name} {tensors[name].dtype}" for name in common if tensors[name].dtype != wanted[name].dtype]
    if dtypes:
        problems.append(f"other dtypes: {_some(dtypes)}")
    if not problems:
        spoilt = [name for name in common if not bool(torch.isfinite(tensors[name]).all())]
        problems += [f"NaN or infinity: {_some(spoilt)}"] if spoilt else []
    if problems:
        raise ValueError(f"{path}: must hold exactly the tensors of the model, got {'; '.join(problems)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

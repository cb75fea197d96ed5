"""Replaced attributes of other people's code: put in place together, and put back by `undo`."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

#: The first and the last version of transformers whose code is known.
OLDEST, NEWEST = (5, 20), (5, 24)

#: What each attribute was, in the order of replacement: (owner, name, original).
_originals: list[tuple[Any, str, Any]] = []


def transformers(who: str) -> ModuleType:
    """The package transformers. Raises ImportError if it is missing or of an unknown version: `who` would be half a patch."""
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(f"{who}: transformers must be installed; run pip install transformers") from None
    version = tuple(int(part) for part in package.__version__.split(".")[:2])
    if not OLDEST <= version <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ImportError(
            f"{who}: transformers must be of version {low} to {high}, got {package.__version__}; nothing was replaced"
        )
    return package


def replace(changes: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes: (owner, name, new value). An attribute that has its new value already stays. Compiled code is forgotten."""
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _ in changes if not hasattr(owner, name)]
    if missing:
        raise ImportError(f"transformers: must have {', '.join(missing)}, got a version without; nothing was replaced")
    for owner, name, value in changes:
        if getattr(owner, name) is not value:
            _originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
    torch._dynamo.reset()


def original(owner: Any, name: str) -> Any:
    """The attribute as it was before it was replaced."""
    return next((value for held, n, value in _originals if held is owner and n == name), getattr(owner, name))


def undo() -> None:
    """Puts back everything that `sprompt.patch` has replaced."""
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)
    torch._dynamo.reset()

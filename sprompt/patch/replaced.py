"""Replaced attributes of other people's code: put in place together, and put back by `undo`."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

#: The first and the last version of transformers whose code is known.
OLDEST, NEWEST = (5, 18), (5, 24)

#: What each attribute was, in the order of replacement: (owner, name, original).
_originals: list[tuple[Any, str, Any]] = []

#: The original of an attribute that a class did not have.
_ABSENT = object()


def transformers(who: str) -> ModuleType:
    """The package transformers. Raises ImportError if it is missing or of an unknown version: `who` would be half a patch."""
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(f"{who}: transformers must be installed; run pip install transformers") from None
    if not OLDEST <= version(package) <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ImportError(
            f"{who}: transformers must be of version {low} to {high}, got {package.__version__}; nothing was replaced"
        )
    return package


def version(package: ModuleType) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)


def replace(changes: list[tuple[Any, str, Any]]) -> None:
    """Sets attributes: (owner, name, new value). An attribute that has its new value already stays. Compiled code is forgotten.

    An attribute must exist, unless the new value is a property: that stands before attributes that only instances have.
    """
    missing = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, name, value in changes
        if not hasattr(owner, name) and not isinstance(value, property)
    ]
    if missing:
        raise ImportError(f"transformers: must have {', '.join(missing)}, got a version without; nothing was replaced")
    for owner, name, value in changes:
        if (before := getattr(owner, name, _ABSENT)) is not value:
            _originals.append((owner, name, before))
            setattr(owner, name, value)
    torch._dynamo.reset()


def original(owner: Any, name: str) -> Any:
    """The attribute as it was before it was replaced."""
    return next((value for held, n, value in _originals if held is owner and n == name), getattr(owner, name))


def undo() -> None:
    """Puts back everything that `sprompt.patch` has replaced."""
    while _originals:
        owner, name, before = _originals.pop()
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    torch._dynamo.reset()

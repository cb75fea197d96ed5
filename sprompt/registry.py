"""Models, methods and evaluators by name: `--model knet` on the command line, `name: knet` in a file.

A registry lists classes by name and imports a class when it is asked for. Every class has an attribute `Config`: a frozen
dataclass of settings, derived from the registry's `Named` base. So the type of a configuration tells to which class it belongs.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class Named:
    """Base of configurations that are chosen by name. Every registry has a base derived from it, such as `class
    ModelConfig(Named)`, which sets `registry`."""

    registry: ClassVar[Registry]


class Registry:
    """Classes by name.

    `package.module:Class` names a class outside of this library. `load` imports it, because a person typed the name. `get`, for names that
    are read from files, finds such a class only after `load`: a file never causes an import.

    Args:
        kind: the noun in messages, and the option that chooses: "model" for --model.
        known: the library's own classes, as {name: "package.module:Class"}.
    """

    def __init__(self, kind: str, known: Mapping[str, str]) -> None:
        self.kind, self.known = kind, dict(known)
        self._classes: dict[str, type[Any]] = {}

    def names(self) -> list[str]:
        """The library's own names."""
        return list(self.known)

    def load(self, name: str) -> type[Any]:
        """The class of a name that a person typed. Imports the module of `package.module:Class`, also from the working directory."""
        module, colon, attribute = name.partition(":")
        if name in self.known or name in self._classes:
            return self.get(name)
        if not (colon and module and attribute):
            advice = "; a trained model is given by --checkpoint" if Path(name).exists() else ""
            raise ValueError(f"--{self.kind}: must be {self._choices()}, got {name}{advice}")
        if (folder := str(Path.cwd())) not in sys.path:
            sys.path.append(folder)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise ValueError(
                f"--{self.kind}: {module} cannot be imported ({error}); is it in this folder or installed?"
            ) from error
        except AttributeError:
            raise ValueError(f"--{self.kind}: {module} has no class {attribute}") from None
        return self.add(name, found)

    def add(self, name: str, found: type[Any]) -> type[Any]:
        """Makes a class known by this name, as `load` does after its import."""
        config = getattr(found, "Config", None)
        if not (isinstance(config, type) and issubclass(config, Named) and getattr(config, "registry", None) is self):
            raise ValueError(
                f"--{self.kind}: {name} must have an attribute Config, a dataclass derived from {self.kind.capitalize()}Config, "
                f"got {config!r}; docs/adding_a_model.md shows one"
            )
        if not dataclasses.is_dataclass(config):
            raise ValueError(f"--{self.kind}: {name}.Config must be a dataclass, got {config!r}; decorate it")
        taken = next((n for n, c in self._classes.items() if c.Config is config and n != name), None)
        if taken is not None:
            raise ValueError(
                f"--{self.kind}: {name} must have a Config of its own, got that of {taken}; derive a dataclass from it"
            )
        self._classes[name] = found
        return found

    def get(self, name: str) -> type[Any]:
        """The class of a name that stands in a file."""
        if name in self._classes:
            return self._classes[name]
        if name in self.known:
            module, _, attribute = self.known[name].partition(":")
            return self.add(name, getattr(importlib.import_module(module), attribute))
        if ":" in name:
            raise ValueError(
                f"{name} is a {self.kind} of your own, which no file may import; name it yourself: --{self.kind} {name}"
            )
        raise ValueError(f"the {self.kind} must be one of {', '.join(self.known)}, got {name!r}")

    def owner(self, config: Named) -> type[Any]:
        """The class that a configuration belongs to."""
        return self.get(self.name(type(config)))

    def name(self, config: type[Any]) -> str:
        """The name of the class that this type of configuration belongs to."""
        for name in (*self._classes, *self.known):
            if self.get(name).Config is config:
                return name
        raise ValueError(
            f"{config.__name__}: must be the Config of a known {self.kind} ({', '.join(self.known)}); use add or load"
        )

    def _choices(self) -> str:
        return f"one of {', '.join(self.known)}, or package.module:Class for a {self.kind} of your own"

"""Conversion of settings between dataclasses and plain YAML. Error messages name the key.

>>> @dataclasses.dataclass
... class Colour:
...     red: float = 0.5
>>> to_yaml(Colour())
'red: 0.5\\n'
>>> from_plain(Colour, {"red": 1})
Colour(red=1.0)
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from tyro.conf import Suppress as Hidden  # marks a setting that the command line does not offer

from sprompt.registry import Named

__all__ = ["Hidden", "SettingsError", "check_choices", "flat", "from_plain", "read_yaml", "to_plain", "to_yaml"]

T = TypeVar("T")
LARGEST_FILE = 1 << 20  # upper bound of the size of a YAML file, bytes


class SettingsError(ValueError):
    """A setting that is unknown, or of the wrong kind."""


def to_plain(value: Any) -> Any:
    """Converts dataclasses to dicts, tuples to lists and paths to strings, which YAML and JSON can hold. The dict of a `Named`
    configuration also holds its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {"name": value.registry.name(type(value))} if isinstance(value, Named) else {}
        return name | {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in plain.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(to_plain(value), sort_keys=False, width=120, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file of at most 1 MiB; an empty file is an empty mapping."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise SettingsError(f"{path}: a settings file has at most {LARGEST_FILE} bytes, got {path.stat().st_size}")
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise SettingsError(f"{path}: must hold `name: value` lines, got a {type(plain).__name__}")
    return plain


def from_plain(kind: type[T], plain: Any, base: T | None = None, where: str = "") -> T:
    """A dataclass of this kind from a mapping. Fields that the mapping leaves out have the value of `base`, or without
    `base` their default."""
    if not isinstance(plain, dict):
        raise SettingsError(f"{where or kind.__name__}: must be a mapping, got {plain!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is always a dataclass
    hints = typing.get_type_hints(kind)
    values = {} if base is None else {name: getattr(base, name) for name in fields}
    for key, value in plain.items():
        name = str(key).replace("-", "_")
        place = f"{where}.{name}" if where else name
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise SettingsError(
                f"{place}: is not a setting"
                + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(fields)}")
            )
        values[name] = _converted(hints[name], value, values.get(name), place)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SettingsError(f"{where or kind.__name__}: lacks {', '.join(missing)}")
    check_choices(kind, values, where)
    return kind(**values)


def check_choices(kind: type[Any], values: Mapping[str, Any], where: str = "") -> None:
    """Raises SettingsError if the Literal type of a field does not list the field's value. Dataclasses call this function from
    `__post_init__` too, with `vars(self)`, so that no other code needs to check choices."""
    for name, hint in typing.get_type_hints(kind).items():
        value = values.get(name)
        if get_origin(hint) is Literal and name in values and value not in get_args(hint):
            place = f"{where}.{name}:" if where else f"{kind.__name__}: {name}"
            raise SettingsError(f"{place} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")


def check_sizes(config: Any, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError if a field named in `bounds` is not a whole number between its bounds, both included. For `__post_init__`."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            rule = f"be a whole number from {low} to {high}"
            raise ValueError(f"{type(config).__name__}: {name} must {rule}, got {value!r}")


def check_weights(config: Any) -> None:
    """Raises ValueError if a weight of a loss or cost (loss_…, cost_…, no_object) is not a finite number of at least 0. For
    `__post_init__`."""
    for name, value in vars(config).items():
        if name.startswith(("loss_", "cost_", "no_object")) and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
        ):
            raise ValueError(f"{type(config).__name__}: {name} must be a number of at least 0, got {value!r}")


def _converted(kind: Any, value: Any, base: Any, place: str) -> Any:
    origin = get_origin(kind)
    if origin is typing.Annotated:
        return _converted(get_args(kind)[0], value, base, place)
    if isinstance(kind, type) and issubclass(kind, Named):
        return _named(kind, value, base, place)
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value, base, place)  # type: ignore[arg-type]  # mypy cannot see that kind is a class
    if origin in (Union, types.UnionType):
        return _first_fit(get_args(kind), value, base, place)
    if origin is Literal:
        return value  # from_plain calls check_choices afterwards
    if origin in (tuple, list):
        return _sequence(origin, get_args(kind), value, place)
    if origin is dict or kind is dict or kind is Any:
        return value
    if kind is type(None):
        fits = value is None
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if fits else _number(value, place)
        fits = True
    elif kind is Path:
        fits = isinstance(value, str)
        value = Path(value) if fits else value
    else:
        fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not fits:
        raise SettingsError(f"{place}: must be {_name(kind)}, got {value!r}")
    return value


def _named(kind: type[Named], value: Any, base: Any, place: str) -> Any:
    """A configuration by its name: `{name: knet, kernels: 50}`, or only `knet`. Without a name it has the class of `base`."""
    plain = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else value
    if not isinstance(plain, dict):
        raise SettingsError(f"{place}: must be a mapping with a name, got {value!r}")
    name = plain.pop("name", None)
    if name is None and base is None:
        raise SettingsError(
            f"{place}: must have a name, got none; add a line `name: NAME` with one of {', '.join(kind.registry.names())}"
        )
    try:
        chosen = type(base) if name is None else kind.registry.get(str(name)).Config
    except ValueError as error:
        raise SettingsError(f"{place}.name: {error}") from None
    return from_plain(chosen, plain, base if type(base) is chosen else None, place)


def _number(value: Any, place: str) -> float:
    """A number from text. YAML 1.1 reads 1e-4 as text."""
    try:
        if not isinstance(value, str):
            raise ValueError
        return float(value)
    except ValueError:
        raise SettingsError(f"{place}: must be a number, got {value!r}") from None


def _first_fit(kinds: tuple[Any, ...], value: Any, base: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    assert sum(map(dataclasses.is_dataclass, kinds)) < 2, (
        f"{place}: configurations are chosen by name; derive them from Named"
    )
    errors = []
    for kind in sorted(kinds, key=lambda k: k is float):  # int before float, so that a whole number stays an int
        if kind is type(None) or (get_origin(kind) is Literal and value not in get_args(kind)):
            continue
        try:
            return _converted(kind, value, base, place)
        except SettingsError as error:
            errors.append(error)
    raise (
        errors[0]
        if len(errors) == 1
        else SettingsError(f"{place}: must be {' or '.join(_name(k) for k in kinds)}, got {value!r}")
    )


def _sequence(origin: Any, kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise SettingsError(f"{place}: must be a list, got {value!r}")
    if origin is list or kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise SettingsError(f"{place}: must have {len(kinds)} values, got {value!r}")
    return origin(_converted(k, v, None, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _name(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))

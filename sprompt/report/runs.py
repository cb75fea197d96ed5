"""The content of a run folder: its log, its metrics and its settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprompt.data.errors import DataError
from sprompt.data.reading import read_bytes, read_json
from sprompt.engine.log import read_log

_MAX_BYTES = 1 << 26


@dataclass(frozen=True)
class Category:
    """The result of a category: its AP, or its AR if classes did not count."""

    rate: float  # −1 without objects
    objects: int  # 0 if the file does not give their number


@dataclass
class Run:
    name: str
    log: list[dict[str, Any]]  # lines of log.jsonl by step
    #: Numbers of metrics.json without its categories; parts of nested objects are joined by a slash.
    metrics: dict[str, float]
    words: dict[str, str]  # texts of metrics.json, by name
    config: dict[str, str]  # settings of config.yaml, without its folder; names of nested ones are joined by a dot
    categories: dict[str, Category] = field(default_factory=dict)  # of metrics.json, by name
    problems: list[str] = field(default_factory=list)

    @property
    def curves(self) -> list[str]:
        """Names of the numbers in the log, in order of first appearance."""
        names = {name: None for line in self.log for name, value in line.items() if _number(value) or value is None}
        return [name for name in names if name not in ("step", "epoch")]

    def curve(self, name: str) -> list[tuple[float, float | None]]:
        """(step, value) of each line of the log; the value is None if it was not finite."""
        points = [(line["step"], line[name]) for line in self.log if name in line]
        return [(float(s), float(v) if _number(v) and math.isfinite(v) else None) for s, v in points]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each named after its folder. Raises DataError if a path is no folder."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise DataError(f"{folder}: must be the folder of a run; check the path")
        if names.count(name) > 1:
            name = "/".join(folder.resolve().parts[-2:])
        runs.append(_read(folder, name))
    return runs


def _read(folder: Path, name: str) -> Run:
    run = Run(name, [], {}, {}, {})
    try:
        lines = {line["step"]: line for line in _merged(read_log(folder / "log.jsonl"))}
        run.log = [lines[step] for step in sorted(lines)]
    except (ValueError, OSError) as error:
        run.problems.append(str(error))
    if (folder / "metrics.json").exists():
        try:
            content = read_json(folder / "metrics.json", _MAX_BYTES)
            run.categories = _categories(content)
            flat = _flat(content, "/")
            flat = {key: v for key, v in flat.items() if not key.startswith(("per_class/", "per_category/"))}
            run.metrics = {key: float(v) for key, v in flat.items() if _number(v) and math.isfinite(v)}
            run.words = {key: str(v) for key, v in flat.items() if isinstance(v, str)}
        except DataError as error:
            run.problems.append(str(error))
    if (folder / "config.yaml").exists():
        try:
            import yaml

            settings = yaml.safe_load(read_bytes(folder / "config.yaml", _MAX_BYTES))
            run.config = {key: _text(value) for key, value in _flat(settings, ".").items() if key != "folder"}
        except (DataError, yaml.YAMLError) as error:
            run.problems.append(f"{name}/config.yaml: {error}")
    return run


def _merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each step: the lines of training and of evaluation at the same step are merged."""
    steps: dict[float, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    return list(steps.values())


def _categories(metrics: Any) -> dict[str, Category]:
    """The categories of the COCO protocol (`per_class`: {name: AP}) or of the open-world protocol (`per_category`)."""
    if not isinstance(metrics, dict):
        return {}
    found = {}
    for name, rate in _items(metrics.get("per_class")):
        if _number(rate):
            found[name] = Category(float(rate), 0)
    for name, numbers in _items(metrics.get("per_category")):
        rate, objects = map(dict(_items(numbers)).get, ("AR", "objects"))
        if isinstance(rate, (int, float)) and isinstance(objects, int):
            found[name] = Category(float(rate), objects)
    return found


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _flat(value: Any, mark: str, before: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {before: value} if before else {}
    items = (_flat(v, mark, f"{before}{mark}{k}" if before else str(k)) for k, v in value.items())
    return {key: v for item in items for key, v in item.items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Work that is cut into units: processes share the units, finished units survive a kill, and the last process joins them into one file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sprompt.atomic import atomic_write, sync_folder
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json

PART_BYTES = 1 << 30  # upper bound of the size of one file of the folder of parts

Item = TypeVar("Item")
Content = TypeVar("Content")


class Parts:
    """The units of the file `out`. Process `index` of `of` works on the units u with u % of == index; the bytes of `out` do not depend on
    `of`. A finished unit is a JSON file in the folder OUT.parts.

    Args:
        info: values of JSON that say what the work is. All processes and all calls must agree on it. It becomes part of the `info` of
            `out`, which is a JSON object with its `info` in the first line, alone.
        units: number of units.
        index: number of this process, from 0 to of - 1.
        results: names in the `info` of `out` that the work adds.
    """

    def __init__(
        self, out: Path, info: dict[str, Any], units: int, *, index: int, of: int, results: Sequence[str]
    ) -> None:
        self.out = Path(out)
        self.info = json.loads(json.dumps(info))  # as it will be read again
        self.units = units
        self.mine = range(index, units, of)
        self.results = results
        self.folder = self.out.with_name(self.out.name + ".parts")

    def finished(self) -> dict[str, Any] | None:
        """The `info` of `out`, if it is there. Raises DataError if it, or a part, belongs to other work."""
        if self.out.exists():
            there = self._info_of_out()
            shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have left it behind
            return there
        path = self.folder / "info.json"
        if not path.exists():
            atomic_write(path, json.dumps(self.info, indent=1) + "\n", sync=True)
        there = read_json(path, PART_BYTES)
        if there != self.info:
            raise DataError(
                f"{self.folder}: must hold parts of the same work, got other {_differing(there, self.info)}; "
                "remove the folder to start anew, or give another output file"
            )
        return None

    def todo(self) -> list[int]:
        """The unfinished units of this process."""
        return [unit for unit in self.mine if not self.path(unit).exists()]

    def path(self, unit: int, suffix: str = ".json") -> Path:
        return self.folder / f"unit-{unit:06d}{suffix}"

    def read(self, unit: int) -> Any:
        return read_json(self.path(unit), PART_BYTES)

    def write(self, unit: int, content: Any) -> None:
        """Marks a unit as finished."""
        atomic_write(self.path(unit), json.dumps(content), sync=True)

    def joined(self, join: Callable[[], None]) -> Path | None:
        """`out`, written by `join` if all units are there; None while units are missing. Another process may write it at the same time,
        with the same bytes."""
        if not self.out.exists():
            if not all(self.path(unit).exists() for unit in range(self.units)):
                return self.out if self.out.exists() else None
            try:
                join()
            except (DataError, FileNotFoundError):
                if not self.out.exists():  # otherwise another process was faster and has removed the parts
                    raise
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.out

    def _info_of_out(self) -> dict[str, Any]:
        with open(self.out, "rb") as file:
            line = file.readline(1 << 28)
        try:
            there = json.loads(line.rstrip().removesuffix(b",") + b"}")["info"]
        except (ValueError, KeyError, TypeError):
            there = {}
        none = dict.fromkeys(self.results)
        if not isinstance(there, dict) or {**there, **none} != {**self.info, **none}:
            raise DataError(
                f"{self.out}: is there already, with other {_differing(there, self.info)}; remove it, or give another output file"
            )
        return there


def ahead(items: Sequence[Item], load: Callable[[Item], Content]) -> Iterator[tuple[Item, Content]]:
    """Pairs of an item and its loaded content. The next item is loaded while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(load, items[0]) if items else None
        for place, item in enumerate(items):
            assert coming is not None
            loaded = coming.result()
            coming = reader.submit(load, items[place + 1]) if place + 1 < len(items) else None
            yield item, loaded


@contextmanager
def written(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """A file that gets its name `path` once it is complete and on the disk.

    Until then it is a temporary file in `folder`, on the same file system. The caller removes `folder` in the end, and with it
    the temporary files of killed processes.
    """
    temporary = folder / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def compact(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def write_entries(file: BinaryIO, entries: Iterable[Any]) -> None:
    """The entries of a list in JSON, one a line, without the brackets."""
    for number, entry in enumerate(entries):
        file.write((b",\n" if number else b"\n") + compact(entry))


def _differing(there: Any, wanted: dict[str, Any]) -> str:
    """Names of the settings that differ from the wanted settings."""
    there = there if isinstance(there, dict) else {}
    names = []
    for name, value in wanted.items():
        if there.get(name) != value:
            inner = _differing(there.get(name), value) if isinstance(value, dict) else ""
            names.append(f"{name} ({inner})" if inner else name)
    return ", ".join(names)

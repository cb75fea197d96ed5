"""Lists of pictures: text files with one file name a line."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from sprompt.data.annotations import leaves, named
from sprompt.data.errors import DataError
from sprompt.data.reading import read_bytes

MAX_LIST = 1 << 28  # upper bound of the size of a list, bytes


def read_list(path: Path | str, known: Collection[str], where: str) -> set[str]:
    """The file names in a list, each relative to the folder of the pictures.

    A line holds one name. Blank lines and lines that begin with # are skipped. White space around a name is not part of it.
    Write ./#1.png for a picture #1.png. A name may appear more than once.

    Args:
        known: the names that a list may hold, with / between folders.
        where: the place of these names, for messages.

    Raises DataError with file name and line for names that are not known or leave the folder, and for a list without a name.
    """
    lines = read_bytes(path, MAX_LIST).decode("utf-8-sig", errors="surrogateescape").split("\n")
    wanted = {_plain(name): name for name in known}
    found: set[str] = set()
    unknown: list[str] = []
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if leaves(name):
            raise DataError(
                f"{path}: line {number} must name a picture below the folder of the pictures, got {name!r:.80}; write the path "
                "from there"
            )
        if _plain(name) in wanted:
            found.add(wanted[_plain(name)])
        else:
            unknown.append(f"{name!r:.80} (line {number})")
    if unknown:
        raise DataError(
            f"{path}: names must be of pictures in {where}, got {len(unknown)} others: {named(unknown)}; correct or "
            "remove these lines"
        )
    if not found:
        raise DataError(f"{path}: must name a picture of {where}, got none; write one file name a line")
    return found


def list_of(names: Iterable[str]) -> str:
    """The text of a list, in the order of the names; raises DataError for a name that a list cannot hold."""
    lines = []
    for name in names:
        if name != name.strip() or "\n" in name:
            raise DataError(
                f"{name!r:.80}: must have no line break and no white space at its ends to stand in a list; rename it"
            )
        lines.append(f"./{name}\n" if name.startswith("#") else f"{name}\n")
    return "".join(lines)


def _plain(name: str) -> str:
    """The name without `.` parts and doubled slashes."""
    return str(PurePosixPath(name))

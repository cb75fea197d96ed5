"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path | str, *, sync: bool = True) -> Iterator[Path]:
    """The path of a temporary file. It replaces `path` at the end of the block; after an error or a kill `path` is unchanged.

    `sync` waits until the data are on the disk, so the same holds for a power failure. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(path.parent)


def atomic_write(path: Path | str, data: bytes | str, *, sync: bool = False) -> None:
    """Writes `path` atomically: it holds either its old content or all of `data`. See `replacing`."""
    with replacing(path, sync=sync) as temporary, open(temporary, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path | str) -> None:
    """Waits until the names in a folder are on the disk. Does nothing on systems that cannot open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

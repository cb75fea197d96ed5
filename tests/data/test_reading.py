"""Files are written whole or not at all, and reading is bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sprompt.atomic import atomic_write, replacing
from sprompt.data.errors import DataError
from sprompt.data.reading import read_bytes, read_json


@pytest.mark.parametrize("sync", [False, True])
def test_write_then_read(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write(path, '{"a": [1, "ü"]}', sync=sync)
    assert read_json(path) == {"a": [1, "ü"]}
    atomic_write(str(path), b"[2]", sync=sync)
    assert read_json(str(path)) == [2]
    assert os.listdir(path.parent) == ["a.json"]  # no temporary file is left


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    atomic_write(path, "old")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "atomic", "")
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b'{"a": 1', "must be JSON, got .* at line 1, column 8"),
        (b"", "must be JSON"),
        (b'"\xff"', "UTF-8"),
        (b"[" * 200_000, "nesting"),
        (b" " * 200_001, "at most 200000 bytes"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)^{path}.*{message}"):
        read_json(path, 200_000)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(tmp_path, 10)


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

"""Entries of arrays equal those of json.loads, wherever the parts of the file end; files that are not JSON are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sprompt.data import json_stream
from sprompt.data.errors import DataError
from sprompt.data.json_stream import array

CONTENT = {
    "info": {"a": [1, {"b": "]}"}], "c": None}, "before": [[1, 2], "x,]", {"images": [7]}], "number": -12.5e3, "text": "images",
    "images": [{"id": 1, "name": "ünï\" \\ [{", "list": [1.5, [], {}, True, None]}, 12345, "a", -0.25, [], 17],
    "empty": [], "numbers": [1, 22, 333, 4444, 55555], "after": {"images": [3]},
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_entries_are_those_of_the_file(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    for ascii_only in (True, False):
        (tmp_path / "a.json").write_text(json.dumps(CONTENT, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        for key in ("before", "images", "empty", "numbers"):
            assert list(array(tmp_path / "a.json", key)) == CONTENT[key]


def test_numbers_that_are_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[1e+9,-1.5E-3 , 0.5,-0,12e3,7]"
    (tmp_path / "a.json").write_text(f'{{"images": {text}}}')
    for chunk in range(1, 20):
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        assert list(array(tmp_path / "a.json", "images")) == json.loads(text)


def test_little_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has 1000 characters of a value at most reads an array of many more."""
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    (tmp_path / "a.json").write_text(json.dumps({"skipped": [[1] * 100] * 500, "images": [[2] * 100] * 500}))
    assert sum(len(entry) for entry in array(tmp_path / "a.json", "images")) == 50_000
    (tmp_path / "b.json").write_text(json.dumps({"images": [[2] * 1000]}))
    with pytest.raises(DataError, match="a value of more than 1000 characters at character 12"):
        list(array(tmp_path / "b.json", "images"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got 'the end' instead of '{' at character 0; is the file whole"),
        ("[1, 2]", r"got '\[' instead of '\{'"),
        ('{"images": [1, 2', "got 'the end' instead of ']' at character 16"),
        ('{"images": [1 2]}', "got '2' instead of ']'"),
        ('{"images": [1, ]}', "got Expecting value at character 15"),
        ('{"images": [{"a": 1, }]}', "must be JSON, got"),
        ('{"images" [1]}', r"got '\[' instead of ':'"),
        ('{"a": 1 "images": [1]}', "got '\"' instead of ','"),
        ('{"a": 1}', "must have an array images, got none"),
        ('{"images": {"a": 1}}', "must have an array images, got none"),
        ('{"images": [' + "[" * 200_000, "endless nesting|must be JSON"),
    ],
)
def test_what_is_not_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(array(tmp_path / "a.json", "images"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(array(tmp_path / "none.json", "images"))
    with pytest.raises(DataError, match="cannot be read"):
        list(array(tmp_path, "images"))
    (tmp_path / "a.json").write_bytes(b'{"images": ["\xff\xfe"]}')
    with pytest.raises(DataError, match="must be JSON in UTF-8"):
        list(array(tmp_path / "a.json", "images"))

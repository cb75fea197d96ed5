"""Reads the arrays of a JSON file entry by entry, for files that are larger than the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sprompt.data.errors import DataError

CHUNK = 1 << 20  # characters that are read at once
MAX_VALUE = 1 << 26  # characters of one entry, or of a value beside the arrays

_decode = json.JSONDecoder().raw_decode


def array(path: Path | str, key: str) -> Iterator[Any]:
    """The entries of one array of the object that a JSON file holds, in order. Only one entry is in memory at a time.

    Raises DataError if the file is missing, is not JSON up to the end of this array, has an entry of more than `MAX_VALUE`
    characters, or has no such array.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = _Text(file, path)
            text.expect("{")
            while text.next() != "}":
                found = text.value()
                text.expect(":")
                wanted = found == key
                if text.next() == "[":
                    for entry in _entries(text):
                        if wanted:
                            yield entry
                    if wanted:
                        return
                else:
                    text.value()
                if text.next() != "}":
                    text.expect(",")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be JSON in UTF-8, got other bytes; is it the right file?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    raise DataError(f"{path}: must have an array {key}, got none; is it the right file?")


def _entries(text: _Text) -> Iterator[Any]:
    text.expect("[")
    if text.next() != "]":
        yield text.value()
        while text.next() == ",":
            text.expect(",")
            yield text.value()
    text.expect("]")


class _Text:
    """The text of a file, of which a part is in memory."""

    def __init__(self, file: TextIO, path: Path | str) -> None:
        self._file, self._path = file, path
        self._text, self._place = "", 0  # the part in memory, and the place in it
        self._before = 0  # characters in front of the part
        self._ended = False

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\n\r":
                    return self._text[self._place]
                self._place += 1
            if self._ended:
                return ""
            self._read()

    def expect(self, character: str) -> None:
        if self.next() != character:
            raise self._error(f"{self.next() or 'the end'!r} instead of {character!r}")
        self._place += 1

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                value, end = _decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._error(error.msg) from None
            except RecursionError:
                raise self._error("endless nesting") from None
            else:
                if end + 2 < len(self._text) or self._ended:  # else a number may go on, such as 1 in front of e+9
                    self._place = end
                    return value
            if len(self._text) - self._place > MAX_VALUE:
                raise self._error(f"a value of more than {MAX_VALUE} characters")
            self._read()

    def _read(self) -> None:
        more = self._file.read(CHUNK)
        self._ended = not more
        self._before += self._place
        self._text, self._place = self._text[self._place :] + more, 0

    def _error(self, got: str) -> DataError:
        place = self._before + self._place
        return DataError(f"{self._path}: must be JSON, got {got} at character {place}; is the file whole?")

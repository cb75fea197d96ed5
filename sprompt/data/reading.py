"""Reading of files, with an upper bound of their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sprompt.data.errors import DataError

MAX_JSON = 4 << 30  # bytes; the largest COCO file (unlabelled proposals included) has about 1 GB


def read_bytes(path: Path | str, max_bytes: int) -> bytes:
    """The content of a file. Raises DataError if the file is missing, unreadable or larger than `max_bytes`."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if len(data) > max_bytes:
        raise DataError(f"{path}: must have at most {max_bytes} bytes, got more; is it the right file?")
    return data


def read_json(path: Path | str, max_bytes: int = MAX_JSON) -> Any:
    """The content of a JSON file of at most `max_bytes`. Raises DataError, with line and column, if it is not JSON."""
    try:
        return json.loads(read_bytes(path, max_bytes))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: must be JSON, got {error.msg} at line {error.lineno}, column {error.colno}; is the file whole?"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be JSON in UTF-8, got other bytes; is it the right file?") from None
    except RecursionError:
        raise DataError(f"{path}: must be JSON of sensible depth, got endless nesting; is it the right file?") from None

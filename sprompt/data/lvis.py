"""Annotation files of LVIS and of COCO, read record by record.

Records of LVIS differ from COCO's in a few ways. A picture has an address instead of a file name, and two lists of categories:
those that are surely absent (`neg_category_ids`), and those of which objects may lack a label
(`not_exhaustive_category_ids`). A category has a `frequency`: "f", "c" or "r". Annotations have no `iscrowd`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sprompt.data.annotations import LISTS, file_name, parse_category, parse_picture, whole
from sprompt.data.errors import DataError
from sprompt.data.json_stream import array


def read_categories(path: Path | str) -> list[dict[str, Any]]:
    """The categories, by ascending id. DataError refuses records without an id or a name."""
    records = list(array(path, "categories"))
    for position, record in enumerate(records):
        parse_category(record, position, str(path))
    return sorted(records, key=lambda record: int(record["id"]))


def read_pictures(path: Path | str) -> Iterator[dict[str, Any]]:
    """The pictures, each with a file name and both lists; lists that the file lacks are empty. DataError refuses a picture
    without id, height, width or name, and lists that hold no category ids."""
    for position, record in enumerate(array(path, "images")):
        parse_picture(record, position, str(path))
        yield record | {"file_name": file_name(record)} | {key: record.get(key, []) for key in LISTS}


def read_annotations(path: Path | str) -> Iterator[dict[str, Any]]:
    """The annotations. DataError refuses a record without id, image_id or category_id."""
    for position, record in enumerate(array(path, "annotations")):
        if not isinstance(record, dict):
            raise DataError(f"{path}: annotation at place {position} must be an object, got {record!r:.40}")
        own = whole(record, "id", f"annotation at place {position}", str(path))
        for key in ("image_id", "category_id"):
            whole(record, key, f"annotation {own}", str(path))
        yield record

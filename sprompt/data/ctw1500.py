"""SCUT-CTW1500: curved text as polygons, as a COCO dataset of one class."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.pictures import EXTENSIONS, picture_size
from sprompt.data.reading import read_bytes

_MAX_BYTES = 1 << 22  # of the labels of one picture


def read_ctw1500(images: Path | str, labels: Path | str, *, keep_empty: bool = False) -> CocoDataset:
    """The pictures of one folder with labels from another. Ids count the sorted names from 1.

    The labels of NAME.jpg are in NAME.txt, NAME.xml or 000NAME.txt. Each text region has one of the forms
      32 numbers     xmin,ymin,xmax,ymax of the box, then x,y of 14 corners from (xmin, ymin): the first release;
      x,y,…,####text   at least 3 corners in pixels: the labels of the test pictures with transcriptions;
      <box><segs>x,y,…</segs></box>   at least 3 corners in pixels: the second release.
    Transcriptions are not used. DataError refuses any other line and names its number.
    """
    folder = Path(images)
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
    except OSError as error:
        raise DataError(f"{folder}: must be a folder of pictures, but {error.strerror}; check the path") from None
    if not names:
        raise DataError(f"{folder}: must hold pictures, got none; check the path")
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = count(1)
    for place, name in enumerate(names, 1):
        path = _label_file(Path(labels), Path(name).stem, folder / name)
        height, width = picture_size(folder / name)
        records.append({"id": place, "file_name": name, "height": height, "width": width})
        polygons = _xml(path) if path.suffix == ".xml" else _lines(path)
        annotations += [
            {"id": next(ids), "image_id": place, "category_id": 1, "segmentation": [polygon]} for polygon in polygons
        ]
    data = {"images": records, "annotations": annotations, "categories": [{"id": 1, "name": "text"}]}
    return CocoDataset.from_dict(folder, data, str(labels), keep_empty=keep_empty)


def _label_file(folder: Path, stem: str, picture: Path) -> Path:
    choices = [folder / f"{stem}.txt", folder / f"{stem}.xml", folder / f"000{stem}.txt"]
    for path in choices:
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: must have the labels of {picture}, but there is no {', '.join(p.name for p in choices)}; check the folder"
    )


def _lines(path: Path) -> list[list[float]]:
    try:
        lines = read_bytes(path, _MAX_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be text in UTF-8; is it the right file?") from None
    polygons = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        corners, mark, _ = line.partition("####")
        values = _numbers(corners.strip().rstrip(",") if mark else corners, f"{path}: line {number}")
        if not mark and len(values) == 32:
            left, top = values[:2]
            values = [v + (left, top)[i % 2] for i, v in enumerate(values[4:])]
        elif not mark or len(values) < 6 or len(values) % 2:
            wanted = "x,y of at least 3 corners before ####" if mark else "32 numbers, or corners and then ####text"
            raise DataError(f"{path}: line {number}: must have {wanted}, got {len(values)} numbers; correct it")
        polygons.append(values)
    return polygons


def _xml(path: Path) -> list[list[float]]:
    text = read_bytes(path, _MAX_BYTES)
    if b"<!ENTITY" in text:
        raise DataError(f"{path}: must be plain XML, got entities of its own; is it the right file?")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: must be XML, but {error}; correct it") from None
    polygons = []
    for number, box in enumerate(root.iter("box"), 1):
        values = _numbers(box.findtext("segs") or "", f"{path}: box {number}")
        if len(values) < 6 or len(values) % 2:
            raise DataError(
                f"{path}: box {number}: must have x,y of at least 3 corners in <segs>, got {len(values)} numbers; correct it"
            )
        polygons.append(values)
    return polygons


def _numbers(text: str, where: str) -> list[float]:
    """Whole numbers between commas. Their range is not checked here but in `segmentation.decode`."""
    try:
        return [float(int(part)) for part in text.strip().strip(",").split(",")] if text.strip() else []
    except (ValueError, OverflowError):
        raise DataError(
            f"{where}: must have whole numbers between commas, got {text.strip()!r:.80}; correct it"
        ) from None

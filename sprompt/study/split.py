"""Splits a labelled dataset in two, and makes a folder of its pictures without labels."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sprompt.atomic import atomic_write, replacing
from sprompt.data.annotations import named, parse
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.data.split import groups_of, part_of
from sprompt.seeding import generator


def split(
    annotations: Path, out: Path, *, val_share: float, seed: int = 0, within: str | None = None
) -> tuple[Path, Path]:
    """Splits the pictures of a COCO file at random into OUT/train.json and OUT/val.json. All other entries are in both files.

    Of n pictures ⌊val_share · n + ½⌋ go to val, but each file gets at least one. They are drawn from the pictures by ascending
    id, so the order of the file does not matter. A larger share contains the pictures of a smaller one. Pictures and
    annotations are sorted by id; annotations of missing pictures are left out.

    Args:
        within: a key of the records of pictures, such as "modality". Each of its values is then split by itself with this
            share.

    Raises DataError if one of the files exists with other content.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"split: val_share must lie between 0 and 1, got {val_share}; 0.2 are 20 %")
    data = read_json(annotations)
    parse(data, str(annotations))
    if len(data["images"]) < 2:
        raise DataError(f"{annotations}: must have two pictures to be split, got {len(data['images'])}")
    val = _drawn(groups_of(data["images"], within, annotations), val_share, seed)
    parts = {out / "train.json": part_of(data, val, inside=False), out / "val.json": part_of(data, val, inside=True)}
    write_once(parts)
    train, held = parts
    return train, held


def link_pictures(images: Path, annotations: Path, out: Path) -> Path:
    """Fills the folder OUT with links to the pictures of a COCO file, under their file names. It copies files if links are not
    possible.

    Raises DataError if pictures are missing or lie outside of the folder `images`, or if OUT holds other pictures.
    """
    file = parse(read_json(annotations), str(annotations))
    sources = {PurePosixPath(p.file_name): Path(os.path.abspath(images / p.file_name)) for p in file.pictures}
    missing = [str(name) for name, source in sources.items() if not source.is_file()]
    if missing:
        raise DataError(
            f"{images}: must have the pictures of {annotations}, but {len(missing)} of {len(sources)} are missing: "
            f"{named(missing)}; check the folder"
        )
    others = sorted(str(name) for name in _files(out) if name not in sources)
    if others:
        raise DataError(
            f"{out}: must hold pictures of {annotations} only, got {len(others)} others: {named(others)}; remove it, or give "
            "another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, source in sorted(sources.items()):
        _link(source, out / name)
    return out


def write_once(files: Mapping[Path, Any]) -> None:
    """Writes each value as JSON to its path. Existing files with the same bytes are kept. If a file has other bytes, DataError
    is raised and nothing is written."""
    texts = {path: json.dumps(value, separators=(",", ":")).encode() + b"\n" for path, value in files.items()}
    for path, text in texts.items():
        if path.exists() and not (path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text):
            raise DataError(f"{path}: is there already, with other content; remove it, or give another place")
    for path, text in texts.items():
        if not path.exists():
            atomic_write(path, text, sync=True)


# -- split
def _drawn(groups: list[list[int]], share: float, seed: int) -> set[int]:
    numbers = [int(Fraction(str(share)) * len(ids) + Fraction(1, 2)) for ids in groups]
    largest = max(range(len(groups)), key=lambda g: len(groups[g]))
    if not any(numbers):
        numbers[largest] = 1
    elif sum(numbers) == sum(map(len, groups)):
        numbers[largest] -= 1
    drawn: set[int] = set()
    for place, (ids, number) in enumerate(zip(groups, numbers, strict=True)):
        order = torch.randperm(len(ids), generator=generator(seed, place)).tolist()
        drawn.update(ids[i] for i in order[:number])
    return drawn


# -- link_pictures
def _files(folder: Path) -> list[PurePosixPath]:
    """Relative paths of all files in a folder and below it, and of links to folders. Hidden files are skipped: they may be
    temporary."""
    return [
        PurePosixPath((Path(parent) / name).relative_to(folder).as_posix())
        for parent, folders, files in os.walk(folder)
        for name in [*files, *(f for f in folders if os.path.islink(os.path.join(parent, f)))]
        if not name.startswith(".")
    ]


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        try:
            os.symlink(source, path)
        except FileExistsError:
            pass  # another process was faster; its file is checked below
        except OSError:  # file systems and accounts that cannot make links
            with replacing(path, sync=False) as temporary:
                shutil.copyfile(source, temporary)
    same = os.readlink(path) == str(source) if path.is_symlink() else filecmp.cmp(source, path, shallow=False)
    if not same:
        raise DataError(f"{path}: must be the picture {source}, got another; remove it, or give another folder")

"""Splits a COCO file into two parts, training and validation, that hold the same classes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from sprompt.atomic import atomic_write
from sprompt.data.annotations import CocoFile, parse
from sprompt.data.errors import DataError
from sprompt.data.listed import MAX_LIST, list_of
from sprompt.data.reading import MAX_JSON, read_bytes, read_json
from sprompt.seeding import generator

PARTS = ("train", "val")
_MARK = "sprompt split"  # marks a file of an earlier split, which may be replaced


@dataclass(frozen=True)
class Part:
    """One part: its COCO file, the list of its pictures, its number of pictures, and the numbers of pictures and objects of
    each class."""

    file: Path
    names: Path
    images: int
    pictures: dict[str, int]
    objects: dict[str, int]


def split(
    annotations: Path | str, out: Path | str, *, val_share: float = 0.2, seed: int = 0, together: str | None = None
) -> tuple[Part, Part]:
    """Splits the pictures of a COCO file into OUT/train.json and OUT/val.json. The lists OUT/train.txt and OUT/val.txt hold
    their file names, for `only=` of PictureFolder and CocoDataset. Pictures stay where they are.

    About `val_share` of the pictures, and of the pictures of every class, go to val, and each part gets at least one picture. A
    class with two pictures or more is in both parts wherever greedy search finds a way. A class with one picture goes to the
    larger part. Crowds and empty masks do not count as objects. The result depends on the seed and the ids, not on the order of
    the file.

    Both files hold pictures and annotations by ascending id. They also hold all other entries of the source file, and
    `info.split` records the split.

    Args:
        together: a key of the pictures' records, such as "video". Pictures with the same value then go to the same part.

    Raises DataError if an output file exists with other content and was not written by this function. Each file is written
    whole or not at all. After a kill, call the function again.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"split: val_share must lie between 0 and 1, got {val_share}; 0.2 means 20 %")
    source, out = Path(annotations), Path(out)
    data = read_json(source)
    file = parse(data, str(source))
    singles = [[own] for own in sorted(p.id for p in file.pictures)]
    units = singles if together is None else groups_of(data["images"], together, source)
    if len(units) < 2:
        of = "" if together is None else f" with different values of {together!r}"
        raise DataError(f"{source}: must have two pictures{of} to be split, got {len(file.pictures)} pictures")
    val = _drawn(file, units, Fraction(str(val_share)), seed)
    about = {"by": _MARK, "of": source.name, "val_share": val_share, "seed": seed, "together": together}
    parts, texts = [], {}
    for part in PARTS:
        content = part_of(data, val, inside=part == "val")
        info = data.get("info")
        content["info"] = {**(info if isinstance(info, dict) else {}), "split": {"part": part, **about}}
        names = [image["file_name"] for image in content["images"]]
        counted = _counted(file, {image["id"] for image in content["images"]})
        parts.append(Part(out / f"{part}.json", out / f"{part}.txt", len(names), *counted))
        texts[parts[-1].file] = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        head = f"# {_MARK}: {part} of {json.dumps(source.name)}\n"
        texts[parts[-1].names] = (head + list_of(names)).encode(errors="surrogateescape")
    _write(texts, source)
    return parts[0], parts[1]


def groups_of(images: Sequence[dict[str, Any]], key: str | None, source: Path) -> list[list[int]]:
    """Groups of picture ids: one group for each value of the key, with ascending ids. The order of the groups depends only
    on the values. Without a key there is one group."""
    groups: dict[str, list[int]] = defaultdict(list)
    for record in sorted(images, key=lambda r: r["id"]):
        value = record.get(key) if key is not None else ""
        if value is None:
            raise DataError(
                f"{source}: picture {record['id']} ({record['file_name']}) must have a value of {key!r}, got none; "
                "complete the file, or split without this key"
            )
        groups[json.dumps(value, sort_keys=True)].append(record["id"])
    return [ids for _, ids in sorted(groups.items())]


def part_of(data: dict[str, Any], ids: Collection[int], *, inside: bool) -> dict[str, Any]:
    """The content of a COCO file, limited to the pictures with these ids (`inside`) or to all other pictures."""
    images = sorted((r for r in data["images"] if (r["id"] in ids) == inside), key=lambda r: r["id"])
    there = {r["id"] for r in images}
    annotations = sorted((a for a in data.get("annotations", []) if a["image_id"] in there), key=lambda a: a["id"])
    return {**data, "images": images, "annotations": annotations}


# -- which pictures
def _drawn(file: CocoFile, units: Sequence[Sequence[int]], share: Fraction, seed: int) -> set[int]:
    """Ids of the pictures of val."""
    class_of = {own: place for place, (own, _) in enumerate(file.categories)}
    # An extra class that every picture shows. It makes the share of all pictures come out right too.
    everything = len(class_of)
    holds = []  # for each unit, {class: number of its pictures that show the class}
    for ids in units:
        seen: Counter[int] = Counter({everything: len(ids)})
        for own in ids:
            seen.update({class_of[a["category_id"]] for a in _objects(file, own)})
        holds.append(dict(seen))
    order = torch.randperm(len(units), generator=generator(seed)).tolist()
    val = _Stratified(holds, everything + 1, share, order).val()
    return {own for place in val for own in units[place]}


class _Stratified:
    """Iterative stratification (Sechidis et al., 2011). It takes the class with the fewest units left. Each of these units
    goes to the part that lacks more pictures of the class. The last unit of a class goes to a part that has no unit of the
    class yet."""

    def __init__(self, holds: Sequence[dict[int, int]], classes: int, share: Fraction, order: Sequence[int]) -> None:
        self.holds = holds
        self.holders: list[list[int]] = [[] for _ in range(classes)]  # units of each class, in the order given
        for unit in order:
            for own in holds[unit]:
                self.holders[own].append(unit)
        self.left = [len(units) for units in self.holders]  # number of units of each class that have no part yet
        self.parts = [-1] * len(holds)  # part of each unit: 0 train, 1 val, -1 none yet
        self.units = [[0] * classes, [0] * classes]  # number of units of each class in each part
        # Number of pictures of each class that each part lacks, times the share's denominator: whole numbers, so ties are exact.
        totals = [sum(holds[unit][own] for unit in units) for own, units in enumerate(self.holders)]
        self.scale = share.denominator
        self.lacks = [[(self.scale - share.numerator) * t for t in totals], [share.numerator * t for t in totals]]

    def val(self) -> list[int]:
        while any(self.left):
            rarest = min((own for own, left in enumerate(self.left) if left), key=lambda own: (self.left[own], own))
            for unit in self.holders[rarest]:
                if self.parts[unit] < 0:
                    part = self._chosen(unit, rarest)
                    for own in self.holds[unit]:
                        self.left[own] -= 1
                    self._put(unit, part)
        self._repair()
        return [unit for unit, part in enumerate(self.parts) if part == 1]

    def _chosen(self, unit: int, rarest: int) -> int:
        for own in sorted(self.holds[unit], key=lambda own: (len(self.holders[own]), own)):
            empty = [part for part in (0, 1) if not self.units[part][own]]
            if self.left[own] == 1 and len(empty) == 1:
                return empty[0]
        everything = len(self.left) - 1
        return int(
            (self.lacks[1][rarest], self.lacks[1][everything]) > (self.lacks[0][rarest], self.lacks[0][everything])
        )

    def _put(self, unit: int, part: int, sign: int = 1) -> None:
        self.parts[unit] = part
        for own, pictures in self.holds[unit].items():
            self.units[part][own] += sign
            self.lacks[part][own] -= sign * self.scale * pictures

    def _repair(self) -> None:
        """For each class that a part lacks, moves a unit of the class to this part, unless the other part would then lose a
        class."""
        for own in sorted(range(len(self.holders)), key=lambda own: (len(self.holders[own]), own)):
            for part in (0, 1):
                if len(self.holders[own]) < 2 or self.units[part][own]:
                    continue
                movable = [unit for unit in self.holders[own] if self._spare(unit)]
                if movable:
                    unit = min(movable, key=lambda unit: self.holds[unit][len(self.left) - 1])
                    self._put(unit, 1 - part, -1)
                    self._put(unit, part)

    def _spare(self, unit: int) -> bool:
        there = self.units[self.parts[unit]]
        return all(there[own] > 1 or len(self.holders[own]) < 2 for own in self.holds[unit])


def _objects(file: CocoFile, picture: int) -> list[dict[str, Any]]:
    return [a for a in file.annotations[picture] if a["id"] not in file.no_instance]


def _counted(file: CocoFile, ids: Collection[int]) -> tuple[dict[str, int], dict[str, int]]:
    """Two dicts by class name, in the order of the category ids: number of pictures, and number of objects."""
    pictures: Counter[int] = Counter()
    objects: Counter[int] = Counter()
    for own in ids:
        found = Counter(a["category_id"] for a in _objects(file, own))
        objects.update(found)
        pictures.update(found.keys())
    names = dict(file.categories)
    return {names[c]: pictures[c] for c in names}, {names[c]: objects[c] for c in names}


# -- files
def _write(texts: dict[Path, bytes], source: Path) -> None:
    for path, text in texts.items():
        if not path.exists():
            continue
        if path.resolve() == source.resolve():
            raise DataError(f"{path}: is the file to be split; give another folder for its parts")
        if not path.is_file() or (path.read_bytes() != text and not _ours(path)):
            raise DataError(
                f"{path}: is there already and was not made by a split; remove the file, or give another folder"
            )
    for path, text in texts.items():
        if not (path.exists() and path.read_bytes() == text):
            atomic_write(path, text, sync=True)


def _ours(path: Path) -> bool:
    """Whether a file was written by `split`."""
    if path.suffix == ".txt":
        return read_bytes(path, MAX_LIST).startswith(f"# {_MARK}:".encode())
    try:
        about = read_json(path, MAX_JSON)["info"]["split"]["by"]
    except (DataError, KeyError, TypeError, IndexError):
        return False
    return bool(about == _MARK)

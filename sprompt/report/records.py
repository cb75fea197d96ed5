"""COCO files and folders as pictures with masks, for the page. A faulty entry is listed as a problem and raises no error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sprompt.data.annotations import distinct, leaves
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.pictures import MAX_PIXELS, read_picture
from sprompt.data.reading import read_json
from sprompt.data.seeds import SeedGrid
from sprompt.data.segmentation import decode, is_segmentation
from sprompt.masks import BitMasks, Size


@dataclass(frozen=True)
class Instance:
    """A mask of a file, not decoded yet."""

    segmentation: Any
    category: int
    score: float | None = None
    crowd: bool = False
    seed: Any = None  # [scale, row, column]
    box: Any = None  # [x, y, width, height], as the file has it


@dataclass
class Entry:
    """A picture of a file, and its instances."""

    id: int
    name: str
    instances: list[Instance] = field(default_factory=list)
    size: Size | None = None  # (h, w), where the file says so


@dataclass
class Records:
    """The content of a file, picture by picture in the order of the file."""

    entries: dict[int, Entry]
    categories: dict[int, str]
    info: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def instances(self) -> int:
        return sum(len(entry.instances) for entry in self.entries.values())

    def pooled(self) -> Records:
        """The same instances without classes."""
        entries = {own: replace(e, instances=classless(e.instances)) for own, e in self.entries.items()}
        return replace(self, entries=entries, categories={})


def read_records(path: Path, images: Path | None = None, like: Records | None = None) -> Records:
    """Reads a COCO file or a list of COCO results. A list has the pictures of `like`, or else the files below `images`, in
    order.

    Raises DataError if the file is neither. Faulty entries are left out and named in `problems`.
    """
    data = read_json(path)
    if isinstance(data, list):
        entries = _entries_of(like, images, path)
        records, annotations = Records(entries, like.categories if like else {}, {}), data
    elif isinstance(data, dict) and isinstance(data.get("images"), list):
        info = data.get("info")
        annotations = data.get("annotations", [])
        records = Records({}, {}, info if isinstance(info, dict) else {})
        for image in data["images"]:
            if isinstance(image, dict) and _whole(image.get("id")) and isinstance(image.get("file_name"), str):
                records.entries[image["id"]] = Entry(image["id"], image["file_name"], size=_size(image))
            else:
                records.problems.append(f"{path.name}: a picture without id or file_name is left out")
        for category in data.get("categories") or []:
            if isinstance(category, dict) and _whole(category.get("id")):
                records.categories[category["id"]] = str(category.get("name", category["id"]))
        records.categories = dict(distinct(list(records.categories.items())))
    else:
        raise DataError(
            f"{path}: must be a COCO file with images, or a list of COCO results, got {type(data).__name__}"
        )
    if not isinstance(annotations, list):
        raise DataError(f"{path}: annotations must be a list, got {type(annotations).__name__}")
    skipped = 0
    for annotation in annotations:
        instance = _instance(annotation)
        entry = records.entries.get(annotation["image_id"]) if instance else None
        if instance is None or entry is None:
            skipped += 1
        else:
            entry.instances.append(instance)
    if skipped:
        records.problems.append(
            f"{path.name}: {skipped} of {len(annotations)} masks are left out: they are broken, or their picture is unknown"
        )
    return records


def classless(instances: Iterable[Instance]) -> list[Instance]:
    """The instances, all of one class."""
    return [replace(instance, category=0) for instance in instances]


def listed(results: Path) -> Records | None:
    """The pictures and classes in the pictures.json that `sprompt predict` writes beside its results; None where there is none."""
    listing = results.with_name("pictures.json")
    return read_records(listing) if listing.is_file() else None


def evenly(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """At most `limit` of the entries, spread evenly from the first to the last."""
    count = min(limit, len(entries))
    return [entries[k * len(entries) // count] for k in range(count)]


def read_image(images: Path, name: str) -> Image.Image:
    """The picture `name` below the folder `images`, which may hold links. Raises DataError for a name that leaves the folder, and for a
    file that is no picture."""
    if leaves(name):
        raise DataError(f"{name}: must lie in {images}; the file points elsewhere")
    return Image.fromarray(read_picture(images / name).permute(1, 2, 0).contiguous().numpy())


def masks_of(instances: Iterable[Instance], size: Size) -> tuple[BitMasks, list[Instance], int]:
    """(masks, their instances, number of unreadable instances) of a picture of size (h, w)."""
    masks, kept, broken = [], [], 0
    for instance in instances:
        try:
            masks.append(decode([instance.segmentation], size, lambda _: "mask"))
            kept.append(instance)
        except DataError:
            broken += 1
    return BitMasks.cat(masks) if masks else BitMasks.from_rle([], size), kept, broken


def seed_grid(records: Records, source: str) -> SeedGrid | None:
    """The grid of the seeds of a proposal file; None if it has no grid, or an unreadable one, which `problems` then names."""
    if "proposals" not in records.info:
        return None
    try:
        return SeedGrid.parse(records.info["proposals"], source)
    except DataError as error:
        records.problems.append(str(error))
        return None


# -- parts
def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _size(image: dict[str, Any]) -> Size | None:
    height, width = image.get("height"), image.get("width")
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0 and height * width <= MAX_PIXELS:
        return height, width
    return None


def _instance(annotation: Any) -> Instance | None:
    if not isinstance(annotation, dict) or not _whole(annotation.get("image_id")):
        return None
    if not is_segmentation(annotation.get("segmentation")):
        return None
    score, category = annotation.get("score"), annotation.get("category_id")
    return Instance(
        annotation["segmentation"],
        category if isinstance(category, int) else 0,
        float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None,
        annotation.get("iscrowd") in (1, True),
        annotation.get("seed"),
        annotation.get("bbox"),
    )


def _entries_of(like: Records | None, images: Path | None, path: Path) -> dict[int, Entry]:
    if like is not None:
        return {entry.id: Entry(entry.id, entry.name) for entry in like.entries.values()}
    if images is None:
        raise DataError(f"{path}: names pictures by number only; give the folder or the labels they were predicted for")
    names = PictureFolder(images).file_names
    return {i: Entry(i, name) for i, name in enumerate(names)}

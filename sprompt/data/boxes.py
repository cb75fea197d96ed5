"""The boxes of a COCO file, checked. Segmentations are never looked at: they may be absent, or anything.

DataError refuses a file as `sprompt.data.annotations` does. Some annotations have no box that can be used; `problems` names them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sprompt.data.annotations import Picture, each_annotation, left_out, parse_head
from sprompt.data.coco import read_sized, refuse_missing
from sprompt.masks import Size

LEAST = 2.0  # pixels: a box must be wider and higher


class Box(NamedTuple):
    """The box of one object, clipped to its picture. Numbers are pixels, and pixel i covers the interval from i to i + 1."""

    x1: float
    y1: float
    x2: float
    y2: float
    area: float  # width times height
    annotation: int  # id


@dataclass(frozen=True)
class BoxedPictures:
    """The pictures of a COCO file with their boxes, and the folder of the pictures."""

    folder: Path
    source: str  # the file, for messages
    pictures: list[Picture]  # in the order of the file
    boxes: list[list[Box]]  # of each picture, in the order of the file
    unusable: dict[str, list[int]]  # reason -> ids of annotations whose box is not used; crowds are among them
    categories: list[tuple[int, str]]  # by ascending id
    problems: list[str]  # without a line about crowds: those are no training objects, but a labelled file keeps them

    def image(self, place: int) -> Tensor:
        """The pixels of a picture, uint8 (3, H, W). Raises DataError if it cannot be read or has another size than its record."""
        picture = self.pictures[place]
        return read_sized(self.folder / picture.file_name, picture.size, self.source)


HOMELESS = "of pictures that are not in the file"
CROWD = "of crowds"
NO_BOX = "without a box of four finite numbers"
OUTSIDE = "whose box lies outside of its picture"
SMALL = "whose box is not wider and higher than 2 pixels"


def read_boxes(folder: Path, data: Any, source: str) -> BoxedPictures:
    """The boxes in the content of a COCO file. Raises DataError if the file is no COCO file or pictures are missing."""
    pictures, categories, problems = parse_head(data, source)
    boxes: list[list[Box]] = [[] for _ in pictures]
    place_of = {picture.id: place for place, picture in enumerate(pictures)}
    unusable: dict[str, list[int]] = {why: [] for why in (HOMELESS, CROWD, NO_BOX, OUTSIDE, SMALL)}
    for own, record, picture in each_annotation(data.get("annotations", []), pictures, categories, source):
        if picture is None:
            unusable[HOMELESS].append(own)
        elif record.get("iscrowd", 0):
            unusable[CROWD].append(own)
        elif isinstance(box := _box(record.get("bbox"), picture.size, own), str):
            unusable[box].append(own)
        else:
            boxes[place_of[picture.id]].append(box)
    refuse_missing(folder, [p.file_name for p, own in zip(pictures, boxes, strict=True) if own], source)
    problems += [left_out(source, ids, why) for why, ids in unusable.items() if ids and why != CROWD]
    return BoxedPictures(folder, source, pictures, boxes, unusable, categories, problems)


def _box(value: Any, size: Size, annotation: int) -> Box | str:
    """The box of [x, y, width, height], or the reason why it cannot be used."""
    if (numbers := four_numbers(value)) is None:
        return NO_BOX
    x, y, width, height = numbers
    if min(width, height) <= LEAST:
        return SMALL
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, float(size[1])), min(y + height, float(size[0]))
    if x1 >= x2 or y1 >= y2:
        return OUTSIDE
    if (x1, y1) != (x, y) or x + width > size[1] or y + height > size[0]:  # clipped
        width, height = x2 - x1, y2 - y1
        if min(width, height) <= LEAST:
            return SMALL
    return Box(x1, y1, x2, y2, width * height, annotation)


def four_numbers(value: Any) -> Sequence[float] | None:
    """The finite floats of a list of four, or None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
        return None
    try:
        numbers = [float(v) for v in value]
    except OverflowError:  # a whole number of more than 300 digits
        return None
    return numbers if all(map(math.isfinite, numbers)) else None

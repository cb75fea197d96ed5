"""A COCO file, checked: its pictures, categories and annotations, and a list of the annotations that are left out.

DataError refuses a file that is not COCO, ids that occur twice, categories that are not declared, and run lengths of another
size than their picture. Three kinds of annotations are left out, and `problems` names them: annotations of pictures that are
not in the file, annotations without a mask, and annotations whose mask has no pixel. Crowd regions are not instances, and no sample
has them; `problems` names them too. Crowd regions and masks without a pixel stay in the ground truth: COCO ignores the first and counts
the second as missed. `lost` names the annotations that the ground truth lacks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprompt.data.errors import DataError
from sprompt.data.pictures import MAX_PIXELS
from sprompt.data.segmentation import decode, is_segmentation
from sprompt.masks import Size

_TINY = 16  # pixels: a mask is decoded at once if its annotation states a smaller area, since it may be empty

#: Lists of LVIS in the record of a picture: categories that are surely absent, and those of which objects may lack a label.
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class Picture:
    id: int
    file_name: str  # below the folder of the pictures
    size: Size
    absent: tuple[int, ...] = ()  # ids of categories that are surely not in the picture, as LVIS lists them
    partial: tuple[int, ...] = ()  # ids of categories of which objects may lack a label


@dataclass(frozen=True)
class CocoFile:
    source: str  # the file, for messages
    pictures: list[Picture]  # in the order of the file
    annotations: dict[int, list[dict[str, Any]]]  # by the id of the picture, in the order of the file, unchanged
    no_instance: frozenset[int]  # ids of the annotations that are not in samples: crowds and empty masks
    categories: list[tuple[int, str]]  # by ascending id, with names as `distinct` makes them
    info: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    boxes: dict[int, int] = field(default_factory=dict)  # by picture's id: annotations with a box but without a mask
    lost: list[str] = field(default_factory=list)  # the problems about annotations that the ground truth lacks too
    frequency: dict[int, str] = field(default_factory=dict)  # by category's id, if the file has it, as those of LVIS do


def parse(data: Any, source: str) -> CocoFile:
    """Checks the content of a COCO file; raises DataError. `source` is the name of the file in messages."""
    pictures, named_so, problems = parse_head(data, source)
    file = _with_annotations(data.get("annotations", []), pictures, named_so, data.get("info"), source)
    file.problems[:0] = problems
    for record in data.get("categories", []):
        if isinstance(record.get("frequency"), str):
            file.frequency[record["id"]] = record["frequency"]
    return file


def parse_head(data: Any, source: str) -> tuple[list[Picture], list[tuple[int, str]], list[str]]:
    """The checked pictures and categories of a COCO file, as `CocoFile` has them, and problems. Annotations are a list, which is not
    looked into."""
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise DataError(
            f"{source}: must be a COCO file, an object with images, annotations and categories, "
            f"got {_kind(data)}; is it the right file?"
        )
    for key in ("annotations", "categories"):
        if not isinstance(data.get(key, []), list):
            raise DataError(f"{source}: {key} must be a list, got {_kind(data[key])}; is it a COCO file?")
    pictures = [parse_picture(record, position, source) for position, record in enumerate(data["images"])]
    _refuse_twice(source, "pictures", (p.id for p in pictures))
    categories = sorted(parse_category(c, i, source) for i, c in enumerate(data.get("categories", [])))
    _refuse_twice(source, "categories", (c[0] for c in categories))
    named_so = distinct(categories)
    changed = [new for (_, old), (_, new) in zip(categories, named_so, strict=True) if old != new]
    said = f"{source}: {len(changed)} categories share a name and are called {named(changed)}"
    return pictures, named_so, [said] if changed else []


def distinct(categories: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Ids and names of categories, where names that several categories share become "name (id)".

    >>> distinct([(1, "cat"), (2, "dog"), (5, "cat")])
    [(1, 'cat (1)'), (2, 'dog'), (5, 'cat (5)')]
    """
    named_so = list(categories)
    while True:  # again where "cat (1)" is the name of another category
        counts = Counter(name for _, name in named_so)
        if len(counts) == len(named_so):
            return named_so
        named_so = [(own, f"{name} ({own})" if counts[name] > 1 else name) for own, name in named_so]


def named(ids: Sequence[Any], most: int = 5) -> str:
    """The first few entries of a list, and the number of the others."""
    rest = len(ids) - most
    return ", ".join(str(i) for i in ids[:most]) + (f" and {rest} more" if rest > 0 else "")


def leaves(name: str) -> bool:
    """Whether a file name is absolute, or goes up with `..`."""
    return name.startswith(("/", "\\")) or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/")


def _with_annotations(
    records: list[Any], pictures: list[Picture], categories: list[tuple[int, str]], info: Any, source: str
) -> CocoFile:
    annotations: dict[int, list[dict[str, Any]]] = {p.id: [] for p in pictures}
    homeless, maskless, boxed, crowds, empty, misfits = [], [], [], [], [], []
    boxes: dict[int, int] = defaultdict(int)
    for own, record, picture in each_annotation(records, pictures, categories, source):
        segmentation = record.get("segmentation")
        if picture is None:
            homeless.append(own)
            continue
        if not is_segmentation(segmentation):
            if _is_box(record.get("bbox")):
                boxed.append(own)
                boxes[picture.id] += 1
            else:
                maskless.append(own)
            continue
        if not is_mask_of(segmentation, picture.size):
            misfits.append(own)
            continue
        annotations[picture.id].append(record)
        if record.get("iscrowd", 0):
            crowds.append(own)
        elif _is_empty(record, picture, source):
            empty.append(own)
    if misfits:
        raise DataError(
            f"{source}: run lengths must have the size [height, width] of their picture, got others in annotations "
            f"{named(misfits)}; were pictures or labels resized?"
        )

    def told(*reasons: tuple[list[int], str]) -> list[str]:
        return [left_out(source, ids, why) for ids, why in reasons if ids]

    lost = told(
        (homeless, "of pictures that are not in the file"), (boxed, "with a box but without a mask"),
        (maskless, "without a mask"),
    )  # fmt: skip
    problems = [*lost, *told((crowds, "of crowds"), (empty, "whose mask has no pixel"))]
    info = info if isinstance(info, dict) else {}
    no_instance = frozenset(crowds + empty)
    return CocoFile(source, pictures, annotations, no_instance, categories, info, problems, dict(boxes), lost)


def each_annotation(
    records: list[Any], pictures: Sequence[Picture], categories: Sequence[tuple[int, str]], source: str
) -> Iterator[tuple[int, dict[str, Any], Picture | None]]:
    """Id, record and picture of each annotation of a file, in order; None for a picture that is not in the file.

    Raises DataError for a record without whole numbers as ids; after the last record also for ids that occur twice, and for unknown
    categories in the pictures of the file.
    """
    by_id = {p.id: p for p in pictures}
    known = {c[0] for c in categories}
    ids: list[int] = []
    strange: list[int] = []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{source}: annotation at place {position} must be an object, got {_kind(record)}")
        own = whole(record, "id", f"annotation at place {position}", source)
        what = f"annotation {own}"
        ids.append(own)
        picture = by_id.get(whole(record, "image_id", what, source))
        category = whole(record, "category_id", what, source)
        crowd = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{source}: {what}: iscrowd must be 0 or 1, got {crowd!r:.40}")
        if picture is not None and category not in known:
            strange.append(own)
        yield own, record, picture
    _refuse_twice(source, "annotations", ids)
    if strange:
        raise DataError(
            f"{source}: categories of annotations must be in the list of categories, got others in annotations "
            f"{named(strange)}; complete the list"
        )


def left_out(source: str, ids: Sequence[int], why: str) -> str:
    """A line about annotations that do not count."""
    return line_about(source, ids, f"{why} {'is' if len(ids) == 1 else 'are'} left out")


def line_about(source: str, ids: Sequence[int], what: str) -> str:
    """A line that says something of these annotations."""
    if len(ids) == 1:
        return f"{source}: 1 annotation {what} (annotation id {ids[0]})"
    return f"{source}: {len(ids)} annotations {what} (annotation ids {named(ids)})"


def parse_picture(record: Any, position: int, source: str) -> Picture:
    """The picture of a record; raises DataError."""
    if not isinstance(record, dict):
        raise DataError(f"{source}: picture at place {position} must be an object, got {_kind(record)}")
    own = whole(record, "id", f"picture at place {position}", source)
    height, width = (whole(record, key, f"picture {own}", source) for key in ("height", "width"))
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"{source}: picture {own} must have between 1 and {MAX_PIXELS} pixels, got {height}x{width}; correct it"
        )
    name = file_name(record)
    if not isinstance(name, str) or not name:
        raise DataError(f"{source}: picture {own} must have a file_name, got {name!r:.40}; correct it")
    if leaves(name):
        raise DataError(
            f"{source}: picture {own} must lie below the folder of the pictures, got {name!r:.80}; write the path from there"
        )
    lists = [record.get(key, []) for key in LISTS]
    for key, ids in zip(LISTS, lists, strict=True):
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise DataError(f"{source}: picture {own}: {key} must be a list of category ids, got {ids!r:.60}")
    return Picture(own, name, (height, width), tuple(lists[0]), tuple(lists[1]))


def file_name(record: dict[str, Any]) -> Any:
    """The file of a picture. LVIS gives an address instead, whose last two parts are the file in COCO's folders.

    >>> file_name({"coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg"})
    'train2017/000000391895.jpg'
    """
    name, url = record.get("file_name"), record.get("coco_url")
    return "/".join(url.split("/")[-2:]) if name is None and isinstance(url, str) else name


def parse_category(record: Any, position: int, source: str) -> tuple[int, str]:
    """Id and name of a category; raises DataError."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise DataError(f"{source}: category at place {position} must have an id and a name, got {record!r:.60}")
    return whole(record, "id", f"category at place {position}", source), record["name"]


def whole(record: dict[str, Any], key: str, what: str, source: str) -> int:
    """An entry of a record that must be a whole number; raises DataError, which calls the record `what`."""
    value = record.get(key)
    if type(value) is not int:  # a bool would pass isinstance
        got = f"{value!r:.40}" if key in record else "none"
        raise DataError(f"{source}: {what} must have a whole number as {key}, got {got}; correct it")
    return value


def _refuse_twice(source: str, what: str, ids: Iterable[int]) -> None:
    seen: set[int] = set()
    twice = sorted({i for i in ids if i in seen or seen.add(i)})  # type: ignore[func-returns-value]  # None is meant: false
    if twice:
        raise DataError(f"{source}: ids of {what} must be unique, got twice {named(twice)}; number them anew")


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(v, (int, float)) for v in value)


def is_mask_of(segmentation: Any, size: Size) -> bool:
    """Whether a segmentation is one by its form, and its run lengths, if it has any, state this size."""
    if not is_segmentation(segmentation):
        return False
    stated = segmentation["size"] if isinstance(segmentation, dict) else size
    return isinstance(stated, (list, tuple)) and tuple(stated) == size


def _is_empty(record: dict[str, Any], picture: Picture, source: str) -> bool:
    area = record.get("area")
    if isinstance(area, (int, float)) and area >= _TINY:
        return False
    name = f"{source}: annotation {record['id']}"
    return not bool(decode([record["segmentation"]], picture.size, lambda _: name).area())


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")

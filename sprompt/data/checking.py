"""Reads every picture and every mask of a dataset, and reports problems that would stop or spoil a training."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import DataLoader, Dataset

from sprompt.data.annotations import named
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError, SizeError
from sprompt.data.folder import PictureFolder
from sprompt.data.pictures import picture_size, read_picture
from sprompt.data.transforms import Augment, resized_size
from sprompt.masks import Size

SMALL, MEDIUM = (
    32**2,
    96**2,
)  # COCO's bounds: small masks have fewer than SMALL pixels, large masks have more than MEDIUM
_WORKERS = 8  # upper bound of the processes that read
_EACH = 16  # pictures for which starting another process pays off

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """The result of reading a picture and its masks."""

    name: str  # the file
    size: Size | None = None  # (h, w) of the picture; None if it cannot be read
    digest: str = ""  # of the content of the file; "" if it was not asked for, or the file cannot be read
    unreadable: str | None = None  # message if the picture cannot be read
    misfit: str | None = None  # message if the picture has another size than its record
    broken: list[str] = field(default_factory=list)  # a message for each annotation that cannot be decoded
    empty: list[int] = field(default_factory=list)  # ids of annotations with an empty mask that their file hides
    labels: list[int] = field(default_factory=list)  # class of each mask with a pixel
    areas: list[int] = field(default_factory=list)  # number of pixels of each of these masks

    @property
    def faults(self) -> list[str]:
        """Messages of the faults that stop a training or an evaluation."""
        return [message for message in (self.unreadable, self.misfit) if message is not None] + self.broken


class Finding(NamedTuple):
    text: str
    names: list[str]  # messages, or names of pictures
    spoils: bool  # whether it would stop or spoil a training


def read_all(
    dataset: CocoDataset | PictureFolder, indices: Sequence[int] | None = None, *, digests: bool = True,
    workers: int | None = None, progress: Progress | None = None,
) -> list[Seen]:  # fmt: skip
    """Decodes every picture of a dataset, and every mask, crowds included. It records faults and goes on.

    Args:
        indices: the pictures to read, in order; None reads all.
        digests: whether to compute the digests of the files.
        workers: number of processes that read. 0 reads in this process. None takes one process a core, at most 8, and at most
            one for every 16 pictures.
        progress: called after each picture with two numbers: pictures read so far, and all pictures.
    """
    chosen = range(len(dataset)) if indices is None else indices
    if workers is None:
        workers = min(cores(), _WORKERS, len(chosen) // _EACH)
    loader: DataLoader[Any] = DataLoader(
        _Reader(dataset, chosen, digests), batch_size=None, num_workers=workers, collate_fn=_same
    )
    seen: list[Seen] = []
    for one in loader:
        seen.append(one)
        if progress is not None:
            progress(len(seen), len(chosen))
    return seen


def refuse_broken(dataset: CocoDataset, option: str, seen: Sequence[Seen]) -> None:
    """Raises DataError if pictures or masks cannot be read. `option` names the dataset in the message."""
    faults = [fault for one in seen for fault in one.faults]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DataError(
            f"--{option}: every picture and mask must be readable, got {len(faults)} of {dataset.source} that are not: "
            f"{'; '.join(faults[:3])}{more}"
        )


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- reading
class _Reader(Dataset[Seen]):
    def __init__(self, dataset: CocoDataset | PictureFolder, indices: Sequence[int], digests: bool) -> None:
        self.dataset, self.indices, self.digests = dataset, indices, digests

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Seen:
        index = self.indices[place]
        if isinstance(self.dataset, CocoDataset):
            return _labelled(self.dataset, index, self.digests)
        path = self.dataset.path / self.dataset.file_names[self.dataset.image_ids[index]]
        try:
            pixels = read_picture(path)
        except DataError as error:
            return Seen(str(path), unreadable=str(error))
        return Seen(str(path), (pixels.shape[1], pixels.shape[2]), _digest(path) if self.digests else "")


def _labelled(dataset: CocoDataset, index: int, digests: bool) -> Seen:
    path = dataset.path(index)
    size, unreadable, misfit = None, None, None
    try:
        pixels = dataset.image(index)
        size = (pixels.shape[1], pixels.shape[2])
    except SizeError as error:
        size, misfit = picture_size(path), str(error)
    except DataError as error:
        unreadable = str(error)
    annotations = dataset.annotations(index)
    areas, broken = _areas(dataset, index, [a for a, _ in annotations])
    found = [(a["id"], label, area) for (a, label), area in zip(annotations, areas, strict=True) if label is not None]
    return Seen(
        str(path), size, _digest(path) if digests and unreadable is None else "", unreadable, misfit, broken,
        [own for own, _, area in found if area == 0],
        [label for _, label, area in found if area],
        [area for _, _, area in found if area],
    )  # fmt: skip


def _areas(
    dataset: CocoDataset, index: int, annotations: Sequence[dict[str, Any]]
) -> tuple[list[int | None], list[str]]:
    """The number of pixels of each mask (None for a broken mask), and the messages about the broken masks."""
    try:
        return list(dataset.masks(index, annotations).area().tolist()), []
    except DataError:
        areas: list[int | None] = []
        broken = []
        for annotation in annotations:
            try:
                areas.append(int(dataset.masks(index, [annotation]).area()))
            except DataError as error:
                areas.append(None)
                broken.append(str(error))
        return areas, broken


def _digest(path: Path) -> str:
    own = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            own.update(block)
    return own.hexdigest()


def _same(item: T) -> T:
    return item


# -- what was found
def of_pictures(seen: Sequence[Seen]) -> list[Finding]:
    """Findings about pictures, with or without labels: unreadable files, and files with the same content."""
    broken = [one.unreadable for one in seen if one.unreadable is not None]
    return [*_some("pictures that cannot be read", broken, True), *_twice(seen)]


def of_labels(dataset: CocoDataset, seen: Sequence[Seen]) -> list[Finding]:
    """Findings about a labelled set, its pictures included."""
    every = of_pictures(seen)
    every += _some("pictures of another size than their record", [s.misfit for s in seen if s.misfit], True)
    every += _some("masks that cannot be decoded", [message for one in seen for message in one.broken], True)
    every += [Finding(problem, [], False) for problem in dataset.problems]
    empty = [own for one in seen for own in one.empty]
    if empty:
        text = (
            f"masks without a pixel in their picture (they are left out): {len(empty)} (annotation ids {named(empty)})"
        )
        every.append(Finding(text, [], False))
    bare = [one.name for one in seen if not one.areas and not one.broken]
    every += _some("pictures without an object", bare, False)
    if len(bare) == len(seen):
        every.append(Finding("no picture has an object: there is nothing to train on", [], True))
    without = [name for name, (_, number) in by_class(dataset, seen).items() if not number]
    every += _some("classes without an object", without, False)
    return every


def of_both(data: CocoDataset, seen: Sequence[Seen], val: CocoDataset, seen_val: Sequence[Seen]) -> list[Finding]:
    """Findings about a set for training and a set for validation together."""
    every = []
    if data.classes != val.classes:
        other = [name for name in (*data.classes, *val.classes) if (name in data.classes) != (name in val.classes)]
        why = f"only one of them has {named(other)}" if other else "their order differs"
        every.append(Finding(f"data and val must have the same classes in one order, but {why}", [], True))
    in_val = by_class(val, seen_val)
    missing = [c for c, (_, n) in by_class(data, seen).items() if n and not in_val.get(c, (0, 0))[1]]
    every += _some("classes of data without an object in val, so that their AP cannot be measured", missing, False)
    known = {one.digest: one.name for one in seen if one.digest}
    pairs = [f"{one.name} = {known[one.digest]}" for one in seen_val if one.digest in known]
    every += _some(
        "pictures of val with the content of a picture of data, so that the AP will be too high", pairs, True
    )
    return every


def by_class(dataset: CocoDataset, seen: Sequence[Seen]) -> dict[str, tuple[int, int]]:
    """Number of pictures and of objects of each class."""
    pictures, objects = [0] * len(dataset.classes), [0] * len(dataset.classes)
    for one in seen:
        for label in one.labels:
            objects[label] += 1
        for label in set(one.labels):
            pictures[label] += 1
    return dict(zip(dataset.classes, zip(pictures, objects, strict=True), strict=True))


def sizes(seen: Sequence[Seen], augment: Augment) -> str:
    """Lines about the objects: number in a picture, sizes, and the smallest object after the resizing for training."""
    counts = [len(one.areas) for one in seen if one.areas]
    areas = [area for one in seen for area in one.areas]
    if not areas:
        return "no objects"
    small, large = sum(a < SMALL for a in areas), sum(a > MEDIUM for a in areas)
    scaled = [(area * _scale(one.size, augment), one) for one in seen if one.size is not None for area in one.areas]
    lines = [
        f"objects in a picture that has any: median {median(counts):g}, at most {max(counts)}",
        f"objects by size: {small} small (below {SMALL} pixels), {len(areas) - small - large} medium, {large} large (above {MEDIUM})",
    ]
    if scaled:
        least, where = min(scaled, key=lambda pair: pair[0])
        lines.append(
            f"smallest object at the size of training (short side {augment.shorts[0]}, long side at most {augment.long}): "
            f"{least:.3g} pixels, in {where.name}"
        )
    return "\n".join(lines)


def crowded(seen: Sequence[Seen], queries: int) -> str | None:
    """A line about pictures with more objects than the model has queries; None if there are none."""
    more = [one.name for one in seen if len(one.areas) > queries]
    if not more:
        return None
    return (
        f"pictures with more objects than the model has queries, {queries}, where a query finds at most one object: "
        f"{len(more)} ({named(more)})"
    )


def _scale(size: Size | None, augment: Augment) -> float:
    """Factor on areas when a picture of this size is resized for training, to the shortest side that `augment` draws."""
    if size is None:
        return 0.0
    short = augment.shorts[0]
    height, width = resized_size(size, short, augment.long) if augment.keep_ratio else (short, augment.long)
    return height * width / (size[0] * size[1])


def _twice(seen: Sequence[Seen]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for one in seen:
        if one.digest:
            groups[one.digest].append(one.name)
    same = [" = ".join(names) for names in groups.values() if len(names) > 1]
    return _some("groups of pictures with the same content", same, False)


def _some(text: str, names: Collection[str], spoils: bool) -> list[Finding]:
    """A list with one finding that counts and names things; an empty list if there are no names."""
    return [Finding(f"{text}: {len(names)}", list(names), spoils)] if names else []

"""Pictures with masks from a COCO file; proposal files are COCO files too."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sprompt.data.annotations import CocoFile, Picture, named, parse
from sprompt.data.errors import DataError, SizeError
from sprompt.data.listed import read_list
from sprompt.data.pictures import read_picture, stored_size
from sprompt.data.reading import read_json
from sprompt.data.sample import Sample
from sprompt.data.seeds import SeedGrid
from sprompt.data.segmentation import decode
from sprompt.masks import BitMasks, Size


class CocoDataset(Dataset[Sample]):
    """The pictures of a COCO file as samples: `dataset[i]` reads the i-th picture.
    Classes number the categories by ascending id. Categories that share a name are different classes, called "name (id)".

    Args:
        images: folder that the file names of the pictures are relative to.
        annotations: the COCO file. Samples of a proposal file have seeds.
        class_agnostic: give all masks one class, "object".
        keep_empty: keep pictures without masks, as an evaluation must.
        categories: names of the categories that count, as in `classes`; None means all. Annotations of other categories are left out.
        only: a text file with the file names of the pictures to take, as they stand in the COCO file; None takes all. See
            `sprompt.data.listed.read_list`.

    `sprompt.data.annotations` says which annotations are left out and which files are refused. The constructor refuses a file
    if pictures are missing. A broken picture, or a picture of another size than the file says, is refused when it is read.
    DataError names the picture. Pictures are turned as their EXIF orientation says; width and height in the file are those of the
    turned picture.
    """

    limited = False  # whether a list chose the pictures

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        *,
        class_agnostic: bool = False,
        keep_empty: bool = False,
        categories: Sequence[str] | None = None,
        only: Path | str | None = None,
    ) -> None:
        file = parse(read_json(annotations), str(annotations))
        if only is not None:
            file = _limited(file, only)
            self.limited = True
        self._start(Path(images), file, class_agnostic, keep_empty, categories)

    @classmethod
    def from_dict(
        cls,
        images: Path | str,
        data: dict[str, Any],
        source: str,
        *,
        class_agnostic: bool = False,
        keep_empty: bool = False,
        categories: Sequence[str] | None = None,
    ) -> CocoDataset:
        """The same dataset from the content of a COCO file; `source` is the name of the file in messages."""
        dataset = cls.__new__(cls)
        dataset._start(Path(images), parse(data, source), class_agnostic, keep_empty, categories)
        return dataset

    def _start(
        self, folder: Path, file: CocoFile, class_agnostic: bool, keep_empty: bool, categories: Sequence[str] | None
    ) -> None:
        _refuse_boxes_alone(file)
        counted = _counted(file, categories)
        self._folder = folder
        self._file = file
        self._keep_empty = keep_empty
        self._class_agnostic = class_agnostic
        self.classes: list[str] = ["object"] if class_agnostic else [name for _, name in counted]
        self.category_ids: list[int] = [1] if class_agnostic else [own for own, _ in counted]
        self._class_of = {own: 0 if class_agnostic else place for place, (own, _) in enumerate(counted)}
        self._seeds = SeedGrid.parse(file.info["proposals"], file.source) if "proposals" in file.info else None
        self.problems: list[str] = list(file.problems)
        self.positions: list[int] = []  # place of each picture of the dataset in the file's images
        self._choose(range(len(file.pictures)))
        if not self.positions:
            why = "pictures" if keep_empty or not file.pictures else "a picture with a mask of these categories"
            raise DataError(f"{file.source}: must have {why}, got none; is it the right file?")
        refuse_missing(folder, [file.pictures[p].file_name for p in self.positions], file.source)

    def _choose(self, positions: Iterable[int]) -> None:
        chosen = list(positions)
        self.positions = [p for p in chosen if self._keep_empty or self._instances(self._file.pictures[p])]
        kept = set(self.positions)
        empty = [self._file.pictures[p].file_name for p in chosen if p not in kept]
        if empty:
            self.problems.append(
                f"{self._file.source}: {len(empty)} pictures without masks are left out: {named(empty)}"
            )

    # -- properties
    @property
    def source(self) -> str:
        return self._file.source

    @property
    def total(self) -> int:
        """Number of pictures in the file, or in the list `only`, including the pictures that are left out."""
        return len(self._file.pictures)

    @property
    def image_ids(self) -> list[int]:
        return [self._file.pictures[p].id for p in self.positions]

    @property
    def mask_counts(self) -> list[int]:
        """Number of masks of each picture."""
        return [len(self._instances(self._file.pictures[p])) for p in self.positions]

    @property
    def info(self) -> dict[str, Any]:
        """The `info` of the file; its entry `proposals` holds the settings that proposals were made with."""
        return self._file.info

    @property
    def lost(self) -> list[str]:
        """Lines about annotations that are not in the ground truth, because they have no mask or their picture is not in the file."""
        return list(self._file.lost)

    @property
    def has_seeds(self) -> bool:
        return self._seeds is not None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        picture = self._file.pictures[self.positions[index]]
        image = self.image(index)
        instances = self._instances(picture)
        masks = self.masks(index, instances)
        labels = torch.tensor([self._class_of[a["category_id"]] for a in instances], dtype=torch.int64)
        seeds = None
        if self._seeds is not None:
            where = f"{self.source}: picture {picture.id}"
            seeds = self._seeds.points([a.get("seed") for a in instances], picture.size, where)
        sample = Sample(image, masks, labels, picture.id, str(self.path(index)), picture.size, seeds)
        seen = masks.area() > 0
        return sample if bool(seen.all()) else sample.kept(seen)

    def category_lists(self) -> dict[int, tuple[list[int], list[int]]]:
        """{image id: classes that are surely not in the picture, classes of which objects may lack a label}, as LVIS lists them, for
        pictures that list any of the dataset's classes."""
        found = {}
        for position in self.positions:
            picture = self._file.pictures[position]
            lists = [
                [self._class_of[c] for c in ids if c in self._class_of] for ids in (picture.absent, picture.partial)
            ]
            if any(lists):
                found[picture.id] = (lists[0], lists[1])
        return found

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self._folder / self._file.pictures[self.positions[index]].file_name

    def image(self, index: int) -> Tensor:
        """The pixels of a picture. Raises DataError if the file cannot be read, and SizeError if its size is not that of the record."""
        return read_sized(self.path(index), self._file.pictures[self.positions[index]].size, self.source)

    def annotations(self, index: int) -> list[tuple[dict[str, Any], int | None]]:
        """Annotations of a picture as they stand in the file, each with its class; the class of a crowd, and of an annotation that is
        known to be empty, is None. Annotations of categories that do not count are left out."""
        picture = self._file.pictures[self.positions[index]]
        return [
            (a, None if a["id"] in self._file.no_instance else self._class_of[a["category_id"]])
            for a in self._file.annotations[picture.id]
            if a["category_id"] in self._class_of
        ]

    def masks(self, index: int, annotations: Sequence[dict[str, Any]]) -> BitMasks:
        """The masks of some annotations of a picture. Raises DataError that names the first broken one."""
        size = self._file.pictures[self.positions[index]].size
        name = f"{self.source}: annotation "
        return decode([a["segmentation"] for a in annotations], size, lambda i: f"{name}{annotations[i]['id']}")

    # -- parts
    def subset(self, indices: Iterable[int]) -> CocoDataset:
        """The pictures at these places of the dataset, in the order given."""
        return self.at_positions([self.positions[i] for i in indices])

    def at_positions(self, positions: Iterable[int]) -> CocoDataset:
        """The pictures at these places of the file's images, in the order given; `keep_empty` applies to them too."""
        part = type(self).__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.problems = list(self._file.problems)
        part._choose(positions)
        return part

    # -- for evaluation
    @property
    def categories(self) -> list[dict[str, Any]]:
        """The categories as records of a COCO file, with the ids of `category_ids`, and with their frequency if the file gives it."""
        often = {} if self._class_agnostic else self._file.frequency
        return [
            {"id": i, "name": n} | ({"frequency": often[i]} if i in often else {})
            for i, n in zip(self.category_ids, self.classes, strict=True)
        ]

    def ground_truth(self) -> dict[str, Any]:
        """The ground truth of an evaluation, as the content of a COCO file, for all pictures of the dataset. Crowds are
        included.

        Categories have the ids of `category_ids`. Annotations are numbered from 1, since pycocotools reads a match with number
        0 as no match; `file_id` is their id in the file. Area and bbox are copied from the file; if it has none, they are
        computed from the mask.
        """
        pictures = [self._file.pictures[p] for p in self.positions]
        annotations: list[dict[str, Any]] = []
        for picture in pictures:
            for a in self._file.annotations[picture.id]:
                if a["category_id"] in self._class_of:
                    annotations.append(self._judged(a, picture, len(annotations) + 1))
        return {
            "info": {"description": self.source},
            "images": [
                {"id": p.id, "file_name": p.file_name, "height": p.size[0], "width": p.size[1]} for p in pictures
            ],
            "annotations": annotations,
            "categories": self.categories,
        }

    def _judged(self, annotation: dict[str, Any], picture: Picture, number: int) -> dict[str, Any]:
        """An annotation of the ground truth."""
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]
        area, box = annotation.get("area"), annotation.get("bbox")
        if isinstance(segmentation, dict):  # pycocotools does not check run lengths; decode does
            decode([segmentation], picture.size, lambda _: f"{self.source}: annotation {annotation['id']}")
        if not (isinstance(area, (int, float)) and area >= 0) or not (isinstance(box, list) and len(box) == 4):
            mask = decode([segmentation], picture.size, lambda _: f"{self.source}: annotation {annotation['id']}")
            ((x1, y1, x2, y2),) = mask.boxes().tolist()
            area, box = int(mask.area()), [x1, y1, x2 - x1, y2 - y1]
        return {
            "id": number, "file_id": annotation["id"], "image_id": picture.id,
            "category_id": self.category_ids[self._class_of[annotation["category_id"]]],
            "iscrowd": int(annotation.get("iscrowd", 0)), "area": area, "bbox": box, "segmentation": segmentation,
        }  # fmt: skip

    def _instances(self, picture: Picture) -> list[dict[str, Any]]:
        """The annotations that the sample of a picture has."""
        no_instance = self._file.no_instance
        return [
            a
            for a in self._file.annotations[picture.id]
            if a["category_id"] in self._class_of and a["id"] not in no_instance
        ]


def read_sized(path: Path, size: Size, source: str) -> Tensor:
    """The pixels of a picture. Raises DataError if the file cannot be read, and SizeError if its size is not that of its record in
    `source`."""
    image = read_picture(path)
    if tuple(image.shape[1:]) != size:
        (h, w), (height, width) = image.shape[1:], size
        if stored_size(path) == size:
            raise SizeError(
                f"{path}: must have the {height}x{width} pixels that {source} says, got {h}x{w} after its EXIF orientation is "
                "applied; the labels were drawn on the unturned picture, so remove the orientation from the file "
                "(exiftool -Orientation= FILE), or turn the labels"
            )
        raise SizeError(
            f"{path}: must have the {height}x{width} pixels that {source} says, got {h}x{w}; was it resized or turned?"
        )
    return image


def _limited(file: CocoFile, only: Path | str) -> CocoFile:
    """The file with the pictures of a list only."""
    wanted = read_list(only, [p.file_name for p in file.pictures], file.source)
    pictures = [p for p in file.pictures if p.file_name in wanted]
    return replace(file, pictures=pictures, annotations={p.id: file.annotations[p.id] for p in pictures})


def _counted(file: CocoFile, names: Sequence[str] | None) -> list[tuple[int, str]]:
    """The categories of these names, by ascending id."""
    if names is None:
        return file.categories
    there = [name for _, name in file.categories]
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise DataError(
            f"{file.source}: categories must be some of {named(there, 20)}, got {named(unknown) or 'none'}; correct the names"
        )
    return [c for c in file.categories if c[1] in names]


def _refuse_boxes_alone(file: CocoFile) -> None:
    boxes = sum(file.boxes.get(p.id, 0) for p in file.pictures)
    if boxes and not any(file.annotations[p.id] for p in file.pictures):
        raise DataError(
            f"{file.source}: must have masks, got only boxes (annotations: {boxes}); export the labels with polygons or run lengths "
            "as `segmentation`, or let `sprompt labeler` and `sprompt label` find masks in the boxes. `sprompt propose` and "
            "`sprompt pretrain` need no labels"
        )


def refuse_missing(folder: Path, names: list[str], source: str) -> None:
    """Raises DataError for missing pictures. Listing each folder once is much faster than a query for every file."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parent, _, base = name.rpartition("/")
        by_parent[parent].append(base)
    missing = []
    for parent, bases in by_parent.items():
        try:
            there = set(os.listdir(folder / parent))
        except OSError as error:
            raise DataError(
                f"{folder / parent}: must be the folder of the pictures in {source}, but cannot be listed "
                f"({error.strerror}); check the path"
            ) from None
        missing += [f"{parent}/{base}" if parent else base for base in bases if base not in there]
    if missing:
        raise DataError(
            f"{folder}: must have the pictures of {source}, but {len(missing)} of {len(names)} are missing: "
            f"{named(missing)}; check the folder"
        )

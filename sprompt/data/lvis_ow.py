"""LVIS-OW: a split of LVIS v1 whose training part has labels of some categories only, and no picture of others.

Its training part has the labels of the known categories, with those of COCO for COCO's classes. Pictures with objects of
unseen categories are moved to its evaluation part, which has the labels of all categories.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from sprompt.atomic import replacing
from sprompt.data import lvis
from sprompt.data.errors import DataError
from sprompt.data.segmentation import decode, is_segmentation
from sprompt.masks import BitMasks, Size
from sprompt.ops import mask_iou

#: {category id of COCO: category id of LVIS with the same synset}. LVIS has none for hot dog (58). Potted plant is flowerpot there.
COCO_TO_LVIS = {
    1: 793, 2: 94, 3: 207, 4: 703, 5: 3, 6: 173, 7: 1115, 8: 1123, 9: 118, 10: 1112, 11: 445, 13: 1019, 14: 766, 15: 90,
    16: 99, 17: 225, 18: 378, 19: 569, 20: 943, 21: 80, 22: 422, 23: 76, 24: 1202, 25: 496, 27: 34, 28: 1133, 31: 35,
    32: 716, 33: 36, 34: 474, 35: 964, 36: 976, 37: 41, 38: 611, 39: 58, 40: 60, 41: 962, 42: 1037, 43: 1079, 44: 133,
    46: 1190, 47: 344, 48: 469, 49: 615, 50: 1000, 51: 139, 52: 45, 53: 12, 54: 912, 55: 735, 56: 154, 57: 217, 59: 816,
    60: 387, 61: 183, 62: 232, 63: 982, 64: 837, 65: 77, 67: 367, 70: 1097, 72: 1077, 73: 631, 74: 705, 75: 881, 76: 296,
    77: 230, 78: 687, 79: 739, 80: 1095, 81: 961, 82: 421, 84: 127, 85: 271, 86: 1139, 87: 923, 88: 1071, 89: 534,
    90: 1102,
}  # fmt: skip
#: Further categories, each with at least 5,500 instances in the training part of LVIS.
MANY_INSTANCES = (
    50, 59, 125, 143, 150, 177, 181, 330, 351, 390, 451, 498, 500, 510, 540, 544, 549, 589, 595, 617, 641, 645, 653, 659, 709,
    734, 804, 827, 947, 948, 959, 965, 967, 981, 1023, 1026, 1027, 1035, 1055, 1056, 1099, 1110, 1122, 1178,
)  # fmt: skip
KNOWN = frozenset((*COCO_TO_LVIS.values(), *MANY_INSTANCES))
#: Number of categories of each group in LVIS v1.
SIZES = {"known": 123, "seen": 743, "unseen": 337}


def groups(frequency: Mapping[int, str], source: str) -> dict[str, list[int]]:
    """{group: category ids}, from the frequency of each category: "f", "c" or "r" (at most 10 training pictures).

    Known categories have labels in the training set. Unseen ones are those of frequency "r", whose pictures no training has. The
    rest is seen: in pictures of the training, without labels. DataError refuses categories that are not those of LVIS v1.
    """
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    for own, how_often in sorted(frequency.items()):
        if how_often not in ("f", "c", "r"):
            raise DataError(f"{source}: the frequency of category {own} must be f, c or r, got {how_often!r:.40}")
        if own in KNOWN and how_often != "f":
            raise DataError(
                f"{source}: category {own}, which LVIS-OW knows, must have the frequency f, got {how_often}; are these the "
                "categories of LVIS v1?"
            )
        found["known" if own in KNOWN else "unseen" if how_often == "r" else "seen"].append(own)
    return found


# -- the two files

TRAIN, VAL = "lvis_ow_train.json", "lvis_ow_val.json"
MOVED_BY = 2_000_000  # added to the ids of annotations that move to the evaluation part
COVERED = 0.5  # IoU with COCO's mask above which a mask of LVIS is the same object

Duplicates = Literal["overlap", "class", "keep"]


@dataclass(frozen=True)
class Built:
    """What `build` made."""

    files: dict[str, Path]  # "train" and "val"
    pictures: dict[str, int]  # of each file
    moved: int  # pictures that moved from train to val
    objects: dict[str, Counter[str]]  # annotations of each file, by group
    from_coco: int  # annotations of COCO in train
    duplicates: int  # annotations of LVIS that are left out, because COCO has the object
    categories: dict[str, int]  # of each group


def build(
    lvis_train: Path, lvis_val: Path, coco_train: Path, out: Path, *, duplicates: Duplicates = "overlap"
) -> Built:
    """Writes OUT/lvis_ow_train.json and OUT/lvis_ow_val.json from the annotation files of LVIS v1 and of COCO train2017.

    1. The pictures of LVIS-train with an object of an unseen category move to the evaluation part with all their annotations,
       behind those of LVIS-val. 2. The other pictures keep the annotations of known categories. 3. The annotations of COCO on
       them, without crowds, are added under the categories of `COCO_TO_LVIS`. Their ids are shifted past those of LVIS. LVIS
       labels most of these objects too; see `duplicates`.

    The training file lists the known categories, the other file all. Pictures keep their lists of absent and of incomplete
    categories. Every file is read record by record, several times. In memory are numbers of each picture, and with "overlap" the
    run lengths of COCO's masks. Both files appear at the end, when they are complete.

    Args:
        duplicates: which annotations of LVIS are left out of the training file. "overlap": those whose mask has an IoU above 0.5
            with a mask of COCO of the same category. "class": all of COCO's classes, on pictures of COCO. "keep": none, as in the
            released data set; most objects of COCO's classes are then there twice.
    """
    sources = (lvis_train, lvis_val, coco_train)
    categories = lvis.read_categories(lvis_train)
    group_of = {
        own: name for name, ids in groups(_frequencies(categories, lvis_train), str(lvis_train)).items() for own in ids
    }
    sizes: dict[int, Size] = {p["id"]: (p["height"], p["width"]) for p in lvis.read_pictures(lvis_train)}
    moved, last = set(), 0
    for a in lvis.read_annotations(lvis_train):
        last = max(last, a["id"])
        if _group(a, group_of, lvis_train) == "unseen" and a["image_id"] in sizes:
            moved.add(a["image_id"])
    val_pictures = {p["id"] for p in lvis.read_pictures(lvis_val)}
    if both := sizes.keys() & val_pictures:
        raise DataError(f"{lvis_val}: must have other pictures than {lvis_train}, got picture {min(both)} in both")
    last_val = max((a["id"] for a in lvis.read_annotations(lvis_val)), default=0)
    kept = {own: size for own, size in sizes.items() if own not in moved}
    twin = _Twins(coco_train, kept, duplicates)
    out_of = {"train": out / TRAIN, "val": out / VAL}
    objects: dict[str, Counter[str]] = {name: Counter() for name in out_of}
    said = Counter[str]()

    def train() -> Iterator[dict[str, Any]]:
        for a in lvis.read_annotations(lvis_train):
            if a["image_id"] in kept and group_of[a["category_id"]] == "known":
                if twin.has(a, lvis_train):
                    said["duplicates"] += 1
                else:
                    yield a
        for a in _of_coco(coco_train, kept):
            said["from COCO"] += 1
            yield a | {"id": a["id"] + last, "category_id": COCO_TO_LVIS[a["category_id"]], "iscrowd": 0}

    def val() -> Iterator[dict[str, Any]]:
        for a in lvis.read_annotations(lvis_val):
            if a["image_id"] in val_pictures:
                _group(a, group_of, lvis_val)
                yield a
        shift = max(MOVED_BY, last_val)
        yield from (a | {"id": a["id"] + shift} for a in lvis.read_annotations(lvis_train) if a["image_id"] in moved)

    def counted(name: str, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for a in records:
            objects[name][group_of[a["category_id"]]] += 1
            yield a

    with replacing(out_of["train"]) as train_file, replacing(out_of["val"]) as val_file:
        _write(
            train_file,
            sources,
            [c for c in categories if group_of[c["id"]] == "known"],
            (p for p in lvis.read_pictures(lvis_train) if p["id"] in kept),
            counted("train", train()),
        )
        if not said["from COCO"]:
            raise DataError(
                f"{coco_train}: must have objects on pictures of {lvis_train}, got none; is it COCO train2017?"
            )
        from_train = (p for p in lvis.read_pictures(lvis_train) if p["id"] in moved)
        _write(val_file, sources, categories, chain(lvis.read_pictures(lvis_val), from_train), counted("val", val()))
    return Built(
        out_of, {"train": len(kept), "val": len(val_pictures) + len(moved)}, len(moved), objects, said["from COCO"],
        said["duplicates"], {name: sum(g == name for g in group_of.values()) for name in SIZES},
    )  # fmt: skip


class _Twins:
    """Finds the objects of LVIS that COCO has too."""

    def __init__(self, coco: Path, kept: Mapping[int, Size], how: Duplicates) -> None:
        self._kept, self._how = kept, how
        self._pictures: set[int] = set()
        self._masks: dict[int, list[tuple[int, bytes]]] = defaultdict(list)  # by picture: LVIS's category, run lengths
        if how == "class":
            self._pictures = {p["id"] for p in lvis.read_pictures(coco)}
        elif how == "overlap":
            for a in _of_coco(coco, kept):
                (rle,) = _mask(a, kept, coco).rle()
                self._masks[a["image_id"]].append((COCO_TO_LVIS[a["category_id"]], rle["counts"]))

    def has(self, annotation: Mapping[str, Any], source: Path) -> bool:
        """Whether COCO has the object of an annotation of LVIS."""
        image, category = annotation["image_id"], annotation["category_id"]
        if self._how == "class":
            return image in self._pictures and category in COCO_TO_LVIS.values()
        others = [counts for own, counts in self._masks.get(image, ()) if own == category]
        if not others or not is_segmentation(annotation.get("segmentation")):
            return False
        size = self._kept[image]
        theirs = BitMasks.from_rle([{"size": size, "counts": counts} for counts in others], size)
        iou = mask_iou(_mask(annotation, self._kept, source), theirs, dtype=torch.float64)
        return bool((iou > COVERED).any())


def _mask(annotation: Mapping[str, Any], sizes: Mapping[int, Size], source: Path) -> BitMasks:
    name = f"{source}: annotation {annotation['id']}"
    return decode([annotation["segmentation"]], sizes[annotation["image_id"]], lambda _: name)


def _of_coco(path: Path, pictures: Mapping[int, Size]) -> Iterator[dict[str, Any]]:
    """COCO's annotations on some pictures that are no crowds, have a mask, and are of a class that LVIS has."""
    for a in lvis.read_annotations(path):
        wanted = a["image_id"] in pictures and a["category_id"] in COCO_TO_LVIS
        if wanted and not a.get("iscrowd", 0) and is_segmentation(a.get("segmentation")):
            yield a


def _frequencies(categories: Iterable[Mapping[str, Any]], path: Path) -> dict[int, str]:
    for record in categories:
        if "frequency" not in record:
            raise DataError(f"{path}: category {record['id']} must have a frequency, got none; is it an LVIS file?")
    return {record["id"]: record["frequency"] for record in categories}


def _group(annotation: Mapping[str, Any], group_of: Mapping[int, str], path: Path) -> str:
    own = annotation["category_id"]
    if own not in group_of:
        raise DataError(f"{path}: annotation {annotation['id']} must have a category of LVIS-train, got category {own}")
    return group_of[own]


def _write(
    path: Path,
    sources: Iterable[Path],
    categories: list[dict[str, Any]],
    pictures: Iterable[dict[str, Any]],
    annotations: Iterable[dict[str, Any]],
) -> None:
    """Writes a COCO file, one record a line."""
    with open(path, "x", encoding="utf-8") as file:
        info = {"description": "LVIS-OW, by sprompt lvis-ow", "sources": [source.name for source in sources]}
        file.write('{"info": ' + json.dumps(info) + ',\n"categories": ' + json.dumps(categories))
        for key, records in (("images", pictures), ("annotations", annotations)):
            file.write(f',\n"{key}": [')
            between = "\n"
            for record in records:
                file.write(between + json.dumps(record))
                between = ",\n"
            file.write("\n]")
        file.write("}\n")

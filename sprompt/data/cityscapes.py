"""Cityscapes: instances of its eight classes of objects, as a COCO dataset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.pictures import picture_size

CLASSES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
_CLASS_OF = np.array(
    [i // 1000 if i >= 1000 else i for i in range(1 << 16)]
)  # class of each pixel value; 0 for pixels of no object
_CLASS_OF[~np.isin(_CLASS_OF, list(CLASSES))] = 0
_PICTURE, _LABELS = "_leftImg8bit.png", "_gtFine_instanceIds.png"


def read_cityscapes(root: Path | str, split: str, *, keep_empty: bool = False) -> CocoDataset:
    """Pictures ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with the labels in ROOT/gtFine. Ids count the sorted names from 1.

    A pixel of *_gtFine_instanceIds.png with a value of 1000 or more is class · 1000 + number of an instance. A pixel with the
    class alone belongs to a group whose objects were not labelled one by one; the group becomes a crowd annotation. All labels
    are read at once, on all cores.
    """
    pictures = Path(root) / "leftImg8bit" / split
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.glob(f"*/*{_PICTURE}"))
    if not names:
        raise DataError(f"{pictures}: must have pictures CITY/*{_PICTURE}, got none; check the path and the split")
    labels = [Path(root) / "gtFine" / split / (name.removesuffix(_PICTURE) + _LABELS) for name in names]
    with ThreadPoolExecutor() as pool:  # threads help: decoding releases the interpreter lock
        read = list(pool.map(_instances, labels, [pictures / name for name in names]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, (height, width, found) in zip(names, read, strict=True):
        images.append({"id": len(images) + 1, "file_name": name, "height": height, "width": width})
        for one in found:
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **one})
    categories = [{"id": own, "name": name} for own, name in CLASSES.items()]
    data = {"images": images, "annotations": annotations, "categories": categories}
    return CocoDataset.from_dict(pictures, data, str(Path(root) / "gtFine" / split), keep_empty=keep_empty)


def _instances(path: Path, picture: Path) -> tuple[int, int, list[dict[str, Any]]]:
    """Height, width, and annotations without ids, by ascending value of their pixels."""
    height, width = picture_size(path)
    if picture_size(picture) != (height, width):
        raise DataError(f"{path}: must have the size of {picture}, got {height}x{width}; are they of one download?")
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except Exception as error:
        raise DataError(f"{path}: is a broken picture ({str(error)[:80]}); replace it") from None
    if values.ndim != 2 or values.min() < 0 or values.max() >= len(_CLASS_OF):
        got = f"values from {values.min()} to {values.max()}" if values.ndim == 2 else f"{values.shape[2]}"
        raise DataError(f"{path}: must have one number of 16 bits a pixel, got {got}; is it an instanceIds picture?")
    pixels = values.ravel(order="F")  # column by column, as COCO's run lengths
    things = np.flatnonzero(_CLASS_OF[pixels])
    things = things[np.argsort(pixels[things], kind="stable")]
    owners, starts = np.unique(pixels[things], return_index=True)
    found: list[dict[str, Any]] = []
    for owner, start, end in zip(owners.tolist(), starts, [*starts[1:], len(things)], strict=False):
        places = things[start:end]
        rle = coco_mask.frPyObjects(_runs(places, height, width), height, width)
        found.append(
            {"category_id": int(_CLASS_OF[owner]), "iscrowd": int(owner < 1000), "area": len(places),
             "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": rle}
        )  # fmt: skip
    return height, width, found


def _runs(places: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Uncompressed run lengths of at least one sorted place."""
    breaks = np.flatnonzero(np.diff(places) > 1)
    begins = places[np.concatenate(([0], breaks + 1))]
    ends = places[np.concatenate((breaks, [len(places) - 1]))] + 1
    edges = np.stack((begins, ends), 1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    return {"size": [height, width], "counts": counts.tolist()}

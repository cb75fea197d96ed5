"""Masks to compare saliency proposals with: those of other pictures, and the true ones. Files are of the form of `sprompt propose`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sprompt.data.annotations import CocoFile, Picture, named, parse
from sprompt.data.errors import DataError
from sprompt.data.files import read_json
from sprompt.data.seeds import SeedGrid
from sprompt.data.segmentation import decode
from sprompt.data.transforms import resized_size
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt.proposals import Proposals, padded_size
from sprompt.methods.saliency_prompt.records import annotation_records, image_record
from sprompt.ops import mask_iou
from sprompt.seeding import generator
from sprompt.study.split import write_once

IOU = 0.5  # at which two masks are of one object


def shuffled(proposals: Path, out: Path, seed: int = 0) -> Path:
    """Gives every picture of a proposal file the masks of another one: on a random circle of the pictures with masks, those of the
    next. So number, sizes and shapes are those of proposals, but have nothing to do with the picture.

    Masks of another size are resized, and are gone where that leaves no pixel. Seeds are put anew, see `seed_addresses`.
    """
    file, grid = _proposals(proposals)
    having = [p for p in sorted(file.pictures, key=lambda p: p.id) if _annotations(file, p)]
    if len(having) < 2:
        raise DataError(f"{proposals}: must have masks on two pictures to be shuffled, got {len(having)}")
    circle = [having[i] for i in torch.randperm(len(having), generator=generator(seed)).tolist()]
    donors = {p.id: donor for p, donor in zip(circle, circle[1:] + circle[:1], strict=True)}

    def records() -> Iterator[dict[str, Any]]:
        for picture in (p for p in file.pictures if p.id in donors):
            masks, scores, _ = _read(file, donors[picture.id])
            masks = masks if masks.size == picture.size else masks.resize(picture.size)
            yield from _records(picture, masks, scores, grid)

    return _written(out, file, file.pictures, records(), {"shuffled": True})


def truth(annotations: Path, proposals: Path, out: Path) -> Path:
    """Gives every picture of a proposal file that has masks, and is in a labelled file too, by file name, its true masks, of whatever
    class. Other pictures are not in the result, so that training on either file sees the same pictures.

    Crowds are left out, and masks that cannot be read, whose ids `info.left_out` has. Seeds are put anew, see `seed_addresses`.
    """
    file, grid = _proposals(proposals)
    labels = parse(read_json(annotations), str(annotations))
    pairs = [(p, labelled) for p, labelled in _in_both(file, labels) if _annotations(file, p)]
    if not pairs:
        raise DataError(
            f"{annotations}: must have pictures of {proposals}, got none; do file names start at one folder?"
        )
    left_out: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        for picture, labelled in pairs:
            masks, _, broken = _read(labels, labelled)
            left_out.extend(broken)
            yield from _records(picture, masks, torch.ones(len(masks), dtype=torch.float64), grid)

    return _written(out, file, [p for p, _ in pairs], records(), {"truth": True, "left_out": left_out})


def agreement(proposals: Path, annotations: Path | None) -> dict[str, Any]:
    """How good the masks of a proposal file are: "pictures" that have masks, and the number of "masks" in all; "precision", the share
    of masks with an IoU of at least ½ with a true one; "recall", the share of true masks (no crowds) with one with a mask.

    The shares are over the pictures that both files have, by file name; of nothing, they are None.
    """
    file = parse(read_json(proposals), str(proposals))
    right: list[bool] = []  # for every mask, whether it is one
    found: list[bool] = []  # for every true mask
    if annotations is not None:
        labels = parse(read_json(annotations), str(annotations))
        for picture, labelled in _in_both(file, labels):
            masks, true = _read(file, picture)[0], _read(labels, labelled)[0]
            same = mask_iou(masks, true) >= IOU
            right += same.any(1).tolist()
            found += same.any(0).tolist()
    counts = [len(_annotations(file, p)) for p in file.pictures]
    return {
        "pictures": sum(c > 0 for c in counts), "masks": sum(counts),
        "precision": sum(right) / len(right) if right else None, "recall": sum(found) / len(found) if found else None,
    }  # fmt: skip


def seed_addresses(masks: BitMasks, grid: SeedGrid) -> Tensor:
    """(L, 3) int64: for each of masks (L,), none of them empty, an address [0, row, col] in the grid of seeds.

    It is the cell whose centre lies in the mask and is nearest to the mask's centroid; where no centre lies in it, the cell of the
    mask's pixel that is nearest to the centroid. Only cells whose centre lies in the picture are taken.
    """
    size = masks.size
    view = resized_size(size, grid.short, grid.long) if grid.keep_ratio else (grid.short, grid.long)
    padded = padded_size(view)
    numbers = grid.grid or (padded[0] // grid.stride, padded[1] // grid.stride)
    cells = [side / number for side, number in zip(padded, numbers, strict=True)]
    centres = []  # of rows, and of columns, in pixels of the picture
    for i in range(2):
        middles = (torch.arange(numbers[i], dtype=torch.float64) + 0.5) * cells[i]
        inside = middles[middles < view[i]]
        centres.append(inside * size[i] / view[i])
    ys, xs = centres
    addresses = []
    for place in range(len(masks)):
        dense = masks[place].to_dense()
        pixels = dense.nonzero().double() + 0.5  # their middles
        y, x = centroid = pixels.mean(0)
        far = (ys - y).square()[:, None] + (xs - x).square()
        far[~dense[ys.long()][:, xs.long()]] = torch.inf
        if bool((far < torch.inf).any()):
            row, col = divmod(int(far.argmin()), len(xs))
        else:
            nearest = pixels[(pixels - centroid).square().sum(1).argmin()].tolist()
            row, col = (
                max(0, min(int(nearest[i] * view[i] / size[i] / cells[i]), len(centres[i]) - 1)) for i in range(2)
            )
        addresses.append((0, row, col))
    return torch.tensor(addresses, dtype=torch.int64).reshape(-1, 3)


# -- files
def _proposals(path: Path) -> tuple[CocoFile, SeedGrid]:
    file = parse(read_json(path), str(path))
    if "proposals" not in file.info:
        raise DataError(f"{path}: must be a file of sprompt propose, with info.proposals; is it the right file?")
    return file, SeedGrid.parse(file.info["proposals"], str(path))


def _annotations(file: CocoFile, picture: Picture) -> list[dict[str, Any]]:
    return [a for a in file.annotations[picture.id] if a["id"] not in file.no_instance]


def _read(file: CocoFile, picture: Picture) -> tuple[BitMasks, Tensor, list[int]]:
    """Masks of a picture and their scores (1 where there is none), and the ids of annotations that cannot be read."""
    masks = [decode([], picture.size, str)]
    scores, broken = [], []
    for a in _annotations(file, picture):
        try:
            mask = decode([a["segmentation"]], picture.size, str)
        except DataError:
            broken.append(a["id"])
            continue
        masks.append(mask)
        scores.append(a.get("score", 1.0))
    return BitMasks.cat(masks), torch.tensor(scores, dtype=torch.float64), broken


def _in_both(file: CocoFile, labels: CocoFile) -> list[tuple[Picture, Picture]]:
    """Pictures of a proposal file, each with that of the same name in a labelled one."""
    by_name: dict[PurePosixPath, Picture] = {}
    for picture in labels.pictures:
        if by_name.setdefault(PurePosixPath(picture.file_name), picture) is not picture:
            raise DataError(f"{labels.source}: file names must be unique, got {picture.file_name!r:.80} twice")
    pairs = [(p, by_name[name]) for p in file.pictures if (name := PurePosixPath(p.file_name)) in by_name]
    others = [p.file_name for p, labelled in pairs if p.size != labelled.size]
    if others:
        raise DataError(
            f"{labels.source}: pictures must have the size that {file.source} says, got others for {named(others)}; "
            "were they resized?"
        )
    return pairs


def _records(picture: Picture, masks: BitMasks, scores: Tensor, grid: SeedGrid) -> list[dict[str, Any]]:
    seen = masks.area() > 0
    masks, scores = masks[seen], scores[seen]
    return annotation_records(picture.id, Proposals(masks, scores, seed_addresses(masks, grid)))


def _written(
    out: Path, file: CocoFile, pictures: list[Picture], records: Iterator[dict[str, Any]], info: dict[str, Any]
) -> Path:
    annotations = [{"id": number, **record} for number, record in enumerate(records, start=1)]
    data = {
        "info": {**file.info, **info},
        "images": [image_record(p.id, p.file_name, p.size) for p in pictures],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    write_once({out: data})
    return out

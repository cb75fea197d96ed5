"""Masks to compare saliency proposals with: masks of other pictures, and true masks. Files have the form of `sprompt
propose`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sprompt.data.annotations import CocoFile, Picture, named, parse
from sprompt.data.errors import DataError
from sprompt.data.reading import read_json
from sprompt.data.seeds import SeedGrid
from sprompt.data.segmentation import decode
from sprompt.data.transforms import resized_size
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt.proposals import Proposals, padded_size
from sprompt.methods.saliency_prompt.records import annotation_records, image_record
from sprompt.ops import mask_iou
from sprompt.seeding import generator
from sprompt.study.split import write_once

IOU = 0.5  # lower bound of the IoU of two masks of one object


def shuffled(proposals: Path, out: Path, seed: int = 0) -> Path:
    """Gives every picture of a proposal file the masks of another picture. Number, sizes and shapes of masks stay realistic,
    but the masks have nothing to do with the picture.

    The pictures with masks are put in a random circle; each picture gets the masks of the next one. Masks of another size are
    resized; a mask without a pixel is then removed. `seed_addresses` chooses new seeds.
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
    """Gives every picture of a proposal file its true masks, of all classes.

    The result holds the pictures that have proposals and are in the labelled file too, by file name. Crowds are left out.
    Unreadable masks are left out too; `info.left_out` lists their ids. `seed_addresses` chooses new seeds.
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
    """The quality of the masks of a proposal file.

    "pictures": number of pictures with masks. "masks": number of masks. "precision": share of the masks with an IoU of at least
    ½ with a true mask. "recall": share of the true masks, without crowds, with an IoU of at least ½ with a mask. The shares are
    over the pictures that both files have, by file name. A share of no masks is None.
    """
    file = parse(read_json(proposals), str(proposals))
    right: list[bool] = []  # of every mask: whether it matches a true mask
    found: list[bool] = []  # of every true mask: whether it matches a mask
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
    """(L, 3) int64: an address [0, row, col] in the grid of seeds for each of masks (L,); no mask may be empty.

    Among the cells with a centre in the mask, it is the cell with the centre nearest to the mask's centroid. If the mask holds
    no centre, it is the cell of the mask's pixel nearest to the centroid. Only cells with a centre in the picture are used.
    """
    size = masks.size
    view = resized_size(size, grid.short, grid.long) if grid.keep_ratio else (grid.short, grid.long)
    padded = padded_size(view, grid.divisor)
    numbers = grid.grid or (padded[0] // grid.stride, padded[1] // grid.stride)
    cells = [side / number for side, number in zip(padded, numbers, strict=True)]
    centres = []  # centres of rows, then of columns, in pixels of the picture
    for i in range(2):
        middles = (torch.arange(numbers[i], dtype=torch.float64) + 0.5) * cells[i]
        inside = middles[middles < view[i]]
        centres.append(inside * size[i] / view[i])
    ys, xs = centres
    addresses = []
    for place in range(len(masks)):
        dense = masks[place].to_dense()
        pixels = dense.nonzero().double() + 0.5  # their centres
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
    """(masks, their scores, ids of unreadable annotations) of a picture. A mask without a score gets 1."""
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
    """Pairs of a picture of a proposal file and the picture of the same name in a labelled file."""
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

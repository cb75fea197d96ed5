"""Masks for the boxes of a COCO file, by a trained network. The work is cut into units that processes share and that survive a kill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sprompt.clock import Clock
from sprompt.data.boxes import CROWD, Box, BoxedPictures
from sprompt.data.colour import normalised
from sprompt.data.errors import DataError
from sprompt.masks import BitMasks, Size
from sprompt.methods.auto_labeler.config import LabelConfig
from sprompt.methods.auto_labeler.samples import LABEL_MARGINS, Window, box_profiles, cut, window_of
from sprompt.methods.parts import Parts, ahead, compact, write_entries, written
from sprompt.methods.saliency_prompt.generate import fingerprint
from sprompt.methods.saliency_prompt.precision import exact_products
from sprompt.nn.mask_labeler import MaskLabeler, size_class
from sprompt.ops import resize_masks

Progress = Callable[[int, int], None]

EMPTY = "whose label has no pixel"
UNREADABLE = "of pictures that cannot be read"


@dataclass(frozen=True)
class Labelled:
    """The result of one call of `label`."""

    out: Path | None  # the labelled file; None while units of other processes are missing
    objects: int  # number of objects labelled by this call
    skipped: list[dict[str, str]]  # file_name and reason of the broken pictures; all of them if `out` is there
    unlabelled: dict[str, list[int]]  # reason -> ids of the annotations without a label; all of them if `out` is there


def label(
    network: MaskLabeler,
    pictures: BoxedPictures,
    data: dict[str, Any],
    out: Path,
    config: LabelConfig,
    *,
    side: int,
    digest: str,
    unit: int = 16,
    batch: int = 8,
    index: int = 0,
    of: int = 1,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Labelled:
    """Writes the COCO file of `pictures` with masks in all boxes.

    Each annotation keeps its fields, except `segmentation`, `area` and `iscrowd`. Crowds stay as they are. Annotations without a label
    are left out: those without a box that can be used, those of unreadable pictures, and those with an empty mask. `info.unlabelled`
    lists their ids by reason. All other parts of the file are kept. Annotations are in the order of their pictures.

    Pictures are cut, in order, into units of `unit` pictures; see `sprompt.methods.parts.Parts`. The objects of a unit go through the
    network in their order, `batch` at a time. The grouping does not depend on `of`, so the bytes of the file do not either.

    Args:
        network: it is moved to `device` and set to eval mode.
        data: the content of the COCO file that `pictures` were read from.
        side: side of the crops in pixels.
        digest: identifies the COCO file. A call that continues the work of another must have the same.
        clock: measures the parts.
        progress: called with the number of finished objects and of all objects of this process. If an earlier call finished units, it
            is also called at the start.

    Raises DataError if OUT, or a unit in OUT.parts, belongs to other labels, another network or other settings.
    """
    if unit < 1 or batch < 1 or of < 1 or not 0 <= index < of:
        raise ValueError(
            f"label: unit, batch and of must be at least 1, and index lie in [0, of), got {unit=}, {batch=}, {of=}, {index=}"
        )
    clock = clock or Clock()
    units = [
        range(start, min(start + unit, len(pictures.pictures))) for start in range(0, len(pictures.pictures), unit)
    ]
    work = {"network": fingerprint(network), "crop": side, "boxes": digest, "unit": unit, "batch": batch}
    kept = data.get("info")
    info = {**(kept if isinstance(kept, dict) else {}), "labels": {**asdict(config), **work}}
    parts = Parts(out, info, len(units), index=index, of=of, results=["skipped", "unlabelled"])
    if (finished := parts.finished()) is not None:
        return Labelled(parts.out, 0, finished["skipped"], finished["unlabelled"])
    todo = parts.todo()
    count = {u: sum(len(pictures.boxes[place]) for place in units[u]) for u in parts.mine}
    done, total = sum(count[u] for u in parts.mine) - sum(count[u] for u in todo), sum(count.values())
    if progress is not None and done and todo:
        progress(done, total)
    records = _records(data, pictures) if todo else []
    labeller = _Labeller(network.to(device).eval(), config, torch.device(device), clock)
    reader = _Reader(pictures, side)
    chunks = [chunk for u in todo for chunk in _chunks(u, units[u], pictures, batch)]
    found: dict[int, dict[str, Any]] = {}  # the labels of the current unit, by annotation
    broken: dict[int, str] = {}  # its unreadable pictures
    worked = 0
    clock.start()
    for chunk, crops in ahead(chunks, reader.read):
        clock.lap("waiting for crops")
        found |= labeller.labels(crops)
        broken |= crops.broken
        worked += len(chunk.objects)
        if chunk.last:
            parts.write(chunk.unit, _unit(units[chunk.unit], pictures, records, found, broken))
            found, broken = {}, {}
            clock.lap("files")
        if progress is not None:
            progress(done + worked, total)
    clock.parts |= reader.clock.parts

    def join() -> None:
        _join(parts, data, pictures)

    path = parts.joined(join)
    if path is not None:
        finished = parts.finished()
        assert finished is not None
        return Labelled(path, worked, finished["skipped"], finished["unlabelled"])
    own = [parts.read(u) for u in parts.mine]
    return Labelled(None, worked, [entry for part in own for entry in part["skipped"]], _reasons(own))


# -- from boxes to crops
class _Chunk(NamedTuple):
    """Objects that go through the network together."""

    unit: int
    objects: list[tuple[int, Box]]  # places of their pictures, and boxes
    last: bool  # of its unit


def _chunks(unit: int, places: Sequence[int], pictures: BoxedPictures, batch: int) -> list[_Chunk]:
    objects = [(place, box) for place in places for box in pictures.boxes[place]]
    starts = range(0, max(len(objects), 1), batch)  # a unit without boxes has one empty chunk
    return [_Chunk(unit, objects[start : start + batch], start + batch >= len(objects)) for start in starts]


class _Cropped(NamedTuple):
    """Objects of a chunk with their crops. Those of unreadable pictures are not among them."""

    objects: list[tuple[int, Box]]
    windows: list[Window]
    sizes: list[Size]  # of the pictures
    crops: Tensor  # (n, 3, S, S) uint8
    profiles: Tensor  # (n, 2, S) uint8
    broken: dict[int, str]  # reasons, by the places of the unreadable pictures


class _Reader:
    """Crops of chunks. It is called by one thread; the picture that was read last stays in memory."""

    def __init__(self, pictures: BoxedPictures, side: int) -> None:
        self.pictures, self.side = pictures, side
        self.clock = Clock()
        self._place = -1
        self._image: Tensor | str = ""  # the picture of this place, or the reason why it cannot be read

    def read(self, chunk: _Chunk) -> _Cropped:
        self.clock.start()
        empty = (
            torch.zeros(0, 3, self.side, self.side, dtype=torch.uint8),
            torch.zeros(0, 2, self.side, dtype=torch.uint8),
        )
        found = _Cropped([], [], [], *empty, {})
        crops, profiles = [], []
        for place, box in chunk.objects:
            if place != self._place:
                self._place, self._image = place, self._opened(place)
                self.clock.lap("decode")
            if isinstance(self._image, str):
                found.broken[place] = self._image
                continue
            size = self.pictures.pictures[place].size
            window = window_of(box, LABEL_MARGINS)
            found.objects.append((place, box))
            found.windows.append(window)
            found.sizes.append(size)
            crops.append(cut(self._image, window, self.side))
            profiles.append(box_profiles(box, window, size, self.side))
            self.clock.lap("crop")
        return found._replace(crops=torch.stack(crops), profiles=torch.stack(profiles)) if crops else found

    def _opened(self, place: int) -> Tensor | str:
        try:
            return self.pictures.image(place)
        except DataError as error:
            return str(error).removeprefix(f"{self.pictures.folder}/")


# -- from crops to labels
@torch.inference_mode()
def probabilities(network: MaskLabeler, crops: Tensor, profiles: Tensor, classes: Sequence[int]) -> Tensor:
    """Crops (n, 3, S, S) uint8 and the profiles of their boxes (n, 2, S) -> probabilities (n, S, S) float32, 0 outside of the box."""
    with exact_products(crops.device):
        logits = network(normalised_crops(crops), classes)
        soft = interpolate(logits[:, None], size=crops.shape[2:], mode="bilinear")[:, 0].sigmoid()
        return soft * profiles[:, 0, :, None] * profiles[:, 1, None, :]


def normalised_crops(crops: Tensor) -> Tensor:
    """As the teacher of the training sees them."""
    return normalised(crops.float() / 255)


def paste(soft: Tensor, window: Window, size: Size, threshold: float) -> BitMasks:
    """The probabilities (S, S) of a window, resized to it bilinearly and compared with a threshold (strictly), as one mask of the picture.

    The bits are those of two steps in a row: S × S to the window, and the window into the picture. Neither float image exists.
    """
    height, width = size
    bits = resize_masks(soft[None], (window.y2 - window.y1, window.x2 - window.x1), threshold=threshold)
    top, left = max(0, -window.y1), max(0, -window.x1)
    y1, x1, y2, x2 = window.y1 + top, window.x1 + left, min(window.y2, height), min(window.x2, width)
    return bits.crop(top, left, y2 - y1, x2 - x1).pad(x1, width - x2, y1, height - y2)


class _Labeller:
    def __init__(self, network: MaskLabeler, config: LabelConfig, device: torch.device, clock: Clock) -> None:
        self.network, self.config, self.device, self.clock = network, config, device, clock

    def labels(self, cropped: _Cropped) -> dict[int, dict[str, Any]]:
        """{annotation: its segmentation and area}. An empty mask has an area of 0."""
        classes = [size_class(box.area) for _, box in cropped.objects]
        if not classes:
            return {}
        soft = probabilities(self.network, cropped.crops.to(self.device), cropped.profiles.to(self.device), classes)
        self.clock.lap("encoder and heads", self.device)
        by_picture: dict[int, list[tuple[Box, BitMasks]]] = defaultdict(list)
        for (place, box), window, size, own, kind in zip(
            cropped.objects, cropped.windows, cropped.sizes, soft, classes, strict=True
        ):
            by_picture[place].append((box, paste(own, window, size, self.config.thresholds[kind])))
        self.clock.lap("paste", self.device)
        found = {}
        for pairs in by_picture.values():
            masks = BitMasks.cat([mask for _, mask in pairs])
            for (box, _), rle, area in zip(pairs, masks.rle(), masks.area().tolist(), strict=True):
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
                found[box.annotation] = {"segmentation": segmentation, "area": area}
                if self.config.area == "box" and area:
                    found[box.annotation]["area"] = box.area
        self.clock.lap("run lengths")
        return found


# -- files
def _records(data: dict[str, Any], pictures: BoxedPictures) -> list[list[dict[str, Any]]]:
    """The annotations of each picture, in the order of the file."""
    place_of = {picture.id: place for place, picture in enumerate(pictures.pictures)}
    records: list[list[dict[str, Any]]] = [[] for _ in pictures.pictures]
    for record in data.get("annotations", []):
        if (place := place_of.get(record["image_id"])) is not None:
            records[place].append(record)
    return records


def _unit(
    places: Sequence[int], pictures: BoxedPictures, records: Sequence[Sequence[dict[str, Any]]],
    found: dict[int, dict[str, Any]], broken: dict[int, str],
) -> dict[str, Any]:  # fmt: skip
    """The content of the file of a unit: finished annotations, broken pictures, and annotations without a label by reason."""
    annotations = []
    unlabelled: dict[str, list[int]] = {EMPTY: [], UNREADABLE: []}
    for place in places:
        boxes = {box.annotation for box in pictures.boxes[place]}
        for record in records[place]:
            if record.get("iscrowd", 0):
                annotations.append(record)
            elif record["id"] in boxes:
                own = found.get(record["id"])
                if own is None or not own["area"]:
                    unlabelled[UNREADABLE if own is None else EMPTY].append(record["id"])
                else:
                    annotations.append({**record, **own, "iscrowd": 0})
    skipped = [
        {"file_name": pictures.pictures[place].file_name, "reason": broken[place]}
        for place in places
        if place in broken
    ]
    return {"annotations": annotations, "skipped": skipped, "unlabelled": unlabelled}


def _reasons(parts: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    return {why: [own for part in parts for own in part["unlabelled"][why]] for why in (EMPTY, UNREADABLE)}


def _join(parts: Parts, data: dict[str, Any], pictures: BoxedPictures) -> None:
    """Writes the labelled file. Only one part is in memory at a time, beside the content of the COCO file."""
    skipped: list[dict[str, str]] = []
    unlabelled = {why: ids for why, ids in pictures.unusable.items() if why != CROWD}
    for u in range(parts.units):
        part = parts.read(u)
        skipped += part["skipped"]
        for why, ids in part["unlabelled"].items():
            unlabelled[why] = unlabelled.get(why, []) + ids
    unlabelled = {why: ids for why, ids in unlabelled.items() if ids}
    with written(parts.out, parts.folder) as file:
        file.write(b'{"info":' + compact({**parts.info, "skipped": skipped, "unlabelled": unlabelled}))
        for name, value in data.items():
            if name not in ("info", "annotations"):
                file.write(b",\n" + compact(name) + b":" + compact(value))
        file.write(b',\n"annotations":[')
        write_entries(file, (record for u in range(parts.units) for record in parts.read(u)["annotations"]))
        file.write(b"]}\n")

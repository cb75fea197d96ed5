"""Crops of Mask Auto-Labeler: one object, with a margin around its box.

Where the window of a crop leaves the picture it shows the other end of the picture, because a constant border would be a region of its
own for the refinement. The mask of the box has zeros there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from sprompt.data.boxes import Box, BoxedPictures
from sprompt.data.colour import blurred, grey, normalised, recoloured, uniform
from sprompt.data.loader import Batches
from sprompt.masks import Size
from sprompt.methods.auto_labeler.config import CropConfig
from sprompt.nn.mask_labeler import MASK_STRIDE, size_class
from sprompt.seeding import generator as seeded

LABEL_MARGINS = (0.3, 0.3, 0.3, 0.3)  # of the crops that are labelled: the mean of the margins in training
_JITTER = (0.4, 0.4, 0.2, 0.1)  # strengths of brightness, contrast, saturation and hue
_BLUR = (0.1, 2.0)  # least and largest sigma in pixels, for crops of 512 pixels


class Window(NamedTuple):
    """Pixels from (x1, y1), inclusive, to (x2, y2), exclusive. It may leave the picture."""

    x1: int
    y1: int
    x2: int
    y2: int


def window_of(box: Box, margins: Sequence[float]) -> Window:
    """The window around a box. The margins of its left, upper, right and lower side are shares of half of the box."""
    left, top, right, bottom = margins
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    return Window(
        math.floor(x - (x - box.x1) * (1 + left)),
        math.floor(y - (y - box.y1) * (1 + top)),
        math.ceil(x + (box.x2 - x) * (1 + right) + 1),
        math.ceil(y + (box.y2 - y) * (1 + bottom) + 1),
    )


def cut(image: Tensor, window: Window, side: int) -> Tensor:
    """The window of a picture (3, H, W), resized to (3, side, side) by Pillow's antialiased bicubic filter; uint8. The picture repeats
    outside of itself."""
    _, height, width = image.shape
    rows, columns = np.arange(window.y1, window.y2) % height, np.arange(window.x1, window.x2) % width
    pixels = image.numpy()[:, rows[:, None], columns].transpose(1, 2, 0)
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def box_profiles(box: Box, window: Window, size: Size, side: int) -> Tensor:
    """The rows and the columns of a box in its resized window, (2, side) of 0 and 1 in uint8. Their product is the mask of the box.

    The mask has the rows int(y1) to int(y2) and the columns int(x1) to int(x2) of the picture, of size (H, W), all inclusive. It is
    resized as the picture is, and rounded.
    """
    profiles = []
    for low, high, start, end, extent in (
        (box.y1, box.y2, window.y1, window.y2, size[0]),
        (box.x1, box.x2, window.x1, window.x2, size[1]),
    ):
        places = np.arange(start, end)
        inside = (places >= int(low)) & (places <= min(int(high), extent - 1))
        line = Image.fromarray(inside.astype(np.uint8)[None]).resize((side, 1), Image.Resampling.BICUBIC)
        profiles.append(torch.from_numpy(np.array(line)[0]))
    return torch.stack(profiles)


def box_targets(profiles: Tensor) -> Tensor:
    """Profiles (B, 2, S) -> the masks of the boxes, resized bilinearly to S/4: (B, S/4, S/4) float32 from 0 to 1."""
    lines = interpolate(profiles.float(), size=profiles.shape[2] // MASK_STRIDE, mode="linear")
    return lines[:, 0, :, None] * lines[:, 1, None, :]


# -- training
class BoxedObject(NamedTuple):
    """One object in its picture."""

    image: Tensor  # (3, H, W) uint8
    box: Box
    name: str  # of the picture's file and the annotation, for messages


class Crop(NamedTuple):
    """One object as student and teacher see it."""

    student: Tensor  # (3, S, S) float32, normalised
    teacher: Tensor  # the same, without a change of colours
    profiles: Tensor  # (2, S) uint8, see `box_profiles`
    size_class: int
    name: str


@dataclass(frozen=True)
class CropBatch:
    """B objects."""

    student: Tensor  # (B, 3, S, S) float32, normalised
    teacher: Tensor  # the same shape
    boxes: Tensor  # (B, S/4, S/4) float32, see `box_targets`
    classes: list[int]  # size classes
    names: list[str]
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> CropBatch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("student", "teacher", "boxes")}
        return replace(self, **moved)


def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    return CropBatch(
        torch.stack([crop.student for crop in crops]),
        torch.stack([crop.teacher for crop in crops]),
        box_targets(torch.stack([crop.profiles for crop in crops])),
        [crop.size_class for crop in crops],
        [crop.name for crop in crops],
    )


class BoxedObjects(Dataset[BoxedObject]):
    """The objects that are trained on, picture by picture. The picture that was read last stays in memory."""

    def __init__(self, pictures: BoxedPictures, min_area: float) -> None:
        self.pictures = pictures
        self.objects = [
            (place, box) for place, boxes in enumerate(pictures.boxes) for box in boxes if box.area > min_area
        ]
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> BoxedObject:
        place, box = self.objects[index]
        if self._last is None or self._last[0] != place:
            self._last = place, self.pictures.image(place)
        file = self.pictures.pictures[place].file_name
        return BoxedObject(self._last[1], box, f"{file}, annotation {box.annotation}")


@dataclass(frozen=True)
class Cropped:
    """(object, generator) -> its crop of `side` pixels."""

    config: CropConfig
    side: int

    def __call__(self, item: BoxedObject, generator: torch.Generator) -> Crop:
        config, image, box = self.config, item.image, item.box
        left, top, right, bottom = (uniform(generator, 0, config.expansion) for _ in range(4))
        across, down = uniform(generator), uniform(generator)
        window = window_of(box, (left * across, top * down, right * (1 - across), bottom * (1 - down)))
        view = cut(image, window, self.side).float() / 255
        profiles = box_profiles(box, window, (image.shape[1], image.shape[2]), self.side)
        if uniform(generator) < config.flip:
            view = view.flip(2)
            profiles = torch.stack((profiles[0], profiles[1].flip(0)))
        student = self._recoloured(view, generator)
        return Crop(normalised(student), normalised(view), profiles, size_class(box.area), item.name)

    def _recoloured(self, view: Tensor, generator: torch.Generator) -> Tensor:
        if uniform(generator) < self.config.jitter:
            view = recoloured(view, _JITTER, generator)
        if uniform(generator) < self.config.grey:
            view = grey(view).expand(3, -1, -1)
        if uniform(generator) < self.config.blur:
            view = blurred(view, uniform(generator, *_BLUR) * self.side / 512)
        return view


class CropBatches(Batches[Crop, CropBatch]):
    """Batches of crops. Up to `together` boxes of a picture, drawn anew in each epoch, follow each other.

    Arguments as of `Batches`; `batch_size` counts objects.
    """

    def __init__(self, dataset: BoxedObjects, crops: Cropped, **order: Any) -> None:
        super().__init__(dataset, crops, collate_crops, **order)
        self.together = crops.config.together

    def order(self, epoch: int) -> list[int]:
        drawn = seeded(self.seed, epoch)
        of_picture: dict[int, list[int]] = {}
        for index in torch.randperm(self.number, generator=drawn).tolist():
            of_picture.setdefault(self.dataset.objects[index][0], []).append(index)
        runs = [
            own[start : start + self.together]
            for own in of_picture.values()
            for start in range(0, len(own), self.together)
        ]
        return [index for run in torch.randperm(len(runs), generator=drawn).tolist() for index in runs[run]]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[CropBatch]:
        for batch in super().epoch(epoch, start_step):
            yield replace(batch, epoch=epoch)

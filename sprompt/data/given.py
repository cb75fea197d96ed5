"""Pictures that a program passes in: paths, PIL images, arrays and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sprompt.data.errors import DataError
from sprompt.data.pictures import read_picture, shown
from sprompt.data.sample import Sample
from sprompt.masks import BitMasks, words_for

Given = str | Path | Image.Image | np.ndarray | Tensor


class GivenPictures(Dataset[Sample]):
    """Pictures as samples without masks. The image_id of a picture is its place in the sequence. A file is read when its
    sample is asked for."""

    def __init__(self, pictures: Sequence[Given]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture = self.pictures[index]
        name = str(picture) if isinstance(picture, (str, Path)) else f"picture {index}"
        image = as_rgb(picture, name)
        size = (image.shape[1], image.shape[2])
        none = BitMasks(torch.zeros(0, words_for(size[0] * size[1]), dtype=torch.int32), size)
        return Sample(image, none, torch.zeros(0, dtype=torch.int64), index, name, size)


def as_rgb(picture: Any, name: str) -> Tensor:
    """uint8 (3, H, W) of a path, a PIL image, an array (H, W), (H, W, 3 or 4), or a tensor (1 or 3, H, W).

    Paths and PIL images become RGB as `sprompt.data.pictures.shown` says. Floats must lie between 0 and 1. A fourth channel
    (transparency) is dropped. Any other value raises DataError with the picture's name.
    """
    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    if isinstance(picture, Image.Image):
        picture = shown(picture, name)
    elif isinstance(picture, np.ndarray):
        if picture.ndim == 2:
            picture = picture[..., None]
        if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
            raise DataError(f"{name}: an array must have shape (H, W), (H, W, 3) or (H, W, 4), got {picture.shape}")
        picture = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:3]
    if not isinstance(picture, Tensor):
        raise DataError(f"{name}: must be a path, a PIL image, an array or a tensor, got {type(picture).__name__}")
    if picture.dim() != 3 or picture.shape[0] not in (1, 3) or 0 in picture.shape:
        raise DataError(f"{name}: a tensor must have shape (3, H, W), got {tuple(picture.shape)}")
    picture = picture.expand(3, -1, -1)
    if picture.is_floating_point():
        low, high = float(picture.min()), float(picture.max())
        if not (low >= 0 and high <= 1):
            raise DataError(f"{name}: floats must lie between 0 and 1, got {low:g} to {high:g}; divide by 255")
        picture = (picture.float() * 255).round().to(torch.uint8)
    if picture.dtype != torch.uint8:
        raise DataError(f"{name}: must hold uint8, or floats between 0 and 1, got {picture.dtype}")
    return picture.cpu().contiguous()

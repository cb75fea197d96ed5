"""A folder of pictures without labels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sprompt.data.annotations import named
from sprompt.data.errors import DataError
from sprompt.data.pictures import EXTENSIONS, read_picture
from sprompt.data.sample import Sample
from sprompt.masks import BitMasks, words_for


class PictureFolder(Dataset[Sample]):
    """The pictures in a folder, and in those below it if `recursive`, as samples without masks.

    They are told by their extension and sorted by their path from the folder; an image_id is a place in that list. Hidden files
    and folders are passed over. A broken picture is found when it is read: DataError names it.
    """

    def __init__(self, path: Path | str, *, recursive: bool = True) -> None:
        self.path = Path(path)
        self.problems: list[str] = []
        paths, others = _listed(self.path, recursive)
        if others:
            self.problems.append(f"{self.path}: {len(others)} files are no pictures and left out: {named(others)}")
        if not paths:
            raise DataError(
                f"{self.path}: must hold pictures ({', '.join(sorted(EXTENSIONS))}), got none; check the path"
            )
        self.file_names: list[str] = paths  # relative, with /
        self.image_ids: list[int] = list(range(len(paths)))
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        own = self.image_ids[index]
        path = self.path / self.file_names[own]
        image = read_picture(path)
        size = (image.shape[1], image.shape[2])
        none = BitMasks(torch.zeros(0, words_for(size[0] * size[1]), dtype=torch.int32), size)
        return Sample(image, none, torch.zeros(0, dtype=torch.int64), own, str(path), size)

    def subset(self, indices: Iterable[int]) -> PictureFolder:
        """The pictures at these places, with their image_ids."""
        part = copy(self)
        part.image_ids = [self.image_ids[i] for i in indices]
        return part


def _listed(folder: Path, recursive: bool) -> tuple[list[str], list[str]]:
    """Pictures and other files, as sorted relative paths."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: must be a folder that can be listed, got '{error.strerror}'; check the path"
        )

    pictures: list[str] = []
    others: list[str] = []
    seen: set[str] = set()  # where links go in a circle
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:
            folders[:] = []
            continue
        seen.add(here)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for file in files:
            if not file.startswith("."):
                relative = (Path(parent) / file).relative_to(folder).as_posix()
                (pictures if Path(file).suffix.lower() in EXTENSIONS else others).append(relative)
    return sorted(pictures), sorted(others)

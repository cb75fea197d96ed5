"""A folder of pictures without labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from copy import copy
from pathlib import Path

import torch
from torch.utils.data import Dataset

from sprompt.data.annotations import named
from sprompt.data.errors import DataError
from sprompt.data.listed import read_list
from sprompt.data.pictures import EXTENSIONS, read_picture
from sprompt.data.sample import Sample
from sprompt.masks import BitMasks, words_for


class PictureFolder(Dataset[Sample]):
    """The pictures of a folder, as samples without masks. `recursive` includes the pictures of its subfolders.

    A file is a picture if its extension is one of `EXTENSIONS`. Pictures are sorted by their path from the folder; an image_id
    is a place in that list. Hidden files and folders are skipped. Links are followed, also to files outside of the folder. A broken
    picture is found when it is read: DataError names it. The same holds for a link to nothing, and for a pipe, socket or device with
    the name of a picture.

    Args:
        only: a text file with the names of the pictures to take, see `sprompt.data.listed.read_list`; None takes all.
    """

    def __init__(self, path: Path | str, *, recursive: bool = True, only: Path | str | None = None) -> None:
        self.path = Path(path)
        self.problems: list[str] = []
        paths, others = _listed(self.path, recursive)
        if only is not None:
            wanted = read_list(only, paths, str(self.path))
            paths = [name for name in paths if name in wanted]
        elif others:
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
        """The pictures at these places; they keep their image_ids."""
        part = copy(self)
        part.image_ids = [self.image_ids[i] for i in indices]
        return part


class Unbroken(Dataset[Sample]):
    """A folder's pictures for training without labels. The next readable picture takes the place of a broken one.

    Each process that meets a broken picture names it once, on stderr. The choice of the next picture depends on the files only,
    so a resumed run sees the same pictures. Raises DataError if all pictures are broken.
    """

    def __init__(self, pictures: PictureFolder) -> None:
        self.pictures = pictures
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        for place in (*range(index, len(self)), *range(index)):
            if place in self._broken:
                continue
            try:
                return self.pictures[place]
            except DataError as error:
                self._broken.add(place)
                print(f"left out: {error}", file=sys.stderr, flush=True)
        raise DataError(f"{self.pictures.path}: must hold a picture that can be read, all {len(self)} are broken")


def _listed(folder: Path, recursive: bool) -> tuple[list[str], list[str]]:
    """(pictures, other files), as sorted paths relative to the folder."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: must be a folder that can be listed, got '{error.strerror}'; check the path"
        )

    pictures: list[str] = []
    others: list[str] = []
    seen: set[str] = set()  # folders already listed, since symbolic links may form a cycle
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

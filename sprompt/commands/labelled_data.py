"""Options that name labelled pictures on the command line."""

import dataclasses
from pathlib import Path
from typing import Literal

from sprompt.commands import run_folder
from sprompt.data.coco import CocoDataset


@dataclasses.dataclass
class LabelledData:
    """Labelled pictures: COCO-style (a folder and a JSON file), Cityscapes, or CTW1500."""

    images: Path | None = None
    """Folder of the pictures. For cityscapes: the folder into which the data set was unpacked."""
    annotations: Path | None = None
    """COCO-style JSON file with the instances. For ctw1500: the folder of the label files."""
    format: Literal["coco", "cityscapes", "ctw1500"] = "coco"
    """Format of the labels."""
    split: str = "train"
    """For format cityscapes: the part to use, train or val."""
    only: Path | None = None
    """For format coco: text file that lists the pictures to use. Each line holds a file name of the COCO file. `sprompt
    split` writes such lists. Default: all pictures of the file. fraction then is a share of the list."""
    fraction: float = 1.0
    """Share of the pictures to use, above 0 and at most 1. They are drawn at random."""
    subset_seed: int = 0
    """Seed of the random choice of the pictures for fraction."""
    subset_list: Path | None = None
    """JSON file with lists of the pictures to use, instead of fraction: {percent: {run: [positions in the images array]}},
    such as COCO_supervision.txt."""
    subset_percent: str = "10.0"
    """Key of the percentage in subset_list."""
    subset_run: str = "1"
    """Key of the run in subset_list."""

    def given(self) -> bool:
        return self.images is not None

    def open(self, name: str, *, keep_empty: bool, class_agnostic: bool = False) -> CocoDataset:
        """Opens the data set.

        Args:
            name: the option that error messages name.
            keep_empty: keep pictures without annotations.
            class_agnostic: pool the categories. Needs format coco.
        """
        from sprompt.data import subsets

        if class_agnostic and self.format != "coco":
            raise ValueError(f"--class-agnostic: needs --{name}.format coco, got {self.format}")
        if self.only is not None and self.format != "coco":
            raise ValueError(f"--{name}.only: needs --{name}.format coco, got {self.format}")
        dataset = self._open(name, keep_empty, class_agnostic)
        if self.subset_list is not None:
            if self.fraction != 1.0:
                raise ValueError(f"--{name}.fraction: must be left out if --{name}.subset-list is given")
            return subsets.from_list(dataset, self.subset_list, self.subset_percent, self.subset_run)
        return dataset if self.fraction == 1.0 else subsets.by_fraction(dataset, self.fraction, self.subset_seed)

    def _open(self, name: str, keep_empty: bool, class_agnostic: bool) -> CocoDataset:
        if self.images is None:
            raise ValueError(f"--{name}.images: must be given")
        images = run_folder.existing(self.images, f"{name}.images", folder=True)
        if self.format == "cityscapes":
            from sprompt.data.cityscapes import read_cityscapes

            if self.annotations is not None:
                raise ValueError(f"--{name}.annotations: must be left out for format cityscapes")
            return read_cityscapes(images, self.split, keep_empty=keep_empty)
        if self.annotations is None:
            raise ValueError(f"--{name}.annotations: must be given for format {self.format}")
        labels = run_folder.existing(self.annotations, f"{name}.annotations", folder=self.format == "ctw1500")
        if self.format == "ctw1500":
            from sprompt.data.ctw1500 import read_ctw1500

            return read_ctw1500(images, labels, keep_empty=keep_empty)
        only = None if self.only is None else run_folder.existing(self.only, f"{name}.only", folder=False)
        return CocoDataset(images, labels, class_agnostic=class_agnostic, keep_empty=keep_empty, only=only)

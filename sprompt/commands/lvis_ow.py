"""`sprompt lvis-ow`: builds the data set LVIS-OW from the annotation files of LVIS and COCO."""

import dataclasses
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.lvis_ow import SIZES, Built, Duplicates


@dataclasses.dataclass
class LvisOw:
    """Builds LVIS-OW, a split of LVIS v1 for open-world segmentation.

    Writes OUT/lvis_ow_train.json, with labels of 123 known categories, and OUT/lvis_ow_val.json, with labels of all: COCO files
    for --data.annotations. Their pictures are those of COCO: --data.images is the folder that holds train2017 and val2017.
    """

    lvis_train: Path
    """Annotations lvis_v1_train.json."""
    lvis_val: Path
    """Annotations lvis_v1_val.json."""
    coco_train: Path
    """Annotations instances_train2017.json."""
    out: Path = Path("lvis_ow")
    """Folder for the two files."""
    duplicates: Duplicates = "overlap"
    """Labels of LVIS that are left out of the training, because COCO labels the object too. overlap: a mask of the same
    category has an IoU above 0.5. class: all of COCO's classes. keep: none, as in the released data set, which has most objects
    of COCO's classes twice."""

    def run(self) -> None:
        from sprompt.data.lvis_ow import build

        def given(path: Path, option: str) -> Path:
            return run_folder.existing(path, option, folder=False)

        built = build(
            given(self.lvis_train, "lvis-train"),
            given(self.lvis_val, "lvis-val"),
            given(self.coco_train, "coco-train"),
            run_folder.to_write(self.out, folder=True),
            duplicates=self.duplicates,
        )
        show(built)


def show(built: Built) -> None:
    """Prints what was made, and what differs from LVIS v1."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("", "categories", "objects: train", "val"):
        table.add_column(column, justify="right" if column else "left")
    for name, number in built.categories.items():
        table.add_row(name, str(number), *(str(built.objects[part][name]) for part in ("train", "val")))
    Console().print(table)
    print(
        f"{built.from_coco} objects of train are labels of COCO; {built.duplicates} labels of LVIS of the same objects are left out"
    )
    print(f"{built.moved} pictures with objects of unseen categories moved from train to val")
    for part, file in built.files.items():
        print(f"{built.pictures[part]} pictures: {file}")
    if built.categories != SIZES:
        expected = ", ".join(f"{number} {name}" for name, number in SIZES.items())
        print(f"warning: LVIS v1 has {expected} categories; results are not comparable with those on LVIS-OW")

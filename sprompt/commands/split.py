"""`sprompt split`: splits a COCO file into a file for training and a file for validation."""

import dataclasses
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.split import Part


@dataclasses.dataclass
class Split:
    """Splits labelled pictures into a part for training and a part for validation that hold the same classes.

    Writes OUT/train.json and OUT/val.json (COCO files), and OUT/train.txt and OUT/val.txt (lists of their pictures, one file
    name a line). Pictures stay where they are. A rare class gets into both parts if it has at least two pictures and the search
    finds a way. Files of an earlier split in OUT are replaced. Other files are never replaced.
    """

    annotations: Path
    """COCO file of the labelled pictures."""
    out: Path = Path("split")
    """Folder for the parts."""
    val_share: float = 0.2
    """Share of the pictures for validation, between 0 and 1."""
    seed: int = 0
    """Seed of the random choice of the pictures."""
    together: str | None = None
    """A key of the pictures' records in the file, such as video. Pictures with the same value of this key go to the same
    part."""

    def run(self) -> None:
        from sprompt.data.split import split

        annotations = run_folder.existing(self.annotations, "annotations", folder=False)
        out = run_folder.to_write(self.out, folder=True)
        parts = split(annotations, out, val_share=self.val_share, seed=self.seed, together=self.together)
        show(*parts)


def show(train: Part, val: Part) -> None:
    """Prints the numbers of pictures and objects of each class in each part."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sprompt.data.annotations import named

    table = Table()
    for column in ("", "pictures: train", "val", "objects: train", "val"):
        table.add_column(column, justify="right" if column else "left")
    for name in train.pictures:
        numbers = [part.pictures[name] for part in (train, val)] + [part.objects[name] for part in (train, val)]
        table.add_row(Text(name), *map(str, numbers))
    table.add_section()
    totals = [train.images, val.images, sum(train.objects.values()), sum(val.objects.values())]
    table.add_row("all", *map(str, totals))
    Console().print(table)
    lonely = [name for name in train.pictures if (train.pictures[name] > 0) != (val.pictures[name] > 0)]
    if lonely:
        print(f"  classes in one part only: {named(lonely, 20)}")
    for part in (train, val):
        print(f"{part.images} pictures: {part.file} and {part.names}")

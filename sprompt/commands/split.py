"""`sprompt split`: a COCO file to one for training and one for validation."""

import dataclasses
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.split import Part


@dataclasses.dataclass
class Split:
    """Splits labelled pictures into a part for training and a part for validation that hold the same classes.

    Writes OUT/train.json and OUT/val.json (COCO files), and OUT/train.txt and OUT/val.txt (lists of their pictures, one file name a
    line). Pictures stay where they are. Rare classes are put into both parts where they have two pictures or more. Files of an earlier
    split in OUT are replaced, other files never.
    """

    annotations: Path
    """COCO file of the labelled pictures."""
    out: Path = Path("split")
    """Folder for the parts."""
    val_share: float = 0.2
    """Share of the pictures for validation."""
    seed: int = 0
    """Chooses the pictures."""
    together: str | None = None
    """A key of the pictures' records in the file, such as video: pictures with the same value never go to different parts."""

    def run(self) -> None:
        from sprompt.data.split import split

        annotations = run_folder.existing(self.annotations, "annotations", folder=False)
        parts = split(annotations, self.out, val_share=self.val_share, seed=self.seed, together=self.together)
        show(*parts)


def show(train: Part, val: Part) -> None:
    """Pictures and objects by class and part."""
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

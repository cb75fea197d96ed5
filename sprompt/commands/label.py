"""`sprompt label`: writes masks into the boxes of a COCO file."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from sprompt.commands import run_folder
from sprompt.data.annotations import left_out, line_about
from sprompt.data.boxes import CROWD, read_boxes
from sprompt.data.reading import read_json
from sprompt.methods.auto_labeler.config import LabelConfig


@dataclasses.dataclass
class Label:
    """Writes a COCO file with a mask for every box, by a network of `sprompt labeler`. `sprompt finetune` trains on this file.

    If you start the same command again after a kill, it goes on where it stopped. To split the work over four processes, start
    them with --shard 0/4 to --shard 3/4, or use `accelerate launch -m sprompt.cli label ...`. The file does not depend on the
    number of processes. Boxes that get no mask are reported and recorded in the file.
    """

    images: Path
    """Folder of the pictures."""
    annotations: Path
    """COCO-style JSON file with the boxes."""
    checkpoint: Path
    """The network: the run folder or the file of `sprompt labeler`."""
    out: Path = Path("labels.json")
    """The file to write (COCO format)."""
    shard: str | None = None
    """Share of the pictures for this process, as index/count with index from 0 to count - 1. Default: all pictures, or under
    a launcher this process's share."""
    batch_size: int = 8
    """Number of objects that go through the network together."""
    compare: bool = False
    """Compare the labels with the masks in --annotations, and print their IoU by category and by size."""
    cpu: bool = False
    """Do not use a GPU."""
    labels: LabelConfig = dataclasses.field(default_factory=LabelConfig)
    """From the network's probabilities to masks."""

    def run(self) -> None:
        import torch

        from sprompt.clock import Clock
        from sprompt.engine.progress import Progress
        from sprompt.methods.auto_labeler.label import label
        from sprompt.methods.auto_labeler.network import load_network

        index, count = run_folder.share(self.shard)
        out = run_folder.to_write(self.out, folder=False)
        images = run_folder.existing(self.images, "images", folder=True)
        source = run_folder.existing(self.annotations, "annotations", folder=False)
        network, sizes = load_network(run_folder.labeler_file(self.checkpoint))
        data = read_json(source)
        pictures = read_boxes(images, data, str(source))
        cuda = torch.cuda.is_available() and not self.cpu
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        boxes = sum(map(len, pictures.boxes))
        share = f", share {index} of {count}" if count > 1 else ""
        print(f"{boxes} boxes in {len(pictures.pictures)} pictures of {source}{share}", flush=True)
        for problem in pictures.problems:
            print(f"  {problem}")
        if crowds := pictures.unusable[CROWD]:
            stay = "stays as it is" if len(crowds) == 1 else "stay as they are"
            print(f"  {line_about(str(source), crowds, f'{CROWD} {stay}')}")
        clock = Clock()
        with Progress("label", boxes) as bar:
            done = label(
                network, pictures, data, out, self.labels, side=sizes.crop, digest=str(run_folder.digest(source)),
                batch=self.batch_size, index=index, of=count, device=device, clock=clock, progress=bar.reach,
            )  # fmt: skip
        for broken in done.skipped:
            print(f"  no labels: {broken['reason']}")
        for why, ids in done.unlabelled.items():
            if why not in pictures.unusable and ids:
                print(f"  {left_out(str(source), ids, why)}")
        if done.objects:
            print(f"  {clock.rates(done.objects, 'objects')}")
        if done.out is None:
            print(f"share {index} of {count} is done; {self.out} appears when the other shares are done")
            return
        without = sum(len(ids) for why, ids in done.unlabelled.items() if why not in pictures.unusable)
        print(f"{boxes - without} masks are in {done.out}")
        if self.compare:
            self._compare(pictures, data)

    def _compare(self, pictures: Any, data: dict[str, Any]) -> None:
        from rich.console import Console

        from sprompt.methods.auto_labeler.quality import quality

        measured = quality(pictures, data, read_json(self.out))
        if not measured["objects"]:
            raise ValueError(f"--compare: needs masks in {self.annotations}, got none")
        Console().print(_table(measured))


def _table(measured: dict[str, Any]) -> Any:
    """A table of mean IoUs in percent."""
    from rich.table import Table

    table = Table(title=f"IoU of {measured['objects']} labels with true masks, mean over categories")
    table.add_column("objects")
    table.add_column("IoU", justify="right")
    sizes = {"small": "below 32² pixels", "medium": "from 32² to 96²", "large": "from 96² on"}
    rows = [("all", measured["IoU"])]
    rows += [(f"boxes {words}", measured[name]) for name, words in sizes.items() if name in measured]
    rows += list(measured["per_class"].items())
    for name, value in rows:
        table.add_row(name, f"{100 * value:.1f}")
    return table

"""`sprompt propose`: pictures without labels to a file of saliency mask proposals."""

import dataclasses
import os
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.reading import read_json
from sprompt.engine.progress import Progress
from sprompt.methods.saliency_prompt import ProposalConfig, generate
from sprompt.nn.distributed import launched
from sprompt.nn.weights import open_backbone


@dataclasses.dataclass
class Propose:
    """Finds saliency mask proposals in a folder of pictures: the masks that pre-training takes for labels.

    Killed and started again it goes on where it was. Work is split over processes by --shard 0/4 to 3/4, or by
    `accelerate launch -m sprompt.cli propose ...`; the file is the same however it is split. Pictures that cannot be read are
    reported by name and recorded in the file.
    """

    images: Path
    """Folder of pictures, subfolders included."""
    backbone: Path
    """Self-supervised backbone: a file of DenseCL, MoCo-v2, SwAV or torchvision, or the run folder or file of `sprompt backbone`."""
    out: Path = Path("proposals.json")
    """The file to write (COCO format)."""
    only: Path | None = None
    """A list of the pictures to take, one file name a line, as `sprompt split` writes it. Default: all pictures of the folder."""
    shard: str | None = None
    """Which share of the pictures this process takes, as index/count; default: all of them, or this process's of a launcher's."""
    vectors: bool = False
    """Write the seeds' feature vectors beside it (OUT.vectors.safetensors, float16)."""
    cpu: bool = False
    """Do not use a GPU."""
    proposals: ProposalConfig = dataclasses.field(default_factory=ProposalConfig)
    """How masks are found and which are kept."""

    def run(self) -> None:
        import torch

        index, count = self._share()
        pictures = run_folder.folder_of(self.images, self.only)
        backbone = open_backbone(run_folder.backbone_file(self.backbone, "backbone"))
        cuda = torch.cuda.is_available() and not self.cpu
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        share = f", share {index} of {count}" if count > 1 else ""
        print(f"{len(pictures)} pictures in {self.images}{share}", flush=True)
        for problem in pictures.problems:
            print(f"  {problem}")
        with Progress("propose", len(pictures)) as bar:
            done = generate(
                pictures, backbone, self.proposals, self.out, index=index, of=count, device=device,
                vectors=self.vectors, progress=bar.reach,
            )  # fmt: skip
        for broken in done.skipped:
            print(f"  left out: {broken['reason']}")
        if done.out is None:
            print(f"share {index} of {count} is done; {self.out} appears when the others are")
        else:
            found = len(read_json(done.out)["annotations"])
            print(f"{found} masks in {len(pictures)} pictures: the proposals are in {done.out}")

    def _share(self) -> tuple[int, int]:
        if self.shard is None:
            return launched()
        index, slash, count = self.shard.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"--shard: must be index/count with index from 0 to count - 1, got {self.shard}")
        return int(index), int(count)

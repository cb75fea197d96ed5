"""`sprompt propose`: finds saliency mask proposals in pictures without labels and writes them to a file."""

import dataclasses
import os
from pathlib import Path

from sprompt.commands import run_folder
from sprompt.data.reading import read_json
from sprompt.engine.progress import Progress
from sprompt.methods.saliency_prompt import ProposalConfig, generate
from sprompt.nn.weights import open_backbone


@dataclasses.dataclass
class Propose:
    """Finds saliency mask proposals in a folder of pictures. Pre-training uses these masks as labels.

    If you start the same command again after a kill, it goes on where it stopped. To split the work over four processes, start
    them with --shard 0/4 to --shard 3/4, or use `accelerate launch -m sprompt.cli propose ...`. The file does not depend on the
    number of processes. Pictures that cannot be read are reported by name and recorded in the file.
    """

    images: Path
    """Folder of pictures, subfolders included."""
    backbone: Path
    """A backbone: a file of DenseCL, MoCo-v2, SwAV, torchvision, EfficientNet-Lite, Swin or a ViT (MAE, DeiT, DINO, DINOv2), the run
    folder or file of `sprompt backbone`, or `imagenet` for the weights of the extra of this name."""
    out: Path = Path("proposals.json")
    """The file to write (COCO format)."""
    only: Path | None = None
    """Text file that lists the pictures to use, one file name a line; `sprompt split` writes such lists. Default: all
    pictures."""
    shard: str | None = None
    """Share of the pictures for this process, as index/count with index from 0 to count - 1. Default: all pictures, or under
    a launcher this process's share."""
    vectors: bool = False
    """Write also the feature vectors of the seeds, to OUT with the suffix .vectors.safetensors (float16)."""
    cpu: bool = False
    """Do not use a GPU."""
    proposals: ProposalConfig = dataclasses.field(default_factory=ProposalConfig)
    """Search and selection of the masks."""

    def run(self) -> None:
        import torch

        index, count = run_folder.share(self.shard)
        out = run_folder.to_write(self.out, folder=False)
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
                pictures, backbone, self.proposals, out, index=index, of=count, device=device,
                vectors=self.vectors, progress=bar.reach,
            )  # fmt: skip
        for broken in done.skipped:
            print(f"  left out: {broken['reason']}")
        if done.out is None:
            print(f"share {index} of {count} is done; {self.out} appears when the other shares are done")
        else:
            found = read_json(done.out)
            masks, read = len(found["annotations"]), len(found["images"])
            print(f"{masks} masks in {read} pictures: the proposals are in {done.out}")

"""`sprompt predict`: masks of a folder of pictures."""

import dataclasses
import json
from pathlib import Path

from sprompt.commands import runs
from sprompt.commands.testing import Testing
from sprompt.files import atomic_write
from sprompt.models.knet import KNetConfig


@dataclasses.dataclass
class Predict:
    """Finds the objects in a folder of pictures.

    Writes OUT/predictions.json (COCO results) and OUT/pictures.json (which picture an image_id is, and the categories).
    Pictures that cannot be read are reported by name and left out.
    """

    images: Path
    """Folder of pictures, subfolders included."""
    model: Path
    """Run folder or model file."""
    out: Path = Path("runs/predict")
    """Run folder."""
    cpu: bool = False
    """Do not use a GPU."""
    test: Testing = dataclasses.field(default_factory=Testing)
    """How pictures are predicted."""

    def run(self) -> None:
        from sprompt.data.folder import PictureFolder
        from sprompt.engine.predict import predict_to_file

        pictures = PictureFolder(runs.existing(self.images, "images", folder=True))
        model, classes, said = runs.open_model(self.model, KNetConfig())
        runs.say(said)
        runs.begin(self.out, self)
        problems = list(pictures.problems)
        if runs.first():
            listing = {
                "images": [{"id": i, "file_name": name} for i, name in enumerate(pictures.file_names)],
                "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
            }
            atomic_write(self.out / "pictures.json", json.dumps(listing) + "\n")
        ids = range(1, len(classes) + 1)
        count = predict_to_file(
            model, pictures, self.out / runs.PREDICTIONS, ids, cpu=self.cpu, problems=problems,
            **dataclasses.asdict(self.test),
        )  # fmt: skip
        for problem in problems:
            print(f"  {problem}")
        runs.say(f"{count} objects in {len(pictures)} pictures: {self.out / runs.PREDICTIONS}")

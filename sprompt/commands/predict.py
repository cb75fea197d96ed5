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
    Pictures that cannot be read are reported by name and left out. A picture has up to --test.max-per-image results whatever their
    scores; take those above a score that suits you.
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
        model, classes, size, said = runs.open_model(self.model, KNetConfig())
        runs.say(said)
        text = runs.begin(self.out, self)
        for problem in pictures.problems:
            runs.say(f"  {problem}")
        problems: list[str] = []
        names = classes or [str(number) for number in range(model.num_classes)]
        if runs.first():
            listing = {
                "images": [{"id": i, "file_name": name} for i, name in enumerate(pictures.file_names)],
                "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
            }
            atomic_write(self.out / "pictures.json", json.dumps(listing) + "\n")
        predict_to_file(
            model, pictures, self.out / runs.PREDICTIONS, range(1, len(names) + 1), cpu=self.cpu, problems=problems,
            **self.test.sized(size),
        )  # fmt: skip
        for problem in problems:
            print(f"  left out: {problem}")
        runs.keep(self.out, text)
        runs.say(f"the objects in {len(pictures)} pictures are in {self.out / runs.PREDICTIONS}, scores from 0 to 1")

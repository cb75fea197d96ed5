"""`sprompt predict`: masks of a folder of pictures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sprompt.atomic import atomic_write
from sprompt.commands import run_folder
from sprompt.commands.prediction import Prediction
from sprompt.data.annotations import parse_head
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.reading import read_json
from sprompt.models.knet import KNetConfig
from sprompt.models.registry import ModelConfig
from sprompt.nn.distributed import is_first


@dataclasses.dataclass
class Predict:
    """Finds the objects in a folder of pictures.

    Writes OUT/predictions.json (COCO results) and OUT/pictures.json (the file of each image_id, and the categories). With
    --draw True it also writes every picture with its objects into OUT/drawn. It leaves out each picture that cannot be read and
    prints its name. pictures.json gives the reason as "problem".
    """

    images: Path
    """Folder of pictures, subfolders included."""
    checkpoint: Path
    """Trained model: a run folder, or a file."""
    out: Path = Path("runs/predict")
    """Run folder."""
    only: Path | None = None
    """Text file that lists the pictures to use, one file name a line; `sprompt split` writes such lists. Default: all
    pictures."""
    threshold: float | None = None
    """Write only objects with a score above this threshold, which is at least 0 and below 1. Default: all objects."""
    draw: bool = False
    """Draw the objects on the pictures, into OUT/drawn. Without --threshold only objects with a score above 0.3 are drawn."""
    ids: Path | None = None
    """COCO file to take image ids and category ids from, by file name and class name. Default: image ids count from 0,
    category ids from 1."""
    cpu: bool = False
    """Do not use a GPU."""
    model: ModelConfig = dataclasses.field(default_factory=KNetConfig)
    """The network in --checkpoint. Give it only if the file does not name its network, such as an official release."""
    test: Prediction = dataclasses.field(default_factory=Prediction)
    """Settings of the prediction."""

    def run(self) -> None:
        from sprompt.clock import Clock
        from sprompt.engine.predict import predict_to_file
        from sprompt.engine.trained import load

        above = self.threshold or 0.0
        if not 0 <= above < 1:
            raise ValueError(f"--threshold: must be at least 0 and below 1, got {self.threshold}")
        pictures = run_folder.folder_of(self.images, self.only)
        trained = load(self.checkpoint, self.model, "cpu")
        run_folder.say(trained.about)
        for problem in pictures.problems:
            run_folder.say(f"  {problem}")
        image_ids, category_ids = self._ids(pictures, trained.names)
        problems: dict[int, str] = {}
        clock = Clock()
        with run_folder.begun(self.out, self) as text:
            count = predict_to_file(
                trained.model, pictures, self.out / run_folder.PREDICTIONS, category_ids, cpu=self.cpu, problems=problems,
                above=above, image_ids=image_ids, clock=clock, **self.test.sized(trained.size),
            )  # fmt: skip
            for problem in problems.values():
                run_folder.say(f"  left out: {problem}")
            if is_first():
                listing = {
                    "images": [
                        {"id": own, "file_name": name} | ({"problem": problems[place]} if place in problems else {})
                        for place, (own, name) in enumerate(zip(image_ids, pictures.file_names, strict=True))
                    ],
                    "categories": [{"id": i, "name": n} for i, n in zip(category_ids, trained.names, strict=True)],
                }
                atomic_write(self.out / "pictures.json", json.dumps(listing) + "\n")
                if self.draw:
                    self._draw(pictures, trained.names, image_ids, category_ids)
            run_folder.write_config(self.out, text)
        run_folder.say(
            f"{count} objects with scores above {above:g}, in {len(pictures) - len(problems)} pictures, are in "
            f"{self.out / run_folder.PREDICTIONS}"
        )
        run_folder.say(f"  {clock.summary(len(pictures) - len(problems))}")

    def _ids(self, pictures: PictureFolder, names: list[str]) -> tuple[list[int], list[int]]:
        """The image ids of the pictures and the category ids of the classes."""
        if self.ids is None:
            return list(range(len(pictures.file_names))), list(range(1, len(names) + 1))
        listed, categories_of, _ = parse_head(
            read_json(run_folder.existing(self.ids, "ids", folder=False)), str(self.ids)
        )
        images = {picture.file_name: picture.id for picture in listed}
        categories = {name: own for own, name in categories_of}
        for what, wanted, known, advice in (
            ("file_name", pictures.file_names, images, "; --only LIST takes a part of the folder"),
            ("category", names, categories, ""),
        ):
            missing = [name for name in wanted if name not in known]
            if missing:
                raise DataError(
                    f"--ids: {self.ids} must have every {what}, but lacks {len(missing)}, such as {missing[0]}{advice}"
                )
        return [images[name] for name in pictures.file_names], [categories[name] for name in names]

    def _draw(self, pictures: PictureFolder, names: list[str], image_ids: list[int], category_ids: list[int]) -> None:
        """Writes the pictures with the objects of predictions.json."""
        from sprompt.engine.progress import Progress
        from sprompt.engine.trained import from_results

        least = 0.3 if self.threshold is None else self.threshold
        found: dict[int, list[Any]] = {}
        for record in read_json(self.out / run_folder.PREDICTIONS):
            if record["score"] > least:
                found.setdefault(record["image_id"], []).append(record)
        folder = self.out / "drawn"
        folder.mkdir(exist_ok=True)
        written: set[Path] = set()
        with Progress("draw", len(pictures.file_names)) as bar:
            for image_id, name in zip(image_ids, pictures.file_names, strict=True):
                bar.advance()
                try:
                    drawn = from_results(pictures.path / name, found.get(image_id, []), names, category_ids).draw()
                except DataError:
                    continue  # the prediction has reported this picture
                file = folder / Path(name).with_suffix(".jpg")
                if file in written:  # by a picture of the same name with another extension
                    file = folder / f"{name}.jpg"
                written.add(file)
                file.parent.mkdir(parents=True, exist_ok=True)
                drawn.save(file, quality=90)
        print(f"the pictures with objects of scores above {least:g} are in {folder}")

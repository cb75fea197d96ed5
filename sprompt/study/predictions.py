"""Test pictures with the predictions of several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sprompt.data.draw import FALSE, IGNORED, TRUE, Mark, overlay
from sprompt.data.errors import DataError
from sprompt.report.compare import Compared, above, best_threshold, compare
from sprompt.report.records import evenly, masks_of, read_image, read_records


@dataclass(frozen=True)
class Side:
    """A picture, drawn once with its labels, and once with the predictions of each model.

    `found` maps a model to its picture and to the numbers of found labels, false predictions and missed labels.
    """

    name: str
    plain: Image.Image
    labels: Image.Image
    found: dict[str, tuple[Image.Image, tuple[int, int, int]]]


def side_by_side(images: Path, labels: Path, predictions: Mapping[str, Path], limit: int) -> list[Side]:
    """At most `limit` pictures with labels, spread evenly over the file, with the predictions of each model.

    The predictions drawn are those above the score threshold with the model's best F1 on these pictures. Unreadable pictures
    are left out.

    Args:
        images: folder of the pictures.
        labels: COCO file of their labels.
        predictions: files of COCO results, by model.
        limit: upper bound of the number of pictures.
    """
    truth = read_records(labels)
    models = {model: read_records(file, images, truth) for model, file in predictions.items()}
    labelled = [entry for entry in truth.entries.values() if entry.instances]
    pictures: list[tuple[str, Image.Image, Image.Image]] = []
    compared: dict[str, list[Compared]] = {model: [] for model in models}
    for entry in evenly(labelled, limit):
        try:
            picture = read_image(images, entry.name)
        except DataError:
            continue
        size = (picture.height, picture.width)
        own, kept, _ = masks_of(entry.instances, size)
        for model, records in models.items():
            masks, instances, _ = masks_of(records.entries[entry.id].instances, size)
            compared[model].append(compare(masks, instances, own, kept))
        marked = overlay(picture, own, [Mark(IGNORED if label.crowd else TRUE) for label in kept])
        pictures.append((entry.name, picture, marked))
    least = {model: best_threshold(all_of) for model, all_of in compared.items()}
    sides = []
    for place, (name, picture, marked) in enumerate(pictures):
        shown = {model: above(all_of[place], least[model]) for model, all_of in compared.items()}
        found = {model: (_drawn(picture, one), one.counts) for model, one in shown.items()}
        sides.append(Side(name, picture, marked, found))
    return sides


def _drawn(picture: Image.Image, compared: Compared) -> Image.Image:
    looks = {-1: Mark(FALSE, style="hatched"), -2: Mark(IGNORED)}
    return overlay(picture, compared.masks, [looks.get(label, Mark(TRUE)) for label in compared.found])

"""From pictures to COCO results, a batch at a time, by one process or several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sprompt.atomic import replacing
from sprompt.clock import Clock
from sprompt.data.errors import DataError
from sprompt.data.sample import Batch
from sprompt.data.transforms import Augment, collate
from sprompt.engine.processes import processes
from sprompt.engine.progress import Progress
from sprompt.masks import Size
from sprompt.models.protocol import Prediction, QueryModel, features_of

DIVISOR = 32  # the sides of a model's input are multiples of it


class Predicted(NamedTuple):
    image_id: int
    name: str  # of the file
    prediction: Prediction


def predict(
    model: nn.Module,
    dataset: Any,
    *,
    short: int = 800,
    long: int = 1333,
    keep_ratio: bool = True,
    threshold: float = 0.5,
    max_per_image: int = 100,
    batch_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    problems: dict[int, str] | None = None,
    progress: bool = False,
    clock: Clock | None = None,
) -> Iterator[Predicted]:
    """Yields the results of the pictures of a dataset, in order. Only one batch is in memory at a time. Empty masks are left
    out.

    Args:
        model: a QueryModel. It is moved to `device`, and is in evaluation mode until the iteration ends.
        dataset: gives Samples; their masks are ignored.
        short, long: pictures are resized so that the shorter side has `short` pixels, unless the longer side would then have
            more than `long` pixels; in this case the longer side gets `long` pixels.
        keep_ratio: False stretches the pictures to long × short pixels.
        threshold: probability above which a pixel is in a mask.
        indices: indices of the pictures, in order; None takes all pictures.
        problems: gets {place of a picture in the dataset: message} for each picture that cannot be read. Such pictures are left
            out. With None such a picture raises DataError.
        clock: measures the parts; what the caller does with a result counts as masks and files.
    """
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
    views = _Views(
        dataset,
        Augment(short, long, flip=0.0, keep_ratio=keep_ratio),
        range(len(dataset)) if indices is None else indices,
    )
    loader: DataLoader[Any] = DataLoader(views, batch_size=batch_size, num_workers=workers, collate_fn=_collated)
    was_training = model.training
    model.to(device).eval()
    clock = clock or Clock()
    clock.start()
    try:
        with Progress("predict", len(views), show=progress) as bar:
            for batches, broken in loader:
                clock.lap("reading")
                if broken and problems is None:
                    raise DataError(next(iter(broken.values())))
                if problems is not None:
                    problems |= broken
                found: dict[int, Predicted] = {}
                for places, batch in batches:
                    predictions = _predicted(model, batch.to(device), threshold, max_per_image, clock)
                    for place, own, name, prediction in zip(
                        places, batch.image_ids, batch.names, predictions, strict=True
                    ):
                        found[place] = Predicted(own, name, prediction)
                yield from (found[place] for place in sorted(found))
                clock.lap("masks and files")
                bar.advance(len(broken) + len(found))
    finally:
        model.train(was_training)


@torch.inference_mode()
def _predicted(model: nn.Module, batch: Batch, threshold: float, max_per_image: int, clock: Clock) -> list[Prediction]:
    network = cast(QueryModel, model)
    height, width = batch.images.shape[2:]
    outputs = network.decode(features_of(network, batch.images, batch.sizes))
    clock.lap("network", batch.images.device)
    found = network.predictions(
        outputs, (height, width), batch.sizes, batch.original_sizes, threshold=threshold, max_per_image=max_per_image
    )
    found = [_without_empty(prediction) for prediction in found]
    clock.lap("masks and files")
    return found


def _without_empty(prediction: Prediction) -> Prediction:
    """Removes empty masks, because they would count as false positives."""
    kept = prediction.masks.area() > 0
    masks, scores, labels = prediction
    return prediction if bool(kept.all()) else Prediction(masks[kept], scores[kept], labels[kept])


def write_results(path: Path, results: Iterable[Predicted], category_ids: Sequence[int]) -> int:
    """Writes COCO results as they arrive, one record a line. The file appears when it is complete.

    A record has image_id, category_id, score, segmentation (RLE) and bbox (x, y, width, height).

    Args:
        category_ids: category id of each class.

    Returns: the number of records.
    """
    count = 0
    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write("[")
        for image_id, _, (masks, scores, labels) in results:
            rles, boxes = masks.rle(), masks.boxes().tolist()
            for rle, (x1, y1, x2, y2), score, label in zip(rles, boxes, scores.tolist(), labels.tolist(), strict=True):
                record = {
                    "image_id": image_id, "category_id": category_ids[label], "score": score,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }  # fmt: skip
                file.write((",\n" if count else "\n") + json.dumps(record))
                count += 1
        file.write("\n]\n")
    return count


def predict_to_file(
    model: nn.Module,
    dataset: Any,
    path: Path,
    category_ids: Sequence[int],
    *,
    cpu: bool = False,
    problems: dict[int, str] | None = None,
    above: float = 0.0,
    image_ids: Sequence[int] | None = None,
    progress: bool = True,
    **settings: Any,
) -> int:
    """Predicts a dataset with all processes of a launcher and writes a file of COCO results.

    Each process predicts a contiguous share of the pictures and writes its results beside `path`. The first process joins these
    files in the order of the pictures, so that the result does not depend on the number of processes. All processes must see
    the same file system.

    Args:
        cpu: stay on the CPU even if there is a GPU.
        problems: as for `predict`; every process gets the problems of all processes.
        above: only results with a score above this are written.
        image_ids: image_ids[i] is the id in the results for the picture with id i in the dataset. None: the ids of the dataset.
        settings: arguments of `predict`.

    Returns: the number of records; in all processes but the first, that of their own share.
    """
    state = processes(cpu)
    rank, world = state.process_index, state.num_processes
    shares = [range(r * len(dataset) // world, (r + 1) * len(dataset) // world) for r in range(world)]
    parts = [path if world == 1 else path.with_name(f".{path.name}.{r}-of-{world}.part") for r in range(world)]
    stream = predict(
        model, dataset, device=state.device, indices=shares[rank], problems=problems, progress=progress and rank == 0, **settings
    )  # fmt: skip
    count = write_results(parts[rank], _chosen(stream, above, image_ids), category_ids)
    if world > 1:
        state.wait_for_everyone()
        if problems is not None:
            problems.update(gather_object(list(problems.items())))
        if rank == 0:
            count = _join(path, parts)
        state.wait_for_everyone()
    return count


def _chosen(stream: Iterator[Predicted], above: float, image_ids: Sequence[int] | None) -> Iterator[Predicted]:
    for own, name, (masks, scores, labels) in stream:
        kept = scores > above if above > 0 else slice(None)
        found = Prediction(masks[kept], scores[kept], labels[kept])
        yield Predicted(own if image_ids is None else image_ids[own], name, found)


def _join(path: Path, parts: Sequence[Path]) -> int:
    """Joins files of `write_results`, line by line. Returns the number of records."""
    count = 0
    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.write("[")
        for part in parts:
            with open(part, encoding="utf-8") as lines:
                for line in lines:
                    record = line.strip().rstrip(",")
                    if record not in ("[", "]"):
                        file.write((",\n" if count else "\n") + record)
                        count += 1
        file.write("\n]\n")
    for part in parts:
        part.unlink()
    return count


class _Views(Dataset[Any]):
    """Samples at the size of the model's input. For a picture that cannot be read: (its place in the dataset, the message)."""

    def __init__(self, dataset: Any, resize: Augment, indices: Sequence[int]) -> None:
        self.dataset, self.resize, self.indices = dataset, resize, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        try:
            return self.resize(self.dataset[self.indices[place]], torch.Generator())
        except DataError as error:
            return self.indices[place], str(error)


def _collated(views: list[Any]) -> tuple[list[tuple[list[int], Batch]], dict[int, str]]:
    """Batches of the pictures that could be read, and {place in the dataset: message} for the other pictures. Each batch comes
    with the places of its pictures among the views.

    All pictures of a batch have the same padded size. A model treats padding as pixels, so with different sizes the results of
    a picture would depend on the other pictures of its batch.
    """
    groups: dict[Size, list[int]] = {}
    for place, view in enumerate(views):
        if not isinstance(view, tuple):
            height, width = view.image.shape[1:]
            groups.setdefault((-(-height // DIVISOR), -(-width // DIVISOR)), []).append(place)
    batches = [(places, collate([views[place] for place in places], divisor=DIVISOR)) for places in groups.values()]
    return batches, dict(view for view in views if isinstance(view, tuple))

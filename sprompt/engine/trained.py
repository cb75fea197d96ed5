"""A trained model: its file, its classes, and its predictions for pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from sprompt.data.given import Given, GivenPictures
from sprompt.engine.predict import predict
from sprompt.masks import BitMasks
from sprompt.models.registry import MODELS, ModelConfig, build
from sprompt.models.saved import is_saved_model, load_model

MODEL = "model.safetensors"  # in a run folder
_SIZE = (800, 1333)  # short and long side of the training pictures of official releases


@dataclass(frozen=True)
class Found:
    """The objects of one picture, the best first.

    >>> found = model.predict("picture.jpg")          # doctest: +SKIP
    >>> found.above(0.5).draw().save("objects.png")   # doctest: +SKIP
    """

    masks: BitMasks  # (K,) of the picture's size
    scores: torch.Tensor  # (K,) float32
    labels: torch.Tensor  # (K,) int64: places in `classes`
    classes: list[str]
    name: str  # the picture's path, or "picture 3"
    picture: Given

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.classes[label] for label in self.labels.tolist()]

    def above(self, score: float) -> Found:
        """The objects with a score above `score`."""
        kept = self.scores > score
        return Found(self.masks[kept], self.scores[kept], self.labels[kept], self.classes, self.name, self.picture)

    def draw(self) -> Image.Image:
        """The picture with its objects: masks, names and scores."""
        from sprompt.data.draw import Mark, colour, overlay
        from sprompt.data.given import as_rgb

        pixels = as_rgb(self.picture, self.name).permute(1, 2, 0).contiguous().numpy()
        objects = zip(self.labels.tolist(), self.names, self.scores.tolist(), strict=True)
        marks = [Mark(colour(label), f"{name} {score:.2f}") for label, name, score in objects]
        return overlay(Image.fromarray(pixels), self.masks, marks)

    def rle(self) -> list[dict[str, Any]]:
        """The masks as COCO run-length codes."""
        return self.masks.rle()

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO results. `category_ids` are the ids of the classes; None counts from 1."""
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        rows = zip(self.rle(), self.masks.boxes().tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {
                "image_id": image_id, "category_id": ids[label], "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
            for rle, (x1, y1, x2, y2), score, label in rows
        ]  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        """The objects as torchvision's models return them: boxes (K, 4) x1 y1 x2 y2, labels, scores, masks (K, 1, H, W)
        float."""
        dense = self.masks.to_dense(torch.float32)[:, None]
        return {"boxes": self.masks.boxes().float(), "labels": self.labels, "scores": self.scores, "masks": dense}

    def arrays(self) -> dict[str, np.ndarray]:
        """Arguments of `supervision.Detections(**found.arrays())`."""
        boxes = self.masks.boxes().float().numpy()
        return {
            "xyxy": boxes.reshape(-1, 4), "mask": self.masks.to_dense().numpy(), "confidence": self.scores.numpy(),
            "class_id": self.labels.numpy(),
        }  # fmt: skip


def from_results(
    picture: Path, records: Sequence[dict[str, Any]], classes: list[str], category_ids: Sequence[int]
) -> Found:
    """The objects of a picture, from its COCO results."""
    from sprompt.data.pictures import picture_size

    ordered = sorted(records, key=lambda record: -record["score"])
    place = {own: label for label, own in enumerate(category_ids)}
    masks = BitMasks.from_rle([record["segmentation"] for record in ordered], picture_size(picture))
    labels = torch.tensor([place[record["category_id"]] for record in ordered], dtype=torch.int64)
    return Found(masks, torch.tensor([float(r["score"]) for r in ordered]), labels, classes, str(picture), picture)


@dataclass
class Trained:
    """A trained model with the names of its classes; see `sprompt.load`."""

    model: nn.Module
    classes: list[str] | None  # None if the file does not name them, as official releases do not
    size: tuple[int, int]  # short and long side of the training pictures
    about: str  # a sentence about the file

    @property
    def names(self) -> list[str]:
        """Names of the classes. If the file does not name them, the names are their numbers."""
        return self.classes or [str(number) for number in range(self.model.num_classes)]  # type: ignore[arg-type]  # a QueryModel

    @overload
    def predict(self, pictures: Given, **how: Any) -> Found: ...
    @overload
    def predict(self, pictures: Sequence[Given], **how: Any) -> list[Found]: ...
    def predict(self, pictures: Any, **how: Any) -> Any:
        """The objects of a picture, or of each picture of a list; see `stream`."""
        single = isinstance(pictures, (str, Path, Image.Image, np.ndarray, torch.Tensor))
        found = list(self.stream([pictures] if single else pictures, **how))
        return found[0] if single else found

    def stream(
        self, pictures: Sequence[Given], *, short: int | None = None, long: int | None = None, score: float = 0.0,
        threshold: float = 0.5, max_per_image: int = 100, batch_size: int = 1, progress: bool = False,
    ) -> Iterator[Found]:  # fmt: skip
        """The objects of each picture, in order; only one batch is in memory at a time.

        Args:
            pictures: paths, PIL images, arrays (H, W, 3), or tensors (3, H, W), of any sizes.
            short, long: pictures are resized so that the shorter side has `short` pixels, unless the longer side would then
                have more than `long` pixels; in this case the longer side gets `long` pixels. Default: the size of the training
                pictures.
            score: only objects with a score above this are returned.
            threshold: probability above which a pixel is in a mask.
            max_per_image: largest number of results of a picture; the best are kept.
            batch_size: number of pictures that are read together. Those of equal padded size are computed together.
        """
        dataset = GivenPictures(pictures)
        device = next(self.model.parameters()).device
        results = predict(
            self.model, dataset, short=short or self.size[0], long=long or self.size[1], threshold=threshold,
            max_per_image=max_per_image, batch_size=batch_size, device=device, progress=progress,
        )  # fmt: skip
        for place, name, (masks, scores, labels) in results:
            found = Found(masks.to("cpu"), scores.cpu(), labels.cpu(), self.names, name, pictures[place])
            yield found.above(score) if score > 0 else found

    def to(self, device: torch.device | str) -> Trained:
        self.model.to(device)
        return self


def load(
    checkpoint: Path | str, model: str | ModelConfig = "knet", device: torch.device | str | None = None
) -> Trained:
    """The trained model of a run folder, of a file that sprompt wrote, or of an official release.

    Args:
        checkpoint: the run folder or the file.
        model: the model's name or its configuration. It is used only for a file that does not name its network, such as an
            official release.
        device: the device of the model. Default: the GPU, if there is one.

    >>> model = sprompt.load("runs/finetune")         # doctest: +SKIP
    >>> found = model.predict(["a.jpg", "b.jpg"])     # doctest: +SKIP
    """
    file = model_file(Path(checkpoint))
    if is_saved_model(file):
        network, about = load_model(file)
        size = (about["extra"].get("short", _SIZE[0]), about["extra"].get("long", _SIZE[1]))
        trained = Trained(
            network, about["classes"], size, f"{file}: {about['model']} of {len(about['classes'])} classes"
        )
    else:
        config = MODELS.get(model).Config() if isinstance(model, str) else model
        if (sizes := getattr(MODELS.owner(config), "released_config", None)) is not None:
            config = sizes(file, config)  # a file beside the weights may tell the sizes
        network = build(config)
        if not hasattr(network, "import_checkpoint"):
            raise ValueError(
                f"{file}: does not name its model, and {MODELS.name(type(config))} cannot read official releases; give a file "
                "of sprompt"
            )
        said = network.import_checkpoint(file)
        trained = Trained(network.eval(), None, _SIZE, said)
    return trained.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def model_file(path: Path) -> Path:
    """The model of a run folder, or the file itself."""
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path}: holds no {MODEL}; has its training finished? (start the same command again to go on)"
            if path.is_dir()
            else f"{path}: there is no such file"
        )
    return file

"""From pictures to results: order, sizes, pictures that cannot be read, and peak memory."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from knet_run import run, tiny
from torch import Tensor, nn

from sprompt.clock import Clock
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.synthetic import write_scenes
from sprompt.engine import predict, write_results
from sprompt.engine.evaluate import evaluate
from sprompt.engine.predict import Predicted, _join, predict_to_file
from sprompt.masks import BitMasks, Size
from sprompt.models.protocol import Features, Prediction

VIEW = {"short": 64, "long": 96}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 6, seed=1, size=(72, 96))
    return folder


class Oracle(nn.Module):
    """A model that finds exactly the objects of a dataset, picture by picture in the dataset's order. Its scores fall with
    the place."""

    def __init__(self, dataset: CocoDataset) -> None:
        super().__init__()
        self.samples = iter([dataset[i] for i in range(len(dataset))])
        self.seen: list[tuple[Size, Size, bool]] = []

    def encode(self, images: Tensor) -> Features:
        return Features([images], [images])

    def decode(self, features: Features) -> Tensor:
        return features.backbone[0]

    def predictions(
        self,
        outputs: Tensor,
        input_size: Size,
        sizes: list[Size],
        original_sizes: list[Size],
        *,
        threshold: float,
        max_per_image: int,
    ) -> list[Prediction]:
        assert tuple(outputs.shape[2:]) == input_size and not torch.is_grad_enabled()
        results = []
        for size, original in zip(sizes, original_sizes, strict=True):
            sample = next(self.samples)
            self.seen.append((size, original, self.training))
            scores = 1 - 0.1 * torch.arange(len(sample.masks))
            results.append(Prediction(sample.masks, scores, sample.labels))
        return results


def test_what_is_found_exactly_has_precision_one(scenes: Path, tmp_path: Path) -> None:
    dataset = CocoDataset(scenes / "images", scenes / "instances.json", keep_empty=True)
    model = Oracle(dataset).train()
    metrics = evaluate(model, dataset, tmp_path, batch_size=4, cpu=True, progress=False, **VIEW)
    assert metrics["AP"] == metrics["bbox"]["AP"] == metrics["AR100"] == 1
    assert model.seen == 6 * [((64, 85), (72, 96), False)] and model.training
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    record = json.loads((tmp_path / "predictions.json").read_text())[0]
    truth = dataset.ground_truth()["annotations"][0]
    expected = {"image_id": 0, "score": 1.0, **{k: truth[k] for k in ("category_id", "bbox", "segmentation")}}
    assert record == expected
    assert metrics["pictures"] == 6 and metrics["results"] == len(dataset.ground_truth()["annotations"])


def test_batches_and_workers_change_nothing(scenes: Path) -> None:
    model, dataset = tiny(3), PictureFolder(scenes / "images")
    first = list(predict(model, dataset, batch_size=1, **VIEW))
    assert [p.image_id for p in first] == list(range(6)) and Path(first[2].name).name == "000002.png"
    assert all(p.prediction.masks.size == (72, 96) and len(p.prediction.scores) == 24 for p in first)
    for other in (
        list(predict(model, dataset, batch_size=4, workers=1, **VIEW)),
        list(predict(model, dataset, indices=[3, 1], **VIEW)),
    ):
        for p in other:
            q = first[p.image_id].prediction
            torch.testing.assert_close(p.prediction.scores, q.scores, rtol=1e-4, atol=1e-5)
            assert (p.prediction.masks.area() - q.masks.area()).abs().max() < 20
    assert [p.image_id for p in other] == [3, 1]


def test_the_seconds_of_the_parts(scenes: Path) -> None:
    class Slow(Oracle):
        def encode(self, images: Tensor) -> Features:
            time.sleep(0.03)
            return super().encode(images)

    dataset, clock = CocoDataset(scenes / "images", scenes / "instances.json", keep_empty=True), Clock()
    time.sleep(0.1)  # what happens before does not count
    began = time.monotonic()
    for _ in predict(Slow(dataset), dataset, batch_size=2, clock=clock, **VIEW):
        time.sleep(0.02)  # the files
    whole = sum(clock.parts.values())
    assert list(clock.parts) == ["reading", "network", "masks and files"] and whole <= time.monotonic() - began
    assert clock.parts["network"] >= 3 * 0.03 and clock.parts["masks and files"] >= 6 * 0.02

    clock.parts = {"reading": 1.0, "network": 6.0, "masks and files": 1.0}
    assert clock.summary(20) == "2.5 pictures a second (reading 12%, network 75%, masks and files 12%)"


def test_a_picture_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """A picture is padded to its own size only, in a batch of several sizes too. Results come in the order of the pictures."""
    for name, size in (("a", (64, 96)), ("b", (96, 64)), ("c", (64, 90))):
        write_scenes(tmp_path / name, 2, seed=1, size=size)
        for i in range(2):
            (tmp_path / name / "images" / f"00000{i}.png").rename(tmp_path / f"{i}{name}.png")
    model, dataset = tiny(3), PictureFolder(tmp_path, recursive=False)
    alone, together = (list(predict(model, dataset, batch_size=n, short=64, long=96)) for n in (1, 6))
    assert [p.image_id for p in together] == list(range(6)) == [p.image_id for p in alone]
    for p, q in zip(alone, together, strict=True):
        assert p.prediction.masks.size == q.prediction.masks.size
        torch.testing.assert_close(p.prediction.scores, q.prediction.scores, rtol=1e-4, atol=1e-5)
        assert (p.prediction.masks.area() - q.prediction.masks.area()).abs().max() < 20


def test_pictures_that_cannot_be_read(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((scenes / "images").iterdir())[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "000001.png").write_bytes(b"\x89PNG no more")
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:200])
    dataset, problems = PictureFolder(folder), {}
    found = list(predict(tiny(1), dataset, batch_size=2, problems=problems, **VIEW))
    assert [p.image_id for p in found] == [0, 2]
    assert list(problems) == [1, 3] and "000001.png" in problems[1] and "000003.png" in problems[3]
    with pytest.raises(DataError, match=r"000001\.png"):
        predict_to_file(tiny(1), dataset, tmp_path / "results.json", [1], cpu=True, progress=False, **VIEW)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]  # no incomplete file


def masks_of(number: int, side: int) -> Prediction:
    masks = BitMasks.from_dense(torch.rand(number, side, side, generator=torch.Generator().manual_seed(0)) > 0.999)
    return Prediction(masks, torch.linspace(1, 0, number), torch.zeros(number, dtype=torch.int64))


def test_only_a_batch_is_held(tmp_path: Path) -> None:
    """With twenty times the pictures, the peak of Python's memory, which holds records and run lengths, is the same."""

    def peak(count: int) -> int:
        tracemalloc.start()
        write_results(tmp_path / "r.json", (Predicted(i, "", masks_of(20, 128)) for i in range(count)), [1])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(60) < 1.3 * peak(3)
    assert len(json.loads((tmp_path / "r.json").read_text())) == 60


def test_shares_are_joined_as_one_would_write_them(tmp_path: Path) -> None:
    found = [Predicted(i, "", masks_of(i % 3, 16)) for i in range(7)]
    assert write_results(tmp_path / "one.json", found, [5]) == 6
    parts = [tmp_path / name for name in "abc"]
    for part, share in zip(parts, (found[:1], found[1:4], found[4:]), strict=True):
        write_results(part, share, [5])
    _join(tmp_path / "joined.json", parts)
    assert (tmp_path / "joined.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joined.json", "one.json"]
    records = json.loads((tmp_path / "one.json").read_text())
    assert {r["category_id"] for r in records} == {5}
    write_results(tmp_path / "none.json", [], [1])
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_an_empty_mask_has_a_box_of_zeros(tmp_path: Path) -> None:
    empty = Prediction(BitMasks.from_dense(torch.zeros(1, 4, 5)), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    write_results(tmp_path / "r.json", [Predicted(1, "", empty)], [1])
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert record["bbox"] == [0, 0, 0, 0] and record["segmentation"] == {"size": [4, 5], "counts": "d0"}


def test_a_tiny_model_is_trained_and_evaluated(scenes: Path, tmp_path: Path) -> None:
    metrics: dict[str, Any] = run(scenes, tmp_path)
    assert 0 <= metrics["AP"] <= 1 and metrics["results"] == 30
    assert np.isfinite([json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]).all()

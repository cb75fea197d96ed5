"""Batches hold the same items for every number of processes and workers, and for every first step of an epoch."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.loader import Batches
from sprompt.data.sample import Batch, Sample
from sprompt.data.synthetic import write_scenes
from sprompt.data.transforms import Augment, collate
from sprompt.seeding import generator

Item = tuple[int, float]


def _draw(item: int, generator: torch.Generator) -> Item:
    return item, float(torch.rand((), generator=generator))


def _list(items: list[Item]) -> list[Item]:
    return items


def _fails(item: int, generator: torch.Generator) -> int:
    if item == 3:
        raise DataError("pictures/3.png: is a broken picture")
    return item


def _batches(number: int = 10, **options: object) -> Batches[Item, list[Item]]:
    given: dict[str, Any] = {"batch_size": 4, "seed": 7, **options}
    return Batches(range(100, 100 + number), _draw, _list, **given)


def test_an_epoch_with_shuffle() -> None:
    batches = _batches()
    assert batches.steps == 3
    epoch = list(batches.epoch(0))
    order = [item for batch in epoch for item, _ in batch]
    assert sorted(order[:10]) == list(range(100, 110)) and order[:10] != sorted(order[:10])
    assert order[10:] == order[:2], "filled up from the start"
    assert list(batches.epoch(0)) == epoch
    other = [item for batch in batches.epoch(1) for item, _ in batch]
    assert other != order and sorted(other[:10]) == sorted(order[:10])
    assert [i for b in _batches(seed=8).epoch(0) for i, _ in b] != order


def test_draws_depend_on_seed_epoch_and_item_only() -> None:
    drawn = {item: value for batch in _batches().epoch(2) for item, value in batch}
    again = {item: value for batch in _batches(batch_size=2, shuffle=False).epoch(2) for item, value in batch}
    assert drawn == again and len(set(drawn.values())) == 10
    assert drawn != {item: value for batch in _batches().epoch(3) for item, value in batch}
    torch.manual_seed(0)
    a = torch.rand(3, generator=generator(1, 2))
    assert torch.equal(a, torch.rand(3, generator=generator(1, 2))) and not torch.equal(
        a, torch.rand(3, generator=generator(2, 1))
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_global_batch(world: int, shuffle: bool) -> None:
    whole = list(_batches(shuffle=shuffle).epoch(1))
    ranks = [list(_batches(shuffle=shuffle, rank=r, world=world).epoch(1)) for r in range(world)]
    assert all(len(parts) == len(whole) for parts in ranks), "all processes take the same number of steps"
    for step, batch in enumerate(whole):
        assert [item for parts in ranks for item in parts[step]] == batch
        assert all(len(parts[step]) <= 4 // world for parts in ranks)


def test_in_order_each_item_once() -> None:
    assert [[i for i, _ in b] for b in _batches(shuffle=False).epoch(0)] == [
        [100, 101, 102, 103], [104, 105, 106, 107], [108, 109]
    ]  # fmt: skip
    last = [list(_batches(9, shuffle=False, rank=r, world=4).epoch(0))[-1] for r in range(4)]
    assert [len(part) for part in last] == [1, 0, 0, 0]


def test_fewer_items_than_a_batch() -> None:
    (batch,) = list(_batches(3, batch_size=8).epoch(0))
    items = [item for item, _ in batch]
    assert items == (items[:3] * 3)[:8] and sorted(items[:3]) == [100, 101, 102]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_taken_up_in_the_middle(workers: int) -> None:
    batches = _batches(workers=workers)
    whole = list(_batches().epoch(5))
    assert list(batches.epoch(5)) == whole
    for start in range(4):
        assert list(batches.epoch(5, start)) == whole[start:]


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_numbers_are_left_alone(workers: int) -> None:
    """A task draws from them: its draws must not depend on whether a step is the first of an iterator."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(list(_batches(workers=workers).epoch(0, 1))) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_go_on_after_an_epoch_was_broken_off() -> None:
    batches = _batches(40, workers=2)
    iterator = batches.epoch(0)
    next(iterator)
    assert list(batches.epoch(1)) == list(_batches(40).epoch(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_can_be_read(workers: int) -> None:
    batches = Batches(range(4), _fails, list, batch_size=2, seed=0, shuffle=False, workers=workers)
    iterator = batches.epoch(0)
    assert next(iterator) == [0, 1]
    with pytest.raises(DataError) as caught:
        next(iterator)
    assert str(caught.value) == "pictures/3.png: is a broken picture"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "dataset must have items"),
        ({"batch_size": 3, "world": 2}, "multiple of the 2 processes, got 3"),
        ({"batch_size": 0}, "multiple of the 1 processes, got 0"),
        ({"rank": 2, "world": 2}, "got rank 2 of 2"),
        ({"seed": -1}, "seed must be at least 0 and whole at least 1, got -1 and 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _batches(**options)


def test_bad_places() -> None:
    for epoch, start in [(-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(ValueError, match=r"Batches\.epoch"):
            next(_batches().epoch(epoch, start))


# -- with pictures, as training uses it
@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5, size=(40, 48))
    return folder


def _read(folder: Path, workers: int) -> list[Batch]:
    augment = Augment((30, 60), 80, rotate_probability=0.5, rotate_degrees=9)
    batches: Batches[Sample, Batch] = Batches(
        PictureFolder(folder / "images"), augment, collate, batch_size=2, seed=0, workers=workers
    )
    pickle.dumps(batches._loader.dataset)  # as a spawned worker gets it
    return list(batches.epoch(0))


def test_pictures_through_workers(pictures: Path) -> None:
    for a, b in zip(_read(pictures, 0), _read(pictures, 2), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.masks.words, b.masks.words)
        assert a.image_ids == b.image_ids and a.sizes == b.sizes and a.masks.size == b.masks.size


def test_no_worker_is_left() -> None:
    batches = _batches(workers=1)
    list(batches.epoch(0))
    del batches
    assert not multiprocessing.active_children()


def test_an_epoch_is_whole_steps() -> None:
    """Ten items in batches of 2, four batches a step: the epoch is filled up from its start, so no step is short."""
    batches = Batches(list(range(10)), lambda item, _: item, list, batch_size=2, whole=4, seed=3)
    order = [i for batch in batches.indices(0) for i in batch]
    assert batches.steps == 8 and len(order) == 16
    assert sorted(order[:10]) == list(range(10)) and order[10:] == order[:6]
    assert Batches(list(range(10)), lambda item, _: item, list, batch_size=2, whole=4, seed=3, shuffle=False).steps == 5

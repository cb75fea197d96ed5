"""Batches of a dataset. They do not depend on the number of processes, nor on the step at which an epoch is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from sprompt.data.errors import DataError
from sprompt.seeding import generator

P = TypeVar("P")
B = TypeVar("B")

Place = tuple[int, int]  # epoch, index of the dataset


class Order:
    """The division of `number` items into the global batches of an epoch, and this process's part of each batch.

    Args:
        batch_size: items of a global batch, over all processes; a multiple of `world`.
        shuffle: True: each epoch has its own order, from (seed, epoch), and its last batch is filled up from the start of that
            order. False: items come once each, in the order of the dataset; the last batch may be short, and the last processes
            may get an empty part of it.
        whole: batches that one optimiser step accumulates. With shuffle, an epoch is filled up to a multiple of `whole`
            batches.
        rank, world: this process takes the rank-th of `world` equal parts of each batch.
    """

    def __init__(
        self, number: int, *, batch_size: int, seed: int, shuffle: bool = True, whole: int = 1, rank: int = 0, world: int = 1
    ) -> None:  # fmt: skip
        if number < 1:
            raise ValueError("Batches: dataset must have items, got none; check what was selected")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"Batches: rank must be at least 0 and below world, got rank {rank} of {world}")
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"Batches: batch_size must be a multiple of the {world} processes, got {batch_size}; it counts all of them"
            )
        if seed < 0 or whole < 1:
            raise ValueError(f"Batches: seed must be at least 0 and whole at least 1, got {seed} and {whole}")
        self.number = number
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.whole = whole if shuffle else 1
        self.rank = rank
        self.world = world

    @property
    def steps(self) -> int:
        """Number of batches of an epoch."""
        return -(-self.number // (self.batch_size * self.whole)) * self.whole

    def indices(self, epoch: int) -> list[list[int]]:
        """The items of each global batch of an epoch."""
        number = self.number
        order = self.order(epoch) if self.shuffle else list(range(number))
        ends = range(0, self.steps * self.batch_size, self.batch_size)
        if self.shuffle:
            return [[order[i % number] for i in range(a, a + self.batch_size)] for a in ends]
        return [order[a : a + self.batch_size] for a in ends]

    def order(self, epoch: int) -> list[int]:
        """The items in the order of an epoch, each once; with shuffle only."""
        return torch.randperm(self.number, generator=generator(self.seed, epoch)).tolist()

    def own(self, epoch: int, start_step: int = 0) -> list[list[int]]:
        """This process's part of the batches of an epoch, from `start_step` on."""
        if epoch < 0 or not 0 <= start_step <= self.steps:
            raise ValueError(
                f"Batches.epoch: epoch must be at least 0 and start_step at most {self.steps}, got {epoch} and {start_step}"
            )
        own = self.batch_size // self.world
        part = slice(self.rank * own, (self.rank + 1) * own)
        return [batch[part] for batch in self.indices(epoch)[start_step:]]


class Batches(Order, Generic[P, B]):
    """This process's part of the global batches of a dataset; `Order` divides them.

    Args:
        dataset: maps an index to an item, and has a length.
        prepare: (item, generator) -> prepared item. The generator depends on (seed, epoch, index) only.
        collate: list of prepared items -> batch of a step. The list has at most `batch_size / world` items and may be empty,
            see `Order`.
        workers: number of processes that read ahead; 0 reads in this process. Workers stay alive between epochs, so only one
            epoch may be iterated at a time.
        order: the other arguments of `Order`.

    A DataError of a worker is raised in this process with the same message.
    """

    def __init__(
        self,
        dataset: Any,
        prepare: Callable[[Any, torch.Generator], P],
        collate: Callable[[list[P]], B],
        *,
        workers: int = 0,
        **order: Any,
    ) -> None:
        super().__init__(len(dataset), **order)
        if workers < 0:
            raise ValueError(f"Batches: workers must be at least 0, got {workers}")
        self.dataset = dataset
        self._schedule = _Schedule()
        self._loader: DataLoader[Any] = DataLoader(
            _Prepared(dataset, prepare, self.seed),
            batch_sampler=self._schedule,
            collate_fn=_Collated(collate),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=False,
            # An iterator draws a seed as it begins. From torch's global generator, that draw would shift the random numbers of a task in
            # the first step of an epoch and of a resumed run.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[B]:
        """This process's part of the batches of an epoch, from `start_step` on."""
        self._schedule.batches = [[(epoch, i) for i in batch] for batch in self.own(epoch, start_step)]
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


class _Failure:
    """The message of a DataError, sent from a worker as an item: DataLoader would wrap the exception in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Schedule:
    """The batch sampler of the loader; `batches` is replaced before each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Place]] = []

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Prepared(Dataset[Any]):
    def __init__(self, dataset: Any, prepare: Callable[[Any, torch.Generator], Any], seed: int) -> None:
        self.dataset = dataset
        self.prepare = prepare
        self.seed = seed

    def __getitem__(self, place: Place) -> Any:
        epoch, index = place
        try:
            return self.prepare(self.dataset[index], generator(self.seed, epoch, index))
        except DataError as error:
            return _Failure(str(error))


class _Collated:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        failures = [item for item in items if isinstance(item, _Failure)]
        return failures[0] if failures else self.collate(list(items))

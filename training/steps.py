"""Where a run is in its data, and the steps from there on, whatever they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from schemas.errors import UserError

T = TypeVar("T")


class Position(NamedTuple):
    """Where a run is: so many steps of an epoch are done."""

    epoch: int = 0
    step: int = 0


START = Position()


@dataclass(frozen=True)
class Step:
    """What one rank computes of an optimizer's step: its passes, one after the other. ``after`` is where it leads.

    ``passes`` are batches of the family's kind, `training.family.AnyBatch`.
    """

    passes: list[Any]
    after: Position


class Steps(IterableDataset[Step | UserError], ABC, Generic[T]):
    """All steps from a position on, without end, as one rank sees them.

    What ``T`` is of each step is cheap to plan; only the worker process whose turn it is makes batches of it.

    Args:
        rank, ranks: of the processes that train together.
    """

    def __init__(self, start: Position, rank: int, ranks: int) -> None:
        self.start, self.rank, self.ranks = start, rank, ranks

    @abstractmethod
    def planned(self, epoch: int) -> Iterator[T]:
        """The steps of an epoch, in order; all ranks see the same."""

    @abstractmethod
    def passes(self, planned: T) -> list[Any]:
        """This rank's batches of a step."""

    def __iter__(self) -> Iterator[Step | UserError]:
        """A user's mistake comes as an item: raised in a reader's process, it would arrive as a page of traceback."""
        try:
            yield from self._steps()
        except UserError as error:
            yield error

    def _steps(self) -> Iterator[Step]:
        worker = get_worker_info()
        own, of = (worker.id, worker.num_workers) if worker else (0, 1)
        number = 0
        for epoch in count(self.start.epoch):
            done = self.start.step if epoch == self.start.epoch else 0
            for at, (planned, is_last) in enumerate(_with_last(self.planned(epoch)), 1):
                if at <= done:
                    continue
                if number % of == own:
                    yield Step(self.passes(planned), Position(epoch + 1) if is_last else Position(epoch, at))
                number += 1


def training_loader(steps: Steps[Any], workers: int) -> DataLoader[Step | UserError]:
    """The steps as they are read ahead by so many worker processes."""
    # else each tensor on its way takes a file descriptor, of which most systems give a process 1024
    torch.multiprocessing.set_sharing_strategy("file_system")
    return DataLoader(steps, batch_size=None, num_workers=workers)


def _with_last(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item with whether it is the last, which takes a look at one more."""
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True

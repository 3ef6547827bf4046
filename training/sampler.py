"""The order of training: which windows share a row, which rows make a step, which of them a rank computes.

All of it follows from (seed, epoch) alone, so that a run goes on from (epoch, step) on any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.batch import Batch, Example, collate, pack
from training.data import SessionData, example_of, window_starts
from training.losses import IGNORE
from training.recipe import Recipe
from training.sequence import SequenceBuilder, Window
from training.steps import START, Position, Steps

POOL_WINDOWS = 256
"""Windows that are packed together: enough that rows come out full, few enough that an epoch's order stays random."""


class _Planned(NamedTuple):
    """A window that is written, but whose features are not read."""

    session: SessionData
    first_tick: int
    num_ticks: int
    seed: tuple[int, ...]
    window: Window


class TrainingSteps(Steps[list[list[_Planned]]]):
    """The steps of the dialog model.

    An epoch cuts each session at another phase and covers each of its ticks once. Rows of like length make a step, so
    that little is padded; the order of the steps is random within each pool.

    Args:
        rank, ranks: of the processes that train together.
    """

    def __init__(
        self,
        sessions: Sequence[SessionData],
        builder: SequenceBuilder,
        recipe: Recipe,
        start: Position = START,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(start, rank, ranks)
        self.sessions, self.builder, self.recipe = sessions, builder, recipe

    def planned(self, epoch: int) -> Iterator[list[list[_Planned]]]:
        """The rows of each step of an epoch, in order; the last one may have fewer."""
        data, seed = self.recipe.data, self.recipe.train.seed
        rng = np.random.default_rng([seed, epoch])
        cuts = [
            (session, first, length)
            for session in self.sessions
            for first, length in window_starts(
                session, data.window_ticks, int(rng.integers(data.window_ticks))
            )
        ]
        order = rng.permutation(len(cuts))
        waiting: list[list[_Planned]] = []
        for begin in range(0, len(order), POOL_WINDOWS):
            chosen = order[begin : begin + POOL_WINDOWS]
            new = [self._planned(cuts[index], (seed, epoch, int(index))) for index in chosen]
            rows = _packed([*chain.from_iterable(waiting), *new], data.max_seq_len)
            # the shortest wait for the next pool, at least the one that was packed last and may be nearly empty
            left = (len(rows) - 1) % data.batch_rows + 1
            waiting = rows[:left]
            steps = [rows[at : at + data.batch_rows] for at in range(left, len(rows), data.batch_rows)]
            yield from (steps[index] for index in rng.permutation(len(steps)))
        yield _evened(waiting, data.max_seq_len)

    def _planned(self, cut: tuple[SessionData, int, int], seed: tuple[int, ...]) -> _Planned:
        session, first, length = cut
        noise = np.random.default_rng([*seed, 0])
        state = with_noise(session.state_before(first), self.recipe.data.state_noise, noise)
        plan = (session.goal, session.step_names, state)
        window = self.builder.window(*plan, first, length, session.words)
        return _Planned(session, first, length, seed, window)

    def passes(self, planned: list[list[_Planned]]) -> list[Batch]:
        """This rank's share of a step. One that would have a pass less than others gets a row without labels: each pass
        is a meeting of all ranks where the model lies in parts, and the last one is where it does not."""
        at_once = self.recipe.data.rows_at_once or -(-len(planned) // self.ranks)
        parts = [planned[at : at + at_once] for at in range(0, len(planned), at_once)]
        own = [self._batch(part) for part in parts[self.rank :: self.ranks]]
        if len(own) < -(-len(parts) // self.ranks):
            own.append(self._batch(planned[:1], with_labels=False))
        return own

    def _batch(self, rows: list[list[_Planned]], with_labels: bool = True) -> Batch:
        examples = [self._example(planned) for row in rows for planned in row]
        numbers = iter(range(len(examples)))
        batch = collate(examples, [[next(numbers) for _ in row] for row in rows], self.builder.pad_token)
        if with_labels:
            return batch
        gone = [
            torch.full_like(labels, IGNORE) for labels in (batch.speaking, batch.dst_update, batch.dst_state)
        ]
        none = torch.empty(0, dtype=torch.long)
        return replace(
            batch, speaking=gone[0], dst_update=gone[1], dst_state=gone[2], response=none, response_at=none
        )

    def _example(self, planned: _Planned) -> Example:
        session, first, length, seed, window = planned
        example = example_of(session, window, first, length)
        tasks, rng = self.recipe.tasks, np.random.default_rng([*seed, 1])
        speaking = subsampled(example.speaking, tasks.speaking.silence_ratio, rng)
        update = subsampled(example.dst_update, tasks.dst_update.silence_ratio, rng)
        if self.builder.speak_by == "end_of_turn":  # the same choice, where the language model learns silence
            targets = window.targets.copy()
            targets[window.tick_at[speaking == IGNORE]] = IGNORE
            window = replace(window, targets=targets)
        return replace(example, window=window, speaking=speaking, dst_update=update)


def with_noise(state: NDArray[np.int8], noise: float, rng: np.random.Generator) -> NDArray[np.int8]:
    """A state ``[K]`` of which each step is another one with the chance ``noise``: so it is where it is predicted."""
    wrong = (state + rng.integers(1, 3, len(state))) % 3
    return np.where(rng.random(len(state)) < noise, wrong, state).astype(np.int8)


def subsampled(labels: NDArray[np.int64], ratio: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Labels ``[T]`` of which each 0 is kept with the chance ``ratio``, else `IGNORE`."""
    dropped = (labels == 0) & (rng.random(len(labels)) >= ratio)
    return np.where(dropped, IGNORE, labels)


def _packed(planned: Sequence[_Planned], max_seq_len: int) -> list[list[_Planned]]:
    """Rows, the shortest first."""
    lengths = [len(each.window.tokens) for each in planned]
    rows = sorted(pack(lengths, max_seq_len), key=lambda row: sum(lengths[index] for index in row))
    return [[planned[index] for index in row] for row in rows]


def _evened(rows: Sequence[Sequence[_Planned]], max_seq_len: int) -> list[list[_Planned]]:
    """The same windows in no more rows, of lengths as like as packing makes them: none is nearly empty."""
    planned = list(chain.from_iterable(rows))
    average = sum(len(each.window.tokens) for each in planned) / len(rows)
    limits = np.linspace(min(average, max_seq_len), max_seq_len, 33)
    tries = (_packed(planned, int(limit)) for limit in limits)
    return next(
        tried for tried in tries if len(tried) <= len(rows)
    )  # the last limit gives the same rows again

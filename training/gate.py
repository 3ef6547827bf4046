"""A session under way: what heads 1, 2 and 4 say at a tick is gated and made legal, the same live and in scores."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.states import StateValidator
from training.sequence import shown_steps
from training.traces import Rejection, Trace, Track


@dataclass(frozen=True)
class Thresholds:
    """When heads 1 and 2 fire: from which probability on, and so many ticks after the last words at the earliest."""

    speaking: float
    dst_update: float
    min_gap_ticks: int = 0

    @classmethod
    def of(cls, config: Any) -> Thresholds:
        """Those that were chosen in training.

        Raises:
            UserError: none were: the checkpoint is from before the first validation.
        """
        if config.speaking_threshold is None or config.dst_update_threshold is None:
            raise UserError(
                "the checkpoint has no thresholds: it was saved before the first validation; train on, or give another"
            )
        return cls(config.speaking_threshold, config.dst_update_threshold, config.min_gap_ticks)


@dataclass(frozen=True)
class Decisions:
    """Heads 1, 2 and 4 on ``T`` ticks of one window with ``K`` shown steps, float32.

    Logits ``speaking_logits`` and ``dst_update_logits`` ``[T, 2]``, ``state_logits`` ``[T, K, 3]``; probabilities
    ``speaking`` and ``dst_update`` ``[T]``, ``state`` ``[T, K, 3]``.
    """

    speaking_logits: NDArray[np.float32]
    dst_update_logits: NDArray[np.float32]
    state_logits: NDArray[np.float32]

    @functools.cached_property
    def speaking(self) -> NDArray[np.float32]:
        return _softmax(self.speaking_logits)[:, 1]

    @functools.cached_property
    def dst_update(self) -> NDArray[np.float32]:
        return _softmax(self.dst_update_logits)[:, 1]

    @functools.cached_property
    def state(self) -> NDArray[np.float32]:
        return _softmax(self.state_logits)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float32] = shares / shares.sum(axis=-1, keepdims=True)
    return probabilities


class Gate:
    """The state that holds, and whether the assistant may speak, tick by tick.

    Attributes:
        validator: holds the state int8 ``[K]`` of every step of the plan.
    """

    def __init__(self, state: NDArray[np.int8], thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.validator = StateValidator(state)
        self._spoke_at: int | None = None

    @property
    def state(self) -> NDArray[np.int8]:
        return self.validator.state

    def speaks(self, tick: int, probability: float) -> bool:
        """Whether the assistant speaks at a tick: it is sure enough, and has not just spoken."""
        if probability < self.thresholds.speaking:
            return False
        if self._spoke_at is not None and tick - self._spoke_at < self.thresholds.min_gap_ticks:
            return False
        self._spoke_at = tick
        return True

    def update(self, tick: int, decisions: Decisions, at: int, shown: NDArray[np.int64]) -> list[Rejection]:
        """Move the state at a tick: head 2 opens the gate, head 4 proposes, the validator disposes.

        Args:
            at: which of the decisions' ticks it is.
            shown: int64, which steps of the plan the decisions are about.

        Returns:
            What was proposed and is not legal.
        """
        if decisions.dst_update[at] < self.thresholds.dst_update:
            return []
        proposed, probability = self.state.copy(), np.ones(len(self.state))
        proposed[shown] = decisions.state[at].argmax(-1)
        probability[shown] = decisions.state[at].max(-1)
        refused = self.validator.update(proposed, probability)
        return [Rejection(tick, int(step), int(proposed[step])) for step in refused]


class Course:
    """All that was decided in a session, for scores.

    Attributes:
        gate: the state that holds now.
        speaks: ticks at which it speaks, counted from the session's first.
    """

    def __init__(self, state: NDArray[np.int8], thresholds: Thresholds) -> None:
        self.gate = Gate(state, thresholds)
        self.speaks: list[int] = []
        self._states: list[NDArray[np.int8]] = []
        self._speaking: list[NDArray[np.float32]] = []
        self._dst_update: list[NDArray[np.float32]] = []
        self._rejections: list[Rejection] = []
        self._given: dict[int, NDArray[np.int8]] = {}

    def give(self, state: NDArray[np.int8]) -> None:
        """The true state before the next tick."""
        self.gate.validator.state = state.copy()
        self._given[len(self._states)] = state.copy()

    def take(self, decisions: Decisions, shown: NDArray[np.int64]) -> list[int]:
        """The next ticks' decisions on the shown steps; at which of these ticks it speaks, counted from the first."""
        begin = len(self._states)
        self._speaking.append(decisions.speaking)
        self._dst_update.append(decisions.dst_update)
        new = []
        for at, probability in enumerate(decisions.speaking.tolist()):
            self._rejections += self.gate.update(begin + at, decisions, at, shown)
            self._states.append(self.gate.state)
            if self.gate.speaks(begin + at, probability):
                new.append(at)
        self.speaks += [begin + at for at in new]
        return new

    def trace(self, session: Trace, said: Mapping[int, str]) -> Trace:
        """A session with this as its prediction.

        Args:
            said: the words, by tick counted from the session's first.
        """
        speaking, dst_update = np.concatenate(self._speaking), np.concatenate(self._dst_update)
        ticks = range(len(speaking))
        predicted = Track(
            speak=np.isin(ticks, self.speaks),
            dst_update=dst_update >= self.gate.thresholds.dst_update,
            state=np.stack(self._states),
            responses=tuple(said.get(tick) for tick in ticks),
            given=self._given,
        )
        return replace(
            session,
            predicted=predicted,
            speak_score=speaking,
            update_score=dst_update,
            proposed_transitions=self.gate.validator.proposed,
            rejections=tuple(self._rejections),
        )


def teacher_trace(
    session: Trace, windows: Sequence[Decisions], max_plan_steps: int, thresholds: Thresholds
) -> Trace:
    """A session with the gated decisions of its windows, each begun from the true state, as prediction, without words.

    Args:
        session: whose truth counts; what it predicts does not.
        windows: their decisions, tick after tick.
    """
    course = Course(np.zeros_like(session.truth.state[0]), thresholds)
    first = 0
    for decisions in windows:
        if first:
            course.give(session.truth.state[first - 1])
        course.take(decisions, shown_steps(course.gate.state, max_plan_steps))
        first += len(decisions.speaking)
    return course.trace(session, {})

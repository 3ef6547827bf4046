"""What happened in a session and what was predicted, tick by tick: the input of every score and picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.states import NOT_STARTED, transitions_between

Outcome = Literal["exact", "words", "missed", "extra"]
"""What became of one tick of speech: said exactly, said in other words, not said, said without being asked."""


@dataclass(frozen=True, eq=False)
class Track:
    """What happens at each of a session's T ticks, true or predicted, for the K steps of its plan.

    ``speak`` and ``dst_update`` are bool ``[T]``; ``state`` is int8 ``[T, K]`` with the values of
    `schemas.states`; ``responses`` holds T entries, the text where it speaks and None elsewhere. ``given`` has the
    state int8 ``[K]`` that a predictor was told to be true before a tick, by tick: what differs is what it changed.

    Raises:
        ValueError: the parts do not have the same number of ticks.
    """

    speak: NDArray[np.bool_]
    dst_update: NDArray[np.bool_]
    state: NDArray[np.int8]
    responses: tuple[str | None, ...]
    given: Mapping[int, NDArray[np.int8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ticks = len(self.responses)
        if self.speak.shape != (ticks,) or self.dst_update.shape != (ticks,):
            raise ValueError(
                f"speak {self.speak.shape} and dst_update {self.dst_update.shape} must both be ({ticks},), "
                "the number of responses"
            )
        if self.state.ndim != 2 or len(self.state) != ticks:
            raise ValueError(f"state must be [{ticks}, steps], not {list(self.state.shape)}")

    @property
    def num_ticks(self) -> int:
        """T, how many ticks the session covers."""
        return len(self.responses)

    @property
    def num_steps(self) -> int:
        """K, how many steps its plan has."""
        return self.state.shape[1]

    def transitions(self) -> NDArray[np.int8]:
        """What changes at each tick, int8 bits ``[T, K]``; before the first tick nothing is started."""
        before = np.full_like(self.state, NOT_STARTED)
        before[1:] = self.state[:-1]
        for tick, state in self.given.items():
            before[tick] = state
        return transitions_between(before, self.state)


class Rejection(NamedTuple):
    """A change of a step's state that was predicted at a tick and is not legal."""

    tick: int
    step: int
    state: int


@dataclass(frozen=True, eq=False)
class Trace:
    """One session: the truth beside the prediction.

    ``first_tick`` is the video's tick at which the session starts. The scores are float32 ``[T]``
    probabilities, None for a predictor that has none. The transitions proposed and rejected are those
    of `schemas.states.StateValidator`. ``source`` is the corpus, which says how far words may lie from the true ones.
    Videos of one ``recording_id`` show the same. ``heard`` is what the user says. Ticks of words and rejections are
    counted from the session's first.

    Raises:
        ValueError: truth, prediction, scores and step names do not fit each other.
    """

    session_id: str
    tick_hz: float
    first_tick: int
    step_names: tuple[str, ...]
    truth: Track
    predicted: Track
    speak_score: NDArray[np.float32] | None
    update_score: NDArray[np.float32] | None
    proposed_transitions: int = 0
    rejections: tuple[Rejection, ...] = ()
    source: str = ""
    video_id: str = ""
    recording_id: str = ""
    goal: str = ""
    heard: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        true, predicted = self.truth.state.shape, self.predicted.state.shape
        if true != predicted:
            raise ValueError(f"session {self.session_id}: {predicted} states predicted where {true} are true")
        if len(self.step_names) != self.truth.num_steps:
            raise ValueError(
                f"session {self.session_id}: {len(self.step_names)} step names for {self.truth.num_steps} steps"
            )
        for score in (self.speak_score, self.update_score):
            if score is not None and score.shape != (self.truth.num_ticks,):
                raise ValueError(
                    f"session {self.session_id}: scores of shape {score.shape} for {self.truth.num_ticks} ticks"
                )
        if not self.tick_hz > 0:
            raise ValueError(f"session {self.session_id}: tick_hz must be positive, not {self.tick_hz}")
        if len(self.rejections) > self.proposed_transitions:
            raise ValueError(
                f"session {self.session_id}: {len(self.rejections)} of {self.proposed_transitions} "
                "transitions rejected is not possible"
            )

    def spoken(self) -> list[tuple[int, Outcome]]:
        """Every tick, counted from the session's first, at which the truth or the prediction speaks."""
        rows: list[tuple[int, Outcome]] = []
        for tick in np.flatnonzero(self.truth.speak | self.predicted.speak).tolist():
            if not self.predicted.speak[tick]:
                rows.append((tick, "missed"))
            elif not self.truth.speak[tick]:
                rows.append((tick, "extra"))
            else:
                words = self.predicted.responses[tick]
                exact = words is not None and words == self.truth.responses[tick]
                rows.append((tick, "exact" if exact else "words"))
        return rows

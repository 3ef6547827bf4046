"""Predictors that never look at the video: what a trained model must beat, scored by the same rules.

Most take a session's true track for its number of ticks and steps alone, and read nothing else of it; two know more,
and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from schemas.states import COMPLETED, IN_PROGRESS, NOT_STARTED, STATE_NAMES
from training.matched import BAG_OF_WORDS, Similarity
from training.metrics import Scores, score
from training.traces import Trace, Track


def copy_initial(truth: Track) -> Track:
    """Nothing ever starts: no state changes, no update, no word."""
    never = np.zeros(truth.num_ticks, dtype=np.bool_)
    return Track(never, never, _initial(truth), (None,) * truth.num_ticks)


def uniform_clock(truth: Track) -> Track:
    """The steps share the session's ticks evenly, in their order; it updates and speaks as each begins.

    With T ticks and K steps, step j is in progress at tick t where ``floor(t * K / T) == j``.
    """
    now = np.arange(truth.num_ticks) * truth.num_steps // max(1, truth.num_ticks)
    steps = np.arange(truth.num_steps)
    state = np.full(truth.state.shape, NOT_STARTED, dtype=np.int8)
    state[now[:, None] == steps] = IN_PROGRESS
    state[now[:, None] > steps] = COMPLETED
    silent = Track(np.zeros_like(truth.speak), np.zeros_like(truth.speak), state, (None,) * truth.num_ticks)
    changes: NDArray[np.bool_] = np.any(silent.transitions(), axis=1)
    return Track(changes, changes, state, tuple("" if speaks else None for speaks in changes))


def always_speak(truth: Track) -> Track:
    """Speaks and updates at every tick, says nothing with it, and never moves the state."""
    always = np.ones(truth.num_ticks, dtype=np.bool_)
    return Track(always, always, _initial(truth), ("",) * truth.num_ticks)


def never_update(truth: Track, window_ticks: int | None) -> Track:
    """Keeps the true state that it is given at the start of each window; free-running, none ever is."""
    kept = copy_initial(truth)
    if window_ticks is None:
        return kept
    state = kept.state.copy()
    given = {first: truth.state[first - 1] for first in range(window_ticks, truth.num_ticks, window_ticks)}
    for first, told in given.items():
        state[first : first + window_ticks] = told
    return replace(kept, state=state, given=given)


def majority(truth: Track, most: int) -> Track:
    """Every step is always in the state that is the most frequent one; no update, no word."""
    return replace(copy_initial(truth), state=np.full_like(truth.state, most))


def _initial(truth: Track) -> NDArray[np.int8]:
    return np.full(truth.state.shape, NOT_STARTED, dtype=np.int8)


BASELINES: dict[str, Callable[[Track], Track]] = {
    "copy_initial": copy_initial,
    "uniform_clock": uniform_clock,
    # A state that is never updated and an assistant that never speaks are one prediction; a reader looks
    # for the first beside the state scores and for the second beside the speech scores.
    "always_silent": copy_initial,
    "always_speak": always_speak,
}


def score_baselines(
    traces: Sequence[Trace], similarity: Similarity | None = BAG_OF_WORDS, window_ticks: int | None = None
) -> dict[str, Scores]:
    """Score every baseline on the truth of these sessions, under the keys of `training.metrics.score`.

    Args:
        similarity: None scores no words.
        window_ticks: of teacher-forced windows; None where a session runs free.
    """
    counts = sum(np.bincount(trace.truth.state.ravel(), minlength=len(STATE_NAMES)) for trace in traces)
    most = int(np.argmax(counts))
    predictors: dict[str, Callable[[Track], Track]] = {
        **BASELINES,
        "never_update": lambda truth: never_update(truth, window_ticks),
        "majority": lambda truth: majority(truth, most),
    }
    return {
        name: score(
            [
                replace(
                    trace,
                    predicted=predict(trace.truth),
                    speak_score=None,
                    update_score=None,
                    proposed_transitions=0,
                    rejections=(),
                )
                for trace in traces
            ],
            similarity=similarity,
        )
        for name, predict in predictors.items()
    }

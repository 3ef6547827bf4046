"""The scores of a model while it is trained: on the validation part, with thresholds chosen there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from schemas.errors import UserError
from training.data import SessionData, true_trace
from training.gate import Thresholds, teacher_trace
from training.matched import BAG_OF_WORDS
from training.metrics import score
from training.model import DSTSmolVLM
from training.ranks import dealt, from_all, in_turn
from training.rollout import POSITIONS_AT_ONCE, decide_teacher, run_free
from training.sequence import SequenceBuilder
from training.sweep import best_gap, best_threshold
from training.traces import Trace, Track

FREE_RUNS = 2
"""Runs on its own words in which a model with inline speech finds its thresholds."""


def validate(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: Sequence[SessionData],
    accelerator: Accelerator,
    positions: int = POSITIONS_AT_ONCE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Choose the thresholds on the validation part, keep them in the model's config, and score with them.

    With speech as a branch, states are true at the start of each window, and nothing is said. With inline speech, true
    words tell the state, so the model runs free, and its words are scored, too. Each process takes its share of the
    sessions, and all get the same scores. It is computed in the precision of training.

    Args:
        sessions: such as `require_events` lets pass.
        positions: of one pass.
        between: called before each pass; where it raises `Interrupted`, all processes do, and nothing is changed.
    """
    own = dealt(sessions, accelerator)
    shares = from_all(accelerator, partial(decide_teacher, model, builder, own, positions, between))
    by_session = in_turn([decisions for decisions, _, _ in shares])
    scored = [
        _Scored(
            session.truth,
            np.concatenate([window.speaking for window in windows]),
            np.concatenate([window.dst_update for window in windows]),
        )
        for session, windows in zip(sessions, by_session, strict=True)
    ]
    thresholds = _best_thresholds(scored, model.config.tick_hz)
    if model.config.speech == "branch":
        traces = [
            teacher_trace(true_trace(session), windows, builder.max_plan_steps, thresholds)
            for session, windows in zip(sessions, by_session, strict=True)
        ]
        row = _scores(traces, with_words=False)
    else:
        thresholds, row = _run_free(model, builder, own, thresholds, accelerator, between)
    model.config.speaking_threshold = thresholds.speaking
    model.config.dst_update_threshold = thresholds.dst_update
    model.config.min_gap_ticks = thresholds.min_gap_ticks
    words = sum(count for _, _, count in shares)
    return row | {"val/loss_response": sum(loss for _, loss, _ in shares) / max(1, words)}


def require_events(sessions: Sequence[SessionData]) -> None:
    """Refuse a validation part on which no threshold can be chosen.

    Raises:
        UserError: nobody ever speaks there, or no state ever changes.
    """
    for name, column in (("speaking", "speak"), ("dst_update", "dst_update")):
        if not any(getattr(session.truth, column).any() for session in sessions):
            raise UserError(f"the val part has no tick for {name}; a threshold cannot be chosen on it")


def _run_free(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    own: Sequence[SessionData],
    thresholds: Thresholds,
    accelerator: Accelerator,
    between: Callable[[], None],
) -> tuple[Thresholds, dict[str, float]]:
    """The best of a few runs, and its thresholds: the first takes those of true words, the next those that would have
    been best in the run before, since a model is less sure of itself after its own words than after true ones.
    """
    found: list[tuple[Thresholds, dict[str, float]]] = []
    for _ in range(FREE_RUNS):
        shares = from_all(accelerator, partial(run_free, model, builder, own, thresholds, between))
        traces = [trace for share in shares for trace in share]
        found.append((thresholds, _scores(traces, with_words=True)))
        scored = [
            _Scored(trace.truth, trace.speak_score, trace.update_score)
            for trace in traces
            if trace.speak_score is not None and trace.update_score is not None
        ]
        thresholds = _best_thresholds(scored, model.config.tick_hz)
    return max(found, key=lambda run: run[1]["val/combined"])


class _Scored(NamedTuple):
    """A session's truth, and the probabilities ``[T]`` of heads 1 and 2."""

    truth: Track
    speaking: NDArray[np.float32]
    dst_update: NDArray[np.float32]


def _best_thresholds(sessions: Sequence[_Scored], tick_hz: float) -> Thresholds:
    """Those with the best F1 per tick, and with them the smallest gap between utterances."""
    speaking, _ = best_threshold(
        np.concatenate([session.speaking for session in sessions]),
        np.concatenate([session.truth.speak for session in sessions]),
    )
    dst_update, _ = best_threshold(
        np.concatenate([session.dst_update for session in sessions]),
        np.concatenate([session.truth.dst_update for session in sessions]),
    )
    gap = best_gap([(session.speaking, session.truth.speak) for session in sessions], speaking, tick_hz)
    return Thresholds(speaking, dst_update, gap)


def _scores(traces: Sequence[Trace], with_words: bool) -> dict[str, float]:
    found = score(traces, similarity=BAG_OF_WORDS if with_words else None)
    row = {
        "val/speaking_f1": found["speaking"]["f1"],
        "val/dst_update_f1": found["dst_update"]["f1"],
        "val/dst_state_macro_f1": found["dst_state"]["macro_f1"],
        "val/dst_state_joint": found["dst_state"]["joint"],
        "val/dst_state_joint_near_transition": found["dst_state"]["joint_near_transition"],
        "val/combined": found["combined"]["value"],
    }
    return row | ({"val/matched_f1": found["matched"]["f1"]} if with_words else {})

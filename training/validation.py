"""The scores of a model while it is trained: on the validation part, with thresholds chosen there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray

from schemas.errors import UserError
from training.data import SessionData
from training.matched import BAG_OF_WORDS
from training.metrics import best_threshold, score
from training.model import DSTSmolVLM
from training.rollout import Thresholds, decide_teacher, run_free, traces_of_teacher
from training.sequence import SequenceBuilder
from training.traces import Trace

FREE_RUNS = 2
"""Runs on its own words in which a model with inline speech finds its thresholds."""


def validate(
    model: DSTSmolVLM, builder: SequenceBuilder, sessions: Sequence[SessionData], accelerator: Accelerator
) -> dict[str, float]:
    """Choose the thresholds on the validation part, keep them in the model's config, and score with them.

    With speech as a branch, states are true at the start of each window, and nothing is said. With inline speech, true
    words tell the state, so the model runs free, and its words are scored, too. Each process takes its share of the
    sessions, and all get the same scores.

    Args:
        sessions: such as `require_events` lets pass.
    """
    own = list(range(accelerator.process_index, len(sessions), accelerator.num_processes))
    decisions, loss, words = decide_teacher(model, builder, [sessions[index] for index in own])
    told = [(index, found) for index, found in zip(own, decisions, strict=True)]
    sums = [(loss, words)]
    if accelerator.num_processes > 1:
        told, sums = gather_object(told), gather_object(sums)
    by_session = [found for _, found in sorted(told, key=lambda each: each[0])]
    windows = [window for found in by_session for window in found]
    thresholds = _best_thresholds(
        np.concatenate([session.truth.speak for session in sessions]),
        np.concatenate([window.speaking for window in windows]),
        np.concatenate([session.truth.dst_update for session in sessions]),
        np.concatenate([window.dst_update for window in windows]),
    )
    if model.config.speech == "branch":
        row = _scores(traces_of_teacher(model, builder, sessions, by_session, thresholds), with_words=False)
    else:
        thresholds, row = _run_free(model, builder, sessions, own, thresholds, accelerator)
    model.config.speaking_threshold = thresholds.speaking
    model.config.dst_update_threshold = thresholds.dst_update
    return row | {"val/loss_response": sum(s for s, _ in sums) / max(1, sum(n for _, n in sums))}


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
    sessions: Sequence[SessionData],
    own: Sequence[int],
    thresholds: Thresholds,
    accelerator: Accelerator,
) -> tuple[Thresholds, dict[str, float]]:
    """The best of a few runs, and its thresholds: the first takes those of true words, the next those that would have
    been best in the run before, since a model is less sure of itself after its own words than after true ones.
    """
    found: list[tuple[Thresholds, dict[str, float]]] = []
    for _ in range(FREE_RUNS):
        traces = run_free(model, builder, [sessions[index] for index in own], thresholds)
        if accelerator.num_processes > 1:
            traces = gather_object(traces)
        found.append((thresholds, _scores(traces, with_words=True)))
        thresholds = _best_thresholds(
            np.concatenate([trace.truth.speak for trace in traces]),
            np.concatenate([trace.speak_score for trace in traces if trace.speak_score is not None]),
            np.concatenate([trace.truth.dst_update for trace in traces]),
            np.concatenate([trace.update_score for trace in traces if trace.update_score is not None]),
        )
    return max(found, key=lambda run: run[1]["val/combined"])


def _best_thresholds(
    speaks: NDArray[np.bool_],
    speaking: NDArray[np.float32],
    updates: NDArray[np.bool_],
    dst_update: NDArray[np.float32],
) -> Thresholds:
    """Those with the best F1 per tick, of truths and scores ``[N]``."""
    return Thresholds(best_threshold(speaking, speaks)[0], best_threshold(dst_update, updates)[0])


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

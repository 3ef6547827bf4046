"""Runs a model over cached sessions, window after window: on its own state, or on the true one at each start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.states import StateValidator
from training.batch import Batch, Example, collate
from training.data import SessionData, make_example, window_starts
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder, Words
from training.speech import speak
from training.traces import Trace, Track


@dataclass(frozen=True)
class Thresholds:
    """Probabilities from which heads 1 and 2 fire."""

    speaking: float
    dst_update: float


@dataclass
class _Run:
    """One session on its way through the model."""

    session: SessionData
    windows: list[tuple[int, int]]
    validator: StateValidator
    words: list[Words]
    speak_score: list[NDArray[np.float32]] = field(default_factory=list)
    update_score: list[NDArray[np.float32]] = field(default_factory=list)
    states: list[NDArray[np.int8]] = field(default_factory=list)
    said: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """Heads 1, 2 and 4 on one window: probabilities ``[T]``, ``[T]``, ``[T, K, 3]``."""

    speaking: NDArray[np.float32]
    dst_update: NDArray[np.float32]
    state: NDArray[np.float32]


def decide(model: DSTSmolVLM, batch: Batch, hidden: torch.Tensor) -> list[Decisions]:
    """Decisions for each window of a batch, in the order of its examples."""
    steps = hidden[batch.step_at][batch.window_of_tick]
    speaking, update, state = model.decide(hidden[batch.tick_at], steps)
    owner = batch.window_of_tick.cpu().numpy()
    arrays = [
        speaking.softmax(-1)[:, 1].cpu().numpy(),
        update.softmax(-1)[:, 1].cpu().numpy(),
        state.softmax(-1).cpu().numpy(),
    ]
    found: dict[int, Decisions] = {}
    for number, example in enumerate(batch.order):
        speak_here, update_here, state_here = (array[owner == number] for array in arrays)
        found[example] = Decisions(speak_here, update_here, state_here[:, : batch.num_steps[number]])
    return [found[index] for index in range(len(found))]


@torch.inference_mode()
def decide_teacher(
    model: DSTSmolVLM, builder: SequenceBuilder, sessions: Sequence[SessionData], batch_windows: int = 16
) -> list[list[Decisions]]:
    """Decisions for each window of each session, with the true state and words at each window's start."""
    model.eval()
    jobs = [
        (number, first, length)
        for number, session in enumerate(sessions)
        for first, length in window_starts(session, model.config.window_ticks, phase=0)
    ]
    found: list[list[Decisions]] = [[] for _ in sessions]
    for start in range(0, len(jobs), batch_windows):
        chosen = jobs[start : start + batch_windows]
        examples = [
            _teacher_example(sessions[number], builder, first, length) for number, first, length in chosen
        ]
        batch = collate(examples, max_seq_len=0, pad_token=builder.pad_token).to(model.device)
        for (number, _, _), decisions in zip(chosen, decide(model, batch, model.hidden(batch)), strict=True):
            found[number].append(decisions)
    return found


def _teacher_example(session: SessionData, builder: SequenceBuilder, first: int, length: int) -> Example:
    words = [w for w in session.words if w.role == "user" or w.tick < first]
    return make_example(session, builder, first, length, session.state_before(first), words)


def traces_of_teacher(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: Sequence[SessionData],
    decisions: Sequence[Sequence[Decisions]],
    thresholds: Thresholds,
) -> list[Trace]:
    """The gated decisions of teacher-forced windows, without words: the state is set right at each window's start."""
    traces = []
    for session, windows in zip(sessions, decisions, strict=True):
        run = _start(session, model.config.window_ticks)
        for (first, _), decision in zip(run.windows, windows, strict=True):
            run.validator.state = session.state_before(first).copy()
            _advance(run, decision, builder.shown_steps(run.validator.state), thresholds)
        traces.append(_trace(run, thresholds))
    return traces


@torch.inference_mode()
def run_free(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: Sequence[SessionData],
    thresholds: Thresholds,
) -> list[Trace]:
    """What the assistant does on its own: states, memory and words are its own; only the user's words are given.

    Sessions advance together, one window at a time. Within a window, heads 1, 2 and 4 read the observation
    alone, so one pass decides all its ticks; then the words are generated where head 1 fires.
    """
    model.eval()
    runs = [_start(session, model.config.window_ticks) for session in sessions]
    for number in range(max(len(run.windows) for run in runs)):
        active = [run for run in runs if number < len(run.windows)]
        examples = []
        for run in active:
            first, length = run.windows[number]
            own = [w for w in run.words if w.role == "user" or w.tick < first]
            examples.append(make_example(run.session, builder, first, length, run.validator.state, own))
        # One row a window, so that a row's words can follow its own observation.
        batch = collate(examples, max_seq_len=0, pad_token=builder.pad_token).to(model.device)
        hidden, cache = model.hidden_with_cache(batch)
        decisions = decide(model, batch, hidden)
        speaking = []
        for run, decision, example in zip(active, decisions, examples, strict=True):
            _advance(run, decision, example.window.shown, thresholds)
            speaking.append(np.flatnonzero(decision.speaking >= thresholds.speaking))
        texts = speak(model, builder, batch, cache, speaking)
        for run, spoken in zip(active, texts, strict=True):
            first, _ = run.windows[number]
            for tick, text in spoken.items():
                run.said[first + tick] = text
                run.words.append(Words(first + tick, "assistant", text))
            run.words.sort(key=lambda w: (w.tick, w.role == "assistant"))
    return [_trace(run, thresholds) for run in runs]


def _start(session: SessionData, window_ticks: int) -> _Run:
    return _Run(
        session,
        list(window_starts(session, window_ticks, phase=0)),
        StateValidator(session.state_before(session.first_tick)),
        [w for w in session.words if w.role == "user"],
    )


def _advance(run: _Run, decision: Decisions, shown: NDArray[np.int64], thresholds: Thresholds) -> None:
    """Move a session's state over a window: head 2 opens the gate, head 4 proposes, the validator disposes."""
    run.speak_score.append(decision.speaking)
    run.update_score.append(decision.dst_update)
    for tick in range(len(decision.speaking)):
        if decision.dst_update[tick] >= thresholds.dst_update:
            proposed, probability = run.validator.state.copy(), np.ones(len(run.validator.state))
            proposed[shown] = decision.state[tick].argmax(-1)
            probability[shown] = decision.state[tick].max(-1)
            run.validator.update(proposed, probability)
        run.states.append(run.validator.state.copy())


def _trace(run: _Run, thresholds: Thresholds) -> Trace:
    session = run.session
    speak_score, update_score = np.concatenate(run.speak_score), np.concatenate(run.update_score)
    ticks = range(session.first_tick, session.first_tick + session.num_ticks)
    predicted = Track(
        speak=speak_score >= thresholds.speaking,
        dst_update=update_score >= thresholds.dst_update,
        state=np.stack(run.states),
        responses=tuple(run.said.get(tick) for tick in ticks),
    )
    return Trace(
        session_id=session.session_id,
        tick_hz=session.labels.meta["tick_hz"],
        first_tick=session.first_tick,
        step_names=session.step_names,
        truth=session.truth,
        predicted=predicted,
        speak_score=speak_score,
        update_score=update_score,
        proposed_transitions=run.validator.proposed,
        rejected_transitions=run.validator.rejected,
    )

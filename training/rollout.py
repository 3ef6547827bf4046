"""Runs a model over cached sessions, window after window: on its own state, or on the true one at each start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.states import StateValidator
from training.batch import Batch, collate
from training.data import SessionData, make_example, window_starts
from training.live import Decisions, LiveWindows, Observation
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder, Words
from training.speech import speak
from training.traces import Trace, Track

SESSIONS_AT_ONCE = 16
"""Sessions that advance together: enough that a pass is worth it, few enough that their keys find room."""


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

    def say(self, texts: dict[int, str]) -> None:
        """Take in what the assistant says, by tick."""
        self.said |= texts
        self.words += [Words(tick, "assistant", text) for tick, text in texts.items()]
        self.words.sort(key=lambda w: (w.tick, w.role == "assistant"))

    def heard(self, tick: int) -> tuple[str, ...]:
        """What the user says at a tick."""
        return tuple(w.text for w in self.words if w.tick == tick and w.role == "user")


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
) -> tuple[list[list[Decisions]], float, int]:
    """Decisions for each window of each session, with the true state at its start and all true words.

    Returns:
        The decisions of each session's windows, the summed loss of the response head, and the words it is the loss of.
    """
    model.eval()
    loss, words = 0.0, 0
    jobs = [
        (number, first, length)
        for number, session in enumerate(sessions)
        for first, length in window_starts(session, model.config.window_ticks, phase=0)
    ]
    found: list[list[Decisions]] = [[] for _ in sessions]
    for start in range(0, len(jobs), batch_windows):
        chosen = jobs[start : start + batch_windows]
        examples = []
        for number, first, length in chosen:
            session = sessions[number]
            state = session.state_before(first)
            examples.append(make_example(session, builder, first, length, state, session.words))
        batch = collate(examples, None, builder.pad_token).to(model.device)
        hidden = model.hidden(batch)
        for (number, _, _), decisions in zip(chosen, decide(model, batch, hidden), strict=True):
            found[number].append(decisions)
        logits = model.project(hidden[batch.response_at])
        loss += float(torch.nn.functional.cross_entropy(logits, batch.response, reduction="sum"))
        words += len(batch.response)
    return found, loss, words


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

    Sessions advance together, one window at a time.
    """
    model.eval()
    take_window = _branch_window if builder.speech == "branch" else _inline_window
    runs = [_start(session, model.config.window_ticks) for session in sessions]
    with _dense_attention(model):
        for begin in range(0, len(runs), SESSIONS_AT_ONCE):
            group = runs[begin : begin + SESSIONS_AT_ONCE]
            for number in range(max(len(run.windows) for run in group)):
                active = [run for run in group if number < len(run.windows)]
                take_window(model, builder, active, number, thresholds)
    return [_trace(run, thresholds) for run in runs]


def _branch_window(
    model: DSTSmolVLM, builder: SequenceBuilder, runs: Sequence[_Run], number: int, thresholds: Thresholds
) -> None:
    """Heads 1, 2 and 4 read the observation alone, so one pass decides all ticks; then comes what is said at them."""
    examples = []
    for run in runs:
        first, length = run.windows[number]
        own = [w for w in run.words if w.role == "user" or w.tick < first]
        examples.append(make_example(run.session, builder, first, length, run.validator.state, own))
    # One row a window, so that a row's words can follow its own observation.
    batch = collate(examples, None, builder.pad_token).to(model.device)
    hidden, cache = model.hidden_with_cache(batch)
    decisions = decide(model, batch, hidden)
    speaking = []
    for run, decision, example in zip(runs, decisions, examples, strict=True):
        _advance(run, decision, example.window.shown, thresholds)
        speaking.append(np.flatnonzero(decision.speaking >= thresholds.speaking))
    texts = speak(model, builder, batch, cache, speaking)
    for run, spoken in zip(runs, texts, strict=True):
        run.say({run.windows[number][0] + tick: text for tick, text in spoken.items()})


def _inline_window(
    model: DSTSmolVLM, builder: SequenceBuilder, runs: Sequence[_Run], number: int, thresholds: Thresholds
) -> None:
    """What was said changes what is decided after it, so one tick follows the other."""
    starts, features = [], []
    for run in runs:
        (first, length), session = run.windows[number], run.session
        plan = (session.goal, session.step_names, run.validator.state)
        starts.append(builder.window(*plan, first, 0, run.words))
        features.append(session.features(first, length))
    live = LiveWindows(model, builder, starts)
    for offset in range(max(len(part) for part in features)):
        decisions = live.observe(
            [
                Observation(part[offset], run.heard(run.windows[number][0] + offset))
                if offset < len(part)
                else None
                for run, part in zip(runs, features, strict=True)
            ]
        )
        speaking = []
        for row, (run, decision) in enumerate(zip(runs, decisions, strict=True)):
            if decision is not None:
                _advance(run, decision, starts[row].shown, thresholds)
                if decision.speaking[0] >= thresholds.speaking:
                    speaking.append(row)
        for row, text in live.speak(speaking).items():
            runs[row].say({runs[row].windows[number][0] + offset: text})


@contextmanager
def _dense_attention(model: DSTSmolVLM) -> Iterator[None]:
    """Attention that takes any mask and length as it comes: FlexAttention would be compiled for each anew."""
    config = model.config.text_config
    trained_with = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = trained_with


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
        source=session.labels.meta["source"],
    )

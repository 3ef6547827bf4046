"""Runs a model over cached sessions, window after window: on its own state, or on the true one at each start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from training.batch import Batch, Example, collate
from training.data import SessionData, make_example, true_trace, window_starts
from training.gate import Course, Decisions, Thresholds
from training.live import LiveWindows, Observation
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder, Words
from training.speech import speak
from training.traces import Trace

SESSIONS_AT_ONCE = 16
"""Sessions that advance together: enough that a pass is worth it, few enough that their keys find room."""

POSITIONS_AT_ONCE = 16_384
"""Positions of a pass that reads true words, where no recipe says what there is room for."""


class _Run:
    """One session on its way through the model."""

    def __init__(self, session: SessionData, window_ticks: int, thresholds: Thresholds) -> None:
        self.session = session
        self.windows = list(window_starts(session, window_ticks, phase=0))
        self.course = Course(session.state_before(session.first_tick), thresholds)
        self.words = [w for w in session.words if w.role == "user"]
        self.said: dict[int, str] = {}

    def say(self, texts: dict[int, str]) -> None:
        """Take in what the assistant says, by tick."""
        self.said |= texts
        self.words += [Words(tick, "assistant", text) for tick, text in texts.items()]
        self.words.sort(key=lambda w: (w.tick, w.role == "assistant"))

    def heard(self, tick: int) -> tuple[str, ...]:
        """What the user says at a tick."""
        return tuple(w.text for w in self.words if w.tick == tick and w.role == "user")

    def trace(self) -> Trace:
        first = self.session.first_tick
        return self.course.trace(
            true_trace(self.session), {tick - first: said for tick, said in self.said.items()}
        )


def decide(model: DSTSmolVLM, batch: Batch, hidden: torch.Tensor) -> list[Decisions]:
    """Decisions for each window of a batch, in the order of its examples."""
    steps = hidden[batch.step_at][batch.window_of_tick]
    speaking, update, state = model.decide(hidden[batch.tick_at], steps)
    owner = batch.window_of_tick.cpu().numpy()
    arrays = [logits.float().cpu().numpy() for logits in (speaking, update, state)]
    found: dict[int, Decisions] = {}
    for number, example in enumerate(batch.order):
        speak_here, update_here, state_here = (array[owner == number] for array in arrays)
        found[example] = Decisions(speak_here, update_here, state_here[:, : batch.num_steps[number]])
    return [found[index] for index in range(len(found))]


@torch.inference_mode()
def decide_teacher(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: Sequence[SessionData],
    positions: int = POSITIONS_AT_ONCE,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[list[Decisions]], float, int]:
    """Decisions for each window of each session, with the true state at its start and all true words.

    Args:
        positions: of a pass, padding included; a window that has more is computed alone.
        between: called before each pass.

    Returns:
        The decisions of each session's windows, the summed loss of the response head, and the words it is the loss of.
    """
    model.eval()
    loss, words = 0.0, 0
    found: list[list[Decisions]] = [[] for _ in sessions]
    with _dense_attention(model):
        for part in _fitting(_true_windows(model, builder, sessions), positions):
            between()
            batch = collate([example for _, example in part], None, builder.pad_token).to(model.device)
            hidden = model.hidden(batch)
            for (number, _), decisions in zip(part, decide(model, batch, hidden), strict=True):
                found[number].append(decisions)
            logits = model.project(hidden[batch.response_at])
            loss += float(torch.nn.functional.cross_entropy(logits, batch.response, reduction="sum"))
            words += len(batch.response)
    return found, loss, words


def _true_windows(
    model: DSTSmolVLM, builder: SequenceBuilder, sessions: Sequence[SessionData]
) -> Iterator[tuple[int, Example]]:
    """Each window with the number of its session, in order, written with the true state and words."""
    for number, session in enumerate(sessions):
        for first, length in window_starts(session, model.config.window_ticks, phase=0):
            state = session.state_before(first)
            yield number, make_example(session, builder, first, length, state, session.words)


def _fitting(windows: Iterator[tuple[int, Example]], positions: int) -> Iterator[list[tuple[int, Example]]]:
    """Windows by as many as have no more positions together, if all are as long as the longest; at least one."""
    part: list[tuple[int, Example]] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window[1].window.tokens))
        if part and longest * (len(part) + 1) > positions:
            yield part
            part, longest = [], len(window[1].window.tokens)
        part.append(window)
    if part:
        yield part


@torch.inference_mode()
def run_free(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    sessions: Sequence[SessionData],
    thresholds: Thresholds,
    between: Callable[[], None] = lambda: None,
) -> list[Trace]:
    """What the assistant does on its own: states, memory and words are its own; only the user's words are given.

    Sessions advance together, one window at a time.

    Args:
        between: called before each window.
    """
    model.eval()
    take_window = _branch_window if builder.speech == "branch" else _inline_window
    runs = [_Run(session, model.config.window_ticks, thresholds) for session in sessions]
    with _dense_attention(model):
        for begin in range(0, len(runs), SESSIONS_AT_ONCE):
            group = runs[begin : begin + SESSIONS_AT_ONCE]
            for number in range(max(len(run.windows) for run in group)):
                active = [run for run in group if number < len(run.windows)]
                between()
                take_window(model, builder, active, number)
    return [run.trace() for run in runs]


def _branch_window(model: DSTSmolVLM, builder: SequenceBuilder, runs: Sequence[_Run], number: int) -> None:
    """Heads 1, 2 and 4 read the observation alone, so one pass decides all ticks; then comes what is said at them."""
    examples = []
    for run in runs:
        first, length = run.windows[number]
        own = [w for w in run.words if w.role == "user" or w.tick < first]
        examples.append(make_example(run.session, builder, first, length, run.course.gate.state, own))
    # One row a window, so that a row's words can follow its own observation.
    batch = collate(examples, None, builder.pad_token).to(model.device)
    hidden, cache = model.hidden_with_cache(batch)
    decisions = decide(model, batch, hidden)
    speaking = []
    for run, decision, example in zip(runs, decisions, examples, strict=True):
        speaking.append(np.array(run.course.take(decision, example.window.shown), dtype=np.int64))
    texts = speak(model, builder, batch, cache, speaking)
    for run, spoken in zip(runs, texts, strict=True):
        run.say({run.windows[number][0] + tick: text for tick, text in spoken.items()})


def _inline_window(model: DSTSmolVLM, builder: SequenceBuilder, runs: Sequence[_Run], number: int) -> None:
    """What was said changes what is decided after it, so one tick follows the other."""
    starts, features = [], []
    for run in runs:
        (first, length), session = run.windows[number], run.session
        plan = (session.goal, session.step_names, run.course.gate.state)
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
            if decision is not None and run.course.take(decision, starts[row].shown):
                speaking.append(row)
        for row, text in live.speak(speaking).items():
            runs[row].say({runs[row].windows[number][0] + offset: text})


@contextmanager
def _dense_attention(model: DSTSmolVLM) -> Iterator[None]:
    """Attention that takes any mask and length as it comes: FlexAttention, or a language model that is compiled for
    training, would be compiled for each anew, and after a few no more."""
    config = model.config.text_config
    trained_with = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        config._attn_implementation = trained_with

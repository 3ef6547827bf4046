"""Sessions of a cache as windows to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.shards import LabelledSession, ShardCache
from schemas.errors import UserError
from training.batch import Example
from training.sequence import SequenceBuilder, Window, Words
from training.tally import near_transition
from training.traces import Trace, Track


@dataclass(frozen=True)
class SessionData:
    """A session's labels in memory; its features stay in the cache's files.

    ``words`` are the true utterances in order, ``near`` bool ``[T]`` the ticks close to a transition. All ticks are the
    video's.
    """

    cache: ShardCache
    labels: LabelledSession
    goal: str
    step_names: tuple[str, ...]
    words: tuple[Words, ...]
    truth: Track
    near: NDArray[np.bool_]
    blind: bool

    @property
    def session_id(self) -> str:
        return self.labels.session_id

    @property
    def first_tick(self) -> int:
        return self.labels.first_tick

    @property
    def num_ticks(self) -> int:
        return self.labels.num_ticks

    def features(self, first_tick: int, num_ticks: int) -> NDArray[Any]:
        """Cached features ``[n, tokens, dim]``; zeros for a blind run."""
        features = self.cache.features(self.labels.meta["video_id"], first_tick, num_ticks)
        return np.zeros_like(features) if self.blind else features

    def state_before(self, tick: int) -> NDArray[np.int8]:
        """The true state before a tick: nothing has started before the session's first."""
        index = tick - self.first_tick
        return self.truth.state[index - 1] if index > 0 else np.zeros_like(self.truth.state[0])


def load_sessions(cache: ShardCache, split: str, blind: bool = False) -> list[SessionData]:
    """All sessions of a split that have a dialog, in order of id; images to count in have none.

    Raises:
        UserError: the cache has none.
    """
    sessions = []
    splits = set()
    for session_id in cache.session_ids:
        labels = cache.session(session_id)
        if labels.points is not None:
            continue
        splits.add(labels.meta["split"])
        if labels.meta["split"] == split:
            sessions.append(_session(cache, labels, blind))
    if not splits:
        raise UserError(
            f"{cache.folder} holds nothing but images to count in; train on it with --recipe counting, or cache dialogs"
        )
    if not sessions:
        raise UserError(
            f"{cache.folder} has no session of the split {split!r} (there are: {', '.join(sorted(splits))}); "
            "prepare and cache some"
        )
    return sessions


def _session(cache: ShardCache, labels: LabelledSession, blind: bool) -> SessionData:
    turns = sorted(labels.turns, key=lambda turn: (turn["tick"], turn["turn"]))
    truth = Track(
        speak=labels.column("speak").astype(np.bool_),
        dst_update=labels.column("dst_update").astype(np.bool_),
        state=labels.column("dst_state"),
        responses=tuple(labels.frames["response"].to_pylist()),
    )
    return SessionData(
        cache=cache,
        labels=labels,
        goal=labels.meta["goal"],
        step_names=tuple(step["name"] for step in sorted(labels.steps, key=lambda step: step["step"])),
        words=tuple(Words(turn["tick"], turn["role"], turn["text"]) for turn in turns),
        truth=truth,
        near=near_transition(truth),
        blind=blind,
    )


def true_trace(session: SessionData) -> Trace:
    """A session whose prediction is the truth."""
    meta = session.labels.meta
    return Trace(
        session_id=session.session_id,
        tick_hz=meta["tick_hz"],
        first_tick=session.first_tick,
        step_names=session.step_names,
        truth=session.truth,
        predicted=session.truth,
        speak_score=None,
        update_score=None,
        source=meta["source"],
        video_id=meta["video_id"],
        recording_id=meta.get("recording_id", meta["video_id"]),  # caches of earlier code do not tell it
        goal=session.goal,
        heard=tuple((w.tick - session.first_tick, w.text) for w in session.words if w.role == "user"),
    )


def window_starts(session: SessionData, window_ticks: int, phase: int) -> Iterator[tuple[int, int]]:
    """First tick and length of the windows that cover a session, the first one shortened by ``phase`` ticks."""
    end = session.first_tick + session.num_ticks
    first, length = session.first_tick, window_ticks - phase
    while first < end:
        yield first, min(length, end - first)
        first, length = first + length, window_ticks


def make_example(
    session: SessionData,
    builder: SequenceBuilder,
    first_tick: int,
    num_ticks: int,
    state: NDArray[np.int8],
    words: Sequence[Words],
) -> Example:
    """A window with its features and true labels.

    Args:
        state: int8 ``[K]``, the state to show before ``first_tick``: the true one, or a predicted one.
        words: the utterances to write into it.
    """
    window = builder.window(session.goal, session.step_names, state, first_tick, num_ticks, words)
    return example_of(session, window, first_tick, num_ticks)


def example_of(session: SessionData, window: Window, first_tick: int, num_ticks: int) -> Example:
    """A window that is written already, with its features and true labels."""
    here = slice(first_tick - session.first_tick, first_tick - session.first_tick + num_ticks)
    truth = session.truth
    return Example(
        window=window,
        features=session.features(first_tick, num_ticks),
        speaking=truth.speak[here].astype(np.int64),
        dst_update=truth.dst_update[here].astype(np.int64),
        state=truth.state[here][:, window.shown],
        near=session.near[here],
        name=f"{session.session_id} ticks {first_tick} to {first_tick + num_ticks - 1}",
    )

"""A session on the clock: rows for the label tables, and rejects for what falls outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.clock import Clock
from schemas.records import Rejects, Session, Turn
from schemas.states import SourceRow, Step, TimestampToStateConverter, transitions_between
from schemas.tables import TABLES

_LONGEST_S = 86_400  # a time that is none, such as nanoseconds for seconds, would fill the memory with ticks
_MOST_STEPS = 32_767  # the tables number them in 16 bits


@dataclass(frozen=True)
class Aligned:
    """Rows of one session, as the tables of the same names have them (the session without its ``source``).

    ``joined_turns`` counts assistant turns that share a tick with an earlier one, whose texts are one response.
    """

    session: dict[str, Any]
    steps: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    frames: pa.Table
    last_tick: int
    joined_turns: int
    points: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    """The ticks of a session, both ends included, and where what lies outside of them is noted."""

    session: Session
    clock: Clock
    first: int
    last: int
    rejects: Rejects

    def holds(self, t: float) -> bool:
        return math.isfinite(t) and self.first <= self.clock.tick_of(t) <= self.last

    def reject(self, what: str, t: float, detail: str, row: SourceRow | None) -> None:
        duration = self.session.video.duration_s
        past_end = duration is not None and self.clock.tick_of(t) >= self.clock.num_ticks(duration)
        reason = "outside the video" if past_end or self.clock.tick_of(t) < 0 else "outside the session"
        what = f"{self.session.session_id} {what}"
        if row:
            self.rejects.add(*row, reason, f"{what}: {detail}")
        else:
            self.rejects.add(self.session.source_file, what, reason, detail)


def align(session: Session, clock: Clock, rejects: Rejects) -> Aligned | None:
    """Put a session on the clock.

    A session's ticks are those of its range that its video has. Each event (a step's start or end, a turn, a
    mistake) belongs to the first tick at or after it; one whose tick is not among the session's is a reject: a
    step whose start is outside never starts, one whose end is outside stays in progress.

    Returns:
        None where no tick or no step remains, or more than a table can hold; the session and each row it was read
        from are rejects then.
    """
    window = _window(session, clock, rejects)
    unusable = _unusable(session, window)
    if unusable:
        detail = f"{session.start_s:g} to {session.end_s:g} s of a video of {session.video.duration_s} s"
        rejects.add(session.source_file, session.session_id, unusable, detail)
        for used in (session.steps, session.turns, session.mistake_rows):
            rejects.add_rows(used, unusable, session.session_id)
        return None
    steps = [_used_part(step, window) for step in session.steps]
    turns = _turns_inside(session, window)
    mistake = _mistaken(session, window)
    responses: dict[int, list[str]] = {}
    for tick, turn in turns:
        if turn.role == "assistant":
            responses.setdefault(tick, []).append(turn.text)
    return Aligned(
        session=_session_row(session, window),
        steps=[_step_row(session, index, step) for index, step in enumerate(steps)],
        turns=[_turn_row(session, index, tick, turn) for index, (tick, turn) in enumerate(turns)],
        frames=_frames(
            session, window, steps, {t: " ".join(texts) for t, texts in responses.items()}, mistake
        ),
        last_tick=window.last,
        joined_turns=sum(len(texts) - 1 for texts in responses.values()),
    )


def _window(session: Session, clock: Clock, rejects: Rejects) -> _Window:
    first, last = max(0, clock.tick_of(session.start_s)), clock.tick_of(session.end_s)
    if session.video.duration_s is not None:
        last = min(last, clock.num_ticks(session.video.duration_s) - 1)
    return _Window(session, clock, first, last, rejects)


def _unusable(session: Session, window: _Window) -> str | None:
    if not session.steps:
        return "no steps"
    if len(session.steps) > _MOST_STEPS:
        return "too many steps"
    if window.last > _LONGEST_S * window.clock.tick_hz:
        return "later than a day"
    return "no ticks" if window.first > window.last else None


def _used_part(step: Step, window: _Window) -> Step:
    """The step with the spans its states are computed from; each other one is a reject."""
    rows: Sequence[SourceRow | None] = step.source_rows or [None] * len(step.spans)
    kept: list[tuple[tuple[float, float], SourceRow | None]] = []
    whole = True
    for (start, end), row in sorted(zip(step.spans, rows, strict=True), key=lambda pair: pair[0]):
        detail = f"{start:.3f} to {end:.3f} s, {step.name}"
        if not (window.holds(start) and window.holds(step.start)):
            window.reject(f"step {step.step_id} start", start, detail, row)
            whole = False
        elif window.holds(end) or math.isinf(end):
            kept.append(((start, end), row))
        else:
            window.reject(f"step {step.step_id} end", end, detail, row)
            kept.append(((start, math.inf), row))
    if kept and not whole:  # it goes on somewhere else
        kept.append(((kept[-1][0][0], math.inf), kept.pop()[1]))
    source_rows = tuple(row for _, row in kept if row)
    return replace(step, spans=tuple(span for span, _ in kept), source_rows=source_rows)


def _turns_inside(session: Session, window: _Window) -> list[tuple[int, Turn]]:
    inside = []
    for index, turn in enumerate(session.turns):
        if window.holds(turn.t_s):
            inside.append((window.clock.tick_of(turn.t_s), turn))
        elif session.dialog_origin != "template":  # made of steps, which are rejects themselves
            detail = f"{turn.t_s:.3f} s, {turn.role}: {turn.text}"
            window.reject(f"turn {index}", turn.t_s, detail, turn.source_row)
    return sorted(inside, key=lambda pair: (pair[0], pair[1].t_s))


def _mistaken(session: Session, window: _Window) -> NDArray[np.bool_] | None:
    """Which ticks lie in a mistake: from the tick its start belongs to up to that of its end, one at least. A span is
    marked where it lies inside, and a reject where it does not."""
    if session.mistakes is None:
        return None
    marks = np.zeros(window.last + 1 - window.first, dtype=np.bool_)
    rows: Sequence[SourceRow | None] = session.mistake_rows or [None] * len(session.mistakes)
    for index, ((start, end), row) in enumerate(zip(session.mistakes, rows, strict=True)):
        first = window.clock.tick_of(start)
        stop = max(window.clock.tick_of(end), first + 1)
        marks[max(0, first - window.first) : max(0, stop - window.first)] = True
        what, detail = f"mistake {index}", f"{start:.3f} to {end:.3f} s"
        if not window.holds(start):
            window.reject(what, start, detail, row)
        elif not window.holds(end):
            window.reject(what, end, f"{detail}, marked from its start on", row)
    return marks


def _frames(
    session: Session,
    window: _Window,
    steps: list[Step],
    responses: dict[int, str],
    mistake: NDArray[np.bool_] | None,
) -> pa.Table:
    ticks = np.arange(window.first, window.last + 1, dtype=np.int32)
    states = TimestampToStateConverter(window.clock).matrix(ticks, steps)
    before = np.vstack([np.zeros_like(states[:1]), states[:-1]])
    texts = np.full(len(ticks), None, dtype=object)
    texts[np.array(list(responses), dtype=np.intp) - window.first] = list(responses.values())
    schema = TABLES["frames"]
    columns = {
        "session_id": pa.repeat(session.session_id, len(ticks)),
        "split": pa.repeat(session.split, len(ticks)),
        "tick": ticks,
        "t_s": ticks / window.clock.tick_hz,
        "speak": texts != None,  # noqa: E711  # element by element
        "response": texts,
        "dst_update": (states != before).any(axis=1),
        "dst_state": _lists(states, schema.field("dst_state").type),
        "transitions": _lists(transitions_between(before, states), schema.field("transitions").type),
        "mistake": pa.nulls(len(ticks), pa.bool_()) if mistake is None else mistake,
    }
    return pa.table(columns, schema=schema)


def _lists(matrix: NDArray[np.int8], kind: pa.DataType) -> pa.Array:
    rows, width = matrix.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(matrix.ravel()), type=kind)


def _session_row(session: Session, window: _Window) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "video_id": session.video.video_id,
        "split": session.split,
        "goal": session.goal,
        "knowledge": session.knowledge,
        "first_tick": window.first,
        "num_ticks": window.last + 1 - window.first,
        "tick_hz": window.clock.tick_hz,
        "num_steps": len(session.steps),
        "user_type": session.user_type,
        "dialog_origin": session.dialog_origin,
        "quality": session.quality,
    }


def _step_row(session: Session, index: int, step: Step) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "step": index,
        "step_id": step.step_id,
        "name": step.name,
        "parent": step.parent,
        "spans": [{"start_s": start, "end_s": end} for start, end in step.spans],
        "source_rows": list(map(str, step.source_rows)),
    }


def _turn_row(session: Session, index: int, tick: int, turn: Turn) -> dict[str, Any]:
    return {
        "session_id": session.session_id,
        "turn": index,
        "tick": tick,
        "t_s": turn.t_s,
        "role": turn.role,
        "text": turn.text,
        "labels": list(turn.labels),
        "progress": turn.progress,
        "source_row": str(turn.source_row) if turn.source_row else None,
    }

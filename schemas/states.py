"""The dialog state: which step of the task is not started, in progress or completed, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.clock import TICK_TOLERANCE, Clock

NOT_STARTED, IN_PROGRESS, COMPLETED = 0, 1, 2
STATE_NAMES = ("not_started", "in_progress", "completed")

START, COMPLETE = 1, 2
"""Bits of a transition. A step shorter than a tick starts and completes in one: 3."""

_CHILDREN = ("steps", "substeps", "actions")
_START_KEYS = ("start_ts", "t0")
_END_KEYS = ("end_ts", "t1")


class SourceRow(NamedTuple):
    """Where something was read: a file, and how people find the row in it."""

    file: str
    locator: str

    def __str__(self) -> str:
        return f"{self.file}, {self.locator}"


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    ``spans`` are half-open intervals in seconds; a step that is interrupted has several. It is in progress
    from its first start to its last end. An end of ``inf`` is a step that is never seen to end; no span at all
    is a step that never starts. ``source_rows`` say, span by span, which row of which file it was read from.
    """

    step_id: str
    name: str
    spans: tuple[tuple[float, float], ...] = ()
    type: str = "step"
    parent: str | None = None
    source_rows: tuple[SourceRow, ...] = ()
    start: float = field(init=False)
    end: float = field(init=False)

    def __post_init__(self) -> None:
        for start, end in self.spans:
            if not math.isfinite(start) or math.isnan(end) or start < 0:
                raise ValueError(f"step {self.step_id!r} has a span {start}-{end} that is not a time")
            if end < start:
                raise ValueError(f"step {self.step_id!r} ends at {end} s, before it starts at {start} s")
        object.__setattr__(self, "start", min((s for s, _ in self.spans), default=math.inf))
        object.__setattr__(self, "end", max((e for _, e in self.spans), default=math.inf))


def parse_dst(dst: Any) -> list[Step]:
    """Read a DST annotation in any form it has had; the order of the list is the order of the steps.

    - a list of ``{"type", "id", "start_ts", "end_ts", "name"}``;
    - ``{"steps": [...]}`` nested through ``substeps`` and ``actions``, each with
      ``timestamps: {start_ts, end_ts}``: parents come before their children;
    - tab separated text with the columns ``type id start_ts end_ts name``, with or without that header;
    - ``{"steps": [{"id", "name", "t0", "t1", "conf"}]}``;
    - a mapping of task names to ``{"timestamps": [...]}``: the first is the start, the last the end, none is a
      step that never starts.

    Raises:
        ValueError: one sentence naming the entry that cannot be read.
    """
    try:
        return _parsed(dst)
    except RecursionError:
        raise ValueError("the DST annotation has entries in entries without end") from None


def _parsed(dst: Any) -> list[Step]:
    if isinstance(dst, str):
        return [_entry(row, index, None) for index, row in enumerate(_tsv_rows(dst))]
    if isinstance(dst, Mapping):
        if isinstance(dst.get("steps"), Sequence):
            return list(_nested(dst["steps"], "step", None))
        return [
            _task(_name(name, f"S{index}"), value, f"S{index}")
            for index, (name, value) in enumerate(dst.items(), 1)
        ]
    if isinstance(dst, Sequence):
        return list(_nested(dst, "step", None))
    raise ValueError(f"a DST annotation is a list, a mapping or TSV text, not {type(dst).__name__}")


def _tsv_rows(text: str) -> Iterator[dict[str, str]]:
    columns = ("type", "id", "start_ts", "end_ts", "name")
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not line.strip() or cells == list(columns):
            continue
        if len(cells) != len(columns):
            raise ValueError(f"DST line {number} has {len(cells)} columns, not the 5 of {' '.join(columns)}")
        yield dict(zip(columns, cells, strict=True))


def _nested(entries: Sequence[Any], kind: str, parent: str | None) -> Iterator[Step]:
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ValueError(f"DST entry {parent!r} has {entries!r} for a list of entries")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"DST entry {index} is {entry!r}, not a mapping")
        step = _entry({"type": kind, **entry}, index, parent)
        yield step
        for key in _CHILDREN:
            if entry.get(key):
                yield from _nested(entry[key], key.rstrip("s"), step.step_id)


def _entry(entry: Mapping[str, Any], index: int, parent: str | None) -> Step:
    kind = str(entry["type"]).lower()
    ids = [entry[key] for key in ("id", f"{kind}_id", "step_id") if key in entry]
    if ids and (isinstance(ids[0], bool) or not isinstance(ids[0], (str, int))):
        raise ValueError(f"DST entry {index} has the id {ids[0]!r}, which is neither text nor a whole number")
    step_id = str(ids[0]) if ids else (f"{parent}.{index + 1}" if parent else f"S{index + 1}")
    name = _name(entry.get("name", step_id), step_id)
    times = entry.get("timestamps", entry)
    if isinstance(times, Sequence) and not isinstance(times, str):
        return replace(_task(name, entry, step_id), type=kind, parent=parent)
    start = _time(times, _START_KEYS, step_id)
    end = _time(times, _END_KEYS, step_id)
    if start is None and end is not None:
        raise ValueError(f"DST entry {step_id!r} has an end and no start")
    spans = () if start is None else ((start, math.inf if end is None else end),)
    return Step(step_id, name, spans, kind, parent)


def _name(name: Any, step_id: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"DST entry {step_id!r} has the name {name!r}, which is no text")
    return name.strip()


def _task(name: str, value: Any, step_id: str) -> Step:
    times = value.get("timestamps") if isinstance(value, Mapping) else None
    if isinstance(times, str) or not isinstance(times, Sequence):
        raise ValueError(f"DST task {name!r} has no list 'timestamps'")
    seconds = [_number(t, step_id) for t in times]
    return Step(step_id, name, ((seconds[0], seconds[-1]),) if seconds else ())


def _time(times: Any, keys: Sequence[str], step_id: str) -> float | None:
    if not isinstance(times, Mapping) or not any(key in times for key in keys):
        raise ValueError(f"DST entry {step_id!r} has none of the keys {', '.join(keys)}")
    value = next(times[key] for key in keys if key in times)
    return None if value is None or value == "" else _number(value, step_id)


def _number(value: Any, step_id: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError("true and false are not times")
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"DST entry {step_id!r} has the time {value!r}, which is not a number") from None


class TimestampToStateConverter:
    """Turns time stamps of steps into states on a clock.

    A step is not started before its start, in progress from it (included) to its end (excluded), completed
    from its end on.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()

    def convert(self, t: float, dst: Any) -> list[int]:
        """States of all steps at ``t`` seconds, in the order of the annotation.

        Args:
            t: seconds from the video's first decoded frame.
            dst: any form `parse_dst` reads, or a list of `Step`.
        """
        return [int(state) for state in self._states(np.array([t * self.clock.tick_hz]), dst)[0]]

    def matrix(self, ticks: Sequence[int] | NDArray[np.integer], dst: Any) -> NDArray[np.int8]:
        """States at many ticks.

        Returns:
            int8 ``[T, K]``, one row a tick, one column a step.
        """
        return self._states(np.asarray(ticks, dtype=np.float64), dst)

    def _states(self, positions: NDArray[np.float64], dst: Any) -> NDArray[np.int8]:
        steps = dst if _are_steps(dst) else parse_dst(dst)
        starts = np.array([step.start for step in steps]) * self.clock.tick_hz - TICK_TOLERANCE
        ends = np.array([step.end for step in steps]) * self.clock.tick_hz - TICK_TOLERANCE
        started = positions[:, None] >= starts[None, :]
        ended = positions[:, None] >= ends[None, :]
        return started.astype(np.int8) + ended.astype(np.int8)


def _are_steps(dst: Any) -> bool:
    return isinstance(dst, Sequence) and all(isinstance(step, Step) for step in dst)


def transitions_between(before: NDArray[np.int8], after: NDArray[np.int8]) -> NDArray[np.int8]:
    """What changed from one state to the next.

    Args:
        before, after: int8 states of the same shape.

    Returns:
        int8 bits of the same shape: ``START``, ``COMPLETE``, both, or 0.
    """
    started = (before == NOT_STARTED) & (after != NOT_STARTED)
    completed = (before != COMPLETED) & (after == COMPLETED)
    return (started * START + completed * COMPLETE).astype(np.int8)


SURE = 0.95
"""Probability from which a step may complete that was never seen in progress."""


class StateValidator:
    """Lets predicted states only move forward, and counts what is proposed.

    A step may stay, start, or complete once started; it never goes back. That it starts and completes at once
    happens only to steps shorter than a tick, and a wrong completion can never be taken back: so it is believed
    only of a head that is sure.
    """

    def __init__(self, initial: Sequence[int] | NDArray[np.integer]) -> None:
        self.state: NDArray[np.int8] = np.array(initial, dtype=np.int8)
        self.proposed = 0

    def update(self, predicted: NDArray[np.integer], probability: NDArray[np.floating]) -> NDArray[np.int64]:
        """Take over the legal part of a prediction.

        Args:
            predicted: states ``[K]``.
            probability: of each of them, ``[K]``.

        Returns:
            The steps whose change is refused, int64.
        """
        skips = (self.state == NOT_STARTED) & (predicted == COMPLETED) & (probability < SURE)
        legal = (predicted > self.state) & ~skips
        changes = predicted != self.state
        self.proposed += int(changes.sum())
        self.state = np.where(legal, predicted, self.state).astype(np.int8)
        return np.flatnonzero(changes & ~legal)

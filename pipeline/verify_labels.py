"""What a label file must hold: sessions whose rows agree with each other, with their video, with the label tables."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.label_shards import meta_of
from pipeline.ledger import Entry, key_of
from pipeline.plan import LabelTables
from pipeline.shard_reader import ShardReader
from pipeline.shards import LabelledSession, read_session, what_is_wrong
from pipeline.stills import marks_sha256
from pipeline.verify_vision import at_ticks
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.points import READING_ROW_PX
from schemas.states import COMPLETED, Step, TimestampToStateConverter, transitions_between
from schemas.tables import SPLITS

_PARTS = ("frames", "meta", "points", "steps", "turns")


class LabelCheck:
    """Checks one label file after the other, and remembers where each session is.

    Args:
        clock: the cache's.
        video_files: in which vision file each video is.
        tables: what the sessions are compared with, or None.
    """

    def __init__(self, clock: Clock, video_files: dict[str, str], tables: LabelTables | None) -> None:
        self._clock, self._video_files, self._tables = clock, video_files, tables
        self.sessions: dict[str, str] = {}  # the file of each
        self._differing: dict[str, list[str]] = defaultdict(list)  # sessions by the parts that do
        self._rows_of = {row["session_id"]: row for row in tables.sessions} if tables else {}
        self._video_rows = {row["video_id"]: row for row in tables.videos} if tables else {}

    def check(self, reader: ShardReader, entry: Entry, vision: Entry | None) -> Iterator[str]:
        """Check a label file.

        Args:
            vision: the entry of the vision file of the same number; None where it is not known.

        Yields:
            One sentence for each thing that is wrong, beginning with the session.
        """
        failed = {failure.id for failure in entry.failures}
        for key in reader.keys:
            if key in self.sessions:
                yield f"{key}: the session is in {self.sessions[key]} too"
                continue
            self.sessions[key] = entry.file
            if key in failed:
                yield f"{key}: the session is there, though the ledger says that it could not be made"
            try:
                session = _session(reader, key)
            except UserError as error:
                yield str(error)
            except _NotAsWanted as error:
                yield f"{key}: {error}"
            else:
                yield from (f"{key}: {wrong}" for wrong in _check_rows(session, self._clock))
                if vision is not None:
                    yield from (f"{key}: {wrong}" for wrong in self._check_video(session, vision))
                self._compare(session)

    def missing(self, entries: list[Entry], unseen: set[str]) -> Iterator[str]:
        """What the label tables have otherwise than the files that were checked.

        Args:
            entries: of all label files; sessions that they call failed are not missing.
            unseen: videos whose sessions are in a file that could not be checked.

        Yields:
            One sentence for each kind of difference.
        """
        for parts, sessions in sorted(self._differing.items()):
            yield f"{_some(sessions)} other {parts} in the cache; run 'dst cache-features --labels-only'"
        known = self.sessions.keys() | {failure.id for entry in entries for failure in entry.failures}
        missing = [
            session_id
            for session_id, row in self._rows_of.items()
            if session_id not in known and row["video_id"] not in unseen
        ]
        if missing:
            yield f"{_some(missing)} no record in the cache; run 'dst cache-features' again"
        foreign = sorted(self.sessions.keys() - self._rows_of.keys())
        if self._tables is not None and foreign:
            yield f"{_some(foreign)} no row in the tables; run 'dst cache-features --labels-only'"

    def _check_video(self, session: LabelledSession, vision: Entry) -> Iterator[str]:
        video_id = session.meta["video_id"]
        video = vision.videos.get(video_id)
        if video is None:
            where = self._video_files.get(video_id)
            yield (
                f"its video {video_id} is in {where}, not in {vision.file} beside it"
                if where
                else f"its video {video_id} is not in the cache"
            )
            return
        drawn = _drawn(session)
        if marks_sha256(drawn) != video.marks_sha256:
            yield (
                f"{video_id} was not cached with its points drawn on it"
                if drawn is not None
                else f"{video_id} was cached with marks drawn on it"
            )
        if session.meta.get("rotation_deg") != video.rotation_deg:
            yield (
                f"it is rotated by {session.meta.get('rotation_deg')} degrees, its video was cached with "
                f"{video.rotation_deg}"
            )
        first, end = session.first_tick, session.first_tick + session.num_ticks
        if end > video.ticks:
            yield f"tick {max(first, video.ticks)}: {video_id} has {video.ticks} ticks in the cache"
        for begin, stop, _ in video.unreadable:
            if begin < min(end, stop) and first < stop:
                yield f"tick {max(first, begin)}: {video_id} is unreadable there"

    def _compare(self, session: LabelledSession) -> None:
        row = self._rows_of.get(session.session_id)
        if self._tables is None or row is None:
            return
        video = self._video_rows[row["video_id"]]
        tables = {
            name: self._tables.of_session(name, session.session_id)
            for name in ("frames", "points", "steps", "turns")
        }
        same = {
            "frames": session.frames.equals(tables["frames"]),
            "meta": _is_same(session.meta, meta_of(row, video)),
            "points": _is_same(session.points or [], tables["points"].to_pylist()),
            "steps": _is_same(session.steps, tables["steps"].to_pylist()),
            "turns": _is_same(session.turns, tables["turns"].to_pylist()),
        }
        parts = [name for name in _PARTS if not same[name]]
        if parts:
            self._differing[", ".join(parts)].append(session.session_id)


class _NotAsWanted(Exception):
    """What is wrong with a session so that its rows are not looked at."""


def _session(reader: ShardReader, key: str) -> LabelledSession:
    members = sorted(reader.members(key))
    wanted = [part for part in _PARTS if part != "points" or "points" in members]
    if members != wanted:
        raise _NotAsWanted(f"it holds {', '.join(members)} in place of {', '.join(wanted)}")
    session = read_session(reader, key)
    meta, frames = session.meta, session.frames
    if not isinstance(meta, dict) or meta.get("num_ticks") != len(frames):
        raise _NotAsWanted(f"it has {len(frames)} rows of frames, which is not what its meta says")
    wrong = what_is_wrong(key, session)
    if wrong:
        raise _NotAsWanted(f"the session {wrong}")
    if len(frames) == 0:
        raise _NotAsWanted("it has no tick")
    return session


def _check_rows(session: LabelledSession, clock: Clock) -> Iterator[str]:
    """What the rows of a session contradict in each other."""
    meta, ticks = session.meta, session.column("tick")
    if meta["tick_hz"] != clock.tick_hz:
        yield f"it has {meta['tick_hz']} ticks a second, the cache {clock.tick_hz}"
        return
    if session.first_tick < 0:
        yield f"it begins at tick {session.first_tick}"
    if meta["num_steps"] != len(session.steps):
        yield f"it has {len(session.steps)} steps, its meta says {meta['num_steps']}"
    if meta["split"] not in SPLITS:
        yield f"its split is {meta['split']!r}"
    for name, rows in (("step", session.steps), ("turn", session.turns)):
        if [(row["session_id"], row[name]) for row in rows] != [
            (session.session_id, n) for n in range(len(rows))
        ]:
            yield f"its {name}s are not those of this session, numbered from 0 on"
    for name, wrong in (
        ("session_id", session.column("session_id") != session.session_id),
        ("split", session.column("split") != meta["split"]),
        ("t_s", np.abs(session.column("t_s") - ticks / clock.tick_hz) > 1e-9),
    ):
        if wrong.any():
            yield f"{at_ticks(ticks[wrong])}: {name} is {session.column(name)[wrong][:1].tolist()[0]!r}"
    yield from _check_states(session, clock)
    yield from _check_turns(session, clock)
    if session.points is not None:
        yield from _check_points(session, session.points)


def _check_points(session: LabelledSession, points: list[dict[str, Any]]) -> Iterator[str]:
    if [(row["session_id"], row["point"]) for row in points] != [
        (session.session_id, n) for n in range(len(points))
    ]:
        yield "its points are not those of this session, numbered from 0 on"
    outside = [row["point"] for row in points if not (abs(row["x"]) <= 1 and abs(row["y"]) <= 1)]
    if outside:
        yield f"point {outside[0]} lies outside of the picture"
    if not all(math.isfinite(row[name]) for row in points for name in ("x_px", "y_px")):
        yield "its points have pixels that are no numbers"
    elif any(_place(row) > _place(after) for row, after in itertools.pairwise(points)):
        yield f"its points are not in reading order, by rows of {READING_ROW_PX} pixels"
    marks = session.meta.get("marks")
    if marks not in ("drawn", "none"):
        yield f"its marks are {marks!r}"
    elif session.num_ticks != (wanted := len(points) + 1 if marks == "drawn" else 1):
        yield f"it has {session.num_ticks} ticks in place of {wanted}: {len(points)} points, marks {marks!r}"


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return row["y_px"] // READING_ROW_PX, row["x_px"]


def _drawn(session: LabelledSession) -> list[list[float]] | None:
    """The marks that were drawn on its picture, None where none were."""
    if session.meta.get("marks") != "drawn":
        return None
    return [[row["x_px"], row["y_px"]] for row in session.points or []]


def _check_states(session: LabelledSession, clock: Clock) -> Iterator[str]:
    ticks, states = session.column("tick"), session.column("dst_state")
    before = np.vstack([np.zeros_like(states[:1]), states[:-1]])
    illegal = ((states > COMPLETED) | (states < before)).any(axis=1)
    if illegal.any():
        yield f"{at_ticks(ticks[illegal])}: a step goes back, or has a state that there is not"
        return
    try:
        steps = [
            Step(
                row["step_id"], row["name"], tuple((span["start_s"], span["end_s"]) for span in row["spans"])
            )
            for row in session.steps
        ]
    except (ValueError, TypeError):
        yield "the spans of its steps are not times"
        return
    differing = (TimestampToStateConverter(clock).matrix(ticks, steps) != states).any(axis=1)
    if differing.any():
        yield f"{at_ticks(ticks[differing])}: the state is not what the spans of the steps give"
        return
    transitions = transitions_between(before, states)
    for name, expected in (("dst_update", transitions.any(axis=1)), ("transitions", transitions)):
        differing = (session.column(name) != expected).reshape(len(ticks), -1).any(axis=1)
        if differing.any():
            yield f"{at_ticks(ticks[differing])}: {name} is not what changes in the state"


def _check_turns(session: LabelledSession, clock: Clock) -> Iterator[str]:
    ticks, responses = session.column("tick"), session.column("response")
    said: dict[int, list[str]] = {}
    wrong = []
    for row in session.turns:
        tick = row["tick"]
        if row["role"] == "assistant":
            said.setdefault(tick, []).append(row["text"])
        elif row["role"] != "user":
            wrong.append(f"tick {tick}: turn {row['turn']} is of {row['role']!r}")
        if not ticks[0] <= tick <= ticks[-1]:
            wrong.append(f"tick {tick}: turn {row['turn']} is outside of the session's ticks")
        elif not math.isfinite(row["t_s"]) or clock.tick_of(row["t_s"]) != tick:
            wrong.append(
                f"tick {tick}: turn {row['turn']} is at {row['t_s']} s, which belongs to another tick"
            )
    differing = session.column("speak") != (responses != None)  # noqa: E711  # element by element
    if differing.any():
        wrong.append(f"{at_ticks(ticks[differing])}: speak does not say whether there is a response")
    if not wrong:
        joined = [" ".join(said[tick]) if tick in said else None for tick in ticks.tolist()]
        differing = np.array([text != response for text, response in zip(joined, responses, strict=True)])
        if differing.any():
            wrong.append(f"{at_ticks(ticks[differing])}: the response is not what the turns there say")
    yield from wrong


def _is_same(cached: Any, wanted: Any) -> bool:
    return key_of(cached) == key_of(wanted)


def _some(sessions: list[str]) -> str:
    """The beginning of a sentence on sessions."""
    return (
        f"{sessions[0]} has"
        if len(sessions) == 1
        else f"{len(sessions)} sessions, such as {sessions[0]}, have"
    )

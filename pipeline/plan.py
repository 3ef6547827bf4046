"""The plan of a cache: which label tables there are, and which video goes into which shard."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.copies import is_remote
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import video_parts
from schemas.shards import is_safe_key
from schemas.tables import TABLES, label_folders, open_table, read_table

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ShardPlan:
    """The videos and sessions of one shard pair."""

    number: int
    videos: Rows
    sessions: Rows

    @property
    def ticks(self) -> int:
        """Ticks of its videos, from the first to the last needed one."""
        return sum(video["last_tick_needed"] + 1 for video in self.videos)


class LabelTables:
    """The label tables of one or more corpora, with the rows of a session at hand.

    Only the tables of videos and sessions are held in memory.

    Raises:
        UserError: no tables there, tables that contradict each other or themselves, or different tick rates.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folders = label_folders(folder)
        self.videos, self.sessions = (
            pa.concat_tables([read_table(each, name) for each in folders]).sort_by(key).to_pylist()
            for name, key in (("videos", "video_id"), ("sessions", "session_id"))
        )
        self._check()
        rates = sorted({session["tick_hz"] for session in self.sessions})
        if len(rates) != 1:
            raise UserError(f"{folder} mixes tick rates {rates}; prepare all corpora with one --tick-hz")
        try:
            self.clock = Clock(rates[0])
        except ValueError as error:
            raise UserError(f"{folder}: {error}; run 'dst prepare' again") from None
        self._rows = {name: _SessionRows(folders, name) for name in ("steps", "turns", "frames", "points")}

    @functools.cached_property
    def video_of(self) -> dict[str, dict[str, Any]]:
        """The rows of the videos by id."""
        return {video["video_id"]: video for video in self.videos}

    def of_session(self, name: str, session_id: str) -> pa.Table:
        """The rows of one session in the table ``steps``, ``turns``, ``frames`` or ``points``."""
        return self._rows[name].of(session_id)

    def _check(self) -> None:
        for rows, key in ((self.videos, "video_id"), (self.sessions, "session_id")):
            twice = [k for k, n in Counter(row[key] for row in rows).items() if n > 1]
            if twice:
                raise UserError(
                    f"{self.folder} has the {key} {twice[0]!r} twice; keep one of the corpora apart"
                )
            odd = [row[key] for row in rows if not is_safe_key(row[key])]
            if odd:
                raise UserError(f"{self.folder} has the {key} {odd[0]!r}, which cannot name a record")
        for part in (part for video in self.videos for part in video_parts(video["uri"])):
            try:
                is_remote(part)
            except UserError as error:
                raise UserError(f"{self.folder}: {error} and run 'dst prepare' again") from None
        beginless = [video["video_id"] for video in self.videos if video["last_tick_needed"] < 0]
        if beginless:
            raise UserError(
                f"{self.folder} needs no tick of the video {beginless[0]!r}; run 'dst prepare' again"
            )
        odd = [video["video_id"] for video in self.videos if not _are_points(video["marks"] or [])]
        if odd:
            raise UserError(
                f"{self.folder} has marks on {odd[0]!r} that are not pairs of numbers; run 'dst prepare' again"
            )
        needed = {video["video_id"]: video["last_tick_needed"] for video in self.videos}
        for session in self.sessions:
            last = session["first_tick"] + session["num_ticks"] - 1
            if not 0 <= session["first_tick"] <= last <= needed.get(session["video_id"], -1):
                raise UserError(
                    f"{self.folder} has the session {session['session_id']!r} on ticks {session['first_tick']} to "
                    f"{last} of {session['video_id']!r}, which videos.parquet does not have; run 'dst prepare' again"
                )


def _are_points(marks: list[list[float]]) -> bool:
    return all(len(mark) == 2 and all(map(math.isfinite, mark)) for mark in marks)


class _SessionRows:
    """One table of several folders, read a row group at a time."""

    def __init__(self, folders: list[Path], name: str) -> None:
        self._name = name
        self._pieces: dict[str, list[tuple[Path, int, int, int]]] = {}  # folder, row group, start, count
        for folder in folders:
            with open_table(folder, name) as path, pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    for session_id, start, count in _runs(file.read_row_group(group, ["session_id"])):
                        self._pieces.setdefault(session_id, []).append((folder, group, start, count))
        self._group = functools.lru_cache(maxsize=2)(self._read_group)  # a session may lie across two

    def of(self, session_id: str) -> pa.Table:
        pieces = [
            self._group(folder, group).slice(start, count)
            for folder, group, start, count in self._pieces.get(session_id, [])
        ]
        return pa.concat_tables(pieces) if pieces else TABLES[self._name].empty_table()

    def _read_group(self, folder: Path, group: int) -> pa.Table:
        with open_table(folder, self._name) as path, pq.ParquetFile(path) as file:
            table = file.read_row_group(group)
            table.validate(full=True)
            return table


def _runs(table: pa.Table) -> Iterator[tuple[str, int, int]]:
    """Stretches of rows with one session id: the id, the first row, the number of rows."""
    if len(table) == 0:
        return
    runs = pc.run_end_encode(table["session_id"].combine_chunks())
    start = 0
    for session_id, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield session_id, start, end - start
        start = end


def plan_shards(tables: LabelTables, bytes_per_tick: int, shard_mb: int) -> list[ShardPlan]:
    """Which video goes into which shard: in order of id, a new shard when the next video would overfill it."""
    sessions_of: dict[str, Rows] = {}
    for session in tables.sessions:
        sessions_of.setdefault(session["video_id"], []).append(session)
    plans: list[ShardPlan] = []
    room = 0
    for video in tables.videos:
        size = (video["last_tick_needed"] + 1) * bytes_per_tick
        if not plans or size > room:
            plans.append(ShardPlan(len(plans), [], []))
            room = shard_mb * 1_000_000
        plans[-1].videos.append(video)
        plans[-1].sessions.extend(sessions_of.get(video["video_id"], []))
        room -= size
    return plans


def plan_text(plans: list[ShardPlan]) -> str:
    """The plan as ``plan.json`` holds it: which videos belong into which shard, for `dst verify`."""
    shards = [
        {"number": plan.number, "ticks": plan.ticks, "videos": [video["video_id"] for video in plan.videos]}
        for plan in plans
    ]
    return json.dumps({"shards": shards}, indent=1) + "\n"

"""The plan of a cache: which label tables there are, and which video goes into which shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.clock import Clock
from schemas.errors import UserError
from schemas.tables import TABLES, label_folders, read_table

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class ShardPlan:
    """The videos and sessions of one shard pair."""

    number: int
    videos: Rows
    sessions: Rows


class LabelTables:
    """The label tables of one or more corpora, with the rows of a session at hand.

    Raises:
        UserError: no tables there, two corpora with one session or video, or different tick rates.
    """

    def __init__(self, folder: Path) -> None:
        folders = label_folders(folder)
        self._tables = {
            name: pa.concat_tables([read_table(each, name) for each in folders])
            for name in TABLES
            if name != "rejects"
        }
        self.videos: Rows = self._tables["videos"].sort_by("video_id").to_pylist()
        self.sessions: Rows = self._tables["sessions"].sort_by("session_id").to_pylist()
        for rows, key in ((self.videos, "video_id"), (self.sessions, "session_id")):
            twice = [k for k, n in Counter(row[key] for row in rows).items() if n > 1]
            if twice:
                raise UserError(f"{folder} has the {key} {twice[0]!r} twice; keep one of the corpora apart")
        rates = sorted({session["tick_hz"] for session in self.sessions})
        if len(rates) != 1:
            raise UserError(f"{folder} mixes tick rates {rates}; prepare all corpora with one --tick-hz")
        self.clock = Clock(rates[0])
        self._rows = {name: _row_ranges(self._tables[name]) for name in ("steps", "turns", "frames")}

    def of_session(self, name: str, session_id: str) -> pa.Table:
        """The rows of one session in the table ``steps``, ``turns`` or ``frames``."""
        start, count = self._rows[name].get(session_id, (0, 0))
        return self._tables[name].slice(start, count)


def _row_ranges(table: pa.Table) -> dict[str, tuple[int, int]]:
    """Where each session's rows are; `dst prepare` writes them together."""
    runs = pc.run_end_encode(table["session_id"].combine_chunks()) if len(table) else None
    if runs is None:
        return {}
    ends = [0, *runs.run_ends.to_pylist()]
    return {key: (a, b - a) for key, a, b in zip(runs.values.to_pylist(), ends, ends[1:], strict=False)}


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

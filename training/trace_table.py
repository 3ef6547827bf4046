"""Predictions as a Parquet table, a row a tick, truth beside prediction: scores and pictures need no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.files import replacing_file
from training.gate import Decisions
from training.traces import Rejection, Trace, Track

STATES = pa.list_(pa.int8())
SCHEMA = pa.schema(
    [
        ("session_id", pa.string()),
        ("tick", pa.int64()),  # of the video
        ("t_s", pa.float64()),
        ("speak_true", pa.bool_()),
        ("speak", pa.bool_()),
        ("speak_score", pa.float32()),
        ("response_true", pa.string()),
        ("response", pa.string()),
        ("dst_update_true", pa.bool_()),
        ("dst_update", pa.bool_()),
        ("dst_update_score", pa.float32()),
        ("dst_state_true", STATES),
        ("dst_state", STATES),
        ("rejected", pa.list_(pa.struct([("step", pa.int16()), ("state", pa.int8())]))),
        ("heard", pa.list_(pa.string())),
    ]
)
"""What is predicted has the plain name, what is true ``_true`` after it."""
_OF_SESSION = (
    *("session_id", "tick_hz", "first_tick", "step_names", "proposed_transitions"),
    *("source", "video_id", "recording_id", "goal"),
)
LOGITS = [
    ("window_first_tick", pa.int64()),  # of the video; the true state was given before it
    ("speaking_logits", pa.list_(pa.float32(), 2)),
    ("dst_update_logits", pa.list_(pa.float32(), 2)),
    ("dst_state_logits", pa.list_(pa.list_(pa.float32(), 3))),  # of the steps that the window shows
]
"""Columns of a teacher-forced pass besides: with them any thresholds can be tried without the model."""


def write_traces(
    path: Path,
    traces: Sequence[Trace],
    about: dict[str, Any],
    decisions: Sequence[Sequence[Decisions]] | None = None,
) -> None:
    """Write sessions in their order; what belongs to a session and not to a tick is in the file's metadata, as JSON.

    Args:
        decisions: of each session's windows, tick after tick, for the columns `LOGITS`.
    """
    sessions = [{name: getattr(trace, name) for name in _OF_SESSION} for trace in traces]
    metadata = {"sessions": json.dumps(sessions), "about": json.dumps(about)}
    fields = SCHEMA if decisions is None else pa.schema([*SCHEMA, *(pa.field(*each) for each in LOGITS)])
    schema = fields.with_metadata(metadata)
    with replacing_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for number, trace in enumerate(traces):
            columns = _columns(trace) | (_logits(trace, decisions[number]) if decisions is not None else {})
            writer.write_table(_table(columns, schema))


def _columns(trace: Trace) -> dict[str, Any]:
    ticks = np.arange(trace.truth.num_ticks) + trace.first_tick
    columns: dict[str, Any] = {
        "session_id": [trace.session_id] * len(ticks),
        "tick": ticks,
        "t_s": ticks / trace.tick_hz,
        "speak_score": trace.speak_score,
        "dst_update_score": trace.update_score,
        "rejected": _by_tick(
            len(ticks), ((r.tick, {"step": r.step, "state": r.state}) for r in trace.rejections)
        ),
        "heard": _by_tick(len(ticks), trace.heard),
    }
    for track, ending in ((trace.truth, "_true"), (trace.predicted, "")):
        columns[f"speak{ending}"] = track.speak
        columns[f"response{ending}"] = track.responses
        columns[f"dst_update{ending}"] = track.dst_update
        columns[f"dst_state{ending}"] = track.state.tolist()
    return columns


def _logits(trace: Trace, windows: Sequence[Decisions]) -> dict[str, Any]:
    lengths = [len(window.speaking) for window in windows]
    firsts = trace.first_tick + np.cumsum([0, *lengths[:-1]])
    return {
        "window_first_tick": np.repeat(firsts, lengths),
        "speaking_logits": [row for window in windows for row in window.speaking_logits.tolist()],
        "dst_update_logits": [row for window in windows for row in window.dst_update_logits.tolist()],
        "dst_state_logits": [row for window in windows for row in window.state_logits.tolist()],
    }


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    ticks = len(columns["tick"])
    arrays = [
        pa.nulls(ticks, field.type)
        if columns[field.name] is None
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _by_tick(ticks: int, items: Any) -> list[list[Any]]:
    rows: list[list[Any]] = [[] for _ in range(ticks)]
    for tick, item in items:
        rows[tick].append(item)
    return rows


def read_traces(path: Path) -> tuple[list[Trace], dict[str, Any]]:
    """What `write_traces` wrote: the sessions, and what it was told about them.

    Raises:
        UserError: not such a file.
    """
    try:
        table = pq.read_table(path)
        metadata = {name.decode(): json.loads(value) for name, value in (table.schema.metadata or {}).items()}
    except FileNotFoundError:
        raise UserError(f"{path} is not there; run 'dst evaluate' first") from None
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        raise UserError(f"{path} is not a table of predictions ({error}); run 'dst evaluate' again") from None
    told = all(session.keys() == set(_OF_SESSION) for session in metadata.get("sessions", []))
    if (
        table.schema.names[: len(SCHEMA)] != SCHEMA.names
        or not {"sessions", "about"} <= metadata.keys()
        or not told
    ):
        raise UserError(f"{path} has other columns than this version writes; run 'dst evaluate' again")
    return list(_traces(table, metadata["sessions"])), metadata["about"]


def read_decisions(path: Path) -> list[list[Decisions]]:
    """The decisions of each session's windows, of a teacher-forced pass.

    Raises:
        UserError: the file is of another kind.
    """
    names = [name for name, _ in LOGITS]
    try:
        table = pq.read_table(path, columns=["session_id", *names])
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} holds no logits ({error}); run 'dst evaluate --mode teacher'") from None
    if table.num_columns < len(names) + 1:
        raise UserError(f"{path} holds no logits; run 'dst evaluate --mode teacher'")
    sessions: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in table.to_pylist():
        windows = sessions.setdefault(row["session_id"], {})
        windows.setdefault(row["window_first_tick"], []).append(row)
    return [
        [
            Decisions(
                np.array([row["speaking_logits"] for row in rows], dtype=np.float32),
                np.array([row["dst_update_logits"] for row in rows], dtype=np.float32),
                np.array([row["dst_state_logits"] for row in rows], dtype=np.float32).reshape(
                    len(rows), -1, 3
                ),
            )
            for rows in windows.values()
        ]
        for windows in sessions.values()
    ]


def _traces(table: pa.Table, sessions: Sequence[dict[str, Any]]) -> Iterator[Trace]:
    row = 0
    names = table["session_id"].to_numpy()
    ends = np.append(np.flatnonzero(names[1:] != names[:-1]) + 1, len(names))
    for session, end in zip(sessions, ends.tolist(), strict=True):
        part = table.slice(row, end - row)
        row = end

        def track(ending: str, part: pa.Table = part, steps: int = len(session["step_names"])) -> Track:
            state = np.array(part[f"dst_state{ending}"].to_pylist(), dtype=np.int8).reshape(len(part), steps)
            speak, update = (part[f"{name}{ending}"].to_numpy() for name in ("speak", "dst_update"))
            return Track(speak, update, state, tuple(part[f"response{ending}"].to_pylist()))

        truth, predicted = track("_true"), track("")
        if "window_first_tick" in part.column_names:  # before which the true state was given
            seams = np.unique(part["window_first_tick"].to_numpy()) - session["first_tick"]
            given = {int(tick): truth.state[tick - 1] for tick in seams if tick}
            predicted = replace(predicted, given=given)

        def scores(name: str, part: pa.Table = part) -> np.ndarray | None:
            return None if part[name].null_count else part[name].to_numpy()

        def said(name: str, part: pa.Table = part) -> list[tuple[int, Any]]:
            return [(tick, each) for tick, found in enumerate(part[name].to_pylist()) for each in found]

        yield Trace(
            **session | {"step_names": tuple(session["step_names"])},
            truth=truth,
            predicted=predicted,
            speak_score=scores("speak_score"),
            update_score=scores("dst_update_score"),
            rejections=tuple(Rejection(tick, r["step"], r["state"]) for tick, r in said("rejected")),
            heard=tuple(said("heard")),
        )

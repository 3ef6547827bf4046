"""The label tables: their columns, a writer that streams sessions, a check that reads them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.files import replacing_folder
from schemas.points import check_points
from schemas.shards import is_safe_key

_string = pa.string()
_int8s = pa.list_(pa.field("item", pa.int8(), nullable=False))
_doubles = pa.list_(pa.field("item", pa.float64(), nullable=False))


def _schema(**columns: Any) -> pa.Schema:
    """A schema from name=type; a name that ends in ``_or_null`` may hold nulls and loses that ending."""
    return pa.schema(
        [
            pa.field(name.removesuffix("_or_null"), kind, nullable=name.endswith("_or_null"))
            for name, kind in columns.items()
        ]
    )


TABLES: dict[str, pa.Schema] = {
    "videos": _schema(
        video_id=_string,
        source=_string,
        recording_id=_string,
        uri=_string,
        rotation_deg=pa.int16(),
        duration_s_or_null=pa.float64(),
        last_tick_needed=pa.int32(),
        marks_or_null=pa.list_(pa.field("item", _doubles, nullable=False)),
    ),
    "sessions": _schema(
        session_id=_string,
        video_id=_string,
        source=_string,
        split=_string,
        goal=_string,
        knowledge_or_null=_string,
        first_tick=pa.int32(),
        num_ticks=pa.int32(),
        tick_hz=pa.float64(),
        num_steps=pa.int16(),
        user_type_or_null=_string,
        dialog_origin=_string,
        quality_or_null=pa.float64(),
    ),
    "steps": _schema(
        session_id=_string,
        step=pa.int16(),
        step_id=_string,
        name=_string,
        parent_or_null=_string,
        spans=pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64())])),
        source_rows=pa.list_(_string),
    ),
    "turns": _schema(
        session_id=_string,
        turn=pa.int32(),
        tick=pa.int32(),
        t_s=pa.float64(),
        role=_string,
        text=_string,
        labels=pa.list_(_string),
        progress_or_null=_string,
        source_row_or_null=_string,
    ),
    "frames": _schema(
        session_id=_string,
        split=_string,
        tick=pa.int32(),
        t_s=pa.float64(),
        speak=pa.bool_(),
        response_or_null=_string,
        dst_update=pa.bool_(),
        dst_state=_int8s,
        transitions=_int8s,
        mistake_or_null=pa.bool_(),
    ),
    "points": _schema(
        session_id=_string,
        point=pa.int32(),
        x=pa.float64(),
        y=pa.float64(),
        x_px=pa.float64(),
        y_px=pa.float64(),
        source_row=_string,
    ),
    "rejects": _schema(source_file=_string, locator=_string, reason=_string, detail=_string),
}

SPLITS = ("train", "val", "test")
_GROUP_BYTES = 8_000_000  # held in memory before a row group is written; of frames, some 60,000 rows


def table_of(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a label table."""
    return pa.Table.from_pylist(list(rows), schema=TABLES[name])


class LabelWriter:
    """Streams sessions into a fresh folder of Parquet files that replaces the old one when all is written.

    Use as a context manager: on an exception the old folder stays as it was.

    Raises:
        UserError: a session or video that is there twice, or a recording that crosses a split.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self._folder = folder
        self._stack = ExitStack()
        self._buffers: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        self._buffered: Counter[str] = Counter()
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._sessions: set[str] = set()
        self._split_of: dict[str, str] = {}
        self.rows: Counter[str] = Counter(dict.fromkeys(TABLES, 0))  # given so far

    def __enter__(self) -> LabelWriter:
        ours = {"about.json", *(f"{name}.parquet" for name in TABLES)}
        others = sorted({path.name for path in self.folder.iterdir()} - ours) if self.folder.is_dir() else []
        if others:
            raise UserError(
                f"{self.folder} holds {others[0]!r}, which new label tables would replace; give another --out"
            )
        self._folder = self._stack.enter_context(replacing_folder(self.folder))
        for name, schema in TABLES.items():
            path = self._folder / f"{name}.parquet"
            local = pa.fs.LocalFileSystem()  # or Arrow would take a colon in a path for the end of a protocol
            writer = pq.ParquetWriter(path, schema, filesystem=local, compression="zstd")
            self._writers[name] = self._stack.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for name in TABLES:
                    self._flush(name)
        except BaseException as failed:
            self._stack.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def add_session(
        self,
        session: Mapping[str, Any],
        recording_id: str,
        steps: Iterable[Mapping[str, Any]],
        turns: Iterable[Mapping[str, Any]],
        frames: pa.Table,
    ) -> None:
        """Add one whole session: its row, the rows of its steps and turns, and its part of ``frames``."""
        rows = {"steps": table_of("steps", steps), "turns": table_of("turns", turns), "frames": frames}
        self.add_sessions([session], [recording_id], rows)

    def add_sessions(
        self,
        sessions: Sequence[Mapping[str, Any]],
        recording_ids: Sequence[str],
        rows: Mapping[str, pa.Table],
    ) -> None:
        """Add whole sessions: their rows, and all their rows of ``steps``, ``turns``, ``frames`` and ``points``, in
        their order; a kind that they have none of may be left away."""
        for session, recording_id in zip(sessions, recording_ids, strict=True):
            self._claim(session["session_id"], session["split"], recording_id)
        self._append("sessions", table_of("sessions", sessions))
        for name in ("steps", "turns", "frames", "points"):
            if name in rows:
                self._append(name, rows[name])

    def _claim(self, session_id: str, split: str, recording_id: str) -> None:
        if session_id in self._sessions:
            raise UserError(f"two sessions have the id {session_id!r}; make the ids of the dialogs unique")
        if not is_safe_key(session_id):
            raise UserError(f"session id {session_id!r} holds more than letters, digits, '-', '_' and '/'")
        if self._split_of.setdefault(recording_id, split) != split:
            raise UserError(
                f"recording {recording_id!r} is in {self._split_of[recording_id]!r} and in {split!r} "
                f"(session {session_id!r}); give each recording one split"
            )
        self._sessions.add(session_id)

    def add_videos(self, videos: Iterable[Mapping[str, Any]]) -> None:
        """Add the videos, once all sessions are known (``last_tick_needed``)."""
        self._append("videos", table_of("videos", videos))

    def add_rejects(self, rejects: pa.Table) -> None:
        """Add what was not used."""
        self._append("rejects", rejects)

    def add_about(self, text: str) -> None:
        """Add ``about.json``: how the tables were made."""
        (self._folder / "about.json").write_text(text, encoding="utf-8")

    def _append(self, name: str, table: pa.Table) -> None:
        self._buffers[name].append(table)
        self._buffered[name] += table.nbytes
        self.rows[name] += table.num_rows
        if self._buffered[name] >= _GROUP_BYTES:
            self._flush(name)

    def _flush(self, name: str) -> None:
        if self._buffers[name]:
            self._writers[name].write_table(pa.concat_tables(self._buffers[name]))
        self._buffers[name], self._buffered[name] = [], 0


def read_table(folder: Path, name: str) -> pa.Table:
    """Read one label table.

    Raises:
        UserError: as `open_table`.
    """
    with open_table(folder, name) as path:
        table = pq.read_table(path)
        table.validate(full=True)  # a text that is not UTF-8 would only be found when it is used
        return table


@contextmanager
def open_table(folder: Path, name: str) -> Iterator[Path]:
    """The file of one label table, to read of it what is needed.

    Raises:
        UserError: there is none, it has other columns than this version's, or reading it finds that it is broken.
    """
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{folder} holds no {name}.parquet; run 'dst prepare' first")
    try:
        if not pq.read_schema(path).equals(TABLES[name]):
            raise UserError(f"{path} has other columns than this version writes; run 'dst prepare' again")
        yield path
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        sentence = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({sentence}); run 'dst prepare' again") from None


def label_folders(labels: Path) -> list[Path]:
    """The folders of label tables: the one given, or those inside it, one a corpus.

    Raises:
        UserError: there is none.
    """
    if (labels / "sessions.parquet").is_file():
        return [labels]
    folders = sorted(path.parent for path in labels.glob("*/sessions.parquet"))
    finished = [
        folder for folder in folders if not folder.name.startswith(".")
    ]  # a killed run leaves such a one
    if not finished:
        raise UserError(f"{labels} holds no label tables; run 'dst prepare --source S' first")
    return finished


def validate_labels(folder: Path) -> list[str]:
    """Check label tables against each other, independently of how they were written.

    Returns:
        One sentence for each thing that does not hold; an empty list when all does.
    """
    tables = {name: read_table(folder, name) for name in ("videos", "sessions")}
    problems: list[str] = []
    videos = {row["video_id"]: row for row in tables["videos"].to_pylist()}
    sessions = {row["session_id"]: row for row in tables["sessions"].to_pylist()}
    if len(sessions) != tables["sessions"].num_rows:
        problems.append("a session_id is there twice")
    split_of: dict[str, str] = {}
    for session in sessions.values():
        video = videos.get(session["video_id"])
        if video is None:
            problems.append(f"session {session['session_id']} is on video {session['video_id']}, unknown")
            continue
        if session["split"] not in SPLITS:
            problems.append(f"session {session['session_id']} is in split {session['split']!r}")
        if split_of.setdefault(video["recording_id"], session["split"]) != session["split"]:
            problems.append(f"recording {video['recording_id']} crosses splits")
        if session["first_tick"] + session["num_ticks"] - 1 > video["last_tick_needed"]:
            problems.append(f"session {session['session_id']} goes past its video's last_tick_needed")
    num_frames: Counter[str] = Counter()
    previous: dict[str, list[int]] = {}
    with open_table(folder, "frames") as path, pq.ParquetFile(path) as frames:
        for batch in frames.iter_batches():
            for row in batch.to_pylist():
                problems.extend(_check_frame(row, sessions, num_frames, previous))
    for session_id, session in sessions.items():
        if num_frames[session_id] != session["num_ticks"]:
            problems.append(f"session {session_id} has {num_frames[session_id]} frames rows, not num_ticks")
    with open_table(folder, "points") as path, pq.ParquetFile(path) as file:
        points = (row for batch in file.iter_batches() for row in batch.to_pylist())
        problems.extend(check_points(points, sessions, videos))
    return problems


def _check_frame(
    row: dict[str, Any],
    sessions: dict[str, dict[str, Any]],
    num_frames: Counter[str],
    previous: dict[str, list[int]],
) -> Iterable[str]:
    session_id = row["session_id"]
    where = f"session {session_id} tick {row['tick']}"
    session = sessions.get(session_id)
    if session is None:
        yield f"{where}: no such session"
        return
    state = row["dst_state"]
    before = previous.get(session_id, [0] * session["num_steps"])
    if row["tick"] != session["first_tick"] + num_frames[session_id]:
        yield f"{where}: ticks are not consecutive"
    if abs(row["t_s"] - row["tick"] / session["tick_hz"]) > 1e-9:
        yield f"{where}: t_s is not tick / tick_hz"
    if len(state) != session["num_steps"] or len(row["transitions"]) != session["num_steps"]:
        yield f"{where}: {len(state)} states for {session['num_steps']} steps"
    elif any(now < then for now, then in zip(state, before, strict=True)):
        yield f"{where}: a step goes back"
    if row["dst_update"] != (state != before) or row["dst_update"] != any(row["transitions"]):
        yield f"{where}: dst_update does not say whether the state changed"
    if row["speak"] != (row["response"] is not None):
        yield f"{where}: speak without a response, or a response without speak"
    num_frames[session_id] += 1
    previous[session_id] = state

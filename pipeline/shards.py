"""The feature cache as training reads it: labels by session, features by video and tick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.copies import local_copy
from pipeline.h5_shard import H5Shard, H5ShardWriter
from pipeline.ledger import Entry, Ledger
from pipeline.shard_reader import Member, ShardReader
from pipeline.storage import open_store
from pipeline.tar_shard import TarShard, TarShardWriter
from schemas.errors import UserError
from schemas.shards import CHUNK_TICKS, Fingerprint, Storage, vision_key
from schemas.tables import TABLES

LARGEST_SCALE = float(np.finfo(np.float16).max) / 128  # of int8 features


class ShardWriter(Protocol):
    """Writes the records of one shard file, each under a key of its own."""

    def add(self, key: str, members: Mapping[str, Member]) -> None:
        """Add one record: arrays, tables, and what JSON can hold, by name.

        Raises:
            UserError: the key cannot name a record, or there is one of that key.
        """


def writer_of(storage: Storage, path: Path) -> AbstractContextManager[ShardWriter]:
    """A writer of a whole new file; it is readable once the context is left without an exception."""
    return TarShardWriter(path) if storage == "tar" else H5ShardWriter(path)


def reader_of(path: Path) -> ShardReader:
    """A reader by the file's ending, ``.tar`` or ``.h5``.

    Raises:
        UserError: the file is not a whole shard.
    """
    return TarShard(path) if path.suffix == ".tar" else H5Shard(path)


@dataclass(frozen=True)
class LabelledSession:
    """One session as a label shard holds it.

    ``frames`` are its rows of the frames table; ``state`` and ``transitions`` are int8 ``[T, K]``. ``points`` are the
    objects to count, None in a session of another kind.
    """

    meta: dict[str, Any]
    steps: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    frames: pa.Table
    points: list[dict[str, Any]] | None = None

    @property
    def session_id(self) -> str:
        return str(self.meta["session_id"])

    @property
    def first_tick(self) -> int:
        return int(self.meta["first_tick"])

    @property
    def num_ticks(self) -> int:
        return int(self.meta["num_ticks"])

    def column(self, name: str) -> NDArray[Any]:
        """A column of ``frames`` as an array; lists of states become ``[T, K]``."""
        column = self.frames[name].combine_chunks()
        if pa.types.is_list(column.type):
            return column.flatten().to_numpy().reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)


class ShardCache:
    """The finished shards of a cache, read by memory map.

    Label shards are opened at once, a vision shard when one of its videos is first asked for; a remote one is copied
    then. A cache may be pickled and forked.

    Args:
        folder: a folder, or the address of a remote one.

    Raises:
        UserError: it is not a cache, holds no finished session, or a shard is not as it was written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder
        store = open_store(folder)
        if not store.has("cache.json"):
            raise UserError(
                f"{folder} holds no cache.json, so it is not a feature cache; run 'dst cache-features'"
            )
        self.fingerprint = Fingerprint.parse(store.read_text("cache.json"), f"{folder}/cache.json")
        self._finished: dict[str, int] = {}  # bytes of each file
        self._videos: dict[str, tuple[str, int]] = {}  # where each is, and its ticks
        self._sessions: dict[str, str] = {}
        self._readers: dict[str, ShardReader] = {}
        entries = Ledger(store).entries.values()
        with ThreadPoolExecutor(16) as pool:  # a remote one takes a network's delay
            labels = [entry.file for entry in entries if entry.file.startswith("labels-")]
            self._paths = dict(zip(labels, pool.map(self._local, labels), strict=True))
        for entry in entries:
            self._add(entry)
        if not self._sessions:
            raise UserError(
                f"{folder} holds no finished session; run 'dst cache-features' and read its summary"
            )
        self.session_ids = sorted(self._sessions)

    def _add(self, entry: Entry) -> None:
        self._finished[entry.file] = entry.bytes
        if entry.file.startswith("vision-"):
            places = {video_id: (entry.file, video.ticks) for video_id, video in entry.videos.items()}
            self._once(self._videos, places)
        elif entry.file.startswith("labels-"):
            self._once(self._sessions, dict.fromkeys(self._reader(entry.file).keys, entry.file))

    def _once(self, places: dict[str, Any], new: dict[str, Any]) -> None:
        twice = sorted(places.keys() & new.keys())
        if twice:
            raise UserError(f"{self.folder} holds {twice[0]!r} in two shards; run 'dst cache-features' again")
        places.update(new)

    def _local(self, file: str) -> Path:
        return local_copy(f"{self.folder}/{file}")

    def _reader(self, file: str) -> ShardReader:
        if file not in self._readers:
            path = self._paths.get(file) or self._local(file)
            if not path.is_file():
                raise UserError(f"{path} is not there; run 'dst cache-features' again")
            size = path.stat().st_size
            if size != self._finished[file]:
                raise UserError(
                    f"{path} has {size} bytes where the ledger says {self._finished[file]}, so it is not a whole "
                    "shard; copy it again, or remove it and run 'dst cache-features' again"
                )
            self._readers[file] = reader_of(path)
        return self._readers[file]

    def session(self, session_id: str) -> LabelledSession:
        """Read one session's labels.

        Raises:
            UserError: there is no such session, or its parts do not belong together.
        """
        if session_id not in self._sessions:
            raise UserError(
                f"{self.folder} holds no session {session_id!r}; `session_ids` lists those it has"
            )
        reader = self._reader(self._sessions[session_id])
        session = read_session(reader, session_id)
        wrong = what_is_wrong(session_id, session)
        if wrong:
            raise UserError(f"{reader.path}: session {session_id} {wrong}; run 'dst cache-features' again")
        return session

    def num_ticks(self, video_id: str) -> int:
        """Ticks of a video that are in the cache, from 0 on; 0 for a video that is not."""
        return self._videos[video_id][1] if video_id in self._videos else 0

    def features(
        self, video_id: str, first_tick: int, num_ticks: int, out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Features of consecutive ticks; those of a tick that could not be decoded are 0.

        Args:
            out: where to put them, such as a part of a batch.

        Returns:
            ``[num_ticks, tokens, dim]``, ``out`` where it is given; else a read-only view of the file where one chunk
            holds all of them as float16.

        Raises:
            UserError: the cache lacks one of the ticks, or a chunk is not as the fingerprint says.
        """
        parts = list(self._parts(video_id, first_tick, num_ticks))
        if out is None:
            if len(parts) == 1 and parts[0].scale is None:
                return parts[0].vision
            out = np.empty((num_ticks, self.fingerprint.tokens_per_frame, self.fingerprint.dim), np.float16)
        at = 0
        for part in parts:
            part.copy_to(out[at : at + len(part.pts)])
            at += len(part.pts)
        return out

    def readable(self, video_id: str, first_tick: int, num_ticks: int) -> NDArray[np.bool_]:
        """Whether each of consecutive ticks could be decoded, bool ``[num_ticks]``.

        Raises:
            UserError: as `features`.
        """
        parts = self._parts(video_id, first_tick, num_ticks)
        return ~np.isnan(np.concatenate([np.empty(0), *(part.pts for part in parts)]))

    def _parts(self, video_id: str, first_tick: int, num_ticks: int) -> Iterator[_Ticks]:
        """Consecutive ticks, chunk by chunk."""
        file, ticks = self._videos.get(video_id, ("", 0))
        end = first_tick + num_ticks
        if not 0 <= first_tick <= end <= ticks:
            tick = first_tick if not 0 <= first_tick <= ticks else ticks
            raise UserError(
                f"{self.folder} has no features of {video_id} at tick {tick}; run 'dst cache-features'"
            )
        for number in range(first_tick // CHUNK_TICKS, -(-end // CHUNK_TICKS)):
            begin = number * CHUNK_TICKS
            chunk = self._chunk(file, vision_key(video_id, number), min(CHUNK_TICKS, ticks - begin))
            yield chunk.between(max(first_tick - begin, 0), end - begin)

    def _chunk(self, file: str, key: str, ticks: int) -> _Ticks:
        reader = self._reader(file)
        is_int8 = self.fingerprint.dtype == "int8"
        tokens, dim = self.fingerprint.tokens_per_frame, self.fingerprint.dim
        chunk = _Ticks(
            reader.array(key, "vision"),
            reader.array(key, "pts"),
            reader.array(key, "scale") if is_int8 else None,
        )
        wanted = [
            (self.fingerprint.dtype, (ticks, tokens, dim)),
            ("float64", (ticks,)),
            ("float32", (ticks, tokens, 1)),
        ]
        for array, (dtype, shape) in zip((chunk.vision, chunk.pts, chunk.scale), wanted, strict=True):
            if array is not None and (array.dtype, array.shape) != (np.dtype(dtype), shape):
                raise UserError(
                    f"{reader.path}: record {key} holds {array.dtype} {list(array.shape)} in place of "
                    f"{dtype} {list(shape)}; remove it and run 'dst cache-features' again"
                )
        if chunk.scale is not None and not (np.abs(chunk.scale) <= LARGEST_SCALE).all():
            raise UserError(
                f"{reader.path}: record {key} holds values that float16 cannot hold; "
                "encode the features with another checkpoint"
            )
        return chunk


@dataclass(frozen=True)
class _Ticks:
    """Consecutive ticks of a chunk, as it holds them: features, presentation times, and the scales of int8."""

    vision: NDArray[Any]
    pts: NDArray[np.float64]
    scale: NDArray[np.float32] | None

    def between(self, first: int, end: int) -> _Ticks:
        here = slice(first, end)
        return _Ticks(self.vision[here], self.pts[here], None if self.scale is None else self.scale[here])

    def copy_to(self, out: NDArray[np.float16]) -> None:
        if self.scale is None:
            out[...] = self.vision
        else:
            np.multiply(self.vision, self.scale, out=out, dtype=np.float32, casting="same_kind")


def read_session(reader: ShardReader, session_id: str) -> LabelledSession:
    """A session's record, before anything in it was looked at.

    Raises:
        UserError: it is not there, or lacks a part.
    """
    meta, steps, turns = (reader.json(session_id, part) for part in ("meta", "steps", "turns"))
    points = reader.json(session_id, "points") if "points" in reader.members(session_id) else None
    return LabelledSession(meta, steps, turns, reader.table(session_id, "frames"), points)


def is_counting(session: Mapping[str, Any]) -> bool:
    """Whether a row of the table ``sessions`` is one of an image whose objects are counted."""
    return bool(session["dialog_origin"] == "none")


def what_is_wrong(session_id: str, session: LabelledSession) -> str | None:
    """What would let a reader of the session stumble; what a shard holds may come from anywhere."""
    parts = {"sessions": [session.meta], "steps": session.steps, "turns": session.turns}
    if session.points is not None:
        parts["points"] = session.points
    for name, rows in parts.items():
        if not _are_rows(name, rows):
            return f"has {name} that are not rows of that table"
    if is_counting(session.meta) != (session.points is not None):
        return "has points and is a dialog" if session.points is not None else "counts and has no points"
    if session.session_id != session_id:
        return f"calls itself {session.session_id!r}"
    if not session.frames.schema.equals(TABLES["frames"]):
        return "has other columns than this version writes"
    ticks = session.frames["tick"].to_numpy()
    if len(ticks) != session.num_ticks or not np.array_equal(
        ticks, session.first_tick + np.arange(len(ticks))
    ):
        return "has not one row of frames for each of its ticks"
    for name in ("dst_state", "transitions"):
        if pc.any(pc.not_equal(pc.list_value_length(session.frames[name]), len(session.steps))).as_py():
            return f"has not one of {name} for each of its {len(session.steps)} steps"
    return None


def _are_rows(name: str, rows: Any) -> bool:
    """Whether JSON holds rows of a label table; it may hold more than its columns."""
    schema = TABLES[name]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= set(schema.names) for row in rows
    ):
        return False
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return all(field.nullable or table[field.name].null_count == 0 for field in schema)

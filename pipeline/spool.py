"""The features of videos while they come in, and the shard that is put together of them."""

from __future__ import annotations

import functools
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ledger import Entry, Failure, VideoEntry, forget, record, sha256_of
from pipeline.quantize import to_float16, to_int8
from pipeline.shards import Member, ShardReader, ShardWriter, reader_of, writer_of
from pipeline.storage import Store
from pipeline.todo import VisionWork
from schemas.shards import CHUNK_TICKS, Fingerprint, shard_stem, vision_key


@dataclass(frozen=True)
class Made:
    """A vision shard that was finished."""

    number: int
    entry: Entry


class Video:
    """A video whose features come in: whole chunks go to a file of its own until its shard is put together.

    ``copies`` is a folder of its own for what is fetched of it.
    """

    def __init__(
        self, row: dict[str, Any], identity: str | None, path: Path, copies: Path, fingerprint: Fingerprint
    ) -> None:
        self.row, self.identity, self.path, self.copies = row, identity, path, copies
        self.ticks = 0  # whose features came in
        self.entry: VideoEntry | None = None  # once the last tick was decoded
        self.failure: str | None = None
        self.dropped = False  # whether features that are still on their way are not for it
        self._fingerprint = fingerprint
        self._features: list[NDArray[np.float32]] = []
        self._pts: list[float] = []
        self._chunks = 0
        self._stack = ExitStack()

    @property
    def id(self) -> str:
        return str(self.row["video_id"])

    @functools.cached_property
    def _writer(self) -> ShardWriter:
        """Open from the first chunk to the last: a shard may hold more videos than a process may have open files."""
        return self._stack.enter_context(writer_of("tar", self.path))

    @property
    def is_done(self) -> bool:
        return self.failure is not None or (self.entry is not None and self.ticks == self.entry.ticks)

    def add(self, features: NDArray[np.float32], pts: list[float]) -> None:
        """Features of consecutive ticks that lie in one chunk."""
        self._features.append(features)
        self._pts += pts
        self.ticks += len(pts)
        if len(self._pts) == CHUNK_TICKS:
            self._write_chunk()
        self._close_when_done()

    def end(self, entry: VideoEntry) -> None:
        """All of it was decoded; the features of the last ticks may still be on their way."""
        self.entry = entry
        self._close_when_done()

    def drop(self) -> None:
        """Not wanted any more, nor what is still on its way."""
        self.dropped = True
        with suppress(OSError):  # a full disk does not matter for it
            self._stack.close()

    def _close_when_done(self) -> None:
        if self.is_done:
            if self._pts:
                self._write_chunk()
            self._stack.close()

    def _write_chunk(self) -> None:
        features, pts = np.concatenate(self._features), np.array(self._pts, np.float64)
        features[np.isnan(pts)] = 0
        meta = {"video_id": self.id, "first_tick": self._chunks * CHUNK_TICKS, "num_ticks": len(pts)}
        if self._fingerprint.dtype == "int8":
            quantised, scale = to_int8(features, f"video {self.id}")
            arrays = {"vision": quantised, "scale": scale}
        else:
            arrays = {"vision": to_float16(features, f"video {self.id}")}
        self._writer.add(vision_key(self.id, self._chunks), {**arrays, "pts": pts, "meta": meta})
        self._chunks += 1
        self._features, self._pts = [], []


@dataclass
class Shard:
    """A shard that is being made; its videos' files lie in ``folder``."""

    work: VisionWork
    folder: Path
    to_do: int  # videos that are not kept
    videos: list[Video] = field(default_factory=list)
    not_fetched: list[Failure] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        given = len(self.videos) + len(self.not_fetched)
        return given == self.to_do and all(video.is_done for video in self.videos)


def commit(shard: Shard, store: Store, fingerprint: Fingerprint, batch_size: int) -> Made:
    """Put a shard's chunks together in the order of the plan, and make the file known as finished."""
    work = shard.work
    stem = shard_stem("vision", work.number)
    path = shard.folder / f"{stem}.{fingerprint.storage}"
    done = {v.id: (v.path, v.entry) for v in shard.videos if v.entry is not None}
    entries: dict[str, VideoEntry] = {}
    kept_reader = functools.lru_cache(maxsize=2)(lambda file: reader_of(store.local(file)))
    with writer_of(fingerprint.storage, path) as writer:
        for video_id in (row["video_id"] for row in work.videos):
            if video_id in work.kept:
                source, entries[video_id] = kept_reader(work.kept[video_id].file), work.kept[video_id].entry
            elif video_id in done:
                source, entries[video_id] = reader_of(done[video_id][0]), done[video_id][1]
            else:
                continue
            _copy(source, video_id, entries[video_id].ticks, writer)
    failures = [Failure(id=v.id, reason=v.failure) for v in shard.videos if v.failure is not None]
    failures += shard.not_fetched
    entry = Entry(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        key=work.key,
        videos=entries,
        batch_size=batch_size,
        failures=tuple(sorted(failures, key=lambda failure: failure.id)),
    )
    forget(store, stem)  # killed between the next two lines, the file is made again
    store.commit(path, path.name)
    record(store, stem, entry)
    shutil.rmtree(shard.folder)
    return Made(work.number, entry)


def _copy(reader: ShardReader, video_id: str, ticks: int, writer: ShardWriter) -> None:
    """The first ticks of a video, from one file to another."""
    for first in range(0, ticks, CHUNK_TICKS):
        key = vision_key(video_id, first // CHUNK_TICKS)
        count = min(CHUNK_TICKS, ticks - first)
        members: dict[str, Member] = {"meta": {**reader.json(key, "meta"), "num_ticks": count}}
        members |= {name: reader.array(key, name)[:count] for name in reader.members(key) if name != "meta"}
        writer.add(key, members)

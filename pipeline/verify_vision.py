"""What a vision file must hold: each tick of each video the ledger names, finite features, times on the clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ledger import Entry, VideoEntry
from pipeline.shard_reader import ShardReader
from pipeline.shards import LARGEST_SCALE
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.shards import CHUNK_TICKS, Fingerprint, vision_key

_GRACE_S = 0.001 + 1e-9  # by which a frame may be later than its tick
_MOST_ALIKE = 20  # ticks that may all look the same
_HALF_MAGNITUDE, _HALF_INFINITE = np.uint16(0x7FFF), np.uint16(0x7C00)  # bits of a float16


def check_vision(reader: ShardReader, entry: Entry, fingerprint: Fingerprint) -> Iterator[str]:
    """Compare a vision file with its entry in the ledger and the cache's fingerprint; each byte is looked at.

    Yields:
        One sentence for each thing that is wrong, beginning with the record or the video.
    """
    there: dict[str, list[str]] = defaultdict(list)
    for key in reader.keys:
        there[key.rpartition("/")[0]].append(key)
    for video_id in sorted(there.keys() - entry.videos.keys()):
        yield f"{there[video_id][0]}: its video is not among those that the ledger says are in this file"
    for video_id, video in entry.videos.items():
        wrong = _what_is_wrong(video)
        if wrong:
            yield f"{video_id}: the ledger says that {wrong}"
        else:
            yield from _Video(reader, video_id, video, fingerprint).check(set(there[video_id]))


def _what_is_wrong(video: VideoEntry) -> str | None:
    """What in an entry contradicts itself."""
    if video.ticks == 0:
        return "it has no tick"
    if video.ticks > video.needed:
        return f"{video.ticks} ticks were cached of {video.needed} that are needed"
    before = 0
    for first, end, _ in video.unreadable:
        if not before <= first <= end <= video.ticks:
            return (
                f"ticks {first} to {end - 1} of its {video.ticks} are unreadable after those before {before}"
            )
        before = end
    return None


@dataclass
class _Chunk:
    """One record's ticks, their times, and of which of them the features are finite, or all 0."""

    ticks: NDArray[np.int64]
    pts: NDArray[np.float64]
    arrays: list[NDArray[Any]]  # the features, of int8 with their scales
    finite: NDArray[np.bool_]
    zero: NDArray[np.bool_]


class _Video:
    """The records of one video, in order."""

    def __init__(
        self, reader: ShardReader, video_id: str, video: VideoEntry, fingerprint: Fingerprint
    ) -> None:
        self._reader, self._id, self._video, self._fingerprint = reader, video_id, video, fingerprint
        self._clock = Clock(fingerprint.tick_hz)
        self._latest = 0.0  # presentation time so far
        self._first: list[NDArray[Any]] | None = None  # features of the first tick that was read
        self._alike = 0  # ticks that have the same

    def check(self, keys: set[str]) -> Iterator[str]:
        is_whole = True
        for first in range(0, self._video.ticks, CHUNK_TICKS):
            key = vision_key(self._id, first // CHUNK_TICKS)
            if key not in keys:
                yield f"{self._id}: it has no record {key} for its ticks from {first} on"
                is_whole = False
                break  # what a stranger calls the number of ticks is not counted up to
            keys.discard(key)
            try:
                chunk = self._chunk(key, first)
            except UserError as error:
                yield str(error)
                is_whole = False
                continue
            except _NotAsWanted as error:
                yield f"{key}: {error}"
                is_whole = False
                continue
            yield from (f"{key}: {wrong}" for wrong in self._check(chunk))
        if is_whole:
            for key in sorted(keys):
                yield f"{key}: the ledger says that its video has {self._video.ticks} ticks"
            if self._alike == self._video.ticks - self._num_unreadable() > _MOST_ALIKE:
                yield (
                    f"{self._id}: all its {self._alike} ticks have the same features; look whether its picture "
                    "never changes, or whether the checkpoint's vision tower is sound"
                )

    def _num_unreadable(self) -> int:
        return sum(end - first for first, end, _ in self._video.unreadable)

    def _chunk(self, key: str, first: int) -> _Chunk:
        reader, wanted = self._reader, self._fingerprint
        count = min(CHUNK_TICKS, self._video.ticks - first)
        is_int8 = wanted.dtype == "int8"
        types = {
            "vision": (wanted.dtype, (count, wanted.tokens_per_frame, wanted.dim)),
            "pts": ("float64", (count,)),
        } | ({"scale": ("float32", (count, wanted.tokens_per_frame, 1))} if is_int8 else {})
        members = sorted(reader.members(key))
        if members != sorted([*types, "meta"]):
            raise _NotAsWanted(
                f"it holds {', '.join(members)} in place of {', '.join(sorted([*types, 'meta']))}"
            )
        meta = {"video_id": self._id, "first_tick": first, "num_ticks": count}
        if reader.json(key, "meta") != meta:
            raise _NotAsWanted(f"its meta is not {meta}")
        arrays = {}
        for name, (dtype, shape) in types.items():
            arrays[name] = array = reader.array(key, name)
            if (array.dtype, array.shape) != (np.dtype(dtype), shape):
                raise _NotAsWanted(
                    f"its {name} is {array.dtype} {list(array.shape)} in place of {dtype} {list(shape)}"
                )
        features, pts = arrays["vision"], arrays["pts"]
        finite, zero = _of_int8(features, arrays["scale"]) if is_int8 else _of_float16(features)
        kept = [features, arrays["scale"]] if is_int8 else [features]
        return _Chunk(np.arange(first, first + count), pts, kept, finite, zero)

    def _check(self, chunk: _Chunk) -> Iterator[str]:
        untimed = np.isnan(chunk.pts)
        unreadable = np.zeros(len(chunk.ticks), np.bool_)
        for first, end, _ in self._video.unreadable:
            unreadable |= (chunk.ticks >= first) & (chunk.ticks < end)
        late = ~untimed & (chunk.pts > chunk.ticks / self._clock.tick_hz + _GRACE_S)
        times = np.where(untimed | late, -np.inf, chunk.pts)
        latest = np.maximum.accumulate([self._latest, *times])
        for wrong, what in (
            (~chunk.finite, "the features are not finite, or too large for float16"),
            (untimed & ~unreadable, "there is no time, though the ledger does not call it unreadable"),
            (~untimed & unreadable, "there is a time, though the ledger calls it unreadable"),
            (untimed & unreadable & ~chunk.zero, "the features are not 0, though it is unreadable"),
            (~untimed & ~unreadable & chunk.zero, "the features are all 0, though it is readable"),
            (late, "the frame is later than the tick"),
            (~untimed & ~late & (times < latest[:-1]), "the frame is earlier than the one before it"),
        ):
            if wrong.any():
                yield f"{at_ticks(chunk.ticks[wrong])}: {what}"
        self._latest = latest[-1]
        self._compare(chunk, ~untimed & ~unreadable)

    def _compare(self, chunk: _Chunk, readable: NDArray[np.bool_]) -> None:
        """Count ticks that are like the first, up to one that is not."""
        for row in np.flatnonzero(readable & ~chunk.zero):
            features = [array[row] for array in chunk.arrays]
            if self._first is None:
                self._first = [np.array(array) for array in features]
            if not all(map(np.array_equal, self._first, features)):
                self._alike = -1
            if self._alike < 0:
                return
            self._alike += 1


class _NotAsWanted(Exception):
    """What is wrong with a record so that its ticks are not looked at."""


def _of_float16(features: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each tick whether its features are finite, and whether they are all 0: from the bits, ten times as fast as
    float16 is computed with."""
    magnitude = features.view(np.uint16) & _HALF_MAGNITUDE
    largest = magnitude.reshape(len(features), -1).max(axis=1)
    return largest < _HALF_INFINITE, largest == 0


def _of_int8(features: NDArray[Any], scale: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    scale = scale[:, :, 0]
    finite = (np.abs(scale) <= LARGEST_SCALE).all(axis=1)  # False for NaN
    return finite, ~(features.any(axis=2) & (scale != 0)).any(axis=1)


def at_ticks(ticks: NDArray[np.integer]) -> str:
    """One tick, or how many and the first of them."""
    return f"tick {ticks[0]}" if len(ticks) == 1 else f"{len(ticks)} ticks from tick {ticks[0]} on"

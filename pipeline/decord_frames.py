"""Frames through decord, for the files that it decodes exactly.

decord hangs on some files, with the interpreter's lock held, and gives wrong frames of others: `why_not_decord` keeps
both away, and who calls `decord_tick_frames` does so in a process of its own that can be killed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import GRACE, TickFrame
from pipeline.packets import MISSING, Packets, scan
from pipeline.streams import Beat, DecodeError, video_stream
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import video_parts

_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_BATCH_FRAMES = 64
_BATCH_BYTES = 256_000_000


@dataclass(frozen=True)
class _Timeline:
    """Times of all pictures, int64 in units of ``time_base`` seconds, sorted; the last is shown until ``end``. A
    picture has so many ``pixels``."""

    pts: NDArray[np.int64]
    time_base: Fraction
    end: Fraction
    pixels: int

    def tick_indices(self, clock: Clock, last_tick: int | None) -> Iterator[tuple[int, int]]:
        """Each tick with the number of its picture: the last one at or before its instant."""
        start = int(self.pts[0])
        until, tick = (self.end - start) * self.time_base, 0
        while (instant := tick / Fraction(clock.tick_hz)) < until and (
            last_tick is None or tick <= last_tick
        ):
            latest = start + math.floor((instant + GRACE) / self.time_base)
            yield tick, int(np.searchsorted(self.pts, latest, side="right")) - 1
            tick += 1

    def seconds(self, index: int) -> float:
        return float((int(self.pts[index]) - int(self.pts[0])) * self.time_base)


def require_decord() -> Any:
    """The package, set to say what it finds damaged.

    Raises:
        UserError: it is not installed.
    """
    try:
        import decord
    except (ImportError, OSError):
        raise UserError(
            "the decoder decord is not installed (it exists for Linux on x86-64 only); use --decoder pyav"
        ) from None
    decord.logging.set_level(decord.logging.INFO)  # of pictures that are patched up, too
    return decord


def why_not_decord(uri: str | Path, beat: Beat | None = None) -> str | None:
    """Why this video is not given to decord, as a clause; None if decord decodes it exactly.

    Only packets and the first picture are looked at, so this cannot hang. Damage that only a decoder finds is not
    seen here: `decord_tick_frames` stops there.

    Raises:
        DecodeError: the file cannot be opened, or holds no video stream.
    """
    if len(video_parts(str(uri))) > 1:
        return "it is several files"
    found = _examined(uri, beat)
    return found if isinstance(found, str) else None


def decord_tick_frames(
    path: str | Path,
    clock: Clock,
    last_tick: int | None = None,
    rotation_deg: int = 0,
    beat: Beat | None = None,
) -> Iterator[TickFrame]:
    """What `pipeline.decode.tick_frames` yields, of a file that `why_not_decord` has nothing against.

    The frames are chosen by the packets' exact times; decord is asked for pictures by their number only. Meanwhile
    this process's standard error goes through a file in memory, where decord's decoder tells of damage.

    Args:
        beat: called for each packet that is scanned and each batch that is decoded.

    Raises:
        DecodeError: the file is refused, or decord finds it damaged. Frames that came before are right.
        UserError: decord is not installed.
    """
    decord = require_decord()
    timeline = _examined(path, beat)
    if isinstance(timeline, str):
        raise DecodeError(f"{path} is not for decord: {timeline}")
    with _Complaints(path) as complaints:
        try:
            reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1)
            if len(reader) != len(timeline.pts):
                raise DecodeError(
                    f"{path} holds {len(timeline.pts)} pictures, and decord finds {len(reader)}"
                )
            most = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (3 * timeline.pixels)))
            for indices, ticks in _batches(timeline.tick_indices(clock, last_tick), most):
                images = reader.get_batch(indices).asnumpy()
                complaints.require_none()
                if beat is not None:
                    beat()
                for index, image in zip(indices, images, strict=True):
                    upright = np.ascontiguousarray(np.rot90(image, round(rotation_deg / 90) % 4))
                    for tick in ticks[index]:
                        yield TickFrame(tick, timeline.seconds(index), upright)
        except (decord.DECORDError, RuntimeError) as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DecodeError(f"{path} cannot be decoded by decord ({text})") from None


def _batches(ticks: Iterator[tuple[int, int]], most: int) -> Iterator[tuple[list[int], dict[int, list[int]]]]:
    """The numbers of up to ``most`` pictures, ascending, with the ticks of each."""
    ticks_of: dict[int, list[int]] = {}
    for index, same in groupby(ticks, key=lambda pair: pair[1]):
        ticks_of[index] = [tick for tick, _ in same]
        if len(ticks_of) == most:
            yield list(ticks_of), ticks_of
            ticks_of = {}
    if ticks_of:
        yield list(ticks_of), ticks_of


_kept: tuple[tuple[object, ...], _Timeline | str] | None = None
"""The last file that was examined: both functions above ask for it."""


def _examined(path: str | Path, beat: Beat | None) -> _Timeline | str:
    """The times of a file's pictures, or why decord is not to be trusted with it."""
    global _kept
    key: tuple[object, ...] = (str(path),)
    with suppress(OSError):  # then the file cannot be opened either
        stat = os.stat(path)
        key = (str(path), stat.st_size, stat.st_mtime_ns)
    if _kept is None or _kept[0] != key:
        _kept = key, _examine(path, beat)
    return _kept[1]


def _examine(path: str | Path, beat: Beat | None) -> _Timeline | str:
    import av

    with video_stream(path) as (container, stream):
        if container.format.name not in _CONTAINERS:
            return f"its container is {container.format.name}"
        codec = stream.codec_context.codec.canonical_name
        if codec != "h264":
            return f"its pictures are {codec}, not h264"
        rate = stream.average_rate or stream.guessed_rate
        try:
            first = next(container.decode(stream), None)
        except av.FFmpegError:
            first = None
        if first is None:
            return "its first picture cannot be decoded"
        if first.interlaced_frame:
            return "its pictures are interlaced"
        matrix = first.side_data.get("DISPLAYMATRIX")
        if matrix is not None and not _turns_only(np.frombuffer(cast(bytes, matrix), "<i4")):
            return "its display matrix does more than turn by 90, 180 or 270 degrees"
    packets = scan(path, beat)
    if (reason := _why_not(packets)) is not None:
        return reason
    duration = Fraction(int(packets.duration[np.argmax(packets.pts)]))
    if not duration and rate:
        duration = 1 / Fraction(rate) / packets.time_base
    pts = packets.shown()
    return _Timeline(pts, packets.time_base, int(pts[-1]) + duration, first.width * first.height)


def _why_not(packets: Packets) -> str | None:
    if packets.broken_off is not None or packets.is_corrupt.any():
        return "it is damaged or cut short"
    if (packets.pts == MISSING).any():
        return "a packet has no presentation time"
    if len(np.unique(packets.pts)) != len(packets):
        return "two packets have the same presentation time"
    if packets.is_discard.any():
        return "an edit list hides some of its pictures"
    if not packets.is_clean[0] or (packets.is_keyframe & ~packets.is_clean).any():
        return "decoding cannot start afresh at each of its key frames"
    if packets.has_parameters[1:].any():
        return "its size or format may change inside"
    return None


def _turns_only(matrix: NDArray[np.int32]) -> bool:
    a, b, _, c, d = matrix[:5].tolist()
    return (a == d and b == c == 0) or (a == d == 0 and b == -c)


class _Complaints:
    """Listens to what decord's decoder says about damage: it conceals it in the picture and tells standard error."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._read = 0

    def __enter__(self) -> _Complaints:
        self._heard, self._stderr = os.memfd_create("decord"), os.dup(2)
        os.dup2(self._heard, 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        self._pass_on()
        os.close(self._stderr)
        os.close(self._heard)

    def require_none(self) -> None:
        for line in self._pass_on().splitlines():
            if line.startswith("[h264 @"):
                raise DecodeError(f"{self._path} is damaged ({line.partition('] ')[2]})")

    def _pass_on(self) -> str:
        """What was said since the last call; it goes on to where standard error led."""
        said = b""
        while part := os.pread(self._heard, 2**16, self._read + len(said)):
            said += part
        self._read += len(said)
        if said:
            os.write(self._stderr, said)
        return said.decode(errors="replace")

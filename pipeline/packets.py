"""The packets of a video file, read without decoding: times, flags, and at which ones decoding may start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.pictures import Picture, examiner
from pipeline.streams import Beat, Complaints, DecodeError, Rhythm, cut_off, loses_silently, video_stream

if TYPE_CHECKING:
    import av

MISSING = np.iinfo(np.int64).min
"""Stands for a time that a container does not tell."""


@dataclass(frozen=True)
class Packets:
    """The packets of the first video stream in decoding order; all arrays are ``[N]``.

    Attributes:
        codec: FFmpeg's name of the format, such as ``h264``.
        time_base: seconds a unit of ``pts``, ``dts`` and ``duration``.
        pts, dts: int64, `MISSING` where the container does not tell it.
        duration: int64, 0 where the container does not tell it.
        size: int64, bytes.
        is_keyframe: as the container says.
        is_corrupt: the container says so, or its bytes are no whole picture, or one is missing before it.
        is_discard: decoded, but not shown: an edit list begins after it.
        is_clean: decoding may start here, and every picture *shown* after it is right whatever was before. Pictures
            that are decoded after it but shown before it ("leading") may need the ones before. False where unsure.
        is_used: pictures decoded later may be predicted from it. True where unsure.
        has_parameters: it holds parameter sets (in-band or as side data), which stay in force behind it.
        whole: False where the scan stopped before the end of the file, as asked.
        broken_off: why the file cannot be read to its end, None where it can.
        loses_silently: a container that leaves no trace where a packet was lost, such as a transport stream.
    """

    codec: str
    time_base: Fraction
    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    size: NDArray[np.int64]
    is_keyframe: NDArray[np.bool_]
    is_corrupt: NDArray[np.bool_]
    is_discard: NDArray[np.bool_]
    is_clean: NDArray[np.bool_]
    is_used: NDArray[np.bool_]
    has_parameters: NDArray[np.bool_]
    whole: bool
    broken_off: str | None
    loses_silently: bool

    def __len__(self) -> int:
        return len(self.pts)

    def shown(self) -> NDArray[np.int64]:
        """Presentation times of the pictures that are shown, sorted; `MISSING` ones come first."""
        return np.sort(self.pts[~self.is_discard])


class _Row(NamedTuple):
    pts: int
    dts: int
    duration: int
    size: int
    is_keyframe: bool
    is_corrupt: bool
    is_discard: bool
    picture: Picture


def scan(path: str | Path, beat: Beat | None = None, until_s: Fraction | None = None) -> Packets:
    """Read all packets of a file's first video stream; nothing is decoded.

    Args:
        beat: called once a packet.
        until_s: stop once nothing that is shown up to so many seconds after the first picture can follow.

    Raises:
        DecodeError: the file cannot be opened, or holds no video stream.
    """
    rows: list[_Row] = []
    whole, broken_off = True, None
    with video_stream(path) as (container, stream):
        codec, time_base = stream.codec_context.codec.canonical_name, Fraction(stream.time_base or 0)
        silent = loses_silently(container)
        enough = _Enough(None if until_s is None else until_s / time_base)
        try:
            for row in _rows(path, container, stream, beat):
                if enough.before(row):
                    whole = False
                    break
                rows.append(row)
        except DecodeError as error:
            broken_off = str(error)
    pictures = [row.picture for row in rows]
    top = max((picture.layer for picture in pictures), default=0)
    return Packets(
        codec=codec,
        time_base=time_base,
        pts=np.array([row.pts for row in rows], np.int64),
        dts=np.array([row.dts for row in rows], np.int64),
        duration=np.array([row.duration for row in rows], np.int64),
        size=np.array([row.size for row in rows], np.int64),
        is_keyframe=np.array([row.is_keyframe for row in rows], bool),
        is_corrupt=np.array([row.is_corrupt for row in rows], bool),
        is_discard=np.array([row.is_discard for row in rows], bool),
        is_clean=np.array([picture.clean for picture in pictures], bool),
        is_used=np.array([picture.used or picture.layer < top for picture in pictures], bool),
        has_parameters=np.array([picture.parameters for picture in pictures], bool),
        whole=whole,
        broken_off=broken_off,
        loses_silently=silent,
    )


def _rows(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream, beat: Beat | None
) -> Iterator[_Row]:
    for packet, picture, torn, gap, _ in read_packets(path, container, stream, beat):
        yield _Row(
            MISSING if packet.pts is None else packet.pts,
            MISSING if packet.dts is None else packet.dts,
            packet.duration or 0,
            packet.size,
            packet.is_keyframe,
            bool(torn or gap),
            packet.is_discard,
            picture,
        )


class _Enough:
    """Whether all that is shown up to a limit has been seen, with the groups of pictures whole."""

    def __init__(self, limit: Fraction | None) -> None:
        self._limit, self._first, self._starts = limit, MISSING, 0

    def before(self, row: _Row) -> bool:
        if self._limit is None or row.pts == MISSING:
            return False
        if self._first == MISSING and not row.is_discard:
            self._first = row.pts
        beyond = self._first != MISSING and row.pts > self._first + self._limit
        self._starts += row.picture.clean and beyond
        return self._starts == 2  # what leads the first such start may be shown before the limit


class Arrival(NamedTuple):
    """A packet as it was read: why its bytes are not to be trusted, and why something may be missing before it."""

    packet: av.Packet
    picture: Picture
    torn: str | None
    gap: str | None
    last: bool = False


def read_packets(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream, beat: Beat | None = None
) -> Iterator[Arrival]:
    """The stream's packets in decoding order.

    Where bytes are lost, the packet that lost them often looks whole, and only what follows shows it: each packet
    is given out when the next has been read.

    Raises:
        DecodeError: the file breaks off; raised after its last packet.
    """
    import av

    examine, complaints = examiner(stream), Complaints()
    silent = loses_silently(container)
    rhythm = Rhythm(silent)
    packets = container.demux(stream)
    before: Arrival | None = None
    count = 0
    while True:
        packet, broken_off = None, None
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            broken_off = str(error.strerror)
        if beat is not None:
            beat()
        gap = complaints.new()
        if packet is None:
            break
        count += packet.dts is not None or packet.pts is not None
        if not packet.size:  # the end; some files hold empty packets inside, too
            continue
        picture = examine(packet)
        if before is not None and rhythm.missed(_step(before.packet, packet)):
            gap = gap or "a picture is missing"
        torn = "a packet is marked as corrupt" if packet.is_corrupt else None
        if picture.broken:
            torn = torn or "a packet holds no whole picture"
        if before is not None:
            spilt = torn if picture.broken or silent else None
            yield before._replace(torn=before.torn or gap or spilt)
            complaints.new()  # not of the reader, but of the decoder, which ran meanwhile
        if picture.lost_before:
            gap = gap or "a picture is missing"
        before = Arrival(packet, picture, torn, gap)
    broken_off = gap or broken_off or cut_off(path, container, stream, count)
    if before is not None:
        yield before._replace(torn=before.torn or broken_off, last=True)
    if broken_off is not None:
        raise DecodeError(f"{path} breaks off ({broken_off})")


def _step(before: av.Packet, packet: av.Packet) -> int:
    return 0 if before.dts is None or packet.dts is None else packet.dts - before.dts

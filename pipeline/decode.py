"""Video to frames on the clock: for each tick, the last frame shown at or before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from schemas.clock import Clock
from schemas.records import video_files

if TYPE_CHECKING:
    import av

GRACE = Fraction(1, 1000)
"""Seconds a frame may come after its tick and still be its frame: containers round times to a millisecond."""

_MOST_B_FRAMES = 16  # in a row, as H.264 allows


class DecodeError(Exception):
    """A video that cannot be decoded: one sentence with the file and the reason."""


@dataclass(frozen=True)
class TickFrame:
    """The frame of one tick.

    ``pts_s`` is its presentation time in seconds from the video's first decoded frame; ``image`` is RGB uint8
    ``[H, W, 3]``, upright.
    """

    tick: int
    pts_s: float
    image: NDArray[np.uint8]


def tick_frames(
    uri: str | Path, clock: Clock, last_tick: int | None = None, rotation_deg: int = 0
) -> Iterator[TickFrame]:
    """Decode a video in order and yield the frame of every tick from 0 on.

    A tick exists while its instant is before the last frame's presentation time plus that frame's duration.
    Times are compared as exact fractions of the container's integer time stamps; frames are never counted.

    Args:
        uri: a file PyAV opens, or several as `schemas.records.joined_uri` names them, whose ticks run on from
            one to the next.
        clock: the ticks.
        last_tick: stop after it; None goes on to the end.
        rotation_deg: counter-clockwise turn in steps of 90, on top of the one the file asks for.

    Raises:
        DecodeError: a file cannot be opened, holds no picture, or breaks off inside.
    """
    tick, shown, shown_at = 0, None, Fraction(0)
    for at, frame in _timeline(video_files(str(uri))):
        until = at if frame is None else at - GRACE
        while shown is not None and _instant(tick, clock) < until:
            yield TickFrame(tick, float(shown_at), _upright(shown, rotation_deg))
            if tick == last_tick:
                return
            tick += 1
        shown, shown_at = frame, at


def probe_duration(path: str | Path) -> float:
    """Duration in seconds of one file as its header tells it; decoding may find a little more or less.

    Raises:
        DecodeError: the file cannot be opened, or tells no duration.
    """
    with _stream(path) as (container, stream):
        told = _told_duration(container, stream)
    if told is None:
        raise DecodeError(f"{path} tells no duration in its header")
    return float(told)


def _timeline(files: Sequence[Path]) -> Iterator[tuple[Fraction, av.VideoFrame | None]]:
    """Each frame with the second from which it is shown, in order; at last the second of the end, with None.

    A part begins where the header of the one before it says that this one ends, so that times agree with the sum
    of the headers' durations: what is decoded beyond is not shown, where there is less the last frame stays.
    """
    begin = Fraction(0)
    for number, path in enumerate(files, 1):
        with _stream(path) as (container, stream):
            told = _told_duration(container, stream) if number < len(files) else None
            end = None if told is None else begin + told
            time_base = Fraction(stream.time_base or 0)
            frames = _decoded(path, container, stream)
            start, shown = next(frames, (0, None))
            if shown is None:
                raise DecodeError(f"{path} holds no picture")
            yield begin, shown
            shown_at = begin
            for pts, frame in frames:
                at = begin + (pts - start) * time_base
                if at <= shown_at:
                    raise DecodeError(f"{path} has frames out of order at {float(at - begin):.3f} s")
                if end is not None and at >= end:
                    break
                yield at, frame
                shown, shown_at = frame, at
            begin = shown_at + _duration(shown, stream, time_base) if end is None else end
    yield begin, None


def _told_duration(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    """Seconds by the header, None where it tells none."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    return Fraction(container.duration, 1_000_000) if container.duration else None


@contextmanager
def _stream(
    path: str | Path,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    import av

    try:
        container = av.open(f"file:{path}", metadata_errors="replace")  # tags may be in any encoding
    except FileNotFoundError:
        raise DecodeError(f"{path} is not there") from None
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path} cannot be opened as a video ({error.strerror})") from None
    with container:
        if not container.streams.video:
            raise DecodeError(f"{path} holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"  # frame threads would hold pictures back and gain nothing per core
        yield container, stream


def _decoded(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[int, av.VideoFrame]]:
    import av
    from av.video.frame import PictureType

    held: list[av.VideoFrame] = []  # a B picture may be drawn from a damaged one that is shown after it
    try:
        for frame in container.decode(stream):
            if frame.pts is None:
                raise DecodeError(f"{path} has a frame without a presentation time")
            if frame.is_corrupt:
                raise DecodeError(f"{path} is damaged at {float(frame.time or 0):.2f} s")
            held.append(frame)
            if frame.pict_type != PictureType.B or len(held) == _MOST_B_FRAMES:
                yield from ((clean.pts or 0, clean) for clean in held)
                held.clear()
        yield from ((clean.pts or 0, clean) for clean in held)
    except av.FFmpegError as error:
        raise DecodeError(f"{path} breaks off while decoding ({error.strerror})") from None


def _instant(tick: int, clock: Clock) -> Fraction:
    return tick / Fraction(clock.tick_hz)


def _duration(frame: av.VideoFrame, stream: av.VideoStream, time_base: Fraction) -> Fraction:
    """Of the last frame, in seconds; where the container does not say, the stream's rate does."""
    if frame.duration:
        return frame.duration * time_base
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(0)


def _upright(frame: av.VideoFrame, rotation_deg: int) -> NDArray[np.uint8]:
    """RGB, turned as the file's display matrix and the corpus ask; both angles are counter-clockwise."""
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    turns = round((frame.rotation + rotation_deg) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image

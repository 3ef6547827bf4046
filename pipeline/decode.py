"""Video to frames on the clock: for each tick, the last frame shown at or before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.packets import MISSING, Packets, scan
from pipeline.sequential import Shown, all_pictures
from pipeline.skipping import UnsureError, plan_of, planned_pictures
from pipeline.streams import Beat, DecodeError, told_duration, video_stream
from schemas.clock import Clock
from schemas.records import video_files

if TYPE_CHECKING:
    import av

__all__ = ["GRACE", "DecodeError", "TickFrame", "probe_duration", "tick_frames", "upright"]

GRACE = Fraction(1, 1000)
"""Seconds a frame may come after its tick and still be its frame: containers round times to a millisecond."""


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
    uri: str | Path,
    clock: Clock,
    last_tick: int | None = None,
    rotation_deg: int = 0,
    *,
    skipping: bool = True,
    on_damage: Callable[[int, int, str], None] | None = None,
    beat: Beat | None = None,
) -> Iterator[TickFrame]:
    """Decode a video and yield the frame of every tick from 0 on, in order.

    A tick exists while its instant is before the last frame's presentation time plus that frame's duration.
    Times are compared as exact fractions of the container's integer time stamps; frames are never counted.

    Args:
        uri: a file PyAV opens, or several as `schemas.records.joined_uri` names them, whose ticks run on from
            one to the next.
        clock: the ticks.
        last_tick: stop after it; None goes on to the end.
        rotation_deg: counter-clockwise turn in steps of 90, on top of the one the file asks for.
        skipping: leave out what no tick needs, where the packets show that the result is the same; False decodes
            every picture.
        on_damage: called with ``(first, end, reason)`` for each run of ticks ``[first, end)`` that cannot be read;
            they are not yielded, and decoding goes on behind them. For a video that breaks off, the last call has
            ``first == end``, where it ends. None: a tick that cannot be read is an error.
        beat: called for each packet, so that a watcher sees progress where no tick is yielded for long.

    Raises:
        DecodeError: without ``on_damage``, at the first tick that cannot be read, or where the video breaks off;
            with it, only if no tick at all can be read.
    """
    tick, readable = -1, False
    damage: tuple[int, str] | None = None  # the first tick of a run, and why
    broken_off: str | None = None
    moments = _timeline(video_files(str(uri)), clock, last_tick, skipping, beat)
    try:
        for tick, moment in _ticks(moments, clock, last_tick):
            if moment.frame is None:
                if on_damage is None:
                    raise DecodeError(moment.damage)
                damage = damage or (tick, moment.damage)
                continue
            if damage is not None and on_damage is not None:
                on_damage(damage[0], tick, damage[1])
                damage = None
            yield TickFrame(tick, float(moment.at), upright(moment.frame, rotation_deg))
            readable = True
    except DecodeError as error:
        if on_damage is None or not readable:
            raise
        broken_off = str(error)
    if damage is not None and not readable:
        raise DecodeError(damage[1])
    if damage is not None and on_damage is not None:
        on_damage(damage[0], tick + 1, damage[1])
    if broken_off is not None and on_damage is not None:
        on_damage(tick + 1, tick + 1, broken_off)


def probe_duration(path: str | Path) -> float:
    """Duration in seconds of one file as its header tells it; decoding may find a little more or less.

    Raises:
        DecodeError: the file cannot be opened, or tells no duration.
    """
    with video_stream(path) as (container, stream):
        told = told_duration(container, stream)
    if told is None:
        raise DecodeError(f"{path} tells no duration in its header")
    return float(told)


class _Moment(NamedTuple):
    """A change of what is shown, at a second of the whole video."""

    at: Fraction
    path: Path
    frame: av.VideoFrame | None = None  # None: it cannot be read, for the reason in `damage`
    damage: str = ""
    is_end: bool = False


def _ticks(moments: Iterator[_Moment], clock: Clock, last_tick: int | None) -> Iterator[tuple[int, _Moment]]:
    """What is shown at each tick."""
    tick = 0
    shown: _Moment | None = None
    for moment in moments:
        until = moment.at if moment.is_end else moment.at - GRACE
        while shown is not None and _instant(tick, clock) < until:
            yield tick, shown
            if tick == last_tick:
                return
            tick += 1
        shown = moment


def _timeline(
    files: Sequence[Path], clock: Clock, last_tick: int | None, skipping: bool, beat: Beat | None
) -> Iterator[_Moment]:
    """Each picture that ticks need and each damaged place with the second from which it is shown; then the end.

    A part begins where the header of the one before it says that this one ends, so that times agree with the sum
    of the headers' durations: what is decoded beyond is not shown, where there is less the last frame stays.

    Raises:
        DecodeError: a part cannot be opened, holds no picture, has pictures out of order, or breaks off; the end
            of what there is comes first.
    """
    begin = Fraction(0)
    for number, path in enumerate(files, 1):
        broken_off: DecodeError | None = None
        last: Shown | None = None
        with video_stream(path) as (container, stream):
            told = told_duration(container, stream) if number < len(files) else None
            end = None if told is None else begin + told
            time_base = Fraction(stream.time_base or 0)
            need = _Need(begin, end, clock, last_tick)
            start, shown_at = 0, begin
            pictures = _pictures(path, container, stream, need if skipping else None, beat)
            try:
                for shown in pictures:
                    start = shown.pts if last is None else start
                    at = begin + (shown.pts - start) * time_base
                    if end is not None and at >= end:
                        break
                    if last is not None and at <= shown_at:
                        raise DecodeError(f"{path} has frames out of order at {float(at - begin):.3f} s")
                    damage = f"{path} is damaged at {float(at - begin):.2f} s ({shown.reason})"
                    yield _Moment(at, path, shown.frame, "" if shown.frame else damage)
                    last, shown_at = shown, at
            except DecodeError as error:
                broken_off = error
            if last is None:
                raise broken_off or DecodeError(f"{path} holds no picture")
            if end is None or broken_off is not None:
                end = shown_at + _duration(last, stream, time_base)
        begin = end
        if broken_off is not None:
            yield _Moment(begin, path, is_end=True)
            raise broken_off
    yield _Moment(begin, path, is_end=True)


@dataclass(frozen=True)
class _Need:
    """Which pictures of a part ticks need; it is shown from ``begin`` to ``end`` seconds of the whole video."""

    begin: Fraction
    end: Fraction | None
    clock: Clock
    last_tick: int | None

    def until_s(self) -> Fraction | None:
        """Seconds of the part up to which ticks are read; None for all of it."""
        if self.last_tick is None:
            return None
        return max(_instant(self.last_tick, self.clock) + GRACE - self.begin, Fraction(0))

    def of(self, packets: Packets) -> NDArray[np.int64]:
        """Presentation times of the pictures that ticks show, of the first and of the one that ends the last."""
        shown = packets.shown()
        if not len(shown) or shown[0] == MISSING:
            return shown
        if self.end is not None:
            units = math.ceil((self.end - self.begin) / packets.time_base)
            shown = shown[: max(1, np.searchsorted(shown, shown[0] + units))]
        whole = (int(shown[-1]) - int(shown[0])) * packets.time_base + self.begin
        tick = max(0, math.ceil((self.begin - GRACE) * Fraction(self.clock.tick_hz)))
        limits = []
        while (instant := _instant(tick, self.clock) + GRACE) < whole:
            if self.last_tick is not None and tick > self.last_tick:
                break
            limits.append(int(shown[0]) + math.floor((instant - self.begin) / packets.time_base))
            tick += 1
        needed = np.searchsorted(shown, np.array(limits, np.int64), side="right") - 1
        last = len(shown) - 1
        if self.last_tick is not None and tick > self.last_tick and len(needed):
            last = min(last, int(needed[-1]) + 1)
        return shown[np.unique([0, *needed.tolist(), last])]


def _pictures(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    need: _Need | None,
    beat: Beat | None,
) -> Iterator[Shown]:
    """All pictures of a part, or at least those that are needed, in order."""
    if need is None:
        yield from all_pictures(path, container, stream, beat)
        return
    packets = scan(path, beat, need.until_s())
    plan = plan_of(packets, need.of(packets))
    if plan is None:
        yield from all_pictures(path, container, stream, beat)
        return
    given = MISSING
    try:
        for shown in planned_pictures(container, stream, plan, beat):
            given = shown.pts
            yield shown
    except UnsureError:
        with video_stream(path) as (container, stream):
            yield from (shown for shown in all_pictures(path, container, stream, beat) if shown.pts > given)


def _instant(tick: int, clock: Clock) -> Fraction:
    return tick / Fraction(clock.tick_hz)


def _duration(shown: Shown, stream: av.VideoStream, time_base: Fraction) -> Fraction:
    """Of the last picture, in seconds; where the container does not say, the stream's rate does."""
    if shown.duration:
        return shown.duration * time_base
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(0)


def upright(frame: av.VideoFrame, rotation_deg: int) -> NDArray[np.uint8]:
    """RGB, as the file's display matrix asks, and then turned counter-clockwise as the corpus asks.

    The matrix puts a picture's (x, y) at (a x + c y, b x + d y); y points down.
    """
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(cast(bytes, matrix), "<i4")[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            image = image.swapaxes(0, 1)
            a, d = c, b
        image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(np.rot90(image, round(rotation_deg / 90) % 4))

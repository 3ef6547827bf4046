"""Live video on the clock: for each tick the picture shown at its instant, or a word why there is none."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from pipeline.decode import GRACE, TickFrame, tick_frames, upright
from pipeline.live_source import PictureTimes, is_live, pictures, shown_name
from pipeline.streams import DecodeError
from schemas.clock import Clock

if TYPE_CHECKING:
    import av

LATE = "late"
"""The reason of a gap whose ticks had pictures, which the consumer did not come for in time."""

_AHEAD_S = 1  # seconds of pictures that are read before their time, from a stream that comes in bursts
_RETRY_S = 0.5
_END_S = 1.0  # seconds in which a reader ends beyond its waiting; a camera's driver may never let go of it


@dataclass(frozen=True)
class Gap:
    """Ticks ``[first, end)`` without a picture, and why. Where a file breaks off, ``first == end``."""

    first: int
    end: int
    reason: str


def live_ticks(
    source: str,
    clock: Clock,
    *,
    rotation_deg: int = 0,
    patience_s: float = 5.0,
    give_up_s: float = 60.0,
    lag_s: float = 2.0,
) -> Generator[TickFrame | Gap, None, None]:
    """The picture of every tick from 0 on, in order, as it comes; gaps in their places.

    Tick k shows the last picture at or before its instant (1 ms of grace), and is given as soon as the next
    picture is there. A file is read as `pipeline.decode.tick_frames` reads it, as fast as it is asked for.

    The clock of a live source starts with its first picture. Pictures have their times by their stamps where
    these run on sensibly and by their arrival elsewhere, as `PictureTimes` tells. A source that drops (it ends,
    breaks, or gives no picture for ``patience_s``) is connected to again while the clock goes on; the ticks
    between are one gap. Its own end is a drop as well: an address that serves a finished video begins anew.

    A consumer that comes too late does not hold the stream up: ticks that waited longer than ``lag_s`` while newer
    ones came are a gap whose reason is `LATE`. Close the generator to let go of the source.

    Args:
        source: a file (``file:`` may stand before its path), the index of a camera ("0"), or an address that
            FFmpeg opens (rtsp, http, https, udp, tcp; HLS by its playlist).
        clock: the ticks.
        rotation_deg: counter-clockwise turn in steps of 90, on top of the one the video asks for.
        patience_s: seconds without an answer or a picture after which a source is connected to again.
        give_up_s: seconds without a picture after which it is given up.
        lag_s: seconds that a tick waits for a consumer who is late.

    Raises:
        DecodeError: a file holds no tick that can be read; a live source cannot be opened, gives no picture at
            all, or none for ``give_up_s``.
    """
    if not is_live(source):
        yield from _file_ticks(source.removeprefix("file:"), clock, rotation_deg)
        return
    reader = _Reader(source, clock, patience_s, give_up_s, lag_s)
    reader.start()
    try:
        while True:
            piece = reader.take()
            if piece.picture is None:
                yield Gap(piece.first, piece.end, piece.reason)
            else:
                image = upright(piece.picture.frame, rotation_deg)
                yield TickFrame(piece.first, float(piece.picture.at), image)
    finally:
        reader.stop()


def _file_ticks(path: str, clock: Clock, rotation_deg: int) -> Generator[TickFrame | Gap, None, None]:
    gaps: list[Gap] = []

    def note(first: int, end: int, reason: str) -> None:
        gaps.append(Gap(first, end, reason))

    for frame in tick_frames(path, clock, rotation_deg=rotation_deg, on_damage=note):
        yield from gaps
        gaps.clear()
        yield frame
    yield from gaps


@dataclass(frozen=True)
class _Picture:
    frame: av.VideoFrame
    at: Fraction  # seconds of the clock

    @property
    def end(self) -> Fraction:
        """Until when it is shown if none follows."""
        return self.at + (self.frame.duration or 0) * (self.frame.time_base or Fraction(0))


@dataclass(eq=False)
class _Piece:
    """A tick with its picture, or ticks ``[first, end)`` without."""

    first: int
    end: int
    picture: _Picture | None
    reason: str
    since_s: float = 0.0  # when it could be taken first


class _Reader:
    """A thread that reads the source, and the few ticks that wait for the consumer."""

    def __init__(self, source: str, clock: Clock, patience_s: float, give_up_s: float, lag_s: float) -> None:
        self._source, self._hz = source, Fraction(clock.tick_hz)
        self._patience_s, self._give_up_s, self._lag_s = patience_s, give_up_s, lag_s
        # what comes steadily is late before there is no room, so that the reader waits only in a burst
        self._room = math.ceil(lag_s * self._hz) + 1
        self._thread = threading.Thread(target=self._run, name="dst-live", daemon=True)
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._waiting: list[_Piece] = []
        self._error: Exception | None = None
        self._trouble = ""  # why the last connection ended
        self._heard_s = self._started_s = time.monotonic()  # the last picture; the first one
        self._tick = 0
        self._times = PictureTimes()
        self._last: _Picture | None = None
        self._dropped = False

    def start(self) -> None:
        self._heard_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, which closes its connection, at the latest when its patience is over."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(2 * self._patience_s + _END_S)  # connecting has two steps

    def take(self) -> _Piece:
        """The next tick or gap, waiting for it.

        Raises:
            DecodeError: the source is not connected to any more.
        """
        with self._changed:
            while not self._waiting:
                if self._error is not None:
                    raise self._error
                left = self._heard_s + self._give_up_s - time.monotonic()
                if left <= 0:
                    raise DecodeError(self._given_up())
                self._changed.wait(left)
            self._changed.notify_all()
            return self._waiting.pop(0)

    def _given_up(self) -> str:
        why = f" ({self._trouble})" if self._trouble else ""
        name = shown_name(self._source)
        return f"{name} gave no picture for {self._give_up_s:g} s{why}; see that it runs, and start again"

    # ---- in the thread

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._connect()
                self._stopped.wait(_RETRY_S)
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _connect(self) -> None:
        """Read one connection to its end. The first has to give a picture."""
        try:
            with closing(pictures(self._source, self._patience_s)) as frames:
                for frame in frames:
                    if self._stopped.is_set():
                        return
                    if frame is not None:
                        self._show(frame)
        except DecodeError as error:
            if self._last is None:
                raise DecodeError(f"{error}; see that it is there and not in use elsewhere") from None
            self._trouble = str(error)
            self._decide(self._last.end)
            self._times.reconnected()
            self._dropped = True

    def _show(self, frame: av.VideoFrame) -> None:
        """Decide the ticks before a picture, and wait if it came long before its time."""
        now = time.monotonic()
        if self._last is None:
            self._started_s = now
        self._heard_s = now
        stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
        picture = _Picture(frame, self._times.time_of(stamp, now - self._started_s))
        if self._last is not None:
            silence_s = float(picture.at - self._last.at)
            self._decide(picture.at - GRACE, f"no picture for {silence_s:.1f} s" if self._dropped else "")
        self._last, self._dropped = picture, False
        self._stopped.wait(max(0.0, self._started_s + float(picture.at) - _AHEAD_S - time.monotonic()))

    def _decide(self, until: Fraction, absence: str = "") -> None:
        """Give the ticks whose instants are before ``until``: the last picture, or a gap for the reason told."""
        end = max(self._tick, math.ceil(until * self._hz))
        if absence and end > self._tick:
            self._put(_Piece(self._tick, end, None, absence))
        elif not absence:
            for tick in range(self._tick, end):
                self._put(_Piece(tick, tick + 1, self._last, ""))
        self._tick = end

    def _put(self, piece: _Piece) -> None:
        """Let a piece wait; where there is no room, the oldest tick goes as soon as it is late."""
        with self._changed:
            while not self._stopped.is_set():
                pictured = [waiting for waiting in self._waiting if waiting.picture is not None]
                if len(pictured) < self._room:
                    break
                due_s = max(self._started_s + float(pictured[0].first / self._hz), pictured[0].since_s)
                left = due_s + self._lag_s - time.monotonic()
                if left <= 0:
                    self._lose(pictured[0])
                else:
                    self._changed.wait(left)
            piece.since_s = time.monotonic()
            self._waiting.append(piece)
            self._changed.notify_all()

    def _lose(self, piece: _Piece) -> None:
        piece.picture, piece.reason = None, LATE
        place = self._waiting.index(piece)
        if place and self._waiting[place - 1].reason == LATE:
            self._waiting[place - 1].end = piece.end
            del self._waiting[place]

"""Decoding of every picture of a file, in order; what damage has touched is named, never shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.packets import MISSING, Arrival, read_packets
from pipeline.streams import Beat, Complaints, DecodeError, Rhythm, loses_silently

if TYPE_CHECKING:
    import av

_NEVER = np.iinfo(np.int64).max
_SPOILT = 2  # packets behind the one that is marked
MOST_B_FRAMES = 16  # in a row, as H.264 allows


class Shown(NamedTuple):
    """A picture at its place in the order of presentation, times in the stream's units.

    ``frame`` is None for a place that cannot be read, and ``reason`` a clause that says why.
    """

    pts: int
    duration: int  # 0 where the container does not tell it
    frame: av.VideoFrame | None
    reason: str = ""


def all_pictures(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream, beat: Beat | None = None
) -> Iterator[Shown]:
    """Every picture from the first key frame on, in the order of presentation, and every place that is lost.

    After damage nothing is shown until a key frame that needs nothing before it, and no picture that is decoded
    after it but shown before.

    Raises:
        DecodeError: the file breaks off, raised after its last picture; or it holds no picture.
    """
    decoder = _Decoder(path, container, stream)
    broken: DecodeError | None = None
    try:
        for arrival in read_packets(path, container, stream, beat):
            decoder.take(arrival)
            yield from decoder.ready()
    except DecodeError as error:
        broken = error
    decoder.end()
    yield from decoder.ready()
    decoder.require_any()
    if broken is not None:
        raise broken


class _Decoder:
    """Takes packets in, gives pictures and lost places out.

    It waits for a start (``_waiting`` is then the reason, "" at the beginning of the file), or it decodes. After
    damage nothing is given out until the next start has proved itself: only then it is known what was lost.
    """

    def __init__(
        self, path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
    ) -> None:
        self._path, self._context = path, stream.codec_context
        silent = loses_silently(container)
        self._rhythm = Rhythm(silent)
        self._counts = container.format.name == "avi"  # a picture's time is its number: one lost, all are off
        self._spoils = silent or self._counts  # where damage was noticed is only about where it is
        self._unharmed = 0  # packets in a row
        self._complaints = Complaints()
        self._waiting: str | None = ""
        self._damage = ""  # why some of what follows the last picture given out is lost
        self._reason = ""  # of the last damage
        self._settled = True  # no packet can follow whose picture comes before the start
        self._first_packet = True
        self._harmless: tuple[str, ...] = ()
        self._proving: int | None = None  # the key frame that is to come out first, as an intra picture
        self._begin = MISSING  # pictures shown before it would need others that are not there
        self._sent: dict[int, int] = {}  # durations of pictures on their way through the decoder, by pts
        # a B picture may be drawn from a damaged one that is shown after it
        self._held: list[av.VideoFrame] = []
        self._whole: list[Shown] = []
        self._lost: list[Shown] = []
        self._last: Shown | None = None  # given out

    def take(self, arrival: Arrival) -> None:
        """Decode a packet, or find out why not."""
        packet, picture, torn, gap, last = arrival
        if last and not self._counts:
            self._spoils = False  # what a cut has touched is the last packet alone
        self._unharmed = 0 if torn or gap else self._unharmed + 1
        first, self._first_packet = self._first_packet, False
        if gap and self._waiting is None:
            self._stop(gap)
        if self._waiting is not None:
            beginning = self._waiting == ""
            starts = picture.recovery and not (self._damage and (self._counts or self._is_near_damage()))
            if not (starts or (beginning and packet.is_keyframe)):
                self._lose(packet, self._waiting)
                return
            if torn:
                self._waiting = self._damage = self._waiting or torn
                self._lose(packet, torn)
                return
            self._start(packet, keeps_leading=beginning and first and picture.recovery == picture.clean)
            # pictures are marked as no longer used that were never there
            self._harmless = () if picture.clean else ("mmco:",)
        elif packet.pts is not None and packet.pts < self._begin and not (torn and self._spoils):
            self._lose(packet, self._damage)
            return
        elif torn:
            self._stop(torn, packet)
            return
        else:
            self._settled = True
        self._decode(packet)

    def _is_near_damage(self) -> bool:
        return self._spoils and self._unharmed <= _SPOILT

    def end(self) -> None:
        """No packet follows."""
        reason = self._accept(self._drain())
        if reason is None:
            self._release()
        else:
            self._damage = reason
        self._lost += [Shown(pts, duration, None, self._damage) for pts, duration in self._sent.items()]
        self._waiting, self._proving, self._settled = None, None, True
        self._begin = _NEVER

    def ready(self) -> Iterator[Shown]:
        """What can be given out by now, in order."""
        if self._damage and (self._waiting is not None or self._proving is not None or not self._settled):
            return
        places = (
            sorted(self._whole + self._lost, key=lambda shown: shown.pts) if self._damage else self._whole
        )
        for shown in places:
            last = self._last
            if last is not None and shown.pts <= last.pts and shown.frame is None:
                continue
            if last is not None and (hole := self._hole(last, shown)):
                yield hole
            self._last = shown
            yield shown
        self._whole, self._lost, self._damage = [], [], ""

    def require_any(self) -> None:
        """Raises DecodeError if not even a lost place was given out."""
        if self._last is None:
            why = f" ({self._reason})" if self._reason else ""
            raise DecodeError(f"{self._path} holds no picture{why}")

    def _hole(self, last: Shown, shown: Shown) -> Shown | None:
        """A place between two that is lost, though no packet tells of it."""
        missed = self._rhythm.missed(shown.pts - last.pts)
        after = last.pts + (self._rhythm.step if missed else last.duration)
        # whole packets may be gone with their times: nobody knows what was shown after the last whole picture
        unknown = self._damage and last.frame is not None and last.duration and last.pts < self._begin
        if (missed or unknown) and after < shown.pts:
            return Shown(after, 0, None, self._damage or "a picture is missing")
        return None

    def _start(self, packet: av.Packet, keeps_leading: bool) -> None:
        self._context.flush_buffers()
        self._begin = packet.pts if packet.pts is not None and not keeps_leading else MISSING
        if self._damage:
            self._proving = MISSING if packet.pts is None or packet.is_discard else packet.pts
            self._settled = False
        self._waiting = None

    def _decode(self, packet: av.Packet) -> None:
        import av

        if packet.pts is not None and not packet.is_discard:
            self._sent[packet.pts] = packet.duration or 0
        self._complaints.new()
        frames: list[av.VideoFrame] = []
        reason = None
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError as error:
            reason = error.strerror
        reason = self._complaints.new(self._harmless) or reason
        if reason:
            self._stop(reason, packet, frames)
        elif reason := self._accept(frames):
            self._context.flush_buffers()  # what is inside may be drawn from the bad one
            self._wait(reason)

    def _stop(self, reason: str, packet: av.Packet | None = None, out: Sequence[av.VideoFrame] = ()) -> None:
        """At damage in a packet, or before the next one: what was decoded before it is whole, nothing behind it."""
        frames = [*out, *self._drain()]
        self._context.flush_buffers()
        if packet is not None:
            frames = [frame for frame in frames if packet.pts not in (None, frame.pts)]
            self._sent.pop(packet.pts or 0, None)
            self._lose(packet, reason)
        if not self._spoils and self._accept(frames) is None:
            self._release()
        self._wait(reason)

    def _wait(self, reason: str) -> None:
        self._held.clear()
        self._lost += [Shown(pts, duration, None, reason) for pts, duration in self._sent.items()]
        self._sent.clear()
        self._waiting = self._damage = self._reason = reason
        self._proving = None

    def _drain(self) -> list[av.VideoFrame]:
        import av

        try:
            return self._context.decode(None)
        except av.FFmpegError:
            return []  # what does not come out is in `_sent`

    def _accept(self, frames: Sequence[av.VideoFrame]) -> str | None:
        """Take decoded pictures in order; ends at the first that is no good, with the reason."""
        from av.video.frame import PictureType

        for frame in frames:
            if frame.pts is None:
                return "a picture without a presentation time"
            if frame.is_corrupt:
                return "a damaged picture"
            if self._proving is not None:
                if frame.pict_type != PictureType.I or self._proving not in (MISSING, frame.pts):
                    return "a key frame needs other pictures"
                self._proving, self._begin = None, frame.pts
            if frame.pts >= self._begin:
                self._held.append(frame)
                if frame.pict_type != PictureType.B or len(self._held) == MOST_B_FRAMES:
                    self._release()
        return None

    def _release(self) -> None:
        for frame in self._held:
            pts = frame.pts or 0
            self._whole.append(Shown(pts, frame.duration or 0, frame))
            self._sent = {sent: duration for sent, duration in self._sent.items() if sent > pts}
        self._held.clear()

    def _lose(self, packet: av.Packet, reason: str) -> None:
        """Its place cannot be read; before the first start, the video has not begun yet."""
        if reason and packet.pts is not None and not packet.is_discard:
            self._lost.append(Shown(packet.pts, packet.duration or 0, None, reason))

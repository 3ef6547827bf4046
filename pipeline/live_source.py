"""A camera or a stream as it comes: one connection to it, and the time of each picture."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from pipeline.streams import DecodeError

if TYPE_CHECKING:
    import av

_DRIFT_S = 5  # by which stamps may differ from the time of arrival and still be believed
_LEAST_STEP = Fraction(1, 1000)
_POLL_S = 0.005
_OPTIONS = {
    "analyzeduration": "1000000",  # microseconds of the stream that are read before its first picture is given
    "fpsprobesize": "0",  # the rate is not needed; pictures that are read to find it out would come late
    "rtsp_flags": "prefer_tcp",  # nothing is lost on the way
}


def is_live(source: str) -> bool:
    """Whether a source is the index of a camera or an address; else it is a file."""
    if source.startswith("file:"):
        return False
    return source.isdecimal() or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def shown_name(source: str) -> str:
    """A source as messages name it: a camera as such, an address without its user and password."""
    return f"camera {source}" if source.isdecimal() else re.sub(r"//[^/]*@", "//", source)


def pictures(source: str, patience_s: float) -> Generator[av.VideoFrame | None, None, None]:
    """Connect, and decode what comes; None stands for a packet, or a little while, without a picture.

    What the decoder marks as damaged, or cannot decode at all, is left out.

    Raises:
        DecodeError: always, where the connection ends: it cannot be made, it breaks or comes to its end, or no
            picture has come for ``patience_s``.
    """
    import av

    name = shown_name(source)
    silence = f"{name} gave no picture for {patience_s:g} s"
    try:
        container = _opened(source, patience_s)
    except av.ExitError:
        raise DecodeError(f"{name} does not answer for {patience_s:g} s") from None
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{name} cannot be opened ({error.strerror})") from None
    with container:
        stream = container.streams.video[0] if container.streams.video else None
        if stream is None or stream.codec_context is None:
            raise DecodeError(f"{name} holds no video that can be decoded")
        stream.thread_type = "SLICE"  # frame threads would hold pictures back
        last = time.monotonic()
        try:
            for packet in _packets(container):
                frames = _decoded(packet, stream)
                if frames:
                    yield from frames
                    last = time.monotonic()
                elif time.monotonic() - last > patience_s:
                    raise DecodeError(silence)
                else:
                    yield None
        except av.ExitError:
            raise DecodeError(silence) from None
        except (av.FFmpegError, OSError) as error:
            raise DecodeError(f"{name} broke off ({error.strerror})") from None
    raise DecodeError(f"{name} ended")


class PictureTimes:
    """The seconds of a live stream's pictures, from the first one on.

    Stamps lead as long as each is later than the one before and the time that they make stays within 5 s of the
    time of arrival, so that a picture that was held up on its way keeps its place. Where a stamp is missing, goes
    back, jumps or falls behind, and at the first picture of a new connection, the time is that of arrival, and
    stamps run on from there. Times always rise.
    """

    def __init__(self) -> None:
        self._time: Fraction | None = None
        self._stamp: Fraction | None = None

    def reconnected(self) -> None:
        """The next picture's stamp has nothing to do with the last one's."""
        self._stamp = None

    def time_of(self, stamp: Fraction | None, arrival_s: float) -> Fraction:
        """Seconds of the next picture.

        Args:
            stamp: its presentation time in seconds, None where the stream tells none.
            arrival_s: when it came, in seconds from when the first one did.
        """
        arrival = Fraction(arrival_s)
        if self._time is None:
            self._time = Fraction(0)
        else:
            step = Fraction(0) if stamp is None or self._stamp is None else stamp - self._stamp
            by_stamp = self._time + step
            if step > 0 and abs(by_stamp - arrival) <= _DRIFT_S:
                self._time = by_stamp
            else:
                self._time = max(arrival, self._time + _LEAST_STEP)
        self._stamp = stamp
        return self._time


def _opened(source: str, patience_s: float) -> av.container.InputContainer:
    """Waits no longer than ``patience_s`` for an answer, and for each packet."""
    import av

    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.PANIC)  # nothing is printed
    format_name, options = None, dict(_OPTIONS)
    if source.isdecimal():
        if sys.platform == "darwin":
            format_name = "avfoundation"
            options["framerate"] = "30"  # FFmpeg's own 29.97 is refused by most cameras
        elif sys.platform == "win32":
            format_name, source = "dshow", f"video={_directshow_name(int(source))}"
        else:
            format_name, source = "v4l2", f"/dev/video{source}"
    return av.open(source, format=format_name, options=options, timeout=patience_s, metadata_errors="replace")


def _directshow_name(index: int) -> str:
    """DirectShow knows cameras by name only."""
    from av.device import enumerate_input_devices

    cameras = [device for device in enumerate_input_devices("dshow") if "video" in device.media_types]
    if index >= len(cameras):
        raise FileNotFoundError(2, f"there are {len(cameras)} cameras, counted from 0")
    return cameras[index].name


def _packets(container: av.container.InputContainer) -> Iterator[av.Packet | None]:
    """All packets, of sound as well, to the end; None while a camera has nothing yet (AVFoundation does not wait)."""
    import av

    while True:
        try:
            yield from container.demux()
            return
        except av.BlockingIOError:
            time.sleep(_POLL_S)
            yield None


def _decoded(packet: av.Packet | None, stream: av.VideoStream) -> list[av.VideoFrame]:
    import av

    if packet is None or packet.stream.index != stream.index:
        return []
    try:
        return [frame for frame in stream.codec_context.decode(packet) if not frame.is_corrupt]
    except av.FFmpegError:
        return []

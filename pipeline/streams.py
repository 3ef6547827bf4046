"""Video files as FFmpeg opens them: the stream, its packets, and what FFmpeg complains about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

Beat = Callable[[], None]


class DecodeError(Exception):
    """A video that cannot be decoded: one sentence with the file and the reason."""


@contextmanager
def video_stream(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file and its first video stream, decoded in one thread.

    Raises:
        DecodeError: the file cannot be opened, or holds no video stream.
    """
    import av

    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.PANIC)  # errors are counted, and nothing is printed
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
        context = stream.codec_context
        if context is None:
            raise DecodeError(f"{path} holds video of an unknown kind")
        if container.format.name == "avi" and context.name in ("h264", "hevc") and context.has_b_frames:
            raise DecodeError(f"{path} keeps no times of its B pictures, as AVI cannot; convert it to mp4")
        stream.thread_type = "SLICE"  # frame threads would hold pictures back and gain nothing per core
        context.thread_count = 1
        yield container, stream


def told_duration(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    """Seconds by the header, None where it tells none."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    return Fraction(container.duration, 1_000_000) if container.duration else None


def loses_silently(container: av.container.InputContainer) -> bool:
    """Whether packets of this container can be lost without a trace: it has no list of them, and no lengths."""
    return container.format.name in ("mpegts", "mpeg")


def cut_off(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream, count: int
) -> str | None:
    """Why a file that gave ``count`` pictures is not whole, where reading to its end was no error; else None."""
    kind = container.format.name
    if kind.startswith("mov") and count < (listed := len(stream.index_entries)):
        return f"it lists {listed} pictures and holds {count}"
    with open(path, "rb") as file:
        head = file.read(64)
        size = file.seek(0, 2)
        file.seek(max(0, size - 204))
        tail = file.read()
    # each packet of a transport stream begins with G and has 188 bytes, with error correction 204
    if kind == "mpegts" and b"G" not in (tail[-188:][:1], tail[:1]):
        return "it ends inside a packet"
    if kind.startswith("matroska") and (whole := _segment_end(head)) and whole > size:
        return f"it tells a size of {whole} bytes and has {size}"
    return None


def _segment_end(head: bytes) -> int:
    """Where the segment, which is all of a Matroska file, ends by its own word; 0 where it does not say."""
    at = head.find(bytes.fromhex("18538067")) + 4
    if not 4 < at < len(head) - 8 or not head[at]:
        return 0
    length = 9 - head[at].bit_length()  # its size is a number whose first 1 tells how many bytes it has
    size = int.from_bytes(head[at : at + length], "big") & (1 << 7 * length) - 1
    return 0 if size == (1 << 7 * length) - 1 else at + length + size


class Rhythm:
    """Finds lost pictures by the beat that they leave out, where nothing else tells of them."""

    _STEADY = 8  # even steps that make a rhythm
    _ROUNDING = 2  # units of 1/90000 s by which even steps differ

    def __init__(self, loses_silently: bool) -> None:
        self.step, self._times, self._on = 0, 0, loses_silently

    def missed(self, step: int) -> bool:
        """Whether a step between two pictures leaves one out: the steps before were even, and this one is longer."""
        if not self._on or abs(step - self.step) <= self._ROUNDING:
            self._times += 1
            return False
        if self._times >= self._STEADY and step > 1.5 * self.step:
            return True
        self.step, self._times = step, 0
        return False


class Complaints:
    """FFmpeg's error messages since they were last asked for.

    FFmpeg often conceals what is broken in a picture and says so in a message only. Messages are counted for the
    whole process: another thread that decodes at the same time may be blamed on this one, never overlooked.
    """

    def __init__(self) -> None:
        self._count = 0
        self.new()

    def new(self, harmless: tuple[str, ...] = ()) -> str | None:
        """The last message, if there is one that matters.

        Args:
            harmless: how messages begin that do not; one about a malformed remark beside the picture (SEI) never does.
        """
        import av

        count, last = av.logging.get_last_error()
        if count == self._count:
            return None
        few, self._count = count <= self._count + 2, count  # only the last of many is known
        message = str(last[2]).strip() if last else "an error without a message"
        return None if few and message.startswith(("SEI ", *harmless)) else message

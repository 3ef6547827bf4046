"""The process that decodes: videos come in as messages, resized frames go out in shared memory.

It is started by `pipeline.feed`, talks to it in short JSON messages, and imports no torch unless resizing needs it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import DecodeError, TickFrame, tick_frames
from pipeline.preprocess import Preprocessor
from pipeline.stills import is_picture, picture_ticks
from schemas.clock import Clock
from schemas.errors import UserError

if TYPE_CHECKING:
    from schemas.shards import Decoder

MOST_BYTES = 4 << 30
"""Memory of one worker, shared memory apart: enough for 8K video, and a header that claims more is no danger."""

_STDERR = 2


@dataclass(frozen=True)
class VideoTask:
    """One video or picture to decode: ticks 0 to ``last_tick``, or to its end where that comes first.

    ``number`` is what events call it by; ``uri`` a local path, or several as `schemas.records.joined_uri` names them;
    ``rotation_deg`` counter-clockwise; ``marks`` what is drawn on a picture, one a tick.
    """

    number: int
    uri: str
    rotation_deg: int
    last_tick: int
    decoder: Decoder = "pyav"
    marks: list[list[float]] | None = None

    @classmethod
    def of(cls, number: int, uri: str, row: Mapping[str, Any], decoder: Decoder) -> VideoTask:
        """Of a row of the table ``videos`` whose file lies at ``uri``; a picture is no decoder's matter."""
        task = cls(number, uri, row["rotation_deg"], row["last_tick_needed"], decoder, row["marks"])
        return replace(task, decoder="pyav") if task.is_picture else task

    @property
    def is_picture(self) -> bool:
        return self.marks is not None or is_picture(self.uri)


@dataclass(frozen=True)
class RingShape:
    """``blocks`` blocks of ``block_frames`` frames, each uint8 ``[side, side, 3]``."""

    blocks: int
    block_frames: int
    side: int


class Ring:
    """Blocks of frames in memory that a worker and its parent share.

    Attributes:
        images: uint8 ``[blocks, block_frames, side, side, 3]``.
        pts: float64 ``[blocks, block_frames]``, seconds, NaN for a tick that cannot be read.
        beats: uint64 ``[1]``, moves while the worker makes progress.
    """

    def __init__(self, descriptor: int, shape: RingShape) -> None:
        frames = (shape.blocks, shape.block_frames)
        picture = (shape.side, shape.side, 3)
        times = 64  # each part on cache lines of its own
        images = times + -(-8 * frames[0] * frames[1] // 64) * 64
        size = images + frames[0] * frames[1] * shape.side * shape.side * 3
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        self.beats = np.frombuffer(memory, np.uint64, 1, 0)
        self.pts: NDArray[np.float64] = np.ndarray(frames, np.float64, memory, times)
        self.images: NDArray[np.uint8] = np.ndarray(frames + picture, np.uint8, memory, images)


def send(connection: Connection, **message: Any) -> None:
    """One message, without waiting: they are short, and few are on their way at a time."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """The next message.

    Raises:
        EOFError, OSError: the process at the other end is gone.
    """
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


def main(settings: str) -> None:
    """Decode one video after the other until the parent is gone.

    Args:
        settings: JSON with the descriptors ``connection``, ``memory`` and ``lifeline``, the ring's ``shape``, the
            ``preprocessor`` and ``tick_hz``.
    """
    given = json.loads(settings)
    _end_with(given["lifeline"])
    _limit_memory()
    ring = Ring(given["memory"], RingShape(**given["shape"]))
    connection = Connection(given["connection"])
    worker = _Worker(ring, connection, Preprocessor(**given["preprocessor"]), Clock(given["tick_hz"]))
    worker.run()


def _end_with(lifeline: int) -> None:
    """Let the kernel end this process when the other end of a pipe, to which nobody writes, is closed.

    A thread that waits for it would not do: a decoder that hangs may hold the interpreter's lock.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(
        lifeline, fcntl.F_SETFL, os.O_ASYNC
    )  # the signal is SIGIO, which ends what does not handle it
    poll = select.poll()
    poll.register(lifeline)
    if poll.poll(0):  # it was closed before
        os._exit(1)


def _limit_memory() -> None:
    """A video that asks for too much fails alone; and where memory runs out all the same, this process goes first."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with suppress(OSError):  # a sandbox may not let it
        Path("/proc/self/oom_score_adj").write_text("500")


class _Worker:
    def __init__(self, ring: Ring, connection: Connection, preprocessor: Preprocessor, clock: Clock) -> None:
        self._ring, self._connection = ring, connection
        self._preprocessor, self._clock = preprocessor, clock
        self._free = list(range(len(ring.images)))
        self._beats = 0

    def run(self) -> None:
        self._send(kind="ready")
        while True:
            message = self._receive()
            if message["kind"] == "free":
                self._free.append(message["block"])
                continue
            os.ftruncate(_STDERR, 0)  # what was said about an earlier video
            self._beat()
            task = VideoTask(**message["task"])
            try:
                self._decode(task)
            except DecodeError as error:
                self._send(kind="failed", reason=str(error))
            except UserError as error:
                self._send(kind="mistake", reason=str(error))
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self._send(kind="broken", reason=f"{task.uri}: {text}")
                return  # a fresh process is sure to have nothing left of what went wrong

    def _decode(self, task: VideoTask) -> None:
        unreadable: list[tuple[int, int, str]] = []
        notes: list[str] = []
        blocks = _Blocks(self._ring, self._take_block, self._send)
        try:
            for frame in self._frames(task, unreadable, notes):
                if frame.tick < blocks.ticks:
                    raise RuntimeError(f"tick {frame.tick} came after tick {blocks.ticks - 1}")
                blocks.add_unreadable(until=frame.tick)
                blocks.add(self._preprocessor.resize(frame.image), frame.pts_s)
                self._beat()
        except DecodeError:
            blocks.flush()  # a block that is begun is given back by who gets it
            raise
        blocks.add_unreadable(until=max((end for _, end, _ in unreadable), default=0))
        blocks.flush()
        if blocks.unreadable != sum(end - first for first, end, _ in unreadable):
            raise RuntimeError(
                f"{blocks.unreadable} ticks did not come; those said to be unreadable are {unreadable}"
            )
        self._send(kind="ended", ticks=blocks.ticks, unreadable=unreadable, notes=notes)

    def _frames(
        self, task: VideoTask, unreadable: list[tuple[int, int, str]], notes: list[str]
    ) -> Iterator[TickFrame]:
        """The video's frames; ``unreadable`` and ``notes`` grow as they come."""

        def on_damage(first: int, end: int, reason: str) -> None:
            unreadable.append((first, end, reason))
            self._beat()

        if task.is_picture:
            return picture_ticks(task.uri, self._clock, task.last_tick, task.rotation_deg, task.marks)
        if task.decoder == "decord":
            from pipeline.decord_frames import decord_tick_frames, why_not_decord

            refused = why_not_decord(task.uri, self._beat)
            if refused is None:
                return decord_tick_frames(
                    task.uri, self._clock, task.last_tick, task.rotation_deg, self._beat
                )
            notes.append(f"decord refused ({refused}): decoded with PyAV")
        return tick_frames(
            task.uri, self._clock, task.last_tick, task.rotation_deg, on_damage=on_damage, beat=self._beat
        )

    def _beat(self) -> None:
        self._beats += 1
        self._ring.beats[0] = self._beats

    def _take_block(self) -> int:
        """A block that the parent does not hold; waits for one."""
        while not self._free:
            self._free.append(self._receive()["block"])
            self._beat()
        return self._free.pop()

    def _send(self, **message: Any) -> None:
        try:
            send(self._connection, **message)
        except OSError:
            raise SystemExit(1) from None  # the parent is gone

    def _receive(self) -> dict[str, Any]:
        try:
            return receive(self._connection)
        except (EOFError, OSError):
            raise SystemExit(1) from None  # the parent is gone


class _Blocks:
    """Fills blocks of a ring with one video's consecutive ticks; a block is handed over when it is full."""

    def __init__(self, ring: Ring, take_block: Callable[[], int], send: Callable[..., None]) -> None:
        self._ring, self._take_block, self._send = ring, take_block, send
        self._block, self._filled = 0, 0
        self.ticks = 0
        self.unreadable = 0  # of them

    def add(self, image: NDArray[np.uint8] | int, pts_s: float) -> None:
        """The next tick."""
        if self._filled == 0:
            self._block = self._take_block()
        self._ring.images[self._block, self._filled] = image
        self._ring.pts[self._block, self._filled] = pts_s
        self._filled += 1
        self.ticks += 1
        if self._filled == self._ring.images.shape[1]:
            self.flush()

    def add_unreadable(self, until: int) -> None:
        """The ticks up to that one, which is not among them."""
        while self.ticks < until:
            self.add(0, float("nan"))
            self.unreadable += 1

    def flush(self) -> None:
        """Hand over what is there."""
        if self._filled:
            self._send(kind="frames", block=self._block, first=self.ticks - self._filled, count=self._filled)
            self._filled = 0

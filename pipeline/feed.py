"""Frames from decode worker processes: one video a worker, pixels in shared memory, trouble as an event of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from numpy.typing import NDArray

from pipeline.decode_process import DecodeProcess
from pipeline.decode_worker import RingShape, VideoTask
from pipeline.preprocess import Preprocessor
from schemas.clock import Clock
from schemas.errors import UserError

_LOOK_S = 1.0  # seconds between two looks at whether the workers make progress


@dataclass(frozen=True)
class Frames:
    """Consecutive ticks of a video; those of one video come in order from 0 on, each once.

    ``images`` are uint8 ``[n, side, side, 3]``, a view that is valid until the next event is asked for; ``pts`` float64
    ``[n]`` in seconds. A tick that cannot be read is a zero image with pts NaN.
    """

    number: int
    first_tick: int
    images: NDArray[np.uint8]
    pts: NDArray[np.float64]


@dataclass(frozen=True)
class Ended:
    """A video is done: how many ticks came, and which of them are unreadable: ``[first, end)`` and why.

    An empty run tells why a video breaks off there. ``notes`` say what was done otherwise than asked for.
    """

    number: int
    ticks: int
    unreadable: list[tuple[int, int, str]]
    notes: list[str]


@dataclass(frozen=True)
class Failed:
    """A video cannot be decoded; the frames that came of it are not to be used."""

    number: int
    reason: str


@dataclass(frozen=True)
class Restarted:
    """A video begins again with another decoder: drop what came of it, all its ticks come again from 0 on."""

    number: int


Event = Frames | Ended | Failed | Restarted


class Feed:
    """Decodes several videos at once in processes of their own and hands over their frames as they come.

    The processes start when there is work for them and end with the feed, or with this process however it ends.
    Each is at most ``blocks`` blocks of ``block_frames`` frames (of fewer, where they are cut into tiles) ahead of the
    consumer. A video that makes no progress
    for ``limit_s`` seconds, or ends its process, fails alone: a fresh process takes the next one.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        clock: Clock,
        workers: int,
        limit_s: float,
        block_frames: int = 8,
        blocks: int = 4,
    ) -> None:
        # as much memory whatever the size of a frame, as far as that goes
        shape = RingShape(blocks, max(1, block_frames // preprocessor.tiles**2), preprocessor.side)
        settings = {
            "preprocessor": dataclasses.asdict(preprocessor),
            "tick_hz": clock.tick_hz,
            "shape": dataclasses.asdict(shape),
        }
        self._limit_s = limit_s
        self._workers = [DecodeProcess(shape, settings, limit_s) for _ in range(workers)]

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def events(self, tasks: Iterator[VideoTask]) -> Iterator[Event]:
        """What comes of the videos, until all are done. Events of different videos interleave.

        A task is taken when a worker is free for it, so what comes next can be decided late.

        Raises:
            UserError: the processes cannot start, or decord is asked for and not installed.
        """
        more = True
        try:
            while True:
                while more and (free := next((w for w in self._workers if w.task is None), None)):
                    task = next(tasks, None)
                    more = task is not None
                    if task is not None:
                        free.begin(task)
                busy = [worker for worker in self._workers if worker.task is not None]
                if not busy:
                    return
                yield from self._next_events(busy)
        finally:
            for worker in self._workers:
                if worker.task is not None:  # the consumer went away
                    worker.stop()

    def _next_events(self, busy: list[DecodeProcess]) -> Iterator[Event]:
        """Those of the worker that was heard of longest ago; none when no worker has news for a while."""
        connections = wait([worker.connection for worker in busy], min(_LOOK_S, self._limit_s / 8))
        news = [worker for worker in busy if worker.connection in connections]
        if news:
            yield from self._heed(min(news, key=lambda worker: worker.heard))
        for worker in busy:
            if worker not in news and worker.is_stuck():
                yield from self._replace(worker, f"no progress for {self._limit_s:g} s: stopped")

    def _heed(self, worker: DecodeProcess) -> Iterator[Event]:
        assert worker.task is not None
        task, number = worker.task, worker.task.number
        try:
            message = worker.receive()
        except (EOFError, OSError):
            yield from self._replace(worker, f"the decoding process ended with {worker.how_it_ended()}")
            return
        match message["kind"]:
            case "ready":
                worker.ready = True
            case "frames":
                block, count = message["block"], message["count"]
                images, pts = worker.ring.images[block, :count], worker.ring.pts[block, :count].copy()
                yield Frames(number, message["first"], images, pts)
                worker.free(block)
            case "ended":
                unreadable = [(first, end, reason) for first, end, reason in message["unreadable"]]
                worker.task = None
                yield Ended(number, message["ticks"], unreadable, worker.notes + message["notes"])
            case "mistake":
                raise UserError(message["reason"])
            case "failed":
                yield from self._fail(worker, task, message["reason"])
            case "broken":
                worker.stop()
                yield from self._fail(worker, task, message["reason"])

    def _replace(self, worker: DecodeProcess, reason: str) -> Iterator[Event]:
        """Of a process that is of no more use. One that cannot even start would fail all videos one by one."""
        assert worker.task is not None
        task, cannot_start = worker.task, worker.cannot_start
        worker.stop()
        if cannot_start:
            raise UserError(f"the decoding processes cannot start ({reason}); install dst again")
        yield from self._fail(worker, task, f"{task.uri}: {reason}")

    def _fail(self, worker: DecodeProcess, task: VideoTask, reason: str) -> Iterator[Event]:
        """What decord cannot do goes to PyAV, which decodes more and tolerates damage."""
        worker.task = None
        if task.decoder == "decord":
            yield Restarted(task.number)
            note = f"decord failed ({reason}): decoded with PyAV"
            worker.begin(dataclasses.replace(task, decoder="pyav"), note)
        else:
            yield Failed(task.number, reason)

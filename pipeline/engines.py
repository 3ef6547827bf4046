"""Where encoders run: in this process, in a process a GPU, or in an actor a GPU of a Ray cluster.

All three pull shards from one plan and make each alone, so the files are the same whichever made them.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from pipeline.encode import EncoderSpec, Job, Progress, make_vision_shards
from pipeline.spool import Made
from pipeline.todo import VisionWork
from pipeline.vision import VisionEncoder
from pipeline.workers import end_with_parent
from schemas.errors import UserError
from schemas.shards import ComputeType


@dataclass(frozen=True)
class Described:
    """What of a fingerprint the encoder decides."""

    model: str
    vision_sha256: str
    preprocessing: dict[str, int | float | str | list[float]]
    compute: ComputeType
    tokens_per_frame: int
    dim: int
    tiles: int

    @classmethod
    def of(cls, encoder: VisionEncoder) -> Described:
        return cls(
            encoder.name,
            encoder.sha256,
            encoder.preprocessor.fingerprint(),
            encoder.compute,
            encoder.tokens_per_frame,
            encoder.dim,
            encoder.preprocessor.tiles,
        )


class Engine(Protocol):
    """One or more loaded encoders. Use it as a context manager."""

    described: Described
    encoders: int

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, job: Job, works: Sequence[VisionWork]) -> Generator[Made | Progress, None, None]:
        """Make the shards. Nothing is written any more once the generator is closed or has raised.

        Raises:
            UserError: features that cannot be kept, or an encoder's process that died.
            OSError: no room, or no right, to write.
        """
        ...


class Here:
    """One encoder, in this process."""

    encoders = 1

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder, self.described = encoder, Described.of(encoder)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, job: Job, works: Sequence[VisionWork]) -> Generator[Made | Progress, None, None]:
        return make_vision_shards(self.encoder, job, works)


class Processes:
    """One encoder a device, each in a process of its own.

    Raises:
        UserError: the encoder cannot be loaded, or devices that would compute in different types.
    """

    def __init__(self, spec: EncoderSpec, devices: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.encoders = len(devices)
        self._processes = []
        self._pipes: list[Connection] = []
        try:
            for device in devices:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, spec, device), daemon=False)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self.described = all_equal([self._receive(pipe) for pipe in self._pipes], spec.compute)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, job: Job, works: Sequence[VisionWork]) -> Generator[Made | Progress, None, None]:
        waiting = iter(works)
        at_work = list(self._pipes)
        try:
            for pipe in at_work:
                _send(pipe, job)
            while at_work:
                ready = wait(at_work)
                for pipe in [pipe for pipe in at_work if pipe in ready]:
                    told = self._receive(pipe)
                    if told == _NEXT:
                        _send(pipe, next(waiting, None))
                    elif told == _DONE:
                        at_work.remove(pipe)
                    else:
                        yield told
        finally:
            if at_work:
                self._end()

    def _receive(self, pipe: Connection) -> Any:
        """What a process tells; an exception it tells is raised here."""
        try:
            told = pipe.recv()
        except (EOFError, OSError):
            process = self._processes[self._pipes.index(pipe)]
            process.join()
            raise UserError(
                f"the encoder's process {process.pid} ended with exit code {process.exitcode}, mostly for want of "
                "memory; run again with a smaller --batch-size, finished shards are kept"
            ) from None
        if isinstance(told, Exception):
            raise told
        return told

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()


_NEXT, _DONE = "next", "done"


def _serve(pipe: Connection, spec: EncoderSpec, device: str) -> None:
    """One encoder's process: load, tell what it is, make shards until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that started this one
    end_with_parent()
    try:
        encoder = spec.load(device)
        pipe.send(Described.of(encoder))
        job = pipe.recv()
        for news in make_vision_shards(encoder, job, iter(lambda: _asked(pipe), None)):
            pipe.send(news)
        pipe.send(_DONE)
    except (EOFError, ConnectionError):
        pass  # the run has ended
    except (UserError, OSError) as error:
        _send(pipe, error)


def _send(pipe: Connection, what: Any) -> None:
    with suppress(ConnectionError):  # that the other process has ended is seen when something is read from it
        pipe.send(what)


def _asked(pipe: Connection) -> VisionWork | None:
    pipe.send(_NEXT)
    work: VisionWork | None = pipe.recv()
    return work


def all_equal(described: Sequence[Described], compute: str | None) -> Described:
    """What all encoders agree on.

    Raises:
        UserError: they do not.
    """
    differing = sorted({each.compute for each in described})
    if len(differing) > 1 and compute is None:
        raise UserError(
            f"these devices would compute in {' and '.join(differing)}, and a cache holds one kind; "
            "choose with --compute"
        )
    if any(each != described[0] for each in described):
        raise UserError("the encoders loaded different checkpoints; give each the same --model folder")
    return described[0]

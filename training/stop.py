"""A request to stop that waits for a place where a run can be saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_REQUEST_S = 2.0
"""A launcher passes on what a scheduler or a terminal has told each process already: that is no second request."""


class Stopped(Exception):
    """A signal asked for it; all is saved.

    Attributes:
        signal: its number.
        step: steps that are done.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.signal, self.step = signal, step


class Interrupted(Exception):
    """A signal asked for it, here or on another rank, in the middle of what can be done again."""


class StopRequest:
    """While entered, SIGTERM and Ctrl-C are noted in ``signal`` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.signal is not None:
            raise Interrupted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def children_that_stay() -> Iterator[None]:
    """Processes started inside do not hear SIGTERM and Ctrl-C, which whole process groups get: they serve the step
    that is still to be done. They end with their parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

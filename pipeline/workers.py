"""Work on many items in several processes, with results in order and only a few of them in memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from types import FrameType
from typing import Any, TypeVar

from schemas.errors import UserError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use: what a cluster's job was given, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_AHEAD = 2  # items a process may be ahead of the one whose result is awaited
_shared: Any = None


def in_order(
    work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """``work(shared, item)`` of every item, in order. Close it when not all are taken: its processes end then.

    Args:
        work: a function of a module.
        shared: goes to each process once.
        workers: processes; 1 works in this one.
    """
    if workers == 1:
        yield from (work(shared, item) for item in items)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(shared,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _interrupts_held_back():  # a process that is started now will not see them
                pending.append(pool.submit(_run, work, item))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process was killed from outside, mostly for want of memory; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; only the one that started the others is to answer it.

    A process that is started here inherits the mask and does not see them. Other threads of this one still may, and
    Python then answers in the main thread: so its answer waits too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    answer = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, answer)
        if waiting and callable(answer):
            answer(*waiting[0])


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    end_with_parent()


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended: one that was killed cannot tell."""
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(work: Callable[[Any, Item], Result], item: Item) -> Result:
    return work(_shared, item)

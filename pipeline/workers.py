"""Work on many items in several processes, with results in order and only a few of them in memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

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
            pending.append(pool.submit(_run, work, item))
            if len(pending) > _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(work: Callable[[Any, Item], Result], item: Item) -> Result:
    return work(_shared, item)

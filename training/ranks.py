"""Work that the processes of a run share, and what comes of it on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from training.stop import Interrupted

T = TypeVar("T")


def dealt(items: Sequence[T], accelerator: Accelerator) -> Sequence[T]:
    """This process's share of the items, which are dealt out one by one."""
    return items[accelerator.process_index :: accelerator.num_processes]


def from_all(accelerator: Accelerator, compute: Callable[[], T]) -> list[T]:
    """What each process computes, by rank, in the precision of training.

    Raises:
        Interrupted: one of them was.
    """
    try:
        with accelerator.autocast():
            found = [compute()]
    except Interrupted:
        found = []
    if accelerator.num_processes > 1:
        found = gather_object(found)
    if len(found) < accelerator.num_processes:
        raise Interrupted
    return found


def in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """What was `dealt` out, in its own order."""
    return [share[at] for at in range(len(shares[0])) for share in shares if at < len(share)]

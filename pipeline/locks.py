"""Who may write to a cache: one run alone, or all parts of one array job, each once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from schemas.errors import UserError

_NOT_OFFERED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_PATIENCE_S = (
    1.0  # another run's look at who holds a lock, or a kill that is under way, may hold it for a moment
)


def _machine() -> str:
    """Equal where process ids can be compared: the same system since its start, and the same container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return platform.node()


MACHINE = _machine()
"""Names this computer (this container, this boot of it) among all."""


def is_running(process: int) -> bool:
    """Whether there is a process of that id here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def this_run() -> str:
    """What a lock tells about its holder: JSON."""
    return json.dumps(
        {
            "host": platform.node(),
            "machine": MACHINE,
            "process": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
    )


def is_dead(text: str) -> bool:
    """Whether a lock's holder is known to run no more; of another computer that cannot be known."""
    try:
        holder = json.loads(text)
        return bool(holder["machine"] == MACHINE) and not is_running(holder["process"])
    except (ValueError, KeyError):
        return False


def refusal(url: str, text: str | None, or_else: str = "") -> UserError:
    """The error of a run that comes second; ``text`` is what the lock of the first one holds."""
    try:
        holder = json.loads(text or "")
        who = "process {process} on {host} since {since} ({command})".format(**holder)
    except (ValueError, KeyError):  # it has just begun, or ended
        who = "a process that has not said more yet"
    return UserError(f"another run is writing {url}: {who}; wait until it is done, or stop it{or_else}")


def lock_name(part: int, of: int) -> str:
    """``.lock`` of a run alone, ``.lock-3-of-8`` of one part of an array job."""
    return ".lock" if of == 1 else f".lock-{part}-of-{of}"


def go_together(one: str, other: str) -> bool:
    """Whether two runs, given by their locks' names, may write at once: two parts of one array job."""
    cut, other_cut = one.partition("-of-")[2], other.partition("-of-")[2]
    return one != other and cut == other_cut != ""


@contextmanager
def folder_lock(folder: Path, part: int, of: int, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a local folder. The kernel frees what a killed process held. Yields whether no other run is there.

    Args:
        say: told in one sentence when the file system has no locks; the run then goes on without.

    Raises:
        UserError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        is_alone = False
        try:
            is_alone = _take(folder, part, of, held)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            say(f"{folder} lies on a file system without locks ({error.strerror}): run one at a time on it")
        yield is_alone


def _take(folder: Path, part: int, of: int, held: ExitStack) -> bool:
    """Parts of an array job share ``.lock`` and have one of their own each; a run alone has ``.lock`` for itself."""
    alone = folder / lock_name(0, 1)
    if of == 1:
        if not _hold(alone, fcntl.LOCK_EX, held):
            raise refusal(str(folder), _holder([alone, *folder.glob(".lock-*")]))
        return True
    if not _hold(alone, fcntl.LOCK_SH, held):
        raise refusal(str(folder), _holder([alone]))
    own = folder / lock_name(part, of)
    if not _hold(own, fcntl.LOCK_EX, held):
        raise refusal(str(folder), _holder([own]))
    others = [path for path in folder.glob(".lock-*") if path != own]
    rival = _holder(path for path in others if not go_together(own.name, path.name))
    if rival is not None:
        raise refusal(str(folder), rival)
    return _holder(others) is None


def _hold(path: Path, kind: int, held: ExitStack) -> bool:
    """Lock a file until ``held`` is closed, and say in it who we are; False where another process has it."""
    file = held.enter_context(path.open("a+", encoding="utf-8"))
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    file.truncate(0)
    if kind == fcntl.LOCK_EX:
        file.write(this_run())
        file.flush()
        held.callback(file.truncate, 0)
    return True


def _holder(paths: Iterable[Path]) -> str | None:
    """What the first lock that is held says of its holder; None where none is."""
    for path in paths:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                return file.read()
    return None

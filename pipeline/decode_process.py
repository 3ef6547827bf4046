"""A decoding process as its parent sees it: started when there is work, watched, and replaced when it ends."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from pipeline.decode_worker import Ring, RingShape, VideoTask, receive, send

_PROGRAM = "from pipeline.decode_worker import main; main(sys.argv[1])"
_START_S = 60.0  # seconds a process may take to start, from a slow disk
_REAP_S = 5.0  # seconds for a killed process to end; one that waits for a dead file server may not


class DecodeProcess:
    """One place for a decoding process, and the memory that it shares with its parent."""

    def __init__(self, shape: RingShape, settings: dict[str, Any], limit_s: float) -> None:
        self.task: VideoTask | None = None
        self.notes: list[str] = []
        self.ready = False  # whether the process did start
        self.heard = 0.0  # when its last message was read
        self._settings, self._limit_s = settings, limit_s
        self._memory = os.memfd_create("dst-frames")  # leaves no name behind, and does not need /dev/shm
        self._output = os.memfd_create("dst-decode-output")
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)
        self.ring = Ring(self._memory, shape)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lifeline: int | None = None
        self._beats, self._looked, self._still_s = -1, 0.0, 0.0

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    @property
    def cannot_start(self) -> bool:
        """Whether the process ended of itself before it could be given work."""
        assert self._process is not None
        return not self.ready and (self._process.returncode or 0) > 0

    def begin(self, task: VideoTask, *notes: str) -> None:
        """Give it a video. ``notes`` are told when the video ends."""
        if self._process is not None and self._process.poll() is not None:
            self.stop()  # something ended it while it had nothing to do
        if self._process is None:
            self._start()
        self.task, self.notes = task, list(notes)
        self._beats, self._looked, self._still_s = -1, monotonic(), 0.0
        self._send(kind="task", task=dataclasses.asdict(task))

    def free(self, block: int) -> None:
        """Give a block back."""
        self._send(kind="free", block=block)

    def receive(self) -> dict[str, Any]:
        """Its next message.

        Raises:
            EOFError, OSError: the process ended.
        """
        self.heard = monotonic()
        return receive(self.connection)

    def is_stuck(self) -> bool:
        """Whether nothing moved for ``limit_s`` seconds. To be asked when all its messages are read and answered.

        So it has a free block, and whatever it waits for is not its parent. A long time between two looks counts as
        a quarter of the limit at most: this process may have been suspended.
        """
        limit = self._limit_s if self.ready else max(self._limit_s, _START_S)
        now, beats = monotonic(), int(self.ring.beats[0])
        if beats != self._beats:
            self._still_s = 0.0
        else:
            self._still_s += min(now - self._looked, limit / 4)
        self._looked, self._beats = now, beats
        return self._still_s >= limit

    def how_it_ended(self) -> str:
        """How a process that closed its connection ended, with the last line it wrote."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        status = self._process.returncode
        if status is None:
            how = "a closed connection"
        elif status < 0:
            how = f"signal {-status} ({signal.Signals(-status).name})"
        else:
            how = f"exit status {status}"
        size = os.fstat(self._output).st_size
        lines = os.pread(self._output, 4096, max(0, size - 4096)).decode(errors="replace").split("\n")
        written = [" ".join(line.split()) for line in lines if line.strip()]
        return f"{how}: {written[-1]}" if written else how

    def stop(self) -> None:
        """End the process, where there is one; the next video gets a fresh one."""
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_REAP_S)
        if self._lifeline is not None:
            os.close(self._lifeline)
        if self._connection is not None:
            self._connection.close()
        self._process = self._lifeline = self._connection = self.task = None
        self.ready = False

    def close(self) -> None:
        """End the process and let go of the memory, which is freed with the last view of it."""
        self.stop()
        os.close(self._memory)
        os.close(self._output)
        del self.ring

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        read, self._lifeline = os.pipe()  # closed by the kernel too, when this process is killed
        settings = {
            **self._settings,
            "connection": theirs.fileno(),
            "memory": self._memory,
            "lifeline": read,
        }
        os.ftruncate(self._output, 0)
        program = f"import sys; sys.path[:] = {sys.path!r}; {_PROGRAM}"
        with ours, theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program, json.dumps(settings)],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    pass_fds=(theirs.fileno(), self._memory, read),
                    process_group=0,  # Ctrl-C is this process' to answer
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            finally:
                os.close(read)
            self._connection = Connection(ours.detach())

    def _send(self, **message: Any) -> None:
        with suppress(OSError):  # that the process ended is seen when its next message is read
            send(self.connection, **message)

"""What tests of a cache's life need: tiny videos with labels, runs in processes that can be killed, what they leave."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow as pa

from pipeline.cache import Summary, cache_features
from pipeline.engines import Here
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.tables import TABLES, LabelWriter

RATE = 4
"""Frames a second of a clip; ticks come at 2 Hz."""


def write_clip(path: Path, ticks: int, seed: int) -> Path:
    """A video of that many ticks at 2 Hz, each frame another picture."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"preset": "ultrafast", "threads": "1"}
        for _ in range(ticks * RATE // 2):
            blocks = rng.integers(0, 256, (4, 6, 3), np.uint8)
            picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class Video:
    """A video and the sessions on it: id, first tick, number of ticks."""

    id: str
    path: Path
    ticks: int
    sessions: tuple[tuple[str, int, int], ...]
    rotation_deg: int = 0

    def needing(self, ticks: int) -> Video:
        """The same video, with one session on its first ticks."""
        return replace(self, ticks=ticks, sessions=((f"{self.id}/all", 0, ticks),))

    def at(self, path: Path) -> Video:
        return replace(self, path=path)


def make_video(folder: Path, name: str, ticks: int, seed: int) -> Video:
    """A new clip with two sessions that overlap."""
    path = write_clip(folder / f"{name}.mp4", ticks, seed)
    half = ticks // 2
    return Video(name, path, ticks, ((f"{name}/early", 0, half + 1), (f"{name}/late", half, ticks - half)))


def write_tables(
    folder: Path,
    videos: Sequence[Video],
    word: str = "Well done.",
    source: str = "little",
    tick_hz: float = 2.0,
) -> Path:
    """Label tables of these videos under ``folder``, in place of those that were there; each session says one word."""
    with LabelWriter(folder / source) as writer:
        for video in videos:
            for session_id, first, count in video.sessions:
                frames = [
                    {
                        "session_id": session_id,
                        "split": "train",
                        "tick": tick,
                        "t_s": tick / 2,
                        "speak": tick == first,
                        "response": word if tick == first else None,
                        "dst_update": tick == first,
                        "dst_state": [1],
                        "transitions": [int(tick == first)],
                        "mistake": None,
                    }
                    for tick in range(first, first + count)
                ]
                session = {
                    "session_id": session_id,
                    "video_id": video.id,
                    "source": source,
                    "split": "train",
                    "goal": "Stir",
                    "first_tick": first,
                    "num_ticks": count,
                    "tick_hz": tick_hz,
                    "num_steps": 1,
                    "dialog_origin": "human",
                }
                spans = [{"start_s": first / 2, "end_s": (first + count) / 2}]
                step = {"session_id": session_id, "step": 0, "step_id": "S", "name": "stir", "spans": spans}
                turn = {
                    "session_id": session_id,
                    "turn": 0,
                    "tick": first,
                    "t_s": first / 2,
                    "role": "assistant",
                    "text": word,
                    "labels": [],
                }
                table = pa.Table.from_pylist(frames, schema=TABLES["frames"])
                writer.add_session(session, video.id, [step], [turn], table)
        writer.add_videos(
            {
                "video_id": video.id,
                "source": source,
                "recording_id": video.id,
                "uri": str(video.path),
                "rotation_deg": video.rotation_deg,
                "last_tick_needed": video.ticks - 1,
            }
            for video in videos
        )
    return folder


def options(ticks: int = 64, **others: Any) -> CacheOptions:
    """Of shards of at most so many ticks of the tiny model, with videos decoded two at a time."""
    bytes_of_tick = 4 * (128 + 4 if others.get("dtype") == "int8" else 128 * 2)
    size: Any = ticks * bytes_of_tick / 1e6
    return CacheOptions(**({"shard_mb": size, "workers": 2} | others))


def run(labels: Path, out: Path, encoder: VisionEncoder, ticks: int = 64, **others: Any) -> Summary:
    return cache_features(labels, out, Here(encoder), options(ticks, **others))


def files(folder: Path) -> dict[str, str]:
    """Hashes of all files in a cache, but of its locks. Whatever lies in its folder for work is among them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not re.fullmatch(r"\.lock(-\d+-of-\d+)?", name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.parent.name == ".work":
            found[name] = "a folder"
    return found


def finished_are_whole(folder: Path) -> None:
    """What the ledger tells is there as it tells it, or not at all."""
    there = files(folder)
    for path in (folder / "ledger").glob("*"):
        entry = json.loads(path.read_text())
        assert there.get(entry["file"], entry["sha256"]) == entry["sha256"]


def vision_files(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in files(folder).items() if name.startswith("vision-")}


# ---- runs in processes of their own

_PRELOADED = [
    "cli",
    "pipeline.cache",
    "pipeline.engines",
    "transformers.models.smolvlm.modeling_smolvlm",
    "h5py",
]


def start(function: Callable[..., Any], *args: Any, output: Path) -> BaseProcess:
    """Call a function in a new process, in a session of its own, that need not import torch anew.

    Its standard output and error go to ``output``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_called, args=(function, args, output), daemon=False)
    process.start()
    return process


def _called(function: Callable[..., Any], args: tuple[Any, ...], output: Path) -> None:
    os.setsid()
    sys.stdout.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()  # as at the end of a program, which a process of this kind leaves out


def ended(process: BaseProcess, limit_s: float = 120) -> int:
    """Its exit status, once it has ended."""
    process.join(limit_s)
    assert process.exitcode is not None
    return process.exitcode


def dst(*args: str) -> None:
    """The command line, as the program calls it."""
    import cli

    sys.argv = ["dst", *args]
    cli.app()


def family(process: BaseProcess) -> list[psutil.Process]:
    """The processes that it started, and theirs."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def decoders() -> list[psutil.Process]:
    """The decode processes that this one has."""
    return [each for each in psutil.Process().children() if "decode_worker" in " ".join(each.cmdline())]


def kill(process: BaseProcess, whole_group: bool) -> None:
    """SIGKILL, to it alone or to its process group; nothing that it started lives on."""
    assert process.pid is not None
    children = family(process)
    with suppress(ProcessLookupError):  # it has just ended, or has no group of its own yet
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    ended(process)
    assert psutil.wait_procs(children, timeout=20)[1] == []


@contextmanager
def waited_for(fifo: Path) -> Iterator[None]:
    """Until somebody reads from the pipe, and then keep it open without writing to it."""
    writer = os.open(fifo, os.O_WRONLY)
    try:
        yield
    finally:
        os.close(writer)


# ---- trouble at an exact step

_STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def at_step(number: int, folder: Path, act: Callable[[str], None]) -> list[int]:
    """From the n-th step on with which this process changes a folder's files, act just before each, with its kind.

    Returns:
        A list whose one number counts the steps.
    """
    done = [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        for_writing = event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        inside = isinstance(args[0], str | Path) and str(args[0]).startswith(f"{folder}/") if args else False
        if inside and (for_writing or event in _STEPS):
            done[0] += 1
            if done[0] >= number:
                act(event)

    sys.addaudithook(watch)
    return done


def before_rename_to(path: Path, act: Callable[[str], None]) -> None:
    """Act just before this process gives a file this name."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(args[1]) == str(path):
            act(event)

    sys.addaudithook(watch)


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(kind: str) -> None:
    """As on a full disk, where names can still be changed and removed."""
    if kind in ("open", "os.mkdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

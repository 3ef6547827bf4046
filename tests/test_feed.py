"""Frames through decode workers: the right ones, few ahead, and whatever happens to a worker harms its video alone.

Decoders that misbehave are fakes, put in place of the real ones inside the worker processes.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from pipeline import decode_process
from pipeline.decode import DecodeError, TickFrame, tick_frames
from pipeline.feed import Ended, Event, Failed, Feed, Frames, Restarted, VideoTask
from pipeline.preprocess import Preprocessor
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import joined_uri

PREPROCESSOR = Preprocessor(48, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
CLOCK = Clock(2.0)
FAR = 10**6

FAKES = '''
import ctypes, os, signal, sys, time, types
from pathlib import Path
import numpy as np
import pipeline.decode
from pipeline.decode import DecodeError, TickFrame
from schemas.errors import UserError

def frames(count, value=0):
    for tick in range(count):
        yield TickFrame(tick, tick / 2 + 0.25, np.full((8, 12, 3), (value + tick) % 256, np.uint8))

def hold_the_lock():
    Path(__file__).with_name("locked").touch()
    ctypes.PyDLL(None).pause()

def crash():
    print("a last word", file=sys.stderr, flush=True)
    os.abort()

def allocate():
    np.ones(6 << 30, np.uint8)

def raise_(error):
    raise error

def wait_for(path, beat=lambda: None):
    while not os.path.exists(path):
        beat()
        time.sleep(0.01)

TROUBLE = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crash": crash,
    "talk": lambda: print("an earlier word", file=sys.stderr, flush=True),
    "exit": lambda: os._exit(7),
    "hang": lambda: time.sleep(10**6),
    "lock": hold_the_lock,
    "bug": lambda: raise_(ValueError("two\\nlines")),
    "bomb": allocate,
    "eof": lambda: raise_(EOFError("no more")),
    "broken": lambda: raise_(DecodeError("a video is broken")),
    "mistake": lambda: raise_(UserError("decord is not installed")),
}

def fake(uri, clock, last_tick=None, rotation_deg=0, *, skipping=True, on_damage=None, beat=None):
    """KIND:COUNT: so many frames, then the trouble of that kind."""
    kind, _, rest = uri.partition(":")
    if kind == "gate":
        yield from frames(3)
        wait_for(rest)
        yield from list(frames(9))[3:]
    elif kind == "beating":
        wait_for(rest, beat)
        yield from frames(9)
    elif kind == "counted":
        for frame in frames(1000):
            with open(rest, "a") as file:
                file.write("x")
            yield frame
    elif kind == "damaged":
        every = list(frames(30))
        on_damage(0, 2, "first")
        yield from every[2:9]
        on_damage(9, 14, "second")
        on_damage(14, 15, "third")
        yield from every[15:20]
        on_damage(20, int(rest), "fourth")
        on_damage(int(rest), int(rest), "cut")
    elif kind == "forgetful":
        yield from list(frames(8))[:3] + list(frames(8))[5:]
    else:
        yield from frames(int(rest))
        TROUBLE.get(kind, lambda: None)()

def fake_decord(path, clock, last_tick, rotation_deg, beat):
    if path.startswith("beating:"):
        wait_for(path.partition(":")[2], beat)
    yield from frames(5, value=100)
    TROUBLE.get(path.partition(":")[0], lambda: None)()

pipeline.decode.tick_frames = fake
sys.modules["pipeline.decord_frames"] = types.SimpleNamespace(
    decord_tick_frames=fake_decord, why_not_decord=lambda path, beat: beat() or ("HEVC" if "hevc" in path else None)
)
'''


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes decode with the fakes above."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decode_process, "_PROGRAM", f"import fakes; {decode_process._PROGRAM}")


def feed(workers: int = 2, limit_s: float = 60.0, **ring: int) -> Feed:
    return Feed(PREPROCESSOR, CLOCK, workers, limit_s, **ring)


@dataclass
class Got:
    """What came of one video."""

    images: list[NDArray[np.uint8]] = field(default_factory=list)
    pts: list[float] = field(default_factory=list)
    end: Ended | Failed | None = None
    restarts: int = 0


def collect(events: Iterable[Event]) -> dict[int, Got]:
    """Copies all frames; checks that ticks follow one another and that nothing comes after a video's end."""
    videos: dict[int, Got] = {}
    for event in events:
        got = videos.setdefault(event.number, Got())
        assert got.end is None
        if isinstance(event, Frames):
            assert event.first_tick == len(got.images)
            assert len(event.images) == len(event.pts) > 0
            got.images += list(event.images.copy())
            got.pts += event.pts.tolist()
        elif isinstance(event, Restarted):
            got.images, got.pts, got.restarts = [], [], got.restarts + 1
        else:
            got.end = event
    assert all(got.end is not None for got in videos.values())
    return videos


def tasks(*uris: str, last_tick: int = FAR, decoder: str = "pyav") -> Iterator[VideoTask]:
    return (VideoTask(n, uri, 0, last_tick, decoder) for n, uri in enumerate(uris))  # type: ignore[arg-type]


def check_faked(got: Got, ticks: int, value: int = 0) -> None:
    """Every tick of a fake video, a picture of one grey that stays the same when it is resized."""
    assert isinstance(got.end, Ended)
    assert (got.end.ticks, got.end.unreadable) == (ticks, [])
    assert got.pts == [tick / 2 + 0.25 for tick in range(ticks)]
    assert [image.shape for image in got.images] == [(16, 16, 3)] * ticks
    assert [set(image.ravel().tolist()) for image in got.images] == [
        {(value + t) % 256} for t in range(ticks)
    ]


# ---- real videos


def write_video(path: Path, size: tuple[int, int], frames: int, seed: int) -> Path:
    """Noise in blocks, 10 frames a second."""
    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"threads": "1", "preset": "ultrafast", "g": "20"}
        stream.codec_context.time_base = Fraction(1, 10)
        for number in range(frames):
            picture = random.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture.repeat(8, 0).repeat(8, 1), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def check_real(got: Got, task: VideoTask) -> None:
    """Against decoding and resizing in this process."""
    unreadable: list[tuple[int, int, str]] = []
    wanted: dict[int, TickFrame] = {}
    failure = None
    try:
        for frame in tick_frames(
            task.uri,
            CLOCK,
            task.last_tick,
            task.rotation_deg,
            on_damage=lambda first, end, reason: unreadable.append((first, end, reason)),
        ):
            wanted[frame.tick] = frame
    except DecodeError as error:
        failure = Failed(task.number, str(error))
    if failure is not None:
        assert got.end == failure
        return
    assert isinstance(got.end, Ended)
    assert got.end.unreadable == unreadable
    assert got.end.ticks == len(got.images) == max([max(wanted) + 1, *(end for _, end, _ in unreadable)])
    for tick, (image, pts) in enumerate(zip(got.images, got.pts, strict=True)):
        if tick in wanted:
            np.testing.assert_array_equal(image, PREPROCESSOR.resize(wanted[tick].image))
            assert pts == wanted[tick].pts_s
        else:
            assert not image.any()
            assert math.isnan(pts)


@pytest.mark.parametrize("workers", [1, 3])
def test_frames_are_those_of_decoding_here(tmp_path: Path, workers: int) -> None:
    """Videos of several sizes and lengths, turned, cut by the last tick, of two files, and one that is not there."""
    paths = [
        write_video(tmp_path / f"{n}.mp4", size, frames, n)
        for n, (size, frames) in enumerate([((48, 64), 130), ((64, 32), 7), ((80, 80), 200), ((32, 48), 81)])
    ]
    videos = [
        VideoTask(10, str(paths[0]), 0, FAR),
        VideoTask(11, str(paths[1]), 90, FAR),
        VideoTask(12, str(paths[2]), 180, 17),
        VideoTask(13, str(tmp_path / "missing.mp4"), 0, FAR),
        VideoTask(14, joined_uri(paths[:2]), 270, FAR),
        VideoTask(15, str(paths[3]), 0, 15),
        VideoTask(16, str(paths[0]), 0, 0),
    ]
    with feed(workers, block_frames=4, blocks=2) as frames:
        got = collect(frames.events(iter(videos)))
    assert got.pop(13).end == Failed(13, f"{tmp_path / 'missing.mp4'} is not there")
    assert {n: len(video.images) for n, video in got.items()} == {
        10: 26,
        11: 2,
        12: 18,
        14: 28,
        15: 16,
        16: 1,
    }
    for task in videos:
        if task.number in got:
            check_real(got[task.number], task)


def test_a_part_that_vanishes_half_way(tmp_path: Path) -> None:
    """The second file is removed while the first is decoded."""
    first = write_video(tmp_path / "a.mp4", (48, 64), 130, 0)
    second = write_video(tmp_path / "b.mp4", (48, 64), 30, 1)
    videos = [VideoTask(0, joined_uri([first, second]), 0, FAR), VideoTask(1, str(first), 0, FAR)]

    def with_removal(events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            second.unlink(missing_ok=True)
            yield event

    with feed(1, block_frames=2, blocks=2) as frames:
        got = collect(with_removal(frames.events(iter(videos))))
    check_real(got[0], videos[0])
    assert "b.mp4 is not there" in str(got[0].end)
    check_real(got[1], videos[1])


def test_a_video_that_blocks_when_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    path = write_video(tmp_path / "a.mp4", (48, 64), 50, 0)
    videos = [VideoTask(n, str(uri), 0, FAR) for n, uri in enumerate([path, tmp_path / "pipe.mp4", path])]
    with feed(1, limit_s=2.0) as frames:
        got = collect(frames.events(iter(videos)))
    assert got[1] == Got(end=Failed(1, f"{tmp_path / 'pipe.mp4'}: no progress for 2 s: stopped"))
    check_real(got[0], videos[0])
    check_real(got[2], videos[2])


# ---- what a worker delivers


@pytest.mark.usefixtures("fakes")
def test_ticks_that_cannot_be_read() -> None:
    with feed(2, block_frames=4) as frames:
        got = collect(frames.events(tasks("damaged:23", "damaged:40")))
    runs = [(0, 2, "first"), (9, 14, "second"), (14, 15, "third")]
    ends = {0: [(20, 23, "fourth"), (23, 23, "cut")], 1: [(20, 40, "fourth"), (40, 40, "cut")]}
    for number, video in got.items():
        missing = {0, 1, *range(9, 15), *range(20, 40)}
        ticks = [23, 40][number]
        assert video.end == Ended(number, ticks, runs + ends[number], [])
        assert len(video.images) == ticks
        for tick in range(ticks):
            assert set(video.images[tick].ravel().tolist()) == {0 if tick in missing else tick}
            assert math.isnan(video.pts[tick]) == (tick in missing)


@pytest.mark.usefixtures("fakes")
def test_a_decoder_that_leaves_ticks_out_unsaid_is_found() -> None:
    with feed(1) as frames:
        got = collect(frames.events(tasks("forgetful:", "good:5")))
    assert got[0].end == Failed(
        0, "forgetful:: RuntimeError: 2 ticks did not come; those said to be unreadable are []"
    )
    check_faked(got[1], 5)


@pytest.mark.usefixtures("fakes")
def test_tasks_are_taken_when_a_worker_is_free() -> None:
    taken: list[int] = []

    def watched() -> Iterator[VideoTask]:
        for task in tasks(*["good:20"] * 5):
            taken.append(task.number)
            yield task

    done: set[int] = set()
    with feed(2) as frames:
        for event in frames.events(watched()):
            assert len(taken) <= len(done) + 2
            if isinstance(event, Ended):
                done.add(event.number)
        assert len(done) == 5
        assert collect(frames.events(tasks("good:3")))[0].pts == [
            0.25,
            0.75,
            1.25,
        ]  # and it can be used again
        assert list(frames.events(iter([]))) == []


@pytest.mark.usefixtures("fakes")
def test_no_worker_is_kept_waiting_by_the_others() -> None:
    """To a slow consumer, for which all have frames, they deliver in turn."""
    order: list[int] = []
    with feed(3, block_frames=2, blocks=2) as frames:
        for event in frames.events(tasks(*["good:100"] * 3)):
            workers = decode_workers()
            assert eventually(lambda: all(w.status() == psutil.STATUS_SLEEPING for w in workers))  # noqa: B023
            order.append(event.number)
            if len(set(order)) == 3 and len(order) > 30:
                break
    assert sorted(order[-3:]) == sorted(order[-6:-3]) == sorted(order[-9:-6]) == [0, 1, 2]


def decode_workers() -> list[psutil.Process]:
    """Of this process; other tests may have left children of another kind, such as a resource tracker."""
    return [child for child in psutil.Process().children() if _is_decode_worker(child.cmdline())]


def _is_decode_worker(command: list[str]) -> bool:
    return "pipeline.decode_worker import main" in " ".join(command)


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it comes true, looked at again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.usefixtures("fakes")
def test_no_more_is_decoded_ahead_than_there_are_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a worker that waits for its consumer, for days by the clock, is not taken for one that hangs."""
    count = tmp_path / "count"
    now = [0.0]
    with feed(1, limit_s=1.0, block_frames=4, blocks=3) as frames:
        monkeypatch.setattr(decode_process, "monotonic", lambda: now[0])
        ticks = 0
        for event in frames.events(tasks(f"counted:{count}")):
            if isinstance(event, Ended):
                break
            assert isinstance(event, Frames)
            ticks += len(event.images)
            if ticks in (4, 400):
                ahead = ticks - 4 + 3 * 4 + 1  # full blocks, and a frame without one
                [worker] = decode_workers()
                assert eventually(
                    lambda: count.stat().st_size >= ahead and worker.status() == psutil.STATUS_SLEEPING  # noqa: B023
                )
                assert count.stat().st_size == ahead
                np.testing.assert_array_equal(np.unique(event.images), np.arange(ticks - 4, ticks) % 256)
                now[0] += 10**6
        assert event == Ended(0, 1000, [], [])


# ---- trouble


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("workers", [1, 2])
def test_trouble_is_that_videos_alone(workers: int) -> None:
    uris = [
        "killed:11",
        "good:40",
        "crash:3",
        "bug:11",
        "good:50",
        "exit:0",
        "bomb:9",
        "eof:1",
        "broken:20",
        "good:60",
        "talk:7",
        "killed:3",
        "talk:8",
        "crash:4",
    ]
    with feed(workers, block_frames=4, blocks=2) as frames:
        got = collect(frames.events(tasks(*uris)))
    process = "the decoding process ended with"
    reasons = {
        0: f"killed:11: {process} signal 9 (SIGKILL)",
        2: f"crash:3: {process} signal 6 (SIGABRT): a last word",
        3: "bug:11: ValueError: two lines",
        5: f"exit:0: {process} exit status 7",
        7: "eof:1: EOFError: no more",
        8: "a video is broken",
        11: f"killed:3: {process} signal 9 (SIGKILL)",
        13: f"crash:4: {process} signal 6 (SIGABRT): a last word",
    }
    assert {n: got[n].end for n in reasons} == {n: Failed(n, reason) for n, reason in reasons.items()}
    bomb = got[6].end
    assert isinstance(bomb, Failed)
    assert "MemoryError: Unable to allocate 6.00 GiB" in bomb.reason
    for number, ticks in ((1, 40), (4, 50), (9, 60), (10, 7), (12, 8)):
        check_faked(got[number], ticks)


@pytest.mark.usefixtures("fakes")
def test_a_worker_that_hangs_is_stopped() -> None:
    """Also one that holds the interpreter's lock, so that no thread of it could answer."""
    with feed(3, limit_s=2.0, block_frames=4, blocks=2) as frames:
        got = collect(frames.events(tasks("hang:10", "lock:4", *["good:40"] * 4)))
    assert got[0].end == Failed(0, "hang:10: no progress for 2 s: stopped")
    assert got[1].end == Failed(1, "lock:4: no progress for 2 s: stopped")
    for number in range(2, 6):
        check_faked(got[number], 40)


@pytest.mark.usefixtures("fakes")
def test_a_pause_of_this_process_is_not_taken_for_a_hanging_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock the worker does nothing for days, as after Ctrl-Z; all but one of the looks are before them."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        if looks == 8:
            (tmp_path / "gate").touch()
        return 0.0 if looks < 5 else 10.0**6

    with feed(1, limit_s=1.0) as frames:
        monkeypatch.setattr(decode_process, "monotonic", clock)
        check_faked(collect(frames.events(tasks(f"gate:{tmp_path / 'gate'}")))[0], 9)
    assert looks > 8


@pytest.mark.usefixtures("fakes")
def test_a_decoder_that_beats_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long there is no frame: by the clock, each look at the worker is a quarter of the limit later."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.2
        if now > 6:
            (tmp_path / "gate").touch()
        return now

    with feed(2, limit_s=0.8) as frames:
        monkeypatch.setattr(decode_process, "monotonic", clock)
        uri = f"beating:{tmp_path / 'gate'}"
        videos = [VideoTask(0, uri, 0, FAR, "pyav"), VideoTask(1, uri, 0, FAR, "decord")]
        got = collect(frames.events(iter(videos)))
    check_faked(got[0], 9)
    check_faked(got[1], 5, value=100)


@pytest.mark.usefixtures("fakes")
def test_a_worker_that_is_killed_while_it_is_idle_harms_nobody() -> None:
    def with_a_murder() -> Iterator[VideoTask]:
        first, second = tasks("good:7", "good:9")
        yield first
        [worker] = decode_workers()
        worker.kill()
        worker_is_gone = lambda: worker.status() == psutil.STATUS_ZOMBIE  # noqa: E731
        assert eventually(worker_is_gone)
        yield second

    with feed(1) as frames:
        got = collect(frames.events(with_a_murder()))
    check_faked(got[0], 7)
    check_faked(got[1], 9)


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_process, "_PROGRAM", "import no_such_module")
    reason = r"cannot start \(.*exit status 1: ModuleNotFoundError: No module named 'no_such_module'\)"
    with feed(2) as frames, pytest.raises(UserError, match=reason):
        list(frames.events(tasks("a", "b", "c")))


@pytest.mark.usefixtures("fakes")
def test_a_mistake_of_the_user_ends_it_all() -> None:
    with feed(2) as frames, pytest.raises(UserError, match=r"^decord is not installed$"):
        list(frames.events(tasks("good:100", "mistake:3", "good:100", decoder="decord")))


# ---- decord


def test_decord_itself(tmp_path: Path) -> None:
    """What it accepts comes near PyAV's pictures and at the same times; what it refuses is PyAV's."""
    path = write_video(tmp_path / "a.mp4", (48, 64), 130, 0)
    videos = [
        VideoTask(0, str(path), 90, FAR, "decord"),
        VideoTask(1, joined_uri([path, path]), 0, FAR, "decord"),
    ]
    with feed(2) as frames:
        got = collect(frames.events(iter(videos)))
    wanted = list(tick_frames(path, CLOCK, rotation_deg=90))
    assert got[0].end == Ended(0, 26, [], [])
    assert got[0].pts == [frame.pts_s for frame in wanted]
    for image, frame in zip(got[0].images, wanted, strict=True):
        assert np.abs(image - PREPROCESSOR.resize(frame.image).astype(float)).mean() < 4
    end = got[1].end
    assert isinstance(end, Ended)
    assert end.notes == ["decord refused (it is several files): decoded with PyAV"]
    check_real(got[1], videos[1])


@pytest.mark.usefixtures("fakes")
def test_what_decord_does_not_do_is_done_by_pyav() -> None:
    """Each video has 30 frames by PyAV and 5 of other greys by decord, after which some are in trouble."""
    uris = ["fine:30", "hevc:30", "killed:0", "bug:0", "broken:0"]
    with feed(2, block_frames=2, blocks=2) as frames:
        got = collect(frames.events(tasks(*uris, decoder="decord")))
    check_faked(got[0], 5, value=100)
    check_faked(got[1], 30)
    assert [got[n].restarts for n in range(5)] == [0, 0, 1, 1, 1]
    assert isinstance(got[0].end, Ended)
    assert isinstance(got[1].end, Ended)
    assert (got[0].end.notes, got[1].end.notes) == ([], ["decord refused (HEVC): decoded with PyAV"])
    process = "the decoding process ended with"
    ends = {  # the fakes of PyAV are in the same trouble
        2: f"killed:0: {process} signal 9 (SIGKILL)",
        3: "bug:0: ValueError: two lines",
        4: "a video is broken",
    }
    assert {n: got[n].end for n in ends} == {n: Failed(n, reason) for n, reason in ends.items()}


@pytest.mark.usefixtures("fakes")
def test_a_video_that_only_decord_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its ticks come again, and the consumer is told so in time."""
    (tmp_path / "only_decord.py").write_text(
        "import fakes, os, time\n"
        "def fail(path, clock, last_tick, rotation_deg, beat):\n"
        "    yield from fakes.frames(5, value=100)\n"
        "    os._exit(3) if 'exit' in path else time.sleep(10**6) if 'sleep' in path else [][0]\n"
        "fakes.sys.modules['pipeline.decord_frames'].decord_tick_frames = fail\n"
    )
    monkeypatch.setattr(decode_process, "_PROGRAM", f"import only_decord; {decode_process._PROGRAM}")
    with feed(3, limit_s=2.0, block_frames=2, blocks=2) as frames:
        got = collect(frames.events(tasks("good exit:30", "good sleep:30", "good bug:30", decoder="decord")))
    reasons = [
        "good exit:30: the decoding process ended with exit status 3",
        "good sleep:30: no progress for 2 s: stopped",
        "good bug:30: IndexError: list index out of range",
    ]
    for number, reason in enumerate(reasons):
        check_faked(got[number], 30)
        assert got[number].restarts == 1
        assert isinstance(got[number].end, Ended)
        assert got[number].end.notes == [f"decord failed ({reason}): decoded with PyAV"]


# ---- nothing is left


def left_over() -> tuple[list[psutil.Process], list[str]]:
    """Child processes, and the kinds of what the descriptors of this process point to."""
    descriptors = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    kinds = sorted(name.partition(":[")[0] for name in descriptors if not name.startswith("/proc"))
    return psutil.Process().children(recursive=True), kinds


def check_memory_has_no_name(workers: list[psutil.Process]) -> None:
    """What a worker shares with its parent is no file that could be left in /dev/shm."""
    for worker in workers:
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "/memfd:dst-frames (deleted)" in maps
        assert "/dev/shm" not in maps


class ConsumerError(Exception):
    pass


@pytest.mark.usefixtures("fakes")
def test_nothing_is_left_over() -> None:
    before = left_over()
    with feed(2) as frames:
        collect(frames.events(tasks("good:100", "killed:10", "good:3", "bug:1")))
    assert left_over() == before

    def fail_at(number: int, events: Iterator[Event]) -> None:
        for event in events:
            if event.number == number:
                raise ConsumerError

    with pytest.raises(ConsumerError), feed(2) as frames:
        fail_at(1, frames.events(tasks("good:100", "lock:10", "good:100")))
    assert left_over() == before

    with feed(2, block_frames=4, blocks=2) as frames:
        for _ in frames.events(tasks("good:100", "good:100", "good:100")):
            break
        del _
        check_faked(collect(frames.events(tasks("good:9")))[0], 9)  # nothing of the videos that were given up
    assert left_over() == before

    def with_an_end() -> Iterator[VideoTask]:
        yield from tasks("good:100", "good:9")
        raise ConsumerError

    with pytest.raises(ConsumerError), feed(2) as frames:
        collect(frames.events(with_an_end()))
    assert left_over() == before


def start_consumer(tmp_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A program with two workers, one that holds the interpreter's lock and one that waits for a block."""
    process = start(
        tmp_path,
        """
heard = set()
with feed(2) as frames:
    for event in frames.events(tasks("lock:8", "good:1000")):
        heard.add(event.number)
        if len(heard) == 2:
            print("waiting", flush=True)
            signal.pause()
""",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    assert eventually((tmp_path / "locked").exists)
    return process, workers


def start(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    """A program of its own process group, whose workers decode with the fakes."""
    head = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(tmp_path)]!r}
from pipeline import decode_process
from test_feed import check_faked, collect, feed, tasks
decode_process._PROGRAM = "import fakes; " + decode_process._PROGRAM
"""
    return subprocess.Popen(
        [sys.executable, "-c", head + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.usefixtures("fakes")
def test_killed_it_leaves_nothing_behind(tmp_path: Path) -> None:
    process, workers = start_consumer(tmp_path)
    check_memory_has_no_name(workers)
    process.kill()
    process.communicate(timeout=20)
    assert psutil.wait_procs(workers, timeout=20)[1] == []


@pytest.mark.usefixtures("fakes")
def test_interrupted_it_ends_at_once(tmp_path: Path) -> None:
    """Ctrl-C goes to the process group of the terminal."""
    process, workers = start_consumer(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode in (-signal.SIGINT, 130)
    assert psutil.wait_procs(workers, timeout=20)[1] == []


@pytest.mark.usefixtures("fakes")
def test_workers_do_not_see_an_interrupt(tmp_path: Path) -> None:
    """So a consumer that does not end for it, such as one of several encoders, has no videos that fail by it."""
    process = start(
        tmp_path,
        """
def interrupted(events):
    for event in events:
        os.killpg(0, signal.SIGINT)
        yield event

signal.signal(signal.SIGINT, lambda *_: None)
with feed(2, block_frames=4, blocks=2) as frames:
    got = collect(interrupted(frames.events(tasks(*["good:50"] * 4))))
for number in range(4):
    check_faked(got[number], 50)
print("all right")
""",
    )
    assert process.communicate(timeout=20) == ("all right\n", "")

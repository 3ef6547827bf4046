"""Whatever happens to a run that makes a cache: run again, it ends with the same bytes."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from little import (
    Video,
    at_step,
    decoders,
    die,
    dst,
    ended,
    family,
    files,
    finished_are_whole,
    kill,
    make_video,
    no_room,
    options,
    run,
    start,
    waited_for,
    write_tables,
)

from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.ledger import Failure
from pipeline.shards import ShardCache
from pipeline.storage import LocalStore
from pipeline.vision import VisionEncoder
from schemas.errors import UserError

ROUNDS = 20


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    """Eight short ones; at 24 ticks a shard, they fill four shards. Leave the files as they are."""
    folder = tmp_path_factory.mktemp("videos")
    ticks = {"a": 12, "b": 9, "c": 20, "d": 6, "e": 5, "f": 7, "g": 14, "h": 8}
    return [make_video(folder, name, count, seed=count) for name, count in ticks.items()]


@pytest.fixture(scope="module")
def labels(videos: list[Video], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("labels"), videos)


@pytest.fixture(scope="module")
def wanted(labels: Path, encoder: VisionEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(labels, out, encoder, ticks=24).failures == []
    assert len(list(out.glob("vision-*.tar"))) == 4
    return files(out)


def copies(videos: list[Video], folder: Path) -> list[Video]:
    """To be broken."""
    folder.mkdir()
    return [video.at(Path(shutil.copy(video.path, folder))) for video in videos]


def a_run(labels: Path, out: Path, model: Path, part: int = 0, of: int = 1) -> None:
    run(labels, out, VisionEncoder(model, "cpu"), ticks=24, part=part, of=of)


# ---- killed


def test_killed_at_random_moments(
    labels: Path,
    tiny_model: Path,
    encoder: VisionEncoder,
    wanted: dict[str, str],
    tmp_path: Path,
) -> None:
    """Some time after each of its shards, or before the first; the process group and the first process alone."""
    assert ended(start(a_run, labels, tmp_path / "warm", tiny_model, output=tmp_path / "said")) == 0
    began = time.monotonic()
    assert ended(start(a_run, labels, tmp_path / "timed", tiny_model, output=tmp_path / "said")) == 0
    lasts = time.monotonic() - began
    assert files(tmp_path / "timed") == wanted
    moments, killed = random.Random(0), 0
    for number in range(ROUNDS):
        out, shards = tmp_path / str(number), number % 4
        process = start(a_run, labels, out, tiny_model, output=tmp_path / "said")
        while process.is_alive() and len(list(out.glob("ledger/vision-*"))) < shards:
            process.join(0.005)
        process.join(moments.random() * lasts / (4 if shards else 2))
        kill(process, whole_group=bool(number // 4 % 2))
        killed += process.exitcode == -signal.SIGKILL
        finished_are_whole(out)
        assert run(labels, out, encoder, ticks=24).failures == []
        assert files(out) == wanted, number
    assert killed >= ROUNDS // 4


def dying_run(labels: Path, out: Path, model: Path, step: int, count: Path) -> None:
    encoder = VisionEncoder(model, "cpu")
    done = at_step(step, out, die)
    run(labels, out, encoder, ticks=12)
    count.write_text(str(done[0]))


def test_killed_at_some_steps(
    videos: list[Video], tiny_model: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """Just before a file or folder is made, renamed or removed: moments that a clock seldom meets."""
    labels = write_tables(tmp_path / "labels", [video.needing(5) for video in videos[:4]])
    run(labels, tmp_path / "whole", encoder, ticks=12)
    steps = tmp_path / "steps"
    never = start(dying_run, labels, tmp_path / "counted", tiny_model, 10**6, steps, output=tmp_path / "said")
    assert ended(never) == 0
    count = int(steps.read_text())
    assert count > 30
    for step in random.Random(1).sample(range(1, count + 1), 10):
        out = tmp_path / str(step)
        process = start(dying_run, labels, out, tiny_model, step, steps, output=tmp_path / "said")
        assert ended(process) == -signal.SIGKILL
        finished_are_whole(out)
        assert run(labels, out, encoder, ticks=12).failures == []
        assert files(out) == files(tmp_path / "whole"), step


# ---- a full disk


def full_disk(labels: Path, out: Path, model: Path, step: int) -> None:
    """Make shards of another size, on a disk that is full from one step on."""
    encoder = VisionEncoder(model, "cpu")
    at_step(step, out, no_room)
    try:
        run(labels, out, encoder, ticks=24)
    except UserError as error:
        print(error)
        raise SystemExit(2) from None


def test_a_disk_that_is_full_at_any_step(
    videos: list[Video], tiny_model: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """All features are taken over, and no video is there: none is lost."""
    mine = [video.needing(5) for video in copies(videos[:4], tmp_path / "videos")]
    labels, before = write_tables(tmp_path / "labels", mine), tmp_path / "before"
    run(labels, tmp_path / "whole", encoder, ticks=24)
    run(labels, before, encoder, ticks=12)
    shutil.rmtree(tmp_path / "videos")
    status, step = 2, 4  # the first are those of the lock
    while status == 2:
        out, said = tmp_path / "out", tmp_path / f"said-{step}"
        shutil.copytree(before, out)
        status = ended(start(full_disk, labels, out, tiny_model, step, output=said))
        if status == 2:
            [sentence] = said.read_text().splitlines()
            assert sentence == (
                f"there is no more room for the shards of {out} (No space left on device); finished ones are kept: "
                "free some room and run again"
            )
            finished_are_whole(out)
        assert run(labels, out, encoder, ticks=24).failures == []
        assert files(out) == files(tmp_path / "whole"), step
        shutil.rmtree(out)
        step += 1
    assert status == 0
    assert step > 15


def with_files_of_at_most(size: int, *command: str) -> None:
    """The command line where no file may grow beyond a size, which stands for a disk that fills up."""
    import pipeline.encode

    small = functools.partial(pipeline.encode.Feed, block_frames=1, blocks=2)  # its memory is a file too
    pipeline.encode.Feed = small  # type: ignore[assignment,misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    dst(*command)


def command_line(labels: Path, out: Path, model: Path, *more: str) -> tuple[str, ...]:
    paths = ("--labels", str(labels), "--out", str(out), "--model", str(model))
    return ("cache-features", "--device", "cpu", "--workers", "2", *paths, *more)


@pytest.mark.parametrize("storage", ["tar", "h5"])
@pytest.mark.parametrize("ticks", [66, 130], ids=["a shard", "a video of a shard"])
def test_no_room_for(tiny_model: Path, tmp_path: Path, ticks: int, storage: str) -> None:
    videos = [make_video(tmp_path / "videos", name, ticks, seed) for seed, name in enumerate("ab")]
    labels, out, said = write_tables(tmp_path / "labels", videos), tmp_path / "out", tmp_path / "said"
    command = command_line(labels, out, tiny_model, "--format", storage)
    assert ended(start(with_files_of_at_most, 120_000, *command, output=said)) == 2
    [sentence] = [line for line in said.read_text().splitlines() if line.startswith("error:")]
    assert f"there is no more room for the shards of {out} (" in sentence
    assert "Traceback" not in said.read_text()
    assert "Exception ignored" not in said.read_text()
    assert sorted(files(out)) == ["cache.json", "plan.json"]
    assert ended(start(dst, *command, output=said)) == 0
    assert (
        ended(start(dst, *command_line(labels, tmp_path / "whole", tiny_model, *command[-2:]), output=said))
        == 0
    )
    assert files(out) == files(tmp_path / "whole")


def test_too_little_room_is_told_before(
    labels: Path, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for all shards, and for the largest of those being made a second time."""
    usage = namedtuple("usage", "total used free")
    ticks, largest = 81, 22
    needed = (ticks + largest) * 4 * encoder.dim * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(
        UserError, match=r"out needs 0\.1 MB free while the shards are made, and has 0\.1 MB; free"
    ):
        run(labels, tmp_path / "out", encoder, ticks=24)
    assert sorted(files(tmp_path / "out")) == ["cache.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    assert run(labels, tmp_path / "out", encoder, ticks=24).shards_made == 4


# ---- trouble with one video


def test_a_decode_process_that_is_killed(videos: list[Video], encoder: VisionEncoder, tmp_path: Path) -> None:
    """Its video fails, and nothing else; a second try decodes that video alone."""
    mine = [*copies(videos[:2], tmp_path / "videos"), make_video(tmp_path / "videos", "long", 100, seed=1)]
    labels, out = write_tables(tmp_path / "labels", mine), tmp_path / "out"
    run(labels, tmp_path / "whole", encoder, ticks=1000, workers=1)
    killed: list[int] = []

    def on_tick(ticks: int) -> None:
        """Its process still has some of the long video before it, for it is only some frames ahead."""
        seen.append(ticks)
        if sum(seen) > 21 and not killed:
            [child] = decoders()
            child.kill()
            killed.append(child.pid)

    seen: list[int] = []
    summary = cache_features(labels, out, Here(encoder), options(1000, workers=1), on_tick=on_tick)
    assert killed
    assert sum(seen) == 121
    path = mine[2].path
    reason = f"{path}: the decoding process ended with signal 9 (SIGKILL)"
    gone = "its video long is not in the cache"
    told = [("long", reason), ("long/early", gone), ("long/late", gone)]
    assert summary.failures == [Failure(id=who, reason=why) for who, why in told]
    check_retried(labels, out, mine, [path], encoder, files(tmp_path / "whole"), ticks=100)


def check_retried(
    labels: Path,
    out: Path,
    videos: list[Video],
    failed: list[Path],
    encoder: VisionEncoder,
    wanted: dict[str, str],
    ticks: int,
) -> None:
    """A plain run keeps things as they are. Another try decodes what failed and nothing else: nothing else is there."""
    before = files(out)
    plain = run(labels, out, encoder, ticks=1000)
    assert (plain.ticks, plain.shards_made) == (0, 0)
    assert plain.failures != []
    assert files(out) == before != wanted
    for video in videos:
        if video.path not in failed:
            video.path.unlink()
    mended = run(labels, out, encoder, ticks=1000, retry_failed=True)
    assert (mended.failures, mended.ticks) == ([], ticks)
    assert files(out) == wanted


def test_a_video_that_vanishes(videos: list[Video], encoder: VisionEncoder, tmp_path: Path) -> None:
    mine = [
        *copies([videos[1], videos[6]], tmp_path / "videos"),
        make_video(tmp_path / "videos", "c", 60, seed=1),
    ]
    labels, out = write_tables(tmp_path / "labels", mine), tmp_path / "out"
    run(labels, tmp_path / "whole", encoder, ticks=1000, workers=1)
    last, aside = mine[1].path, tmp_path / "aside.mp4"

    def on_tick(ticks: int) -> None:
        if last.exists():
            last.rename(aside)

    summary = cache_features(labels, out, Here(encoder), options(1000, workers=1), on_tick=on_tick)
    assert [failure.id for failure in summary.failures] == ["g", "g/early", "g/late"]
    assert summary.failures[0].reason == f"{last} is not there"
    aside.rename(last)
    check_retried(labels, out, mine, [last], encoder, files(tmp_path / "whole"), ticks=14)


def hanging(videos: list[Video], folder: Path) -> list[Video]:
    """Of which the second is a pipe that nobody writes to."""
    mine = copies(videos, folder)
    mine[1].path.rename(folder / "aside")
    os.mkfifo(mine[1].path)
    return mine


def test_a_video_that_hangs(
    videos: list[Video], tiny_model: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """By the command line: exit status 1 with the video's name; 0 once it is mended."""
    mine = hanging(videos[:3], tmp_path / "videos")
    labels, out, said = write_tables(tmp_path / "labels", mine), tmp_path / "out", tmp_path / "said"
    command = command_line(labels, out, tiny_model)
    process = start(dst, *command, "--time-limit", "3", output=said)
    with waited_for(mine[1].path):
        assert ended(process) == 1
    assert f"b: {mine[1].path}: no progress for 3 s: stopped" in " ".join(said.read_text().split())
    failures = json.loads((out / "ledger" / "vision-00000.json").read_text())["failures"]
    assert failures == [{"id": "b", "reason": f"{mine[1].path}: no progress for 3 s: stopped"}]
    mine[1].path.unlink()
    (tmp_path / "videos" / "aside").rename(mine[1].path)
    run(labels, tmp_path / "whole", encoder, shard_mb=512)
    for video in (mine[0], mine[2]):
        video.path.unlink()
    assert ended(start(dst, *command, "--retry-failed", output=said)) == 0
    assert files(out) == files(tmp_path / "whole")


def run_with_few_descriptors(labels: Path, out: Path, model: Path) -> None:
    encoder = VisionEncoder(model, "cpu")
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
    run(labels, out, encoder, ticks=1000)


def test_more_videos_than_files_may_be_open(videos: list[Video], tiny_model: Path, tmp_path: Path) -> None:
    """All in one shard."""
    many = [Video(f"v{number}", videos[0].path, 1, ((f"s{number}", 0, 1),)) for number in range(60)]
    labels, out = write_tables(tmp_path / "labels", many), tmp_path / "out"
    assert ended(start(run_with_few_descriptors, labels, out, tiny_model, output=tmp_path / "said")) == 0
    assert len(ShardCache(out).session_ids) == 60
    assert len(list(out.glob("vision-*"))) == 1


# ---- several runs


def test_two_runs_at_once(
    videos: list[Video], tiny_model: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """The second says who was first. Ctrl-C ends the first with all that it started, and leaves nothing half-made."""
    mine = hanging(videos[:3], tmp_path / "videos")
    labels, out = write_tables(tmp_path / "labels", mine), tmp_path / "out"
    process = start(dst, *command_line(labels, out, tiny_model), output=tmp_path / "said")
    with waited_for(mine[1].path):
        told = rf"another run is writing {out}: process {process.pid} on .* \(dst cache-features .*\); wait until"
        for second in (lambda: run(labels, out, encoder), lambda: run(labels, out, encoder, part=1, of=3)):
            with pytest.raises(UserError, match=told):
                second()
        children = family(process)
        assert children != []
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert ended(process) not in (0, None)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert set(files(out)) <= {"cache.json", "plan.json"}


def test_an_array_job(
    labels: Path, tiny_model: Path, encoder: VisionEncoder, wanted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parts = [start(a_run, labels, out, tiny_model, part, 3, output=tmp_path / "said") for part in range(3)]
    assert [ended(process) for process in parts] == [0, 0, 0]
    assert files(out) == wanted
    assert run(labels, out, encoder, ticks=24).shards_kept == 4


def test_parts_that_write_just_now(
    labels: Path,
    encoder: VisionEncoder,
    wanted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One begins and ends between two looks of another: after that one did not see a cache, and before it opens an
    entry of the ledger that it saw."""
    out = tmp_path / "out"
    has, read_text = LocalStore.has, LocalStore.read_text

    def has_not_yet(self: LocalStore, name: str) -> bool:
        monkeypatch.setattr(LocalStore, "has", has)
        assert (name, has(self, name)) == ("cache.json", False)
        run(labels, out, encoder, ticks=24, part=1, of=2)
        return False

    def replaced(self: LocalStore, name: str) -> str:
        if name.startswith("ledger/"):
            monkeypatch.setattr(LocalStore, "read_text", read_text)
            (out / name).unlink()
        return read_text(self, name)

    monkeypatch.setattr(LocalStore, "has", has_not_yet)
    assert run(labels, out, encoder, ticks=24, part=0, of=2).shards_made == 2
    assert files(out) == wanted
    monkeypatch.setattr(LocalStore, "read_text", replaced)
    run(labels, out, encoder, ticks=24)
    assert files(out) == wanted

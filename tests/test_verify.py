"""`dst verify`: each thing that can be wrong with a cache, put there with stock libraries, is told and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.shards import reader_of, writer_of
from pipeline.verify import verify
from schemas.errors import UserError

Files = dict[str, bytes]
Json = Any


def npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def arrow(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


class Cache:
    """A cache of tar files, changed with the stock libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def problems(self, labels: Path | None = None) -> list[str]:
        return verify(self.folder, labels).problems

    @contextmanager
    def json(self, name: str) -> Iterator[Json]:
        """A small file's content, written back when changed."""
        path = self.folder / name
        content = json.loads(path.read_text())
        yield content
        path.write_text(json.dumps(content))

    def entry(self, stem: str) -> Json:
        return json.loads((self.folder / "ledger" / f"{stem}.json").read_text())

    @property
    def videos(self) -> list[str]:
        return list(self.entry("vision-00000")["videos"])

    def read(self, stem: str) -> Files:
        with tarfile.open(self.folder / f"{stem}.tar") as tar:
            return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]

    def write(self, stem: str, files: Files) -> None:
        with tarfile.open(self.folder / f"{stem}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        self.sign(f"{stem}.tar")

    def sign(self, file: str) -> None:
        """Make the ledger know a file's bytes."""
        data = (self.folder / file).read_bytes()
        with self.json(f"ledger/{file.partition('.')[0]}.json") as entry:
            entry |= {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    @contextmanager
    def files(self, stem: str) -> Iterator[Files]:
        files = self.read(stem)
        yield files
        self.write(stem, files)

    @contextmanager
    def array(self, key: str, member: str) -> Iterator[NDArray[Any]]:
        """One array of a vision record, changed in place."""
        with self.files("vision-00000") as files:
            name = f"{key}.{member}.npy"
            array = np.load(io.BytesIO(files[name]))
            yield array
            files[name] = npy(array)

    @contextmanager
    def part(self, session: str, part: str) -> Iterator[Json]:
        """One JSON part of a session, changed in place."""
        with self.files("labels-00000") as files:
            name = f"{session}.{part}.json"
            content = json.loads(files[name])
            yield content
            files[name] = json.dumps(content).encode()

    def part_of(self, session: str, part: str) -> Json:
        return json.loads(self.read("labels-00000")[f"{session}.{part}.json"])

    def frames(self, session: str) -> pa.Table:
        return pa.ipc.open_file(self.read("labels-00000")[f"{session}.frames.arrow"]).read_all()

    def set_frames(self, session: str, table: pa.Table) -> None:
        with self.files("labels-00000") as files:
            files[f"{session}.frames.arrow"] = arrow(table)

    def set_cell(self, session: str, column: str, row: int, value: Any) -> None:
        table = self.frames(session)
        values = table[column].to_pylist()
        values[row] = value
        self.set_column(session, column, values)

    def set_column(self, session: str, column: str, values: list[Any]) -> None:
        table = self.frames(session)
        index = table.schema.get_field_index(column)
        field = table.schema.field(index)
        self.set_frames(session, table.set_column(index, field, pa.array(values, field.type)))


def move(cache: Cache, videos: list[str], *, keep: bool = False) -> None:
    """Put videos and their sessions into a second shard."""
    vision, labels = cache.read("vision-00000"), cache.read("labels-00000")
    metas = {name.removesuffix(".meta.json"): json.loads(d) for name, d in labels.items() if "meta" in name}
    sessions = [key for key, meta in metas.items() if meta["video_id"] in videos]
    of_videos = {n: d for n, d in vision.items() if n.rpartition("/")[0] in videos}
    of_sessions = {n: d for n, d in labels.items() if n.split(".")[0] in sessions}
    with cache.json("plan.json") as plan, cache.json("ledger/vision-00000.json") as entry:
        needed = sum(entry["videos"][video]["needed"] for video in videos)
        plan["shards"].append({"number": 1, "ticks": needed, "videos": videos})
        plan["shards"][0]["ticks"] -= needed
        for video in videos:
            plan["shards"][0]["videos"].remove(video)
        second = {**entry, "videos": {video: entry["videos"].pop(video) for video in videos}}
    for stem, files in (("vision", of_videos), ("labels", of_sessions)):
        content = second if stem == "vision" else cache.entry("labels-00000")
        (cache.folder / f"ledger/{stem}-00001.json").write_text(json.dumps(content))
        cache.write(f"{stem}-00001", files)
    cache.write("vision-00000", {n: d for n, d in vision.items() if n not in of_videos})
    cache.write("labels-00000", {n: d for n, d in labels.items() if n not in of_sessions})


@pytest.fixture(scope="module")
def small(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of ``shards`` that is two of its videos, one longer than two records, with their sessions."""
    folder = tmp_path_factory.mktemp("small") / "shards"
    shutil.copytree(shards, folder)
    cache = Cache(folder)
    move(cache, cache.videos[2:])
    for stem in ("vision-00001", "labels-00001"):
        (folder / f"{stem}.tar").unlink()
        (folder / f"ledger/{stem}.json").unlink()
    with cache.json("plan.json") as plan:
        plan["shards"].pop()
    return folder


@pytest.fixture
def cache(small: Path, tmp_path: Path) -> Cache:
    shutil.copytree(small, tmp_path / "shards")
    return Cache(tmp_path / "shards")


@pytest.fixture
def tables(cache: Cache, labels: Path, tmp_path: Path) -> Path:
    """The label tables of ``cache``."""
    out = tmp_path / "labels" / "assembly101"
    out.mkdir(parents=True)
    sessions = pq.read_table(labels / "assembly101" / "sessions.parquet")
    chosen = sessions.filter(pc.is_in(sessions["video_id"], pa.array(cache.videos)))["session_id"]
    for path in (labels / "assembly101").glob("*.parquet"):
        table = pq.read_table(path)
        for column, ids in (("video_id", pa.array(cache.videos)), ("session_id", chosen.combine_chunks())):
            if column in table.column_names:
                table = table.filter(pc.is_in(table[column], ids))
        pq.write_table(table, out / path.name)
    return out.parent


def sessions_of(cache: Cache, stem: str = "labels-00000") -> list[str]:
    return [n.removesuffix(".meta.json") for n in cache.read(stem) if n.endswith(".meta.json")]


def assert_one(problems: list[str], *parts: str) -> None:
    assert len(problems) == 1, problems
    for part in parts:
        assert part in problems[0]


# ---- nothing is wrong


def test_a_whole_cache_has_no_problem_and_is_counted(shards: Path, labels: Path) -> None:
    planned: list[int] = []
    checked: list[None] = []
    report = verify(shards, labels, on_plan=planned.append, on_file=lambda: checked.append(None))
    assert (report.problems, report.notes, report.failures) == ([], [], [])
    assert (planned, len(checked)) == ([2], 2)
    cache, videos = Cache(shards), pq.read_table(labels / "assembly101" / "videos.parquet")
    pts = [np.load(io.BytesIO(d)) for n, d in cache.read("vision-00000").items() if n.endswith(".pts.npy")]
    assert report.counts == {
        "shards planned": 1,
        "shards finished": 1,
        "bytes": sum(path.stat().st_size for path in shards.glob("*.tar")),
        "videos": len(videos),
        "ticks": sum(map(len, pts)),
        "unreadable ticks": 0,
        "failed videos": 0,
        "failed sessions": 0,
        "sessions": len(sessions_of(cache)),
    }
    assert report.counts["sessions"] == len(pq.read_table(labels / "assembly101" / "sessions.parquet")) > 0


def test_a_part_of_it_and_one_of_two_shards_are_whole_too(cache: Cache, tables: Path) -> None:
    assert cache.problems(tables) == []
    move(cache, cache.videos[1:])
    assert cache.problems(tables) == []


def unreadable(cache: Cache, first: int, end: int) -> str:
    """Make ticks of a video unreadable, and its sessions failures."""
    video = cache.videos[0]
    with cache.files("vision-00000") as files:
        for chunk in range(first // 64, -(-end // 64)):
            here = slice(max(first - 64 * chunk, 0), end - 64 * chunk)
            for member, value in (("pts", np.nan), ("vision", 0)):
                name = f"{video}/{chunk:05d}.{member}.npy"
                array = np.load(io.BytesIO(files[name]))
                array[here] = value
                files[name] = npy(array)
    sessions = [s for s in sessions_of(cache) if cache.part_of(s, "meta")["video_id"] == video]
    with cache.files("labels-00000") as files:
        for name in [name for name in files if name.split(".")[0] in sessions]:
            del files[name]
    with cache.json("ledger/vision-00000.json") as entry:
        entry["videos"][video]["unreadable"] = [[first, end, "damaged"]]
    with cache.json("ledger/labels-00000.json") as entry:
        entry["failures"] = [{"id": session, "reason": "its ticks"} for session in sessions]
    return video


def test_what_the_ledger_says_could_not_be_made_is_no_problem(cache: Cache, tables: Path) -> None:
    unreadable(cache, 60, 70)
    report = verify(cache.folder, tables)
    assert report.problems == []
    assert report.counts["unreadable ticks"] == 10
    assert report.failures
    assert report.counts["failed sessions"] == len(report.failures)


def test_a_video_that_failed_is_no_problem(cache: Cache, tables: Path) -> None:
    move(cache, cache.videos[1:])
    with cache.json("ledger/vision-00001.json") as entry:
        [video] = entry["videos"]
        entry["videos"], entry["failures"] = {}, [{"id": video, "reason": "broken"}]
    sessions = sessions_of(cache, "labels-00001")
    with cache.json("ledger/labels-00001.json") as entry:
        entry["failures"] = [{"id": session, "reason": "its video"} for session in sessions]
    cache.write("vision-00001", {})
    cache.write("labels-00001", {})
    report = verify(cache.folder, tables)
    assert report.problems == []
    assert [failure.id for failure in report.failures] == [video, *sessions]


# ---- the small files


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"cache\.json"):
        verify(tmp_path)
    with pytest.raises(UserError, match=r"cache\.json"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "not there"),
        ("{", "fingerprint"),
        ('{"format": 2}', "fingerprint"),
        (("chunk_ticks", 32), "32 ticks a record"),
        (("tick_hz", -2.0), "tick_hz: Input should be greater than 0"),
        (("dim", 0), "no size"),
    ],
)
def test_a_fingerprint_that_cannot_be_used(cache: Cache, text: Any, told: str) -> None:
    """All else is still checked, the contents of the files apart."""
    if text is None:
        (cache.folder / "cache.json").unlink()
    elif isinstance(text, str):
        (cache.folder / "cache.json").write_text(text)
    else:
        with cache.json("cache.json") as fingerprint:
            fingerprint[text[0]] = text[1]
    assert_one(cache.problems(), "cache.json", told)
    (cache.folder / "labels-00000.tar").write_bytes(b"")
    assert len(cache.problems()) == 2


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"shards": [{"number": "x"}]}', '{"shards": [{"number": -1}]}']
)
def test_a_plan_that_cannot_be_read(cache: Cache, text: str | None) -> None:
    if text is None:
        (cache.folder / "plan.json").unlink()
    else:
        (cache.folder / "plan.json").write_text(text)
    assert_one(cache.problems(), "plan.json: ", "run 'dst cache-features' again")


def test_a_shard_that_is_not_finished(cache: Cache, tables: Path) -> None:
    """Its sessions are not missing besides."""
    move(cache, cache.videos[1:])
    shutil.rmtree(cache.folder / ".work", ignore_errors=True)
    for path in cache.folder.rglob("*-00001.*"):
        path.unlink()
    report = verify(cache.folder, tables)
    assert_one(report.problems, "plan.json: vision-00001 and labels-00001 not finished yet")
    assert (report.counts["shards planned"], report.counts["shards finished"]) == (2, 1)


def test_a_shard_whose_labels_are_not_finished(cache: Cache, tables: Path) -> None:
    (cache.folder / "labels-00000.tar").unlink()
    (cache.folder / "ledger/labels-00000.json").unlink()
    assert_one(cache.problems(tables), "plan.json: labels-00000 not finished yet")


def test_a_plan_that_has_no_such_shard(cache: Cache) -> None:
    move(cache, cache.videos[1:])
    with cache.json("plan.json") as plan:
        plan["shards"].pop()
    problems = cache.problems()
    assert [p.partition(":")[0] for p in problems if "no shard 1" in p] == [
        "vision-00001.tar",
        "labels-00001.tar",
    ]
    assert len(problems) == 2


def test_a_plan_with_a_shard_twice(cache: Cache) -> None:
    with cache.json("plan.json") as plan:
        plan["shards"] *= 2
    assert_one(cache.problems(), "plan.json: it has a shard twice")


def test_a_plan_of_other_videos(cache: Cache) -> None:
    with cache.json("plan.json") as plan:
        plan["shards"][0]["videos"].append("another/video")
    assert_one(cache.problems(), "vision-00000.tar: the planned video another/video is neither")
    with cache.json("plan.json") as plan:
        plan["shards"][0]["videos"] = cache.videos[1:]
    assert_one(cache.problems(), "vision-00000.tar: ", cache.videos[0], "not planned")


def test_a_plan_of_other_ticks(cache: Cache) -> None:
    with cache.json("plan.json") as plan:
        plan["shards"][0]["ticks"] += 3
    assert_one(cache.problems(), "vision-00000.tar: ", "ticks of its videos are needed")


def test_a_video_that_failed_and_is_there(cache: Cache) -> None:
    with cache.json("ledger/vision-00000.json") as entry:
        entry["failures"] = [{"id": cache.videos[1], "reason": "broken"}]
    assert_one(cache.problems(), "vision-00000.tar: ", cache.videos[1], "among the failures")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../vision-00000.tar"},
        {"file": "vision-00007.tar"},
        {"bytes": "many"},
        {"bytes": -1},
        {"videos": []},
        {"videos": {"v": None}},
        {"more": 1},
        {"failures": [{"id": 3}]},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_read(cache: Cache, tables: Path, change: dict[str, Any]) -> None:
    """Its file is not called foreign, nor not finished, and the label file is still checked."""
    with cache.json("ledger/vision-00000.json") as entry:
        entry |= change
    report = verify(cache.folder, tables)
    assert_one(report.problems, "ledger/vision-00000.json: ", "remove it and run 'dst cache-features' again")
    assert report.notes == []
    assert report.counts["sessions"] == len(sessions_of(cache))


def test_sessions_that_cannot_be_seen_are_not_called_missing(cache: Cache, tables: Path) -> None:
    """Not even where no plan says which they are."""
    for name in ("plan.json", "ledger/labels-00000.json"):
        (cache.folder / name).write_text("{")
    problems = cache.problems(tables)
    assert [problem.partition(": ")[0] for problem in problems] == ["plan.json", "ledger/labels-00000.json"]


def test_an_entry_that_no_shard_has(cache: Cache) -> None:
    shutil.copy(cache.folder / "ledger/labels-00000.json", cache.folder / "ledger/labels-000000.json")
    with cache.json("ledger/labels-000000.json") as entry:
        entry["file"] = "labels-000000.tar"
    assert_one(cache.problems(), "ledger/labels-000000.json: ", "no shard is called")


def test_a_file_that_is_gone(cache: Cache) -> None:
    (cache.folder / "vision-00000.tar").unlink()
    assert_one(cache.problems(), "vision-00000.tar: the ledger has it, and it is not there")


def test_files_that_the_ledger_does_not_know_are_harmless(cache: Cache) -> None:
    shutil.copy(cache.folder / "labels-00000.tar", cache.folder / "labels-00001.tar")
    (cache.folder / "notes.txt").write_text("mine")
    report = verify(cache.folder)
    assert report.problems == []
    assert [note.partition(":")[0] for note in report.notes] == ["labels-00001.tar", "notes.txt"]
    assert "killed" in report.notes[0]


def test_a_file_that_was_set_aside(cache: Cache) -> None:
    shutil.copy(cache.folder / "vision-00000.tar", cache.folder / "old-00000.tar")
    shutil.copy(cache.folder / "ledger/vision-00000.json", cache.folder / "ledger/old-00000.json")
    cache.sign("old-00000.tar")
    assert_one(cache.problems(), "old-00000.tar: it was set aside by a run that did not end")


def test_a_file_of_the_other_kind(cache: Cache) -> None:
    with cache.json("ledger/labels-00000.json") as entry:
        entry["file"] = "labels-00000.h5"
    (cache.folder / "labels-00000.tar").rename(cache.folder / "labels-00000.h5")
    assert_one(cache.problems(), "labels-00000.h5: cache.json says that the shards are tar files")


# ---- bytes


@pytest.mark.parametrize("stem", ["vision-00000", "labels-00000"])
def test_bytes_that_are_not_those_written(cache: Cache, tables: Path, stem: str) -> None:
    path = cache.folder / f"{stem}.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_one(cache.problems(tables), f"{stem}.tar: its bytes are not those")
    path.write_bytes(data[:-512])
    assert_one(
        cache.problems(tables), f"{stem}.tar: it has {len(data) - 512} bytes, the ledger says {len(data)}"
    )


def test_a_file_that_is_no_shard_does_not_stop_the_others(cache: Cache) -> None:
    (cache.folder / "vision-00000.tar").write_bytes(b"no tar" * 1000)
    cache.sign("vision-00000.tar")
    cache.set_cell(session := sessions_of(cache)[0], "split", 3, "tests")
    problems = cache.problems()
    assert len(problems) == 2
    assert problems[0].startswith("vision-00000.tar: ")
    assert problems[1].startswith(f"labels-00000.tar, {session}: tick ")


# ---- vision


def first_key(cache: Cache, chunk: int = 1) -> tuple[str, str]:
    """A record of the first video; it has one after it."""
    video = cache.videos[0]
    assert cache.entry("vision-00000")["videos"][video]["ticks"] > 64 * (chunk + 1)
    return f"{video}/{chunk:05d}", f"vision-00000.tar, {video}/{chunk:05d}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(cache: Cache, value: float) -> None:
    key, where = first_key(cache)
    with cache.array(key, "vision") as features:
        features[5, 2, 7] = value
    assert_one(cache.problems(), f"{where}: tick 69: the features are not finite")
    with cache.array(key, "vision") as features:
        features[60, 0, 0] = value
    assert_one(cache.problems(), f"{where}: 2 ticks from tick 69 on: the features are not finite")


def test_large_features_are_finite(cache: Cache) -> None:
    with cache.array(first_key(cache)[0], "vision") as features:
        features[5, 2, 7:9] = [65504, -65504]
    assert cache.problems() == []


def test_features_that_are_all_0(cache: Cache) -> None:
    key, where = first_key(cache)
    with cache.array(key, "vision") as features:
        features[9] = 0
        features[9, 0, 0] = -0.0
    assert_one(cache.problems(), f"{where}: tick 73: the features are all 0")


def all_alike(cache: Cache, video: str) -> int:
    with cache.files("vision-00000") as files:
        names = [n for n in files if n.rpartition("/")[0] == video and n.endswith(".vision.npy")]
        arrays = {name: np.load(io.BytesIO(files[name])) for name in names}
        first = arrays[names[0]][0]
        for name, array in arrays.items():
            files[name] = npy(np.broadcast_to(first, array.shape))
        return sum(map(len, arrays.values()))


def test_features_that_never_change(cache: Cache) -> None:
    video = cache.videos[1]
    ticks = all_alike(cache, video)
    assert_one(cache.problems(), f"vision-00000.tar, {video}: all its {ticks} ticks have the same features")
    with cache.array(f"{video}/{(ticks - 1) // 64:05d}", "vision") as features:
        features[-1, -1, -1] += 1  # one value of the last tick
    assert cache.problems() == []


def shorten(cache: Cache, video: str, ticks: int) -> None:
    """Leave only the first ticks of a video, in one record, and no session on it."""
    with cache.files("vision-00000") as files:
        for name in [n for n in files if n.rpartition("/")[0] == video]:
            if not name.startswith(f"{video}/00000."):
                del files[name]
            elif name.endswith(".npy"):
                files[name] = npy(np.load(io.BytesIO(files[name]))[:ticks])
            else:
                files[name] = json.dumps(json.loads(files[name]) | {"num_ticks": ticks}).encode()
    with cache.json("ledger/vision-00000.json") as entry:
        entry["videos"][video]["ticks"] = ticks
    with cache.files("labels-00000") as files:
        for session in [s for s in sessions_of(cache) if cache.part_of(s, "meta")["video_id"] == video]:
            for name in [n for n in files if n.startswith(f"{session}.")]:
                del files[name]


@pytest.mark.parametrize(("ticks", "problems"), [(20, 0), (21, 1)])
def test_a_short_video_may_never_change(cache: Cache, ticks: int, problems: int) -> None:
    shorten(cache, video := cache.videos[1], ticks)
    assert cache.problems() == []
    all_alike(cache, video)
    assert len(cache.problems()) == problems


@pytest.mark.parametrize(
    ("tick", "pts", "told"),
    [
        (0, -0.5, "tick 0: the frame is earlier than the one before it"),
        (0, 0.01, "tick 0: the frame is later than the tick"),
        (69, 34.502, "tick 69: the frame is later than the tick"),
        (69, np.inf, "tick 69: the frame is later than the tick"),
        (69, 30.0, "tick 69: the frame is earlier than the one before it"),
        (64, 30.0, "tick 64: the frame is earlier than the one before it"),
        (69, np.nan, "tick 69: there is no time"),
    ],
)
def test_times_that_cannot_be(cache: Cache, tick: int, pts: float, told: str) -> None:
    """64 is the first tick of a record: times are compared across records."""
    key = f"{cache.videos[0]}/{tick // 64:05d}"
    with cache.array(key, "pts") as times:
        times[tick % 64] = pts
    assert_one(cache.problems(), f"vision-00000.tar, {key}: {told}")


def test_a_frame_may_be_shown_long_and_be_a_millisecond_late(cache: Cache) -> None:
    key, _ = first_key(cache)
    with cache.array(key, "pts") as times:
        times[20:50] = times[19]
        times[10] = 74 / 2 + 0.001
    assert cache.problems() == []


def test_ticks_that_the_ledger_does_not_call_unreadable(cache: Cache) -> None:
    video = unreadable(cache, 66, 70)
    key = f"vision-00000.tar, {video}/00001"
    for ticks, told in (
        ([[67, 70, ""]], "tick 66: there is no time, though the ledger does not call it unreadable"),
        ([[66, 69, ""], [69, 71, ""]], "tick 70: there is a time, though the ledger calls it unreadable"),
        ([], "4 ticks from tick 66 on: there is no time"),
    ):
        with cache.json("ledger/vision-00000.json") as entry:
            entry["videos"][video]["unreadable"] = ticks
        assert_one(cache.problems(), f"{key}: {told}")


def test_features_of_an_unreadable_tick(cache: Cache) -> None:
    video = unreadable(cache, 60, 70)
    with cache.array(f"{video}/00001", "vision") as features:
        features[2, 0, 0] = 1e-7  # the smallest there is
    assert_one(cache.problems(), f"{video}/00001: tick 66: the features are not 0, though it is unreadable")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ticks": 0}, "it has no tick"),
        ({"needed": 5}, "ticks were cached of 5 that are needed"),
        ({"unreadable": [[0, 10**9, ""]]}, "are unreadable"),
        ({"unreadable": [[9, 8, ""]]}, "are unreadable"),
        ({"unreadable": [[8, 9, ""], [3, 4, ""]]}, "are unreadable"),
        ({"ticks": 10**15, "needed": 10**15}, "'num_ticks': 64"),
    ],
    ids=str,
)
def test_an_entry_that_contradicts_itself(cache: Cache, change: dict[str, Any], told: str) -> None:
    video = cache.videos[0]
    with cache.json("ledger/vision-00000.json") as entry:
        entry["videos"][video] |= change
    problems = [problem for problem in cache.problems() if problem.startswith("vision-00000.tar, ")]
    assert video in problems[0]
    assert told in problems[0]


def test_a_record_that_is_missing(cache: Cache) -> None:
    key, _ = first_key(cache)
    with cache.files("vision-00000") as files:
        for name in [name for name in files if name.startswith(f"{key}.")]:
            del files[name]
    assert_one(cache.problems(), f"vision-00000.tar, {cache.videos[0]}: it has no record {key}")


def test_a_record_too_many(cache: Cache) -> None:
    key, _ = first_key(cache)
    with cache.files("vision-00000") as files:
        for name in [name for name in files if name.startswith(f"{key}.")]:
            files[name.replace(key, f"{cache.videos[0]}/00077")] = files[name]
    assert_one(
        cache.problems(), f"vision-00000.tar, {cache.videos[0]}/00077: the ledger says that its video has"
    )


def test_a_video_that_the_ledger_does_not_have(cache: Cache) -> None:
    key, _ = first_key(cache)
    with cache.files("vision-00000") as files:
        for name in [name for name in files if name.startswith(f"{key}.")]:
            files[name.replace(key, "foreign/00000")] = files[name]
    assert_one(cache.problems(), "vision-00000.tar, foreign/00000: its video is not among those")


def test_a_video_in_two_shards(cache: Cache) -> None:
    move(cache, cache.videos[1:])
    video = cache.videos[0]
    with cache.json("ledger/vision-00001.json") as entry:
        entry["videos"][video] = cache.entry("vision-00000")["videos"][video]
    records = {n: d for n, d in cache.read("vision-00000").items() if n.rpartition("/")[0] == video}
    with cache.files("vision-00001") as files:
        files |= records
    assert_one(cache.problems(), f"vision-00001.tar: the video {video} is in vision-00000.tar too")


@pytest.mark.parametrize(
    ("member", "change", "told"),
    [
        ("vision", lambda a: a.astype(np.float32), "its vision is float32 [64, 4, 128] in place of float16"),
        ("vision", lambda a: a[:63], "its vision is float16 [63, 4, 128] in place of float16 [64, 4, 128]"),
        ("vision", lambda a: a[:, :, :, None], "its vision is float16 [64, 4, 128, 1]"),
        ("vision", lambda a: np.array(["x"], object), "vision: "),
        ("pts", lambda a: a.astype(np.float32), "its pts is float32 [64] in place of float64 [64]"),
        ("pts", lambda a: np.append(a, a[-1]), "its pts is float64 [65] in place of float64 [64]"),
    ],
)
def test_arrays_of_another_kind(cache: Cache, member: str, change: Callable[..., Any], told: str) -> None:
    key, _where = first_key(cache)
    with cache.files("vision-00000") as files:
        name = f"{key}.{member}.npy"
        files[name] = npy(change(np.load(io.BytesIO(files[name]))))
    assert_one(cache.problems(), "vision-00000.tar, ", key, told)


@pytest.mark.parametrize(
    "meta",
    [
        {"first_tick": 0},
        {"num_ticks": 63},
        {"video_id": "another"},
        {"num_ticks": None},
        {"more": []},
        [],
        None,
        "x",
    ],
)
def test_a_record_whose_meta_is_anothers(cache: Cache, meta: Json) -> None:
    key, where = first_key(cache)
    with cache.files("vision-00000") as files:
        name = f"{key}.meta.json"
        files[name] = json.dumps(json.loads(files[name]) | meta if isinstance(meta, dict) else meta).encode()
    assert_one(cache.problems(), f"{where}: its meta is not ")


@pytest.mark.parametrize(("removed", "added"), [("pts.npy", None), ("meta.json", None), (None, "scale.npy")])
def test_a_record_with_other_members(cache: Cache, removed: str | None, added: str | None) -> None:
    key, where = first_key(cache)
    files = cache.read("vision-00000")
    records = [(name, data) for name, data in files.items() if name != f"{key}.{removed}"]
    if added:
        at = 1 + next(n for n, (name, _) in enumerate(records) if name.startswith(f"{key}."))
        records.insert(at, (f"{key}.{added}", npy(np.ones((64, 4, 1), np.float32))))
    cache.write("vision-00000", dict(records))
    assert_one(cache.problems(), f"{where}: it holds ", "in place of")


# ---- int8


@pytest.fixture
def int8(cache: Cache) -> Cache:
    """The cache as int8: half the features' bytes, and a scale a token."""
    files: Files = {}
    for name, data in cache.read("vision-00000").items():
        if name.endswith(".vision.npy"):
            features = np.load(io.BytesIO(data)).astype(np.float32)
            scale = np.abs(features).max(axis=2, keepdims=True) / np.float32(127)
            files[name] = npy(np.rint(features / scale).astype(np.int8))
            files[name.replace(".vision.", ".scale.")] = npy(scale)
        else:
            files[name] = data
    cache.write("vision-00000", files)
    with cache.json("cache.json") as fingerprint:
        fingerprint["dtype"] = "int8"
    return cache


def test_int8_features(int8: Cache) -> None:
    assert int8.problems() == []
    key, where = first_key(int8)
    for value, told in (
        (np.nan, "tick 67: the features are not finite"),
        (np.inf, "tick 67: the features are not finite"),
        (-600.0, "tick 67: the features are not finite, or too large for float16"),
        (0.1, None),
    ):
        with int8.array(key, "scale") as scale:
            scale[3, 1] = value
        if told:
            assert_one(int8.problems(), f"{where}: {told}")
    with int8.array(key, "scale") as scale:
        scale[3] = 0
    assert_one(int8.problems(), f"{where}: tick 67: the features are all 0")
    with int8.array(key, "scale") as scale:
        scale[3] = 0.1
    with int8.array(key, "vision") as features:
        features[3] = 0
    assert_one(int8.problems(), f"{where}: tick 67: the features are all 0")


def test_int8_features_that_differ_in_their_scale_only(int8: Cache) -> None:
    with int8.files("vision-00000") as files:
        for name in [
            n for n in files if n.startswith(int8.videos[1]) and n.endswith((".vision.npy", ".scale.npy"))
        ]:
            files[name] = npy(np.ones_like(np.load(io.BytesIO(files[name]))))
    assert_one(int8.problems(), int8.videos[1], "have the same features")
    with int8.array(f"{int8.videos[1]}/00000", "scale") as scale:
        scale[1, 0] = 2
    assert int8.problems() == []


# ---- labels


def a_session(cache: Cache) -> tuple[str, str]:
    """A session that speaks, with steps, and how problems with it begin."""
    session = next(s for s in sessions_of(cache) if any(cache.frames(s)["speak"].to_pylist()))
    return session, f"labels-00000.tar, {session}: "


def test_a_state_that_goes_back(cache: Cache) -> None:
    session, where = a_session(cache)
    table = cache.frames(session)
    states = np.array(table["dst_state"].to_pylist())
    row = 1 + int(np.flatnonzero((states[1:-1] > 0).any(axis=1))[0])
    changed = states.copy()
    changed[row + 1] = 0
    cache.set_column(session, "dst_state", changed.tolist())
    assert_one(cache.problems(), f"{where}tick {table['tick'][row + 1]}: a step goes back")


@pytest.mark.parametrize("state", [-1, 3])
def test_a_state_that_there_is_not(cache: Cache, state: int) -> None:
    session, where = a_session(cache)
    table = cache.frames(session)
    last = table["dst_state"].to_pylist()[-1]
    cache.set_cell(session, "dst_state", len(table) - 1, [state, *last[1:]])
    assert_one(
        cache.problems(), f"{where}tick {table['tick'][len(table) - 1]}: ", "a state that there is not"
    )


def test_spans_that_give_other_states(cache: Cache) -> None:
    """A step that starts two ticks later is wrong at two ticks."""
    session, where = a_session(cache)
    with cache.part(session, "steps") as steps:
        step = next(
            s for s in steps if s["spans"] and s["spans"][0]["end_s"] - s["spans"][0]["start_s"] > 1.5
        )
        start = step["spans"][0]["start_s"]
        step["spans"][0]["start_s"] += 1
    tick = int(np.ceil(start * 2 - 1e-6))
    assert_one(cache.problems(), f"{where}2 ticks from tick {tick} on: the state is not what the spans")


def test_a_first_state_that_is_not_the_spans(cache: Cache) -> None:
    """The state at the first tick is that of the spans, and an update where it is not all zeros."""
    session, where = a_session(cache)
    first = cache.part_of(session, "meta")["first_tick"]
    with cache.part(session, "steps") as steps:
        step = next(n for n, s in enumerate(steps) if s["spans"] and s["spans"][0]["start_s"] > first / 2 + 1)
        until = int(np.ceil(steps[step]["spans"][0]["start_s"] * 2 - 1e-6))
        steps[step]["spans"][0]["start_s"] = max(first / 2 - 0.4, 0)
    frames = cache.frames(session)
    states, transitions = (frames[name].to_pylist() for name in ("dst_state", "transitions"))
    for row in range(until - first):
        states[row][step] = 1
    transitions[0][step], transitions[until - first][step] = 1, transitions[until - first][step] & 2
    cache.set_column(session, "dst_state", states)
    cache.set_column(session, "transitions", transitions)
    cache.set_column(session, "dst_update", [any(row) for row in transitions])
    assert cache.problems() == []
    cache.set_cell(session, "dst_update", 0, False)
    assert_one(cache.problems(), f"{where}tick {first}: dst_update is not what changes")


@pytest.mark.parametrize("spans", [[[2, 1]], [[None, 1]], [[-1, 2]], [None], [[0, "x"]], {"a": 1}, "x", [3]])
def test_spans_that_are_not_times(cache: Cache, spans: Json) -> None:
    session, where = a_session(cache)
    as_spans = [dict(zip(("start_s", "end_s"), s, strict=True)) if isinstance(s, list) else s for s in spans]
    with cache.part(session, "steps") as steps:
        steps[0]["spans"] = as_spans if isinstance(spans, list) else spans
    assert_one(cache.problems(), where)


def test_an_update_and_transitions_that_are_not_the_states(cache: Cache) -> None:
    session, where = a_session(cache)
    table = cache.frames(session)
    updates, transitions = table["dst_update"].to_pylist(), table["transitions"].to_pylist()
    row = updates.index(False)
    tick = table["tick"][row].as_py()
    cache.set_cell(session, "dst_update", row, True)
    assert_one(cache.problems(), f"{where}tick {tick}: dst_update is not what changes in the state")
    cache.set_cell(session, "dst_update", row, False)
    cache.set_cell(session, "transitions", row, [1, *transitions[row][1:]])
    assert_one(cache.problems(), f"{where}tick {tick}: transitions is not what changes in the state")


def test_speaking_that_is_not_the_response(cache: Cache) -> None:
    session, where = a_session(cache)
    table = cache.frames(session)
    speaks = table["speak"].to_pylist()
    for row in (speaks.index(True), speaks.index(False)):
        cache.set_cell(session, "speak", row, not speaks[row])
        assert_one(cache.problems(), f"{where}tick {table['tick'][row]}: speak does not say")
        cache.set_cell(session, "speak", row, speaks[row])
    cache.set_cell(session, "response", speaks.index(True), "something else")
    assert_one(cache.problems(), f"{where}tick {table['tick'][speaks.index(True)]}: the response is not")


def spoken(cache: Cache, session: str) -> int:
    return next(n for n, turn in enumerate(cache.part_of(session, "turns")) if turn["role"] == "assistant")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": "something else"}, "the response is not what the turns there say"),
        ({"role": "user"}, "the response is not what the turns there say"),
        ({"role": "system"}, "is of 'system'"),
        ({"t_s": 0.25}, "is at 0.25 s, which belongs to another tick"),
        ({"t_s": float("nan")}, "is at nan s, which belongs to another tick"),
        ({"tick": 9999}, "is outside of the session's ticks"),
        ({"turn": 99}, "its turns are not those of this session, numbered"),
        ({"session_id": "another"}, "its turns are not those of this session"),
    ],
    ids=str,
)
def test_turns_that_do_not_fit(cache: Cache, change: dict[str, Any], told: str) -> None:
    session, where = a_session(cache)
    turn = spoken(cache, session)
    with cache.part(session, "turns") as turns:
        turns[turn] |= change
    assert_one(cache.problems(), where, told)


def test_two_turns_on_one_tick_are_joined(cache: Cache) -> None:
    session, where = a_session(cache)
    with cache.part(session, "turns") as turns:
        turn = turns[spoken(cache, session)]
        more = {**turn, "text": "And more."}
        turns.insert(turn["turn"] + 1, more)
        for number, each in enumerate(turns):
            each["turn"] = number
    assert_one(cache.problems(), f"{where}tick {turn['tick']}: the response is not")
    first = cache.part_of(session, "meta")["first_tick"]
    cache.set_cell(session, "response", turn["tick"] - first, f"{turn['text']} And more.")
    assert cache.problems() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tick_hz": 4.0}, "it has 4.0 ticks a second, the cache 2.0"),
        ({"num_steps": 99}, "its meta says 99"),
        ({"split": "tests"}, "split"),
        ({"rotation_deg": 90}, "it is rotated by 90 degrees, its video was cached with 0"),
        ({"video_id": "another"}, "its video another is not in the cache"),
        ({"session_id": "another"}, "another"),
        ({"num_ticks": 3}, "rows of frames, which is not what its meta says"),
        ({"num_ticks": 2**31 - 1}, "rows of frames"),
        ({"first_tick": 1}, "frames"),
        ({"goal": 3}, "sessions that are not rows"),
    ],
    ids=str,
)
def test_a_meta_that_does_not_fit(cache: Cache, change: dict[str, Any], told: str) -> None:
    session, where = next(
        (s, f"labels-00000.tar, {s}: ")
        for s in sessions_of(cache)
        if cache.part_of(s, "meta")["first_tick"] != 1
    )
    with cache.part(session, "meta") as meta:
        meta |= change
    problems = cache.problems()
    assert problems[0].startswith(where)
    assert told in problems[0]
    assert len(problems) == (2 if "split" in change else 1)  # its frames have the other one


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("session_id", "another", "tick {}: session_id is 'another'"),
        ("split", "other", "tick {}: split is 'other'"),
        ("tick", 12345, "frames"),
        ("dst_state", [], "steps"),
        ("transitions", [0], "steps"),
    ],
)
def test_frames_that_do_not_fit(cache: Cache, column: str, value: Any, told: str) -> None:
    session, where = a_session(cache)
    tick = cache.frames(session)["tick"][5].as_py()
    cache.set_cell(session, column, 5, value)
    assert_one(cache.problems(), where, told.format(tick))


def test_a_time_that_is_not_the_ticks(cache: Cache) -> None:
    session, where = a_session(cache)
    tick = cache.frames(session)["tick"][5].as_py()
    cache.set_cell(session, "t_s", 5, tick / 2 + 0.001)
    assert_one(cache.problems(), f"{where}tick {tick}: t_s is {tick / 2 + 0.001}")


@pytest.mark.parametrize("column", ["tick", "t_s", "speak", "dst_update", "session_id", "dst_state"])
def test_frames_that_lack_values(cache: Cache, column: str) -> None:
    session, _ = a_session(cache)
    cache.set_cell(session, column, 5, None)
    assert_one(cache.problems(), "labels-00000.tar, ", session, column)


def test_states_that_are_null(cache: Cache) -> None:
    session, _ = a_session(cache)
    table = cache.frames(session)
    index = table.schema.get_field_index("dst_state")
    field = table.schema.field("dst_state")
    values = table["dst_state"].combine_chunks()
    inner = values.flatten().to_pylist()
    holed = pa.ListArray.from_arrays(values.offsets, pa.array([None, *inner[1:]], pa.int8()), type=field.type)
    cache.set_frames(session, table.set_column(index, field, holed))
    assert_one(cache.problems(), "labels-00000.tar, ", session, "lacks values")


@pytest.mark.parametrize("change", ["columns", "order", "rows", "none", "bytes"])
def test_tables_of_another_kind(cache: Cache, change: str) -> None:
    session, _ = a_session(cache)
    table = cache.frames(session)
    match change:
        case "columns":
            cache.set_frames(session, table.drop_columns("mistake"))
        case "order":
            cache.set_frames(session, table.take(list(range(len(table)))[::-1]))
        case "rows":
            cache.set_frames(session, table.slice(0, len(table) - 1))
        case "none":
            cache.set_frames(session, table.slice(0, 0))
            with cache.part(session, "meta") as meta:
                meta["num_ticks"] = 0
        case "bytes":
            with cache.files("labels-00000") as files:
                files[f"{session}.frames.arrow"] = b"ARROW1 but not"
    assert_one(cache.problems(), "labels-00000.tar, ", session)


def test_a_session_with_other_members(cache: Cache) -> None:
    session, where = a_session(cache)
    with cache.files("labels-00000") as files:
        del files[f"{session}.turns.json"]
    assert_one(
        cache.problems(), f"{where}it holds frames, meta, steps in place of frames, meta, steps, turns"
    )


def test_a_session_whose_ticks_are_not_all_readable(cache: Cache) -> None:
    session, where = a_session(cache)
    meta = cache.part_of(session, "meta")
    labels = cache.read("labels-00000")
    first = meta["first_tick"]
    if meta["video_id"] != cache.videos[0]:
        pytest.fail("the sample's first session that speaks is on its second video")
    unreadable(cache, first + 3, first + 5)
    cache.write("labels-00000", {n: d for n, d in labels.items() if n.startswith(f"{session}.")})
    with cache.json("ledger/labels-00000.json") as entry:
        entry["failures"] = []
    assert_one(cache.problems(), f"{where}tick {first + 3}: {cache.videos[0]} is unreadable there")


def test_a_session_that_its_video_does_not_cover(cache: Cache) -> None:
    session = next(s for s in sessions_of(cache) if cache.part_of(s, "meta")["video_id"] == cache.videos[1])
    kept = {n: d for n, d in cache.read("labels-00000").items() if n.startswith(f"{session}.")}
    first = cache.part_of(session, "meta")["first_tick"]
    shorten(cache, cache.videos[1], 40)
    cache.write("labels-00000", kept)
    assert_one(
        cache.problems(), f"labels-00000.tar, {session}: tick {max(first, 40)}: ", "has 40 ticks in the cache"
    )


def test_a_session_that_failed_and_is_there(cache: Cache) -> None:
    session, where = a_session(cache)
    with cache.json("ledger/labels-00000.json") as entry:
        entry["failures"] = [{"id": session, "reason": "its video"}]
    assert_one(cache.problems(), f"{where}the session is there, though the ledger says")


def test_sessions_in_two_shards_and_in_the_wrong_one(cache: Cache, tables: Path) -> None:
    move(cache, cache.videos[1:])
    session = sessions_of(cache)[0]
    records = {n: d for n, d in cache.read("labels-00000").items() if n.startswith(f"{session}.")}
    with cache.files("labels-00001") as files:
        files |= records
    assert_one(cache.problems(tables), f"labels-00001.tar, {session}: the session is in labels-00000.tar too")
    with cache.files("labels-00000") as files:
        for name in records:
            del files[name]
    assert_one(
        cache.problems(tables),
        f"labels-00001.tar, {session}: its video {cache.videos[0]} is in vision-00000.tar, not in vision-00001.tar",
    )


# ---- against label tables


def change_table(
    tables: Path, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    path = tables / "assembly101" / f"{name}.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


@pytest.mark.parametrize(
    ("name", "column", "value", "part"),
    [
        ("sessions", "goal", "another goal", "meta"),
        ("videos", "uri", "/elsewhere.mp4", "meta"),
        ("turns", "text", "another text", "turns"),
        ("turns", "labels", ["new"], "turns"),
        ("steps", "name", "another name", "steps"),
        ("frames", "mistake", True, "frames"),
    ],
)
def test_tables_that_have_changed(
    cache: Cache, tables: Path, name: str, column: str, value: Any, part: str
) -> None:
    change_table(tables, name, lambda rows: [rows[0] | {column: value}, *rows[1:]])
    session_rows = pq.read_table(tables / "assembly101" / "sessions.parquet").to_pylist()
    row = pq.read_table(tables / "assembly101" / f"{name}.parquet").to_pylist()[0]
    ids = (
        [row["session_id"]]
        if name != "videos"
        else [r["session_id"] for r in session_rows if r["video_id"] == row["video_id"]]
    )
    told = f"other {part} in the cache; run 'dst cache-features --labels-only'"
    assert_one(
        cache.problems(tables), str(tables), told, *([ids[0]] if len(ids) == 1 else [f"{len(ids)} sessions"])
    )
    assert cache.problems() == []


def test_sessions_that_only_one_of_them_has(cache: Cache, tables: Path) -> None:
    sessions = sorted(sessions_of(cache))
    with cache.files("labels-00000") as files:
        for name in [name for name in files if name.startswith(f"{sessions[0]}.")]:
            del files[name]
    assert_one(cache.problems(tables), f"{tables}: {sessions[0]} has no record in the cache")
    change_table(tables, "sessions", lambda rows: [r for r in rows if r["session_id"] in sessions[1:-1]])
    assert_one(cache.problems(tables), f"{tables}: {sessions[-1]} has no row in the tables", "--labels-only")


def test_tables_on_another_clock(cache: Cache, tables: Path) -> None:
    change_table(tables, "sessions", lambda rows: [row | {"tick_hz": 4.0} for row in rows])
    assert_one(cache.problems(tables), f"{tables}: it has 4.0 ticks a second, the cache 2.0")


def test_no_tables_are_the_users_mistake(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label tables"):
        verify(cache.folder, tmp_path / "nothing")


# ---- h5


@pytest.fixture
def h5(cache: Cache) -> Cache:
    """The cache as HDF5."""
    for stem in ("vision-00000", "labels-00000"):
        reader = reader_of(cache.folder / f"{stem}.tar")
        with writer_of("h5", cache.folder / f"{stem}.h5") as writer:
            for key in reader.keys:
                read = {"frames": reader.table, "vision": reader.array, "pts": reader.array}
                writer.add(key, {m: read.get(m, reader.json)(key, m) for m in reader.members(key)})
        (cache.folder / f"{stem}.tar").unlink()
        cache.sign(f"{stem}.h5")
    with cache.json("cache.json") as fingerprint:
        fingerprint["storage"] = "h5"
    return cache


@contextmanager
def dataset(cache: Cache, stem: str, name: str) -> Iterator[Any]:
    """A dataset of an HDF5 shard, changed in place."""
    with h5py.File(cache.folder / f"{stem}.h5", "r+") as file:
        yield file[name]
    cache.sign(f"{stem}.h5")


def set_text(data: h5py.Dataset, change: Callable[[str], str]) -> None:
    before = data[()].decode()
    after = change(before).encode()
    data[()] = np.array(after.ljust(data.dtype.itemsize), data.dtype)


def test_h5_is_checked_as_tar_is(h5: Cache, tables: Path) -> None:
    assert h5.problems(tables) == []
    video, where = h5.videos[0], f"vision-00000.h5, {h5.videos[0]}/00001: "
    with dataset(h5, "vision-00000", f"{video}/00001/vision") as features:
        kept = features[5, 2, 7]
        features[5, 2, 7] = np.nan
    assert_one(h5.problems(tables), f"{where}tick 69: the features are not finite")
    with dataset(h5, "vision-00000", f"{video}/00001/vision") as features:
        features[5, 2, 7] = kept
    with dataset(h5, "vision-00000", f"{video}/00001/pts") as pts:
        kept, pts[5] = pts[5], 40.0
    assert_one(h5.problems(tables), f"{where}tick 69: the frame is later than the tick")
    with dataset(h5, "vision-00000", f"{video}/00001/pts") as pts:
        pts[5] = kept
    with dataset(h5, "vision-00000", f"{video}/00001/meta") as meta:
        set_text(meta, lambda text: text.replace('"first_tick":64', '"first_tick":0'))
    assert_one(h5.problems(tables), f"{where}its meta is not ")


def test_labels_in_h5_are_checked_as_in_tar(h5: Cache) -> None:
    with h5py.File(h5.folder / "labels-00000.h5") as file:
        metas: list[dict[str, Any]] = []
        file.visititems(
            lambda name, node: metas.append(json.loads(node[()])) if name.endswith("/meta") else None
        )
    meta = metas[0]
    session, where = meta["session_id"], f"labels-00000.h5, {meta['session_id']}: "
    row = meta["num_ticks"] - 1
    with dataset(h5, "labels-00000", f"{session}/frames/dst_state") as states:
        kept = states[row]
        states[row] = 3
    assert_one(h5.problems(), f"{where}tick {meta['first_tick'] + row}: a step goes back, or has a state")
    with dataset(h5, "labels-00000", f"{session}/frames/dst_state") as states:
        states[row] = kept
    with dataset(h5, "labels-00000", f"{session}/turns") as turns:
        set_text(turns, lambda text: text.replace('"role":"assistant"', '"role":"system"', 1))
    assert_one(h5.problems(), where, "is of 'system'")


def test_an_h5_file_that_breaks_off(h5: Cache) -> None:
    path = h5.folder / "labels-00000.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one(h5.problems(), "labels-00000.h5: it has ")
    h5.sign("labels-00000.h5")
    assert_one(h5.problems(), "labels-00000.h5: ", "not a whole shard")


# ---- a stranger's cache


ODD = (None, True, -1, 2**70, float("nan"), "\x1b[31m\n", [], {}, [[]])


@pytest.mark.parametrize("part", ["meta", "steps", "turns"])
def test_whatever_a_session_holds_is_told(cache: Cache, tables: Path, part: str) -> None:
    session, _ = a_session(cache)
    files = {n: d for n, d in cache.read("labels-00000").items() if n.startswith(f"{session}.")}
    name = f"{session}.{part}.json"
    whole = json.loads(files[name])
    variants = [*ODD]
    for column, value in (whole if isinstance(whole, dict) else whole[0]).items():
        for odd in ODD:
            if odd != value:
                changed = (whole if isinstance(whole, dict) else whole[0]) | {column: odd}
                variants.append(changed if isinstance(whole, dict) else [changed, *whole[1:]])
    for variant in variants:
        cache.write("labels-00000", {**files, name: json.dumps(variant).encode()})
        problems = cache.problems(tables)
        assert any(session in problem for problem in problems), variant
        assert all(problem.isprintable() for problem in problems)


@pytest.mark.parametrize(
    "name", ["cache.json", "plan.json", "ledger/vision-00000.json", "ledger/labels-00000.json"]
)
def test_whatever_the_small_files_hold_is_told(cache: Cache, name: str) -> None:
    whole = json.loads((cache.folder / name).read_text())
    variants = [*ODD, *({**whole, key: odd} for key in whole for odd in ODD), {**whole, "odd": 1}]
    if "videos" in whole:
        video = cache.videos[0]
        fields = whole["videos"][video]
        variants += [
            {**whole, "videos": {**whole["videos"], video: {**fields, key: odd}}}
            for key in fields
            for odd in ODD
        ]
        variants.append({**whole, "videos": {"\x1b[31m": fields}})
    for variant in variants:
        (cache.folder / name).write_text(json.dumps(variant))
        report = verify(cache.folder)
        assert all(told.isprintable() for told in [*report.problems, *report.notes])

"""The feature cache end to end: read with stock tools, against transformers on frames decoded here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from little import make_video, write_tables
from numpy.typing import NDArray
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from pipeline.cache import Summary, cache_features, dry_run
from pipeline.engines import Here
from pipeline.estimate import Estimate
from pipeline.ledger import Failure, Unreadable
from pipeline.plan import LabelTables, plan_shards
from pipeline.shards import ShardCache
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from schemas.tables import TABLES, LabelWriter, validate_labels

REAL_VIDEOS = sorted((Path(__file__).parents[2] / "shared" / "samples" / "videos").glob("*.*"))
SOURCE = "assembly101"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label tables of three short videos, each with two sessions; the second video takes two chunks."""
    folder = tmp_path_factory.mktemp("few")
    videos = [
        make_video(folder / "videos", name, ticks, ticks) for name, ticks in (("a", 12), ("b", 70), ("c", 9))
    ]
    return write_tables(folder / "labels", videos, source=SOURCE)


SMALL: Any = 0.02
"""MB of a shard, which has room for one of the first two videos of ``few``."""


def made(labels: Path, out: Path, encoder: VisionEncoder, **options: Any) -> Summary:
    return cache_features(labels, out, Here(encoder), CacheOptions(**({"workers": 2} | options)))


def rows_of(labels: Path, name: str, source: str = SOURCE) -> Rows:
    return pq.read_table(labels / source / f"{name}.parquet").to_pylist()


def unchanged(name: str, rows: Rows) -> Rows:
    return rows


def some_labels(
    labels: Path,
    out: Path,
    videos: slice,
    source: str = SOURCE,
    change: Callable[[str, Rows], Rows] = unchanged,
) -> Path:
    """Tables of some of the videos (in order of id) and their sessions, changed by hand."""
    chosen = {
        row["video_id"] for row in sorted(rows_of(labels, "videos"), key=lambda r: r["video_id"])[videos]
    }
    sessions = {row["session_id"] for row in rows_of(labels, "sessions") if row["video_id"] in chosen}
    (out / source).mkdir(parents=True, exist_ok=True)
    for name, schema in TABLES.items():
        rows = [
            row
            for row in rows_of(labels, name)
            if row.get("video_id", next(iter(chosen))) in chosen
            and row.get("session_id", next(iter(sessions))) in sessions
        ]
        table = pa.Table.from_pylist(change(name, rows), schema=schema)
        pq.write_table(table, out / source / f"{name}.parquet")
    return out


def with_uris(uris: dict[str, Path]) -> Callable[[str, Rows], Rows]:
    def change(name: str, rows: Rows) -> Rows:
        if name == "videos":
            return [row | {"uri": str(uris.get(row["video_id"], row["uri"]))} for row in rows]
        return rows

    return change


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def every_file(folder: Path) -> dict[str, str]:
    """With the ledger's; the lock is no part of a cache."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / ".lock")
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def ledger(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "ledger").iterdir())}


def ledger_failures(folder: Path) -> list[Failure]:
    return [Failure(**each) for entry in ledger(folder).values() for each in entry.get("failures", [])]


def records(path: Path) -> Rows:
    return list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())


# ---- an independent reading: all frames through PyAV, chosen by their times, through transformers


def reference_features(
    model_folder: Path, uri: str, first_tick: int, num_ticks: int, hz: int
) -> tuple[NDArray[np.float32], list[float]]:
    frames: list[av.VideoFrame] = []
    with av.open(uri) as container:
        frames = list(container.decode(video=0))
    times = [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]
    chosen = [
        max(n for n, time in enumerate(times) if time <= Fraction(tick, hz) + Fraction(1, 1000))
        for tick in range(first_tick, first_tick + num_ticks)
    ]
    processor = SmolVLMImageProcessorPil.from_pretrained(model_folder)
    images = [[frames[number].to_ndarray(format="rgb24")] for number in chosen]
    pixels = processor(images, do_image_splitting=False, return_tensors="pt")["pixel_values"]
    model = SmolVLMForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        features = model.get_image_features(pixels).pooler_output
    return np.stack([one.numpy() for one in features]), [float(times[number]) for number in chosen]


def assert_close(got: NDArray[Any], wanted: NDArray[np.float32]) -> None:
    """Within half a step of float16, and a little for the sums in another order."""
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=2**-11, atol=2e-5)


@pytest.mark.parametrize("late", [False, True], ids=["first-session", "second-session-of-its-video"])
def test_features_are_the_models(labels: Path, tiny_model: Path, shards: Path, late: bool) -> None:
    sessions = rows_of(labels, "sessions")
    videos = {row["video_id"]: row for row in rows_of(labels, "videos")}
    session = max(sessions, key=lambda s: s["first_tick"]) if late else sessions[0]
    first, count = session["first_tick"], session["num_ticks"]
    assert first // 64 != (first + count - 1) // 64  # the session crosses a chunk's border
    assert (first > 64) == late
    uri = videos[session["video_id"]]["uri"]
    wanted, times = reference_features(tiny_model, uri, first, count, 2)
    cache = ShardCache(shards)
    got = cache.features(session["video_id"], first, count)
    assert_close(got, wanted)
    assert np.abs(np.diff(wanted, axis=0)).max(axis=(1, 2)).max() > 0.1  # ticks do differ
    cut = [cache.features(session["video_id"], first + at, 7) for at in range(0, count - 7, 7)]
    np.testing.assert_array_equal(np.concatenate(cut), got[: 7 * len(cut)])
    stored = {
        record["meta.json"]["first_tick"]: record["pts.npy"]
        for path in sorted(shards.glob("vision-*.tar"))
        for record in records(path)
        if record["meta.json"]["video_id"] == session["video_id"]
    }
    pts = np.concatenate([stored[at] for at in sorted(stored)])[first : first + count]
    assert pts.tolist() == pytest.approx(times, abs=1e-9)


def test_stock_webdataset_reads_vision(labels: Path, shards: Path, encoder: VisionEncoder) -> None:
    needed = {row["video_id"]: row["last_tick_needed"] + 1 for row in rows_of(labels, "videos")}
    found = [record for path in sorted(shards.glob("vision-*.tar")) for record in records(path)]
    ticks: dict[str, int] = {}
    for record in found:
        video, chunk = record["__key__"].rsplit("/", 1)
        meta, vision, pts = record["meta.json"], record["vision.npy"], record["pts.npy"]
        assert set(record) == {"__key__", "__url__", "__local_path__", "meta.json", "vision.npy", "pts.npy"}
        assert meta == {"video_id": video, "first_tick": 64 * int(chunk), "num_ticks": len(vision)}
        assert meta["first_tick"] == ticks.get(video, 0)
        assert vision.dtype == np.float16
        assert vision.shape == (len(pts), 4, encoder.dim)
        assert len(vision) == min(64, needed[video] - meta["first_tick"])
        assert pts.dtype == np.float64
        at = (np.arange(len(pts)) + meta["first_tick"]) / 2.0
        assert ((pts <= at + 0.001) & (pts > at - 0.05)).all()
        ticks[video] = meta["first_tick"] + len(vision)
    assert ticks == needed
    assert ShardCache(shards).num_ticks(max(needed, key=needed.__getitem__)) == max(needed.values())


def test_stock_webdataset_reads_labels(labels: Path, shards: Path) -> None:
    tables = {name: rows_of(labels, name) for name in ("sessions", "videos", "steps", "turns", "frames")}
    videos = {row["video_id"]: row for row in tables["videos"]}
    sessions = {row["session_id"]: row for row in tables["sessions"]}
    found = {r["__key__"]: r for path in sorted(shards.glob("labels-*.tar")) for r in records(path)}
    assert sorted(found) == sorted(sessions)
    assert len(sessions) == 18
    cache = ShardCache(shards)
    assert cache.session_ids == sorted(sessions)
    for session_id, record in found.items():
        video = videos[sessions[session_id]["video_id"]]
        place = {name: video[name] for name in ("recording_id", "uri", "rotation_deg")}
        assert record["meta.json"] == sessions[session_id] | place
        of_session = {
            name: [row for row in tables[name] if row["session_id"] == session_id]
            for name in ("steps", "turns", "frames")
        }
        assert record["steps.json"] == of_session["steps"]
        assert record["turns.json"] == of_session["turns"]
        frames = pa.ipc.open_file(record["frames.arrow"]).read_all()
        assert frames.to_pylist() == of_session["frames"]
        ours = cache.session(session_id)
        assert (ours.meta, ours.steps, ours.turns) == tuple(
            record[f"{part}.json"] for part in ("meta", "steps", "turns")
        )
        assert ours.frames.equals(frames)
        state = ours.column("dst_state")
        assert (state.dtype, state.shape) == (np.int8, (ours.num_ticks, len(ours.steps)))
        assert state.tolist() == [row["dst_state"] for row in of_session["frames"]]
        assert ours.column("speak").tolist() == [row["speak"] for row in of_session["frames"]]


def test_ticks_that_are_not_there(labels: Path, shards: Path) -> None:
    cache = ShardCache(shards)
    video = min(rows_of(labels, "videos"), key=lambda row: row["video_id"])
    end = video["last_tick_needed"] + 1
    assert len(cache.features(video["video_id"], 0, end)) == cache.num_ticks(video["video_id"]) == end
    with pytest.raises(UserError, match=f"has no features of .* at tick {end}; run 'dst cache-features'"):
        cache.features(video["video_id"], 0, end + 1)
    with pytest.raises(UserError, match=r"has no features of nowhere at tick 0"):
        cache.features("nowhere", 0, 1)
    assert cache.num_ticks("nowhere") == 0


# ---- running it again


def test_finished_shards_are_kept(shards: Path, labels: Path, encoder: VisionEncoder) -> None:
    before = every_file(shards)
    times = {
        path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.name not in (".lock", ".work")
    }
    told: list[Estimate] = []
    passed: list[int] = []
    options = CacheOptions()
    summary = cache_features(
        labels, shards, Here(encoder), options, on_estimate=told.append, on_tick=passed.append
    )
    assert (summary.shards_made, summary.shards_kept, summary.ticks, summary.failures) == (0, 1, 0, [])
    assert every_file(shards) == before
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path in times} == times
    assert sorted(before) == [
        "cache.json",
        "labels-00000.tar",
        "ledger/labels-00000.json",
        "ledger/vision-00000.json",
        "plan.json",
        "vision-00000.tar",
    ]
    ticks = sum(row["last_tick_needed"] + 1 for row in rows_of(labels, "videos"))
    [estimate] = told
    assert (estimate.ticks, estimate.ticks_to_encode, sum(passed)) == (ticks, 0, ticks)
    assert (estimate.shards, estimate.shards_to_make, estimate.bytes_to_write) == (1, 0, 0)


def test_the_ledger_tells_what_is_there(labels: Path, shards: Path) -> None:
    entries = ledger(shards)
    for entry in entries.values():
        path = shards / entry["file"]
        assert (entry["sha256"], entry["bytes"]) == (sha256(path), path.stat().st_size)
    rows = rows_of(labels, "videos")
    videos = entries["vision-00000"]["videos"]
    assert list(videos) == sorted(row["video_id"] for row in rows)
    for row in rows:
        entry, needed = videos[row["video_id"]], row["last_tick_needed"] + 1
        assert (entry["ticks"], entry["needed"], entry["rotation_deg"]) == (
            needed,
            needed,
            row["rotation_deg"],
        )
    assert len({entry["identity"] for entry in videos.values()}) == len(rows)


def test_a_fresh_run_gives_the_same_bytes(few: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever frames share a batch, and in whatever order videos are decoded."""
    made(few, tmp_path / "one", VisionEncoder(tiny_model, "cpu"), workers=1)
    made(few, tmp_path / "other", VisionEncoder(tiny_model, "cpu", batch_size=5), workers=3)
    one, other = every_file(tmp_path / "one"), every_file(tmp_path / "other")
    assert one.pop("ledger/vision-00000.json") != other.pop("ledger/vision-00000.json")
    assert one == other
    told, told_too = ledger(tmp_path / "one"), ledger(tmp_path / "other")
    assert (told["vision-00000"].pop("batch_size"), told_too["vision-00000"].pop("batch_size")) == (16, 5)
    assert told == told_too


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("batches", [0, 2, 4])
def test_a_run_that_is_interrupted_and_repeated(
    few: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """After a number of batches; what a run leaves behind that was killed harder is in `test_unbreakable`."""
    encoder = VisionEncoder(tiny_model, "cpu")
    little, out = some_labels(few, tmp_path / "labels", slice(0, 2)), tmp_path / "broken"
    made(little, tmp_path / "whole", encoder, shard_mb=SMALL)
    assert len(files(tmp_path / "whole", "*.tar")) == 4
    done: list[int] = []
    begin = VisionEncoder.start

    def interrupted(self: VisionEncoder, frames: NDArray[np.uint8]) -> Any:
        if len(done) == batches:
            raise Interrupted
        done.append(len(frames))
        return begin(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "start", interrupted)
        with pytest.raises(Interrupted):
            made(little, out, encoder, shard_mb=SMALL)
    there, whole = every_file(out), every_file(tmp_path / "whole")
    assert there.items() <= whole.items()  # what is there by its name is whole
    assert len(there) < len(whole)
    assert list((out / ".work").iterdir()) == []
    assert made(little, out, encoder, shard_mb=SMALL).failures == []
    assert every_file(out) == whole


@pytest.mark.parametrize("gone", ["vision-00000", "labels-00000"])
def test_a_file_that_the_ledger_does_not_know(
    few: Path, encoder: VisionEncoder, tmp_path: Path, gone: str
) -> None:
    """It may be anything: it is made again."""
    little, out = some_labels(few, tmp_path / "labels", slice(1, 2)), tmp_path / "out"
    made(little, out, encoder)
    before = every_file(out)
    (out / "ledger" / f"{gone}.json").unlink()
    (out / f"{gone}.tar").write_bytes(b"half a shard")
    summary = made(little, out, encoder)
    assert (summary.shards_made, summary.shards_kept) == ((1, 0) if gone == "vision-00000" else (0, 1))
    assert every_file(out) == before


def test_a_ledger_of_something_else(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    little, out = some_labels(few, tmp_path / "labels", slice(1, 2)), tmp_path / "out"
    made(little, out, encoder)
    before, path = every_file(out), out / "ledger" / "vision-00000.json"
    text = path.read_text()
    for wrong in (text[: len(text) // 2], "{}", text.replace('"bytes":', '"bytes":-')):
        path.write_text(wrong)
        with pytest.raises(
            UserError, match=r"ledger/vision-00000\.json is not an entry .*; remove it, and its shard"
        ):
            made(little, out, encoder)
    path.write_text(text.replace('"file":"vision-00000.tar"', '"file":"vision-00001.tar"'))
    with pytest.raises(UserError, match=r"ledger/vision-00000\.json is about 'vision-00001\.tar'; remove it"):
        made(little, out, encoder)
    path.unlink()
    assert made(little, out, encoder).shards_made == 1
    assert every_file(out) == before


def test_a_shard_that_was_removed_is_made_again(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    little, out = some_labels(few, tmp_path / "labels", slice(0, 1)), tmp_path / "out"
    made(little, out, encoder)
    before = files(out, "*.tar")
    (out / "vision-00000.tar").unlink()
    assert made(little, out, encoder).shards_made == 1
    (out / "labels-00000.tar").unlink()
    assert made(little, out, encoder).shards_kept == 1
    assert files(out, "*.tar") == before
    (out / "vision-00000.tar").write_bytes((out / "vision-00000.tar").read_bytes()[:-1])
    assert made(little, out, encoder).shards_made == 1
    assert files(out, "*.tar") == before


def test_a_folder_of_something_else(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    little, out = some_labels(few, tmp_path / "labels", slice(1, 2)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for run in (
        lambda: made(little, out, encoder),
        lambda: dry_run(little, out, Here(encoder), CacheOptions()),
    ):
        with pytest.raises(UserError, match=r"holds 'thesis\.tex' but no cache\.json, .* give another --out"):
            run()
    assert list(every_file(out)) == ["thesis.tex"]


def test_other_settings_are_refused(
    shards: Path, labels: Path, tiny_model: Path, tmp_path: Path, encoder: VisionEncoder
) -> None:
    before = every_file(shards)
    with pytest.raises(UserError, match=r"tokens_per_frame: 4 there, 1 now.*another --out"):
        made(labels, shards, VisionEncoder(tiny_model, "cpu", tokens_per_frame=1))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(
        UserError, match=r"preprocessing: .*\[0\.5, 0\.5, 0\.5\].* there, .*\[0\.4, 0\.5, 0\.5\]"
    ):
        made(labels, shards, VisionEncoder(other, "cpu"))
    weights = bytearray((tiny_model / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    place = json.loads(weights[8 : 8 + header])["model.connector.modality_projection.proj.weight"]
    weights[8 + header + place["data_offsets"][0]] ^= 1
    shutil.copy(tiny_model / "preprocessor_config.json", other)
    (other / "model.safetensors").write_bytes(weights)
    changed = VisionEncoder(other, "cpu")
    with pytest.raises(UserError, match=f"vision_sha256: {encoder.sha256} there, {changed.sha256} now"):
        made(labels, shards, changed)
    slow = some_labels(labels, tmp_path / "slow", slice(0, 1), change=with_rate(4.0))
    with pytest.raises(UserError, match=r"tick_hz: 2\.0 there, 4\.0 now"):
        made(slow, shards, encoder)
    with pytest.raises(UserError, match=r"dtype: float16 there, int8 now; format: tar there, h5 now"):
        made(labels, shards, encoder, dtype="int8", storage="h5")
    assert every_file(shards) == before


def with_rate(hz: float) -> Callable[[str, Rows], Rows]:
    def change(name: str, rows: Rows) -> Rows:
        return [row | {"tick_hz": hz} for row in rows] if name == "sessions" else rows

    return change


def test_pooled_tokens(labels: Path, shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    little = some_labels(labels, tmp_path / "labels", slice(0, 1))
    made(little, tmp_path / "out", VisionEncoder(tiny_model, "cpu", tokens_per_frame=1))
    [video] = rows_of(little, "videos")
    pooled = ShardCache(tmp_path / "out").features(video["video_id"], 0, 80)
    every = ShardCache(shards).features(video["video_id"], 0, 80)
    assert pooled.shape == (80, 1, every.shape[2])
    np.testing.assert_allclose(pooled[:, 0], every.astype(np.float32).mean(axis=1), rtol=2e-3, atol=4e-3)


# ---- relabelling


def test_new_labels_leave_the_vision_shards(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    out, tables = tmp_path / "out", tmp_path / "labels"
    made(some_labels(few, tables, slice(0, 2)), out, encoder)
    before, stamp = files(out, "*.tar"), (out / "vision-00000.tar").stat().st_mtime_ns

    def another_word(name: str, rows: Rows) -> Rows:
        return [rows[0] | {"text": "Quite another word."}, *rows[1:]] if name == "turns" else rows

    some_labels(few, tables, slice(0, 2), change=another_word)
    summary = made(tables, out, encoder)
    assert (summary.ticks, summary.shards_kept, summary.failures) == (0, 1, [])
    after = files(out, "*.tar")
    assert after["vision-00000.tar"] == before["vision-00000.tar"]
    assert (out / "vision-00000.tar").stat().st_mtime_ns == stamp
    assert after["labels-00000.tar"] != before["labels-00000.tar"]
    turns = [turn for record in records(out / "labels-00000.tar") for turn in record["turns.json"]]
    assert [turn["text"] for turn in turns].count("Quite another word.") == 1
    some_labels(few, tables, slice(0, 2))
    made(tables, out, encoder)
    assert files(out, "*.tar") == before


# ---- what fails


def break_inside(video: Path, copy: Path) -> Path:
    """Zeros in place of a picture at three quarters of the video."""
    with av.open(str(video)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    picture = max(packets[len(packets) * 3 // 4 :], key=len)
    data = video.read_bytes()
    assert data.count(picture) == 1
    copy.write_bytes(data.replace(picture, bytes(len(picture))))
    return copy


@pytest.mark.parametrize("damage", ["missing", "no video"])
def test_a_video_that_fails(few: Path, encoder: VisionEncoder, tmp_path: Path, damage: str) -> None:
    """The first of two, which holds two sessions. With the video back, ``retry_failed`` mends all."""
    video = min(rows_of(few, "videos"), key=lambda row: row["video_id"])
    path = tmp_path / "video.mp4"
    if damage == "no video":
        path.write_text("<html>Not found</html>")
    change = with_uris({video["video_id"]: path})
    tables = some_labels(few, tmp_path / "labels", slice(0, 2), change=change)
    made(some_labels(few, tmp_path / "without", slice(1, 2)), tmp_path / "alone", encoder)

    out = tmp_path / "out"
    summary = made(tables, out, encoder)
    of_it = [row["session_id"] for row in rows_of(tables, "sessions") if row["video_id"] == video["video_id"]]
    assert [failure.id for failure in summary.failures] == [video["video_id"], *sorted(of_it)]
    assert {"missing": f"{path} is not there", "no video": "cannot be opened"}[damage] in summary.failures[
        0
    ].reason
    reason = f"its video {video['video_id']} is not in the cache"
    assert {failure.reason for failure in summary.failures[1:]} == {reason}
    assert sorted(ledger_failures(out), key=str) == sorted(summary.failures, key=str)
    # the shards hold the others as if it had never been there
    assert files(out, "*.tar") == files(tmp_path / "alone", "*.tar")
    with tarfile.open(out / "vision-00000.tar") as tar:
        assert not [name for name in tar.getnames() if name.startswith(video["video_id"])]

    again = made(tables, out, encoder)  # kept, and still told
    assert (again.shards_made, again.shards_kept, again.failures) == (0, 1, summary.failures)
    broken = every_file(out)
    still = made(tables, out, encoder, retry_failed=True)
    assert (still.shards_made, still.ticks, still.failures) == (1, 0, summary.failures)
    assert every_file(out) == broken

    shutil.copy(video["uri"], path)
    mended = made(tables, out, encoder, retry_failed=True)
    assert (mended.shards_made, mended.ticks, mended.failures) == (1, video["last_tick_needed"] + 1, [])
    made(tables, tmp_path / "whole", encoder)
    assert every_file(out) == every_file(tmp_path / "whole")
    assert made(tables, out, encoder, retry_failed=True).shards_kept == 1


def test_a_video_that_is_damaged_inside(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """Ticks that cannot be read are told, and cost the session that they are in; all else is there."""
    video = min(rows_of(labels, "videos"), key=lambda row: row["video_id"])
    path = break_inside(Path(video["uri"]), tmp_path / "video.mp4")
    tables = some_labels(
        labels, tmp_path / "labels", slice(0, 1), change=with_uris({video["video_id"]: path})
    )
    early, late = sorted(rows_of(tables, "sessions"), key=lambda row: row["first_tick"])
    summary = made(tables, tmp_path / "out", encoder)
    [unreadable] = ledger(tmp_path / "out")["vision-00000"]["videos"][video["video_id"]]["unreadable"]
    first, end, reason = Unreadable(*unreadable)
    assert early["first_tick"] + early["num_ticks"] <= first < end <= video["last_tick_needed"]
    assert str(path) in reason
    told = f"{video['video_id']}: ticks {first} to {end - 1} cannot be read ({reason})"
    assert summary.notes == [told]
    told = f"ticks {first} to {end - 1} of {video['video_id']} cannot be read: {reason}"
    assert summary.failures == [Failure(id=late["session_id"], reason=told)]
    made(some_labels(labels, tmp_path / "sound", slice(0, 1)), tmp_path / "whole", encoder)
    broken, whole = ShardCache(tmp_path / "out"), ShardCache(tmp_path / "whole")
    assert broken.session_ids == [early["session_id"]]
    count = video["last_tick_needed"] + 1
    got, wanted = (cache.features(video["video_id"], 0, count) for cache in (broken, whole))
    there = broken.readable(video["video_id"], 0, count)
    assert there.tolist() == [not first <= tick < end for tick in range(count)]
    np.testing.assert_array_equal(got[there], wanted[there])
    assert not got[~there].any()
    pts = np.concatenate([record["pts.npy"] for record in records(tmp_path / "out" / "vision-00000.tar")])
    assert np.isnan(pts).tolist() == (~there).tolist()


def test_retrying_leaves_other_shards(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    ids = sorted(row["video_id"] for row in rows_of(few, "videos"))
    gone = with_uris({ids[0]: tmp_path / "video.mp4"})
    tables = some_labels(few, tmp_path / "labels", slice(0, 2), change=gone)
    summary = made(tables, tmp_path / "out", encoder, shard_mb=SMALL)
    assert summary.shards_made == 2
    retried = made(tables, tmp_path / "out", encoder, shard_mb=SMALL, retry_failed=True)
    assert (retried.shards_made, retried.shards_kept) == (1, 1)


def test_all_videos_fail(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    ids = [row["video_id"] for row in rows_of(few, "videos")]
    nowhere = with_uris(dict.fromkeys(ids, tmp_path / "gone.mp4"))
    tables = some_labels(few, tmp_path / "labels", slice(0, 2), change=nowhere)
    summary = made(tables, tmp_path / "out", encoder)
    assert len(summary.failures) == 2 + len(rows_of(tables, "sessions"))
    assert records(tmp_path / "out" / "vision-00000.tar") == []
    with pytest.raises(UserError, match="holds no finished session; run 'dst cache-features'"):
        ShardCache(tmp_path / "out")


def test_labels_beyond_the_video(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """The later session of a video needs more ticks than there are; the earlier one is cached all the same."""
    both = slice(2, 3)
    sessions = rows_of(some_labels(few, tmp_path / "plain", both), "sessions")
    early, late = sorted(sessions, key=lambda row: row["first_tick"])
    last = late["first_tick"] + late["num_ticks"] - 1 + 1000

    def longer(name: str, rows: Rows) -> Rows:
        if name == "videos":
            return [row | {"last_tick_needed": last} for row in rows]
        if name == "sessions":
            more = {late["session_id"]: {"num_ticks": late["num_ticks"] + 1000}}
            return [row | more.get(row["session_id"], {}) for row in rows]
        return rows

    tables = some_labels(few, tmp_path / "labels", both, change=longer)
    summary = made(tables, tmp_path / "out", encoder)
    with av.open(rows_of(tables, "videos")[0]["uri"]) as container:
        frames = list(container.decode(video=0))
    end = (frames[-1].pts + frames[-1].duration - frames[0].pts) * frames[-1].time_base
    ticks = next(k for k in range(10_000) if Fraction(k, 2) >= end)
    reason = f"needs {last + 1} ticks of {late['video_id']}, the video has {ticks}"
    assert summary.failures == [Failure(id=late["session_id"], reason=reason)]
    assert ledger_failures(tmp_path / "out") == summary.failures
    assert made(tables, tmp_path / "out", encoder).shards_kept == 1  # there is no more of it to come
    cache = ShardCache(tmp_path / "out")
    assert cache.session_ids == [early["session_id"]]
    assert cache.num_ticks(late["video_id"]) == ticks


def test_features_float16_cannot_hold(
    few: Path, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken checkpoint ends the run and leaves no shard."""
    tables = some_labels(few, tmp_path / "labels", slice(0, 1))
    for dtype, value in (("float16", np.nan), ("float16", np.inf), ("float16", 70_000.0), ("int8", np.nan)):
        wrong = np.full((encoder.batch_size, 4, encoder.dim), value, np.float32)
        monkeypatch.setattr(encoder, "finish", lambda pending, wrong=wrong: wrong[: pending.frames])
        out = tmp_path / dtype
        with pytest.raises(UserError, match=f"that {dtype} cannot hold"):
            made(tables, out, encoder, dtype=dtype)
        assert sorted(every_file(out)) == ["cache.json", "plan.json"]
        assert list((out / ".work").iterdir()) == []


# ---- the plan


def test_several_shards_hold_each_video_once(
    labels: Path, shards: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    """The plan as it was told before; features do not depend on where a video lies."""
    told: list[Estimate] = []
    advanced: list[int] = []
    some = some_labels(labels, tmp_path / "labels", slice(4, 8))
    size: Any = 0.5
    options = CacheOptions(shard_mb=size, workers=2)
    out = tmp_path / "out"
    summary = cache_features(
        some, out, Here(encoder), options, on_estimate=told.append, on_tick=advanced.append
    )
    [estimate] = told
    ticks = sum(row["last_tick_needed"] + 1 for row in rows_of(some, "videos"))
    assert sum(advanced) == estimate.ticks == estimate.ticks_to_encode == summary.ticks == ticks
    assert (estimate.videos, estimate.shards, estimate.shards_to_make) == (4, 2, 2)
    assert (summary.shards_made, summary.shards_kept, summary.ticks_reused) == (2, 0, 0)
    written = sum(path.stat().st_size for path in out.glob("vision-*.tar"))
    assert estimate.bytes_to_write == ticks * 4 * encoder.dim * 2 < written < 1.1 * estimate.bytes_to_write
    shard_of: dict[str, set[str]] = {}
    found: dict[str, Any] = {}
    for path in sorted(out.glob("vision-*.tar")):
        assert path.stat().st_size < 550_000
        for record in records(path):
            shard_of.setdefault(record["meta.json"]["video_id"], set()).add(path.stem[-5:])
            assert found.setdefault(record["__key__"], record) is record
    assert sorted(shard_of) == sorted(row["video_id"] for row in rows_of(some, "videos"))
    assert all(len(numbers) == 1 for numbers in shard_of.values())
    for path in sorted(out.glob("labels-*.tar")):
        for record in records(path):
            assert shard_of[record["meta.json"]["video_id"]] == {path.stem[-5:]}
    plan = json.loads((out / "plan.json").read_text())["shards"]
    assert {video: {f"{shard['number']:05d}"} for shard in plan for video in shard["videos"]} == shard_of
    one, several = ShardCache(shards), ShardCache(out)
    assert several.session_ids == sorted(row["session_id"] for row in rows_of(some, "sessions"))
    for video in rows_of(some, "videos"):
        count = video["last_tick_needed"] + 1
        np.testing.assert_array_equal(
            one.features(video["video_id"], 0, count), several.features(video["video_id"], 0, count)
        )


def test_a_dry_run(labels: Path, shards: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """Tells what is to be done, and does nothing."""
    some = some_labels(labels, tmp_path / "labels", slice(0, 2))
    before = every_file(shards)
    estimate, rate = dry_run(labels, shards, Here(encoder), CacheOptions())
    assert (estimate.ticks_to_encode, rate) == (0, None)
    assert every_file(shards) == before
    estimate, rate = dry_run(some, tmp_path / "out", Here(encoder), CacheOptions(), seconds=0.1)
    ticks = sum(row["last_tick_needed"] + 1 for row in rows_of(some, "videos"))
    assert (estimate.ticks_to_encode, estimate.shards_to_make) == (ticks, 1)
    assert estimate.bytes_to_write == ticks * 4 * encoder.dim * 2
    assert rate is not None
    assert rate > 0
    assert not (tmp_path / "out").exists()


def test_fewer_shards_than_before(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """Those past the new plan go away, also where labels were taken out."""
    tables = some_labels(few, tmp_path / "labels", slice(0, 2))
    made(tables, tmp_path / "out", encoder, shard_mb=SMALL)
    assert len(files(tmp_path / "out", "vision-*.tar")) == 2
    fewer = some_labels(few, tmp_path / "fewer", slice(0, 1))
    made(fewer, tmp_path / "out", encoder)
    made(fewer, tmp_path / "fresh", encoder)
    assert every_file(tmp_path / "out") == every_file(tmp_path / "fresh")


def test_a_video_larger_than_a_shard_has_its_own(labels: Path, tmp_path: Path) -> None:
    tables = LabelTables(some_labels(labels, tmp_path / "labels", slice(0, 4)))
    sizes = {video["video_id"]: (video["last_tick_needed"] + 1) * 20_000 for video in tables.videos}
    plans = plan_shards(tables, 20_000, 1)
    assert [[video["video_id"] for video in plan.videos] for plan in plans] == [[v] for v in sorted(sizes)]
    assert min(sizes.values()) > 1_000_000
    roomy = plan_shards(tables, 20_000, 1 + sum(sizes.values()) // 1_000_000)
    assert [[video["video_id"] for video in plan.videos] for plan in roomy] == [sorted(sizes)]


def test_tables_that_do_not_go_together(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mixed = some_labels(few, tmp_path / "mixed", slice(0, 1), source="one")
    some_labels(few, mixed, slice(1, 2), source="two", change=with_rate(5.0))
    with pytest.raises(UserError, match=r"mixes tick rates \[2\.0, 5\.0\]; .*--tick-hz"):
        made(mixed, out, encoder)
    twice = some_labels(few, tmp_path / "twice", slice(0, 1), source="one")
    some_labels(few, twice, slice(0, 1), source="two")
    with pytest.raises(UserError, match=r"has the video_id '.*' twice"):
        made(twice, out, encoder)
    with pytest.raises(UserError, match=r"nothing holds no label tables; run 'dst prepare"):
        made(tmp_path / "nothing", out, encoder)
    assert not out.exists()


def test_one_corpus_or_the_folder_of_all(few: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    tables = some_labels(few, tmp_path / "labels", slice(0, 1), source="one")
    some_labels(few, tables, slice(1, 2), source="two")
    made(tables / "one", tmp_path / "single", encoder)
    made(tables, tmp_path / "both", encoder)
    ids = [sorted(row["session_id"] for row in rows_of(tables, "sessions", s)) for s in ("one", "two")]
    assert ShardCache(tmp_path / "single").session_ids == ids[0]
    assert ShardCache(tmp_path / "both").session_ids == sorted(ids[0] + ids[1])


def test_a_damaged_cache(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    path = copy / "vision-00000.tar"
    video_id = next(iter(ledger(copy)["vision-00000"]["videos"]))
    for size in (100_000, 0):
        os.truncate(path, size)
        with pytest.raises(
            UserError, match=r"vision-00000\.tar has .* not a whole shard; .*dst cache-features"
        ):
            ShardCache(copy).features(video_id, 0, 1)
    os.truncate(copy / "labels-00000.tar", 5000)
    with pytest.raises(UserError, match=r"labels-00000\.tar has 5000 bytes .* not a whole shard"):
        ShardCache(copy)
    (copy / "cache.json").write_text("{}")
    with pytest.raises(UserError, match=r"cache\.json is not a fingerprint of this version"):
        ShardCache(copy)
    (copy / "cache.json").unlink()
    with pytest.raises(UserError, match=r"holds no cache\.json, so it is not a feature cache"):
        ShardCache(copy)


# ---- a real video


@pytest.mark.parametrize("path", REAL_VIDEOS, ids=lambda path: path.name)
def test_a_real_video(path: Path, tiny_model: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """With labels written by hand at 5 Hz: one step, one word, from 1 s to 9 s."""
    first, count = 5, 40
    states = [int(tick >= 10) + int(tick >= 30) for tick in range(first, first + count)]
    before = [0, *states[:-1]]
    frames = [
        {
            "session_id": "pancake/one",
            "split": "test",
            "tick": tick,
            "t_s": tick / 5,
            "speak": tick == 30,
            "response": "Well flipped." if tick == 30 else None,
            "dst_update": state != last,
            "dst_state": [state],
            "transitions": [{(0, 1): 1, (1, 2): 2}.get((last, state), 0)],
            "mistake": None,
        }
        for tick, state, last in zip(range(first, first + count), states, before, strict=True)
    ]
    session = {
        "session_id": "pancake/one",
        "video_id": "pancake/video",
        "source": "kitchen",
        "split": "test",
        "goal": "Flip a pancake",
        "first_tick": first,
        "num_ticks": count,
        "tick_hz": 5.0,
        "num_steps": 1,
        "dialog_origin": "human",
    }
    step = {
        "session_id": "pancake/one",
        "step": 0,
        "step_id": "S1",
        "name": "flip it",
        "spans": [{"start_s": 2.0, "end_s": 6.0}],
    }
    turn = {
        "session_id": "pancake/one",
        "turn": 0,
        "tick": 30,
        "t_s": 6.0,
        "role": "assistant",
        "text": "Well flipped.",
        "labels": ["feedback"],
    }
    video = {
        "video_id": "pancake/video",
        "source": "kitchen",
        "recording_id": "pancake",
        "uri": str(path),
        "rotation_deg": 0,
        "last_tick_needed": first + count - 1,
    }
    with LabelWriter(tmp_path / "labels" / "kitchen") as writer:
        table = pa.Table.from_pylist(frames, schema=TABLES["frames"])
        writer.add_session(session, "pancake", [step], [turn], table)
        writer.add_videos([video])
    assert validate_labels(tmp_path / "labels" / "kitchen") == []
    summary = made(tmp_path / "labels", tmp_path / "out", encoder)
    assert (summary.ticks, summary.failures) == (first + count, [])
    cache = ShardCache(tmp_path / "out")
    wanted, times = reference_features(tiny_model, str(path), 0, first + count, 5)
    assert_close(cache.features("pancake/video", 0, first + count), wanted)
    [record] = records(tmp_path / "out" / "vision-00000.tar")
    assert record["pts.npy"].tolist() == pytest.approx(times, abs=1e-9)
    stored = cache.session("pancake/one")
    assert stored.frames.to_pylist() == frames
    assert stored.column("dst_state")[:, 0].tolist() == states
    assert stored.turns == [turn | {"progress": None, "source_row": None}]

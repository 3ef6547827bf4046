"""The feature cache end to end: read with stock tools, against transformers on frames decoded here."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
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
from numpy.typing import NDArray
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from pipeline.cache import Summary, cache_features
from pipeline.ledger import Ledger
from pipeline.plan import LabelTables, ShardPlan, plan_shards
from pipeline.shards import ShardCache, TarReader, TarWriter, npy_bytes
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from schemas.tables import TABLES, LabelWriter, validate_labels

REAL_VIDEOS = sorted((Path(__file__).parents[2] / "shared" / "samples" / "videos").glob("*.*"))
SOURCE = "assembly101"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video for each shard, without the megabytes that takes."""

    def plan(tables: LabelTables, bytes_per_tick: int, shard_mb: int) -> list[ShardPlan]:
        return plan_shards(tables, 20 * bytes_per_tick, shard_mb)

    monkeypatch.setattr("pipeline.cache.plan_shards", plan)


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
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern))}


def ledger_lines(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


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
        place = {"uri": video["uri"], "rotation_deg": video["rotation_deg"]}
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
    before, times = files(shards), {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    summary = cache_features(labels, shards, encoder)
    assert (summary.shards_made, summary.shards_kept, summary.ticks, summary.failures) == (0, 1, 0, [])
    assert files(shards) == before
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == times
    assert sorted(before) == ["cache.json", "labels-00000.tar", "ledger.jsonl", "vision-00000.tar"]


def test_a_fresh_run_gives_the_same_bytes(
    shards: Path, labels: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cache_features(labels, tmp_path / "again", VisionEncoder(tiny_model, "cpu"))
    assert files(tmp_path / "again") == files(shards)
    for line in ledger_lines(shards):
        assert line["sha256"] == sha256(shards / line["file"])
        assert line["failures"] == []


class Killed(BaseException):
    pass


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("batches", [0, 1, 3, 4])
def test_a_run_that_is_interrupted_and_repeated(
    labels: Path, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Interrupted after a number of batches; a file of a run that was killed harder lies about too."""
    little = some_labels(labels, tmp_path / "labels", slice(0, 2))
    cache_features(little, tmp_path / "whole", encoder, shard_mb=1, batch_size=64)
    assert len(files(tmp_path / "whole", "*.tar")) == 4
    out = tmp_path / "broken"
    done: list[int] = []
    encode = VisionEncoder.encode

    def killed(self: VisionEncoder, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(done) == batches:
            raise Killed
        done.append(len(frames))
        return encode(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "encode", killed)
        with pytest.raises(Killed):
            cache_features(little, out, encoder, shard_mb=1, batch_size=64)
    for path in out.glob("*.tar"):  # what is there by its name is whole
        assert sha256(path) == sha256(tmp_path / "whole" / path.name)
    assert not list(out.glob(".*"))
    (out / ".vision-00000.tar.tmp").write_bytes(b"half a shard")
    summary = cache_features(little, out, encoder, shard_mb=1, batch_size=64)
    assert summary.failures == []
    assert files(out, "*.tar") == files(tmp_path / "whole", "*.tar")


@pytest.mark.parametrize("keep", ["nothing", "half a line"])
def test_a_ledger_cut_short(labels: Path, encoder: VisionEncoder, tmp_path: Path, keep: str) -> None:
    """The shard of a line that is not whole is made again; lines after it are read."""
    little, out = some_labels(labels, tmp_path / "labels", slice(0, 1)), tmp_path / "out"
    cache_features(little, out, encoder)
    before, ledger = files(out, "*.tar"), out / "ledger.jsonl"
    first, second = ledger.read_text().splitlines()
    ledger.write_text(first + "\n" + (second[: len(second) // 2] if keep == "half a line" else ""))
    summary = cache_features(little, out, encoder)
    assert (summary.shards_made, summary.shards_kept) == (0, 1)
    assert files(out, "*.tar") == before
    last = {line["file"]: line for line in readable_lines(ledger)}
    assert last == {line["file"]: line for line in (json.loads(first), json.loads(second))}
    assert {name: line["sha256"] for name, line in last.items()} == before
    assert cache_features(little, out, encoder).shards_kept == 1
    assert len(readable_lines(ledger)) == 2  # nothing was made a third time


def readable_lines(ledger: Path) -> Rows:
    lines = []
    for line in ledger.read_text().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def test_the_last_line_of_a_file_counts(tmp_path: Path) -> None:
    """Also where a line was cut short; the text is appended to, never rewritten."""
    path, shard = tmp_path / "ledger.jsonl", tmp_path / "a.tar"
    shard.write_bytes(b"one")
    Ledger(path).add(shard, "first key", [])
    path.write_text(path.read_text()[:-20])
    assert Ledger(path).finished(shard, "first key") is None
    cut = path.read_text()
    ledger = Ledger(path)
    ledger.add(shard, "old key", [])
    ledger.add(shard, "new key", [{"id": "v", "reason": "r"}])
    assert path.read_text().startswith(cut + "\n")
    again = Ledger(path)
    assert again.finished(shard, "old key") is None
    entry = again.finished(shard, "new key")
    assert entry is not None
    assert (entry["failures"], entry["sha256"]) == (
        [{"id": "v", "reason": "r"}],
        hashlib.sha256(b"one").hexdigest(),
    )
    shard.unlink()
    assert again.finished(shard, "new key") is None


def test_a_shard_that_was_removed_is_made_again(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    little, out = some_labels(labels, tmp_path / "labels", slice(0, 1)), tmp_path / "out"
    cache_features(little, out, encoder)
    before = files(out, "*.tar")
    (out / "vision-00000.tar").unlink()
    assert cache_features(little, out, encoder).shards_made == 1
    (out / "labels-00000.tar").unlink()
    assert cache_features(little, out, encoder).shards_kept == 1
    assert files(out, "*.tar") == before


def test_other_settings_are_refused(
    shards: Path, labels: Path, tiny_model: Path, tmp_path: Path, encoder: VisionEncoder
) -> None:
    before = files(shards)
    with pytest.raises(UserError, match=r"tokens_per_frame: 4 there, 1 now.*another --out"):
        cache_features(labels, shards, VisionEncoder(tiny_model, "cpu", tokens_per_frame=1))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(
        UserError, match=r"preprocessing: .*\[0\.5, 0\.5, 0\.5\].* there, .*\[0\.4, 0\.5, 0\.5\]"
    ):
        cache_features(labels, shards, VisionEncoder(other, "cpu"))
    weights = bytearray((tiny_model / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    place = json.loads(weights[8 : 8 + header])["model.connector.modality_projection.proj.weight"]
    weights[8 + header + place["data_offsets"][0]] ^= 1
    shutil.copy(tiny_model / "preprocessor_config.json", other)
    (other / "model.safetensors").write_bytes(weights)
    changed = VisionEncoder(other, "cpu")
    with pytest.raises(UserError, match=f"vision_sha256: {encoder.sha256} there, {changed.sha256} now"):
        cache_features(labels, shards, changed)
    slow = some_labels(labels, tmp_path / "slow", slice(0, 1), change=with_rate(4.0))
    with pytest.raises(UserError, match=r"tick_hz: 2\.0 there, 4\.0 now"):
        cache_features(slow, shards, encoder)
    assert files(shards) == before


def with_rate(hz: float) -> Callable[[str, Rows], Rows]:
    def change(name: str, rows: Rows) -> Rows:
        return [row | {"tick_hz": hz} for row in rows] if name == "sessions" else rows

    return change


def test_pooled_tokens(labels: Path, shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    little = some_labels(labels, tmp_path / "labels", slice(0, 1))
    cache_features(little, tmp_path / "out", VisionEncoder(tiny_model, "cpu", tokens_per_frame=1))
    [video] = rows_of(little, "videos")
    pooled = ShardCache(tmp_path / "out").features(video["video_id"], 0, 80)
    every = ShardCache(shards).features(video["video_id"], 0, 80)
    assert pooled.shape == (80, 1, every.shape[2])
    np.testing.assert_allclose(pooled[:, 0], every.astype(np.float32).mean(axis=1), rtol=2e-3, atol=4e-3)


# ---- relabelling


def test_new_labels_leave_the_vision_shards(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    out, tables = tmp_path / "out", tmp_path / "labels"
    cache_features(some_labels(labels, tables, slice(0, 2)), out, encoder)
    before, stamp = files(out, "*.tar"), (out / "vision-00000.tar").stat().st_mtime_ns

    def another_word(name: str, rows: Rows) -> Rows:
        return [rows[0] | {"text": "Quite another word."}, *rows[1:]] if name == "turns" else rows

    some_labels(labels, tables, slice(0, 2), change=another_word)
    summary = cache_features(tables, out, encoder)
    assert (summary.ticks, summary.shards_kept, summary.failures) == (0, 1, [])
    after = files(out, "*.tar")
    assert after["vision-00000.tar"] == before["vision-00000.tar"]
    assert (out / "vision-00000.tar").stat().st_mtime_ns == stamp
    assert after["labels-00000.tar"] != before["labels-00000.tar"]
    turns = [turn for record in records(out / "labels-00000.tar") for turn in record["turns.json"]]
    assert [turn["text"] for turn in turns].count("Quite another word.") == 1
    some_labels(labels, tables, slice(0, 2))
    cache_features(tables, out, encoder)
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


def check_failed_video(
    out: Path, summary: Summary, video: dict[str, Any], sessions: Rows, alone: Path, reason: str
) -> None:
    """One failed, with its sessions; the shards hold the others as if it had never been there."""
    of_it = sorted(row["session_id"] for row in sessions if row["video_id"] == video["video_id"])
    assert [failure["id"] for failure in summary.failures] == [video["video_id"], *of_it]
    assert reason in summary.failures[0]["reason"]
    for failure, session_id in zip(summary.failures[1:], of_it, strict=True):
        [row] = [row for row in sessions if row["session_id"] == session_id]
        needed = row["first_tick"] + row["num_ticks"]
        assert failure["reason"] == f"needs {needed} ticks of {video['video_id']}, the video has 0"
    listed = [failure for line in ledger_lines(out) for failure in line["failures"]]
    assert listed == summary.failures
    assert files(out, "*.tar") == files(alone, "*.tar")
    assert sorted(path.name for path in out.iterdir()) == [
        "cache.json",
        "labels-00000.tar",
        "ledger.jsonl",
        "vision-00000.tar",
    ]
    with tarfile.open(out / "vision-00000.tar") as tar:
        assert not [name for name in tar.getnames() if name.startswith(video["video_id"])]


@pytest.mark.parametrize("damage", ["missing", "no video", "broken inside"])
def test_a_video_that_fails(labels: Path, encoder: VisionEncoder, tmp_path: Path, damage: str) -> None:
    """The first of two, which holds two sessions. With the video back, ``retry_failed`` mends all."""
    video = min(rows_of(labels, "videos"), key=lambda row: row["video_id"])
    path = tmp_path / "video.mp4"
    if damage == "no video":
        path.write_text("<html>Not found</html>")
    if damage == "broken inside":
        break_inside(Path(video["uri"]), path)
    tables = some_labels(
        labels, tmp_path / "labels", slice(0, 2), change=with_uris({video["video_id"]: path})
    )
    without = some_labels(labels, tmp_path / "without", slice(1, 2))
    cache_features(without, tmp_path / "alone", encoder)

    out = tmp_path / "out"
    summary = cache_features(tables, out, encoder)
    reason = {"missing": "is not there", "no video": "cannot be opened", "broken inside": str(path)}[damage]
    check_failed_video(out, summary, video, rows_of(tables, "sessions"), tmp_path / "alone", reason)
    again = cache_features(tables, out, encoder)  # kept, and still told
    assert (again.shards_made, again.shards_kept, again.failures) == (0, 1, summary.failures)
    still = cache_features(tables, out, encoder, retry_failed=True)
    assert (still.shards_made, still.failures) == (1, summary.failures)

    shutil.copy(video["uri"], path)
    mended = cache_features(tables, out, encoder, retry_failed=True)
    assert (mended.shards_made, mended.failures) == (1, [])
    cache_features(tables, tmp_path / "whole", encoder)
    assert files(out, "*.tar") == files(tmp_path / "whole", "*.tar")
    assert cache_features(tables, out, encoder, retry_failed=True).shards_kept == 1


@pytest.mark.usefixtures("small_shards")
def test_retrying_leaves_other_shards(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    ids = sorted(row["video_id"] for row in rows_of(labels, "videos"))
    gone = with_uris({ids[0]: tmp_path / "video.mp4"})
    tables = some_labels(labels, tmp_path / "labels", slice(0, 2), change=gone)
    summary = cache_features(tables, tmp_path / "out", encoder, shard_mb=1)
    assert summary.shards_made == 2
    retried = cache_features(tables, tmp_path / "out", encoder, shard_mb=1, retry_failed=True)
    assert (retried.shards_made, retried.shards_kept) == (1, 1)


def test_all_videos_fail(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    ids = [row["video_id"] for row in rows_of(labels, "videos")]
    nowhere = with_uris(dict.fromkeys(ids, tmp_path / "gone.mp4"))
    tables = some_labels(labels, tmp_path / "labels", slice(0, 2), change=nowhere)
    summary = cache_features(tables, tmp_path / "out", encoder)
    assert len(summary.failures) == 2 + len(rows_of(tables, "sessions"))
    assert records(tmp_path / "out" / "vision-00000.tar") == []
    with pytest.raises(UserError, match="holds no finished session; run 'dst cache-features'"):
        ShardCache(tmp_path / "out")


def test_labels_beyond_the_video(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """The later session of a video needs more ticks than there are; the earlier one is cached all the same."""
    both = slice(2, 3)
    sessions = rows_of(some_labels(labels, tmp_path / "plain", both), "sessions")
    early, late = sorted(sessions, key=lambda row: row["first_tick"])
    last = late["first_tick"] + late["num_ticks"] - 1 + 1000

    def longer(name: str, rows: Rows) -> Rows:
        if name == "videos":
            return [row | {"last_tick_needed": last} for row in rows]
        if name == "sessions":
            more = {late["session_id"]: {"num_ticks": late["num_ticks"] + 1000}}
            return [row | more.get(row["session_id"], {}) for row in rows]
        return rows

    tables = some_labels(labels, tmp_path / "labels", both, change=longer)
    summary = cache_features(tables, tmp_path / "out", encoder)
    with av.open(rows_of(tables, "videos")[0]["uri"]) as container:
        frames = list(container.decode(video=0))
    end = (frames[-1].pts + frames[-1].duration - frames[0].pts) * frames[-1].time_base
    ticks = next(k for k in range(10_000) if Fraction(k, 2) >= end)
    reason = f"needs {last + 1} ticks of {late['video_id']}, the video has {ticks}"
    assert summary.failures == [{"id": late["session_id"], "reason": reason}]
    assert [failure for line in ledger_lines(tmp_path / "out") for failure in line["failures"]] == (
        summary.failures
    )
    cache = ShardCache(tmp_path / "out")
    assert cache.session_ids == [early["session_id"]]
    assert cache.num_ticks(late["video_id"]) == ticks


def test_features_float16_cannot_hold(
    labels: Path, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken checkpoint ends the run and leaves no shard."""
    tables = some_labels(labels, tmp_path / "labels", slice(0, 1))
    for value in (np.nan, np.inf, 70_000.0):
        wrong = np.full((64, 4, encoder.dim), value, np.float32)
        monkeypatch.setattr(encoder, "encode", lambda frames, wrong=wrong: wrong[: len(frames)])
        with pytest.raises(UserError, match="that float16 cannot hold"):
            cache_features(tables, tmp_path / "out", encoder)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cache.json"]


# ---- the plan


def test_several_shards_hold_each_video_once(
    labels: Path, shards: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    told: list[Any] = []
    advanced: list[int] = []
    summary = cache_features(
        labels,
        tmp_path / "out",
        encoder,
        shard_mb=1,
        on_plan=lambda plans, ticks: told.append((plans, ticks)),
        on_tick=advanced.append,
    )
    [(plans, ticks)] = told
    assert summary.shards_made == len(plans) >= 3
    assert sum(advanced) == ticks == summary.ticks
    shard_of: dict[str, set[str]] = {}
    found: dict[str, Any] = {}
    for path in sorted((tmp_path / "out").glob("vision-*.tar")):
        assert path.stat().st_size < 1_100_000
        for record in records(path):
            shard_of.setdefault(record["meta.json"]["video_id"], set()).add(path.stem[-5:])
            assert found.setdefault(record["__key__"], record) is record
    assert sorted(shard_of) == sorted(row["video_id"] for row in rows_of(labels, "videos"))
    assert all(len(numbers) == 1 for numbers in shard_of.values())
    for path in sorted((tmp_path / "out").glob("labels-*.tar")):
        for record in records(path):
            assert shard_of[record["meta.json"]["video_id"]] == {path.stem[-5:]}
    one, several = ShardCache(shards), ShardCache(tmp_path / "out")
    assert one.session_ids == several.session_ids
    for video in rows_of(labels, "videos"):
        count = video["last_tick_needed"] + 1
        np.testing.assert_array_equal(
            one.features(video["video_id"], 0, count), several.features(video["video_id"], 0, count)
        )


@pytest.mark.usefixtures("small_shards")
def test_fewer_shards_than_before(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    """Those past the new plan go away, also where labels were taken out."""
    tables = some_labels(labels, tmp_path / "labels", slice(0, 2))
    cache_features(tables, tmp_path / "out", encoder, shard_mb=1)
    assert len(files(tmp_path / "out", "vision-*.tar")) == 2
    fewer = some_labels(labels, tmp_path / "fewer", slice(0, 1))
    cache_features(fewer, tmp_path / "out", encoder)
    cache_features(fewer, tmp_path / "fresh", encoder)
    assert files(tmp_path / "out", "*.tar") == files(tmp_path / "fresh", "*.tar")


def test_a_video_larger_than_a_shard_has_its_own(labels: Path, tmp_path: Path) -> None:
    tables = LabelTables(some_labels(labels, tmp_path / "labels", slice(0, 4)))
    sizes = {video["video_id"]: (video["last_tick_needed"] + 1) * 20_000 for video in tables.videos}
    plans = plan_shards(tables, 20_000, 1)
    assert [[video["video_id"] for video in plan.videos] for plan in plans] == [[v] for v in sorted(sizes)]
    assert min(sizes.values()) > 1_000_000
    roomy = plan_shards(tables, 20_000, 1 + sum(sizes.values()) // 1_000_000)
    assert [[video["video_id"] for video in plan.videos] for plan in roomy] == [sorted(sizes)]


def test_tables_that_do_not_go_together(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mixed = some_labels(labels, tmp_path / "mixed", slice(0, 1), source="one")
    some_labels(labels, mixed, slice(1, 2), source="two", change=with_rate(5.0))
    with pytest.raises(UserError, match=r"mixes tick rates \[2\.0, 5\.0\]; .*--tick-hz"):
        cache_features(mixed, out, encoder)
    twice = some_labels(labels, tmp_path / "twice", slice(0, 1), source="one")
    some_labels(labels, twice, slice(0, 1), source="two")
    with pytest.raises(UserError, match=r"has the video_id '.*' twice"):
        cache_features(twice, out, encoder)
    with pytest.raises(UserError, match=r"nothing holds no label tables; run 'dst prepare"):
        cache_features(tmp_path / "nothing", out, encoder)
    assert not out.exists()


def test_one_corpus_or_the_folder_of_all(labels: Path, encoder: VisionEncoder, tmp_path: Path) -> None:
    tables = some_labels(labels, tmp_path / "labels", slice(0, 1), source="one")
    some_labels(labels, tables, slice(1, 2), source="two")
    cache_features(tables / "one", tmp_path / "single", encoder)
    cache_features(tables, tmp_path / "both", encoder)
    ids = [sorted(row["session_id"] for row in rows_of(tables, "sessions", s)) for s in ("one", "two")]
    assert ShardCache(tmp_path / "single").session_ids == ids[0]
    assert ShardCache(tmp_path / "both").session_ids == sorted(ids[0] + ids[1])


# ---- the tar files themselves


def test_records_are_taken_back(tmp_path: Path) -> None:
    """What an exception interrupts leaves no trace in the bytes, first, in the middle or last."""

    def write(path: Path, failing: bool) -> Path:
        with TarWriter(path) as tar:
            for key in ("a", "bad/1", "b" * 150, "bad/2", "c", "bad/3"):
                if not key.startswith("bad"):
                    tar.add(key, {"x.npy": npy_bytes(np.arange(len(key))), "y.json": b"{}"})
                elif failing:
                    with pytest.raises(KeyboardInterrupt), tar.all_or_nothing():  # noqa: PT012
                        tar.add(f"{key}/0", {"x.npy": bytes(99_999)})
                        tar.add(f"{key}/1", {"x.npy": b"more"})
                        raise KeyboardInterrupt
        return path

    clean, mended = write(tmp_path / "clean.tar", False), write(tmp_path / "mended.tar", True)
    assert clean.read_bytes() == mended.read_bytes()
    reader = TarReader(mended)
    assert sorted(reader.members) == sorted(
        f"{k}.{e}" for k in ("a", "b" * 150, "c") for e in ("x.npy", "y.json")
    )
    assert reader.array_of(f"{'b' * 150}.x.npy").tolist() == list(range(150))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.zeros((0, 4), np.float32),
        np.array(3.5),
        np.int8([1]),
    ],
    ids=["3d", "empty", "number", "bytes"],
)
def test_arrays_come_back(tmp_path: Path, array: NDArray[Any]) -> None:
    with TarWriter(tmp_path / "a.tar") as tar:
        tar.add("k", {"a.npy": npy_bytes(array)})
    got = TarReader(tmp_path / "a.tar").array_of("k.a.npy")
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(got, array)
    assert not got.flags.writeable


def test_a_damaged_shard(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    path = copy / "vision-00000.tar"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"vision-00000\.tar is not a whole shard .*dst cache-features"):
        ShardCache(copy)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"vision-00000\.tar is not a whole shard"):
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
    summary = cache_features(tmp_path / "labels", tmp_path / "out", encoder, batch_size=7)
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

"""The feature cache: label tables and videos in, shard pairs out. Each file is whole or not there."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.decode import DecodeError, tick_frames
from pipeline.ledger import Ledger
from pipeline.plan import LabelTables, Rows, ShardPlan, plan_shards
from pipeline.shards import TarReader, TarWriter, npy_bytes
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.files import fsync_folder, replacing_file
from schemas.shards import CHUNK_TICKS, Fingerprint, shard_stem, vision_key
from schemas.tables import TABLES


@dataclass
class Summary:
    """What a run did: seconds by stage, ticks encoded, and what failed with its reason."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ticks: int = 0
    shards_kept: int = 0
    shards_made: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)


def cache_features(
    labels: Path,
    out: Path,
    encoder: VisionEncoder,
    *,
    shard_mb: int = 512,
    batch_size: int = 16,
    retry_failed: bool = False,
    on_tick: Callable[[int], None] = lambda ticks: None,
    on_plan: Callable[[list[ShardPlan], int], None] = lambda plans, ticks: None,
) -> Summary:
    """Make or complete the shard pairs of all label tables under ``labels``.

    Finished shards of an earlier run are kept. A video or session that fails is recorded in
    ``ledger.jsonl`` with its reason and left out; the run goes on.

    Args:
        on_tick: called with a number of ticks done, for a progress bar.
        on_plan: called once, before any work, with the plan and the number of ticks in it.

    Raises:
        UserError: no tables, a folder that was made with other settings, or no room to write.
    """
    tables = LabelTables(labels)
    fingerprint = Fingerprint(
        model=encoder.name,
        vision_sha256=encoder.sha256,
        preprocessing=encoder.preprocessor.fingerprint(),
        tick_hz=tables.clock.tick_hz,
        tokens_per_frame=encoder.tokens_per_frame,
        dim=encoder.dim,
    )
    out.mkdir(parents=True, exist_ok=True)
    if (out / "cache.json").is_file():
        fingerprint.require_equal(Fingerprint.read(out), out)
    else:
        fingerprint.write(out)
    plans = plan_shards(tables, encoder.tokens_per_frame * encoder.dim * 2, shard_mb)
    on_plan(plans, sum(video["last_tick_needed"] + 1 for plan in plans for video in plan.videos))
    ledger = Ledger(out / "ledger.jsonl")
    _remove_unplanned(out, len(plans))
    summary = Summary()
    for plan in plans:
        _make_vision(
            plan, out, encoder, tables.clock, fingerprint, ledger, retry_failed, batch_size, on_tick, summary
        )
        _make_labels(plan, out, tables, ledger, summary)
    return summary


def _remove_unplanned(out: Path, shards: int) -> None:
    """Shards past the plan belong to tables that are no longer there, temporary files to runs that were killed."""
    for path in out.glob(".*.tar.tmp"):
        path.unlink()
    for path in [*out.glob("vision-*.tar"), *out.glob("labels-*.tar")]:
        if int(path.stem.rsplit("-", 1)[1]) >= shards:
            path.unlink()
    fsync_folder(out)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _make_vision(
    plan: ShardPlan,
    out: Path,
    encoder: VisionEncoder,
    clock: Clock,
    fingerprint: Fingerprint,
    ledger: Ledger,
    retry_failed: bool,
    batch_size: int,
    on_tick: Callable[[int], None],
    summary: Summary,
) -> None:
    path = out / f"{shard_stem('vision', plan.number)}.tar"
    key = _key(fingerprint.model_dump(exclude={"model"}), plan.videos)
    entry = ledger.finished(path, key)
    if entry is not None and not (retry_failed and entry["failures"]):
        summary.shards_kept += 1
        summary.failures += entry["failures"]
        on_tick(sum(video["last_tick_needed"] + 1 for video in plan.videos))
        return
    failures: list[dict[str, str]] = []
    with replacing_file(path) as temporary, TarWriter(temporary) as tar:
        decoder = _DecodeAhead(plan.videos, clock, encoder, summary)
        for video in plan.videos:
            try:
                with tar.all_or_nothing():
                    ticks = _encode_video(video, decoder, encoder, tar, batch_size, on_tick, summary)
                on_tick(max(0, video["last_tick_needed"] + 1 - ticks))
            except DecodeError as error:
                failures.append({"id": video["video_id"], "reason": str(error)})
    ledger.add(path, key, failures)
    summary.shards_made += 1
    summary.failures += failures


def _encode_video(
    video: dict[str, Any],
    decoder: _DecodeAhead,
    encoder: VisionEncoder,
    tar: TarWriter,
    batch_size: int,
    on_tick: Callable[[int], None],
    summary: Summary,
) -> int:
    ticks = 0
    for chunk, (frames, pts) in enumerate(decoder.chunks()):
        began = time.perf_counter()
        batches = [encoder.encode(frames[i : i + batch_size]) for i in range(0, len(frames), batch_size)]
        features = _to_float16(np.concatenate(batches), video["video_id"])
        encoded = time.perf_counter()
        meta = {"video_id": video["video_id"], "first_tick": ticks, "num_ticks": len(frames)}
        members = {
            "vision.npy": npy_bytes(features),
            "pts.npy": npy_bytes(pts),
            "meta.json": json.dumps(meta).encode(),
        }
        tar.add(vision_key(video["video_id"], chunk), members)
        summary.seconds["encode"] += encoded - began
        summary.seconds["write"] += time.perf_counter() - encoded
        ticks += len(frames)
        summary.ticks += len(frames)
        on_tick(len(frames))
    return ticks


def _to_float16(features: NDArray[np.float32], video_id: str) -> NDArray[np.float16]:
    if not np.isfinite(features).all() or np.abs(features).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(
            f"the vision tower gives values that float16 cannot hold (video {video_id}); check the checkpoint"
        )
    return features.astype(np.float16)


class _DecodeAhead:
    """Decodes and resizes in a thread of its own, a few chunks ahead of the encoder."""

    def __init__(self, videos: Rows, clock: Clock, encoder: VisionEncoder, summary: Summary) -> None:
        self._queue: queue.Queue[tuple[NDArray[np.uint8], NDArray[np.float64]] | Exception | None] = (
            queue.Queue(4)
        )
        self._summary = summary
        self._thread = threading.Thread(target=self._run, args=(videos, clock, encoder), daemon=True)
        self._thread.start()

    def _run(self, videos: Rows, clock: Clock, encoder: VisionEncoder) -> None:
        for video in videos:
            try:
                for chunk in _decoded_chunks(video, clock, encoder, self._summary):
                    self._queue.put(chunk)
                self._queue.put(None)
            except Exception as error:  # carried to the consumer, which records it or ends the run
                self._queue.put(error)

    def chunks(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
        """Chunks of the next video: resized frames uint8 ``[n, S, S, 3]`` and seconds float64 ``[n]``."""
        while True:
            began = time.perf_counter()
            item = self._queue.get()
            self._summary.seconds["wait for frames"] += time.perf_counter() - began
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item


def _decoded_chunks(
    video: dict[str, Any], clock: Clock, encoder: VisionEncoder, summary: Summary
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    images: list[NDArray[np.uint8]] = []
    times: list[float] = []
    began = time.perf_counter()
    for frame in tick_frames(video["uri"], clock, video["last_tick_needed"], video["rotation_deg"]):
        decoded = time.perf_counter()
        images.append(encoder.preprocessor.resize(frame.image))
        times.append(frame.pts_s)
        summary.seconds["decode"] += decoded - began
        began = time.perf_counter()
        summary.seconds["resize"] += began - decoded
        if len(images) == CHUNK_TICKS:
            yield np.stack(images), np.array(times)
            images, times = [], []
            began = time.perf_counter()
    if images:
        yield np.stack(images), np.array(times)


def _make_labels(plan: ShardPlan, out: Path, tables: LabelTables, ledger: Ledger, summary: Summary) -> None:
    vision = TarReader(out / f"{shard_stem('vision', plan.number)}.tar")
    path = out / f"{shard_stem('labels', plan.number)}.tar"
    videos = {video["video_id"]: video for video in plan.videos}
    records: dict[str, dict[str, bytes]] = {}
    failures: list[dict[str, str]] = []
    began = time.perf_counter()
    for session in plan.sessions:
        cached = _cached_ticks(vision, session["video_id"])
        needed = session["first_tick"] + session["num_ticks"]
        if cached < needed:
            reason = f"needs {needed} ticks of {session['video_id']}, the video has {cached}"
            failures.append({"id": session["session_id"], "reason": reason})
            continue
        records[session["session_id"]] = _label_record(session, videos[session["video_id"]], tables)
    digest = hashlib.sha256()
    for members in records.values():
        for data in members.values():
            digest.update(hashlib.sha256(data).digest())
    key = _key(digest.hexdigest(), failures)
    if ledger.finished(path, key) is None:
        with replacing_file(path) as temporary, TarWriter(temporary) as tar:
            for session_id, members in records.items():
                tar.add(session_id, members)
        ledger.add(path, key, failures)
    summary.failures += failures
    summary.seconds["labels"] += time.perf_counter() - began


def _cached_ticks(vision: TarReader, video_id: str) -> int:
    ticks, chunk = 0, 0
    while (name := f"{vision_key(video_id, chunk)}.meta.json") in vision.members:
        ticks += vision.json_of(name)["num_ticks"]
        chunk += 1
    return ticks


def _label_record(session: dict[str, Any], video: dict[str, Any], tables: LabelTables) -> dict[str, bytes]:
    session_id = session["session_id"]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, TABLES["frames"]) as writer:
        rows = tables.of_session("frames", session_id)
        # copied row by row: a slice's bit maps would end in bits of the next session
        writer.write_table(rows.take(np.arange(len(rows))).combine_chunks())
    turns, steps = (tables.of_session(name, session_id).to_pylist() for name in ("turns", "steps"))
    return {
        "frames.arrow": sink.getvalue().to_pybytes(),
        "turns.json": json.dumps(turns).encode(),
        "steps.json": json.dumps(steps).encode(),
        "meta.json": json.dumps(
            {**session, "uri": video["uri"], "rotation_deg": video["rotation_deg"]}
        ).encode(),
    }

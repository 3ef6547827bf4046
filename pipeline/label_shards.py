"""Label tables to label shards: a record a session, beside the features of its video."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.ledger import Entry, Failure, Ledger, VideoEntry, forget, record, sha256_of
from pipeline.plan import LabelTables, Rows
from pipeline.shards import Member, is_counting, writer_of
from pipeline.stills import marks_sha256
from pipeline.storage import Store
from schemas.shards import Storage, shard_stem


def make_labels(
    number: int,
    sessions: Rows,
    videos: dict[str, VideoEntry],
    tables: LabelTables,
    store: Store,
    storage: Storage,
    ledger: Ledger,
    missing: tuple[Failure, ...] = (),
) -> Entry:
    """Write the label shard of a vision shard, unless the one that is there holds the same.

    A session that its video's features do not cover is left out, and named in the entry.

    Args:
        sessions: those on the shard's videos, in order.
        videos: what of each video was cached.
        missing: failures to name beside those found here.
    """
    stem = shard_stem("labels", number)
    name = f"{stem}.{storage}"
    failures = list(missing)
    path = store.work_folder() / name
    with writer_of(storage, path) as writer:
        for session in sorted(sessions, key=lambda row: (row["video_id"], row["session_id"])):
            video = tables.video_of[session["video_id"]]
            reason = _why_not(session, video, videos.get(session["video_id"]))
            if reason is None:
                writer.add(session["session_id"], _members(session, video, tables))
            else:
                failures.append(Failure(id=session["session_id"], reason=reason))
    digest = sha256_of(path)
    entry = Entry(file=name, bytes=path.stat().st_size, sha256=digest, key=digest, failures=tuple(failures))
    if ledger.finished(stem, digest) == entry:
        path.unlink()
        return entry
    forget(store, stem)
    store.commit(path, name)
    record(store, stem, entry)
    ledger.entries[stem] = entry
    return entry


def _why_not(session: dict[str, Any], video: dict[str, Any], cached: VideoEntry | None) -> str | None:
    """Why a session's features are not there; None when all are."""
    video_id, first = session["video_id"], session["first_tick"]
    end = first + session["num_ticks"]
    if cached is None:
        return f"its video {video_id} is not in the cache"
    if cached.rotation_deg != video["rotation_deg"]:
        return (
            f"{video_id} was cached with a rotation of {cached.rotation_deg}, the tables say "
            f"{video['rotation_deg']}: run 'dst cache-features'"
        )
    if cached.marks_sha256 != marks_sha256(video["marks"]):
        return f"{video_id} was cached with other marks drawn on it: run 'dst cache-features'"
    if cached.ticks < end:
        return f"needs {end} ticks of {video_id}, the video has {cached.ticks}"
    for unreadable in cached.unreadable:
        if unreadable.first < end and first < unreadable.end:
            return f"ticks {unreadable.first} to {unreadable.end - 1} of {video_id} cannot be read: {unreadable.reason}"
    return None


def _members(session: dict[str, Any], video: dict[str, Any], tables: LabelTables) -> dict[str, Member]:
    session_id = session["session_id"]
    frames = tables.of_session("frames", session_id)
    turns, steps = (tables.of_session(name, session_id).to_pylist() for name in ("turns", "steps"))
    members: dict[str, Member] = {
        # copied row by row: a slice's bit maps would end in bits of the next session
        "frames": frames.take(np.arange(len(frames))).combine_chunks(),
        "turns": turns,
        "steps": steps,
        "meta": meta_of(session, video),
    }
    if is_counting(session):
        members["points"] = tables.of_session("points", session_id).to_pylist()
    return members


def meta_of(session: dict[str, Any], video: dict[str, Any]) -> dict[str, Any]:
    """What a record tells of its session: the row of the table, and what its video's row tells besides."""
    meta = session | {name: video[name] for name in ("recording_id", "uri", "rotation_deg")}
    if is_counting(session):
        meta["marks"] = "none" if video["marks"] is None else "drawn"
    return meta

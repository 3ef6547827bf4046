"""What the small files of a cache say, and whether they agree: fingerprint, plan, ledger, names of the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel, ValidationError

from pipeline.ledger import FOLDER, Entry, Ticks
from pipeline.storage import Store
from schemas.errors import UserError
from schemas.shards import CHUNK_TICKS, Fingerprint, shard_stem

AGAIN = "run 'dst cache-features' again"


class PlannedShard(BaseModel):
    """One shard of ``plan.json``: ``ticks`` that are needed of its videos."""

    number: Ticks
    ticks: Ticks
    videos: list[str]


class _Plan(BaseModel):
    shards: list[PlannedShard]


@dataclass
class SmallFiles:
    """What could be read of them.

    Attributes:
        plan: the planned shards by number; empty where the plan cannot be read.
        vision, labels: entries of the ledger by number.
        old: entries of files that a run set aside.
        broken: stems of the files whose entries cannot be read.
        problems: what could not be read, one sentence each.
    """

    fingerprint: Fingerprint | None = None
    plan: dict[int, PlannedShard] = field(default_factory=dict)
    vision: dict[int, Entry] = field(default_factory=dict)
    labels: dict[int, Entry] = field(default_factory=dict)
    old: dict[int, Entry] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [*self.vision.values(), *self.labels.values(), *self.old.values()]


def read_small_files(store: Store) -> SmallFiles:
    """Read them; what cannot be read is a problem, and does not keep the others from being read."""
    read = SmallFiles()
    try:
        read.fingerprint = _fingerprint(store)
    except UserError as error:
        read.problems.append(f"cache.json: {error}")
    try:
        plan = _Plan.model_validate_json(store.read_text("plan.json"))
        read.plan = {shard.number: shard for shard in plan.shards}
        if len(read.plan) != len(plan.shards):
            read.problems.append(f"plan.json: it has a shard twice; {AGAIN}")
    except (UserError, ValidationError) as error:
        read.problems.append(f"plan.json: {_sentence(error)}; {AGAIN}")
    for name, data in store.read_all([f"{FOLDER}/{name}" for name in store.names(FOLDER)]).items():
        stem = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
        kind, _, number = stem.partition("-")
        try:
            entry = Entry.model_validate_json(data)
            if f"{FOLDER}/{stem}.json" != name or entry.file.partition(".")[0] != stem:
                raise UserError(f"it is about {entry.file}")
            if stem != shard_stem(kind, int(number)):
                raise UserError(f"no shard is called {stem}")
        except (UserError, ValidationError) as error:
            read.broken.add(stem)
            read.problems.append(f"{name}: {_sentence(error)}; remove it and {AGAIN}")
        else:
            {"vision": read.vision, "labels": read.labels, "old": read.old}[kind][int(number)] = entry
    return read


def check_small_files(files: SmallFiles) -> Iterator[str]:
    """Compare the ledger with plan and fingerprint.

    Yields:
        One sentence for each thing that does not agree, beginning with the file.
    """
    for number in files.plan:
        finished = {"vision": files.vision, "labels": files.labels}
        missing = [shard_stem(kind, number) for kind, entries in finished.items() if number not in entries]
        if missing := [stem for stem in missing if stem not in files.broken]:
            yield f"plan.json: {' and '.join(missing)} not finished yet; {AGAIN}"
    for entry in files.old.values():
        yield f"{entry.file}: it was set aside by a run that did not end; {AGAIN}"
    for entry in [*files.vision.values(), *files.labels.values()]:
        if files.fingerprint and not entry.file.endswith(f".{files.fingerprint.storage}"):
            yield f"{entry.file}: cache.json says that the shards are {files.fingerprint.storage} files; {AGAIN}"
    if files.plan:
        for entries in (files.vision, files.labels):
            for number in sorted(entries.keys() - files.plan.keys()):
                yield f"{entries[number].file}: the plan has no shard {number}; {AGAIN}"
    yield from _check_videos(files)


def _check_videos(files: SmallFiles) -> Iterator[str]:
    """Whether each planned video is in its shard, or failed there, and in no other."""
    times = Counter(video_id for entry in files.vision.values() for video_id in entry.videos)
    for video_id in (video_id for video_id, count in times.items() if count > 1):
        where = [entry.file for entry in files.vision.values() if video_id in entry.videos]
        yield f"{where[1]}: the video {video_id} is in {where[0]} too; {AGAIN}"
    for number in sorted(files.vision.keys() & files.plan.keys()):
        entry, plan = files.vision[number], files.plan[number]
        failed = {failure.id for failure in entry.failures}
        for video_id in plan.videos:
            if video_id not in entry.videos and video_id not in failed:
                yield f"{entry.file}: the planned video {video_id} is neither in it nor failed; {AGAIN}"
            if video_id in entry.videos and video_id in failed:
                yield f"{entry.file}: the video {video_id} is in it, and among the failures; {AGAIN}"
        for video_id in entry.videos:
            if video_id not in plan.videos and times[video_id] == 1:
                yield f"{entry.file}: the video {video_id} is in it, which is not planned; {AGAIN}"
        needed = sum(video.needed for video in entry.videos.values())
        if entry.videos.keys() == set(plan.videos) and needed != plan.ticks:
            yield f"{entry.file}: {needed} ticks of its videos are needed, the plan says {plan.ticks}; {AGAIN}"


def foreign_files(store: Store, files: SmallFiles) -> Iterator[str]:
    """Files that the ledger does not know, which is harmless: one sentence each."""
    known = {entry.file for entry in files.entries} | {"cache.json", "plan.json"}
    for name in store.names():
        if name in known or name.partition(".")[0] in files.broken:
            continue
        if re.fullmatch(r"(old|vision|labels)-\d{5,}\.(tar|h5)", name):
            yield f"{name}: it is not in the ledger, so that nobody reads it; a run that was killed may have left it"
        else:
            yield f"{name}: it is no file of a cache"


def _fingerprint(store: Store) -> Fingerprint:
    fingerprint = Fingerprint.parse(store.read_text("cache.json"), "it")
    if fingerprint.chunk_ticks != CHUNK_TICKS:
        raise UserError(
            f"it says {fingerprint.chunk_ticks} ticks a record, this version writes {CHUNK_TICKS}"
        )
    if min(fingerprint.tokens_per_frame, fingerprint.dim) < 1:
        raise UserError("it says that features have no size")
    return fingerprint


def _sentence(error: UserError | ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = error.errors()[0]
    where = "".join(f"{part}: " for part in first["loc"])
    return f"it is not what this version writes ({where}{first['msg']})"

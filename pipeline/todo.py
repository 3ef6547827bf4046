"""What is left to do of a cache: which shards are finished, which are to be made, and what they can take over."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.identity import identities
from pipeline.ledger import SHARD_FILE, Entry, Ledger, Unreadable, VideoEntry, forget, key_of, record
from pipeline.plan import LabelTables, Rows, ShardPlan, plan_shards, plan_text
from pipeline.stills import marks_sha256
from pipeline.storage import Store
from schemas.errors import UserError
from schemas.shards import Decoder, FeatureType, Fingerprint, Storage, shard_stem

Row = dict[str, Any]


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is made."""

    shard_mb: int = 512
    storage: Storage = "tar"
    dtype: FeatureType = "float16"
    decoder: Decoder = "pyav"
    workers: int = 1  # decode processes of each encoder
    limit_s: float = 120.0  # without progress in a video, after which it is given up
    part: int = 0  # of an array job: every `of`-th shard from this one on
    of: int = 1
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.of:
            raise UserError(
                f"--shard {self.part}/{self.of} must be one of 0/{self.of} to {self.of - 1}/{self.of}"
            )

    def owns(self, number: int) -> bool:
        """Whether a shard is this run's."""
        return number % self.of == self.part


@dataclass(frozen=True)
class Kept:
    """Features of a video that are there already, in a file of the cache."""

    file: str
    entry: VideoEntry


@dataclass(frozen=True)
class VisionWork:
    """One vision shard to make.

    ``identity`` is that of each video's file (`pipeline.identity`); ``kept`` says of which videos the features are
    taken over.
    """

    number: int
    key: str
    videos: Rows
    identity: dict[str, str | None]
    kept: dict[str, Kept]


@dataclass(frozen=True)
class Todo:
    """What a run has before it. ``plans`` are all shards of the cache, by number, ``mine`` those of this run."""

    plans: list[ShardPlan]
    mine: list[ShardPlan]
    finished: dict[int, Entry]
    works: list[VisionWork]

    @property
    def plan_text(self) -> str:
        return plan_text(self.plans)

    @property
    def ticks_reused(self) -> int:
        return sum(kept.entry.ticks for work in self.works for kept in work.kept.values())


def make_todo(tables: LabelTables, fingerprint: Fingerprint, ledger: Ledger, options: CacheOptions) -> Todo:
    """Compare the plan with the ledger, and the videos with those that were cached."""
    plans = plan_shards(tables, fingerprint.bytes_per_tick(), options.shard_mb)
    mine = [plan for plan in plans if options.owns(plan.number)]
    videos = [video for plan in mine for video in plan.videos]
    identity = dict(
        zip(
            (video["video_id"] for video in videos),
            identities([video["uri"] for video in videos]),
            strict=True,
        )
    )
    cached = _cached(ledger, options)
    settings = fingerprint.model_dump(exclude={"model"})
    finished: dict[int, Entry] = {}
    works: list[VisionWork] = []
    for plan in mine:
        key = key_of(settings, [_needs(video) for video in plan.videos])
        entry = ledger.finished(shard_stem("vision", plan.number), key)
        own = {video["video_id"]: identity[video["video_id"]] for video in plan.videos}
        again = entry is None or (options.retry_failed and entry.failures)
        if entry is not None and not again and _are_same(entry, own):
            finished[plan.number] = entry
            continue
        kept = {
            video["video_id"]: usable
            for video in plan.videos
            if (usable := _usable(video, cached.get(video["video_id"]), own[video["video_id"]])) is not None
        }
        works.append(VisionWork(plan.number, key, plan.videos, own, kept))
    return Todo(plans, mine, finished, works)


def set_aside(todo: Todo, store: Store, ledger: Ledger, options: CacheOptions) -> list[VisionWork]:
    """Rename the files that features are taken over from, so that new ones can take their place, and remove what no
    longer belongs to the plan. A run that was killed after it finds all it needs under the new names.

    Returns:
        The work, with the names that the files have now.
    """
    sources = {kept.file for work in todo.works for kept in work.kept.values()}
    numbers = (n for n in itertools.count(options.part, options.of) if f"old-{n:05d}" not in ledger.entries)
    now = {file: _old_name(file, store, ledger, numbers) for file in sorted(sources)}
    for stem in list(ledger.entries):
        kind, number = stem.split("-")
        if kind != "old" and options.owns(int(number)) and int(number) >= len(todo.plans):
            remove(stem, store, ledger)
    return [
        replace(work, kept={v: replace(kept, file=now[kept.file]) for v, kept in work.kept.items()})
        for work in todo.works
    ]


def remove_the_rest(todo: Todo, store: Store, ledger: Ledger, options: CacheOptions) -> None:
    """Remove what was set aside, and files outside the plan of which a run that was killed left no entry. Call it
    when all work is done.
    """
    for stem in list(ledger.entries):
        if stem.startswith("old-") and options.owns(int(stem.removeprefix("old-"))):
            remove(stem, store, ledger)
    planned = {
        f"{shard_stem(kind, plan.number)}.{options.storage}"
        for plan in todo.mine
        for kind in ("vision", "labels")
    }
    for name in store.names():
        if re.match(SHARD_FILE, name) and name not in planned and options.owns(_number_of(name)):
            store.remove(name)


def _cached(ledger: Ledger, options: CacheOptions) -> dict[str, Kept]:
    """The videos in files that are there whole, whichever plan they were made for; only this run's files."""
    found: dict[str, Kept] = {}
    for stem, entry in sorted(ledger.entries.items()):
        kind, number = stem.split("-")
        if kind != "labels" and options.owns(int(number)) and ledger.is_whole(entry):
            found |= {video_id: Kept(entry.file, video) for video_id, video in entry.videos.items()}
    return found


def _needs(video: Row) -> list[Any]:
    """What of a video's row its features depend on."""
    needs = [video["video_id"], video["rotation_deg"], video["last_tick_needed"]]
    return needs if video["marks"] is None else [*needs, marks_sha256(video["marks"])]


def _usable(video: Row, cached: Kept | None, identity: str | None) -> Kept | None:
    """The features of a video that are there already, as many as are needed now."""
    if cached is None or not _is_same(cached.entry.identity, identity):
        return None
    entry, needed = cached.entry, video["last_tick_needed"] + 1
    ends_before = entry.ticks < entry.needed
    if entry.rotation_deg != video["rotation_deg"] or entry.marks_sha256 != marks_sha256(video["marks"]):
        return None
    if entry.ticks < needed and not ends_before:
        return None
    ticks = min(entry.ticks, needed)
    unreadable = tuple(
        Unreadable(first, min(end, ticks), reason)
        for first, end, reason in entry.unreadable
        if first < ticks or (first == ticks < needed)  # the video breaks off there
    )
    return Kept(
        cached.file, entry.model_copy(update={"ticks": ticks, "needed": needed, "unreadable": unreadable})
    )


def _are_same(entry: Entry, identity: dict[str, str | None]) -> bool:
    return all(_is_same(video.identity, identity[video_id]) for video_id, video in entry.videos.items())


def _is_same(cached: str | None, now: str | None) -> bool:
    """Whether a video's file is the one that was cached; one that is gone is not taken for another."""
    return cached is None or now is None or cached == now


def _number_of(file: str) -> int:
    return int(file.partition(".")[0].rpartition("-")[2])


def _old_name(file: str, store: Store, ledger: Ledger, free_numbers: Iterator[int]) -> str:
    stem, _, ending = file.partition(".")
    if stem.startswith("old-"):
        return file
    old = f"old-{next(free_numbers):05d}"
    entry = ledger.entries[stem].model_copy(update={"file": f"{old}.{ending}"})
    record(store, old, entry)  # first: killed here, it is an entry without a file, which says nothing
    store.rename(file, entry.file)
    forget(store, stem)
    ledger.entries[old] = entry
    del ledger.entries[stem]
    return entry.file


def remove(stem: str, store: Store, ledger: Ledger) -> None:
    """Remove a file, then what the ledger says of it: killed between, it is still known what is to be removed."""
    store.remove(ledger.entries.pop(stem).file)
    forget(store, stem)

"""The feature cache: label tables and videos in, shard pairs out. Each file is whole or not there."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.encode import Job, Progress
from pipeline.engines import Engine, Here
from pipeline.estimate import Estimate, probe
from pipeline.label_shards import make_labels
from pipeline.ledger import Entry, Failure, Ledger
from pipeline.plan import LabelTables, Rows
from pipeline.spool import Made
from pipeline.storage import Store, open_store
from pipeline.todo import CacheOptions, make_todo, remove, remove_the_rest, set_aside
from schemas.errors import UserError
from schemas.shards import Fingerprint, shard_stem


@dataclass
class Summary:
    """What a run did: seconds by stage (of all encoders together), ticks, shards, and what failed with its reason.

    ``ticks_reused`` were taken over from shards of an earlier plan; ``notes`` tell what was done otherwise than asked.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ticks: int = 0
    ticks_reused: int = 0
    shards_kept: int = 0
    shards_made: int = 0
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, progress: Progress) -> None:
        self.ticks += progress.encoded
        for stage, seconds in progress.seconds.items():
            self.seconds[stage] += seconds

    def add(self, vision: Entry, labels: Entry) -> None:
        """A finished pair."""
        self.failures += [*vision.failures, *labels.failures]
        for video_id, video in vision.videos.items():
            self.notes += [f"{video_id}: {note}" for note in video.notes]
            for first, end, reason in video.unreadable:
                what = (
                    f"ticks {first} to {end - 1} cannot be read"
                    if first < end
                    else f"ends after {first} ticks"
                )
                self.notes.append(f"{video_id}: {what} ({reason})")


def cache_features(
    labels: Path,
    out: str | Path,
    engine: Engine,
    options: CacheOptions | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_tick: Callable[[int], None] = lambda ticks: None,
) -> Summary:
    """Make or complete the shard pairs of all label tables under ``labels``.

    Finished shards of an earlier run are kept; features of an earlier plan are taken over where their video and all
    settings are the same. A video or session that fails is recorded in the ledger with its reason and left out; the
    run goes on.

    Args:
        out: a folder, or an address that fsspec knows.
        say: told what the user should know besides.
        on_estimate: called once, before any work, with what is going to be done.
        on_tick: called with a number of ticks done, for a progress bar.

    Raises:
        UserError: no tables, a cache that was made with other settings or that another run holds, or no room.
    """
    options = options or CacheOptions()
    tables, store = LabelTables(labels), open_store(out)
    fingerprint = _fingerprint(engine, tables, options)
    with store.lock(options.part, options.of, say), _full_disk_told(store):
        if not _is_cache_of(store, fingerprint):
            store.write_text("cache.json", fingerprint.text())
        ledger = Ledger(store)
        todo = make_todo(tables, fingerprint, ledger, options)
        expected = Estimate.of(todo, fingerprint, store, engine.encoders, options.workers)
        on_estimate(expected)
        expected.require_room()
        if not store.has("plan.json") or store.read_text("plan.json") != todo.plan_text:
            store.write_text("plan.json", todo.plan_text)
        works = set_aside(todo, store, ledger, options)
        summary = Summary(ticks_reused=todo.ticks_reused)
        job = Job(store.url, fingerprint, options.workers, options.limit_s)

        def finish(number: int, entry: Entry) -> None:
            labelled = make_labels(
                number,
                todo.plans[number].sessions,
                entry.videos,
                tables,
                store,
                options.storage,
                ledger,
            )
            summary.add(entry, labelled)

        for number, entry in todo.finished.items():
            on_tick(todo.plans[number].ticks)
            finish(number, entry)
            summary.shards_kept += 1
        with closing(engine.run(job, works)) as told:  # on an error, encoders end before the store is let go
            for news in told:
                if isinstance(news, Made):
                    finish(news.number, news.entry)
                    summary.shards_made += 1
                else:
                    summary.count(news)
                    on_tick(news.passed)
        remove_the_rest(todo, store, ledger, options)
    return summary


def dry_run(
    labels: Path,
    out: str | Path,
    engine: Here,
    options: CacheOptions,
    encoders: int = 1,
    seconds: float = 3.0,
) -> tuple[Estimate, float | None]:
    """What `cache_features` would do, without doing it, and the ticks a second that this encoder makes of the videos.

    Raises:
        UserError: as `cache_features`, but for want of room: that is for the caller to ask (`Estimate.require_room`).
    """
    tables, store = LabelTables(labels), open_store(out)
    fingerprint = _fingerprint(engine, tables, options)
    _is_cache_of(store, fingerprint)
    todo = make_todo(tables, fingerprint, Ledger(store), options)
    expected = Estimate.of(todo, fingerprint, store, encoders, options.workers)
    return expected, probe(todo, fingerprint, engine.encoder, options.workers, options.limit_s, seconds)


def relabel(labels: Path, out: str | Path, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Write the label shards of a cache anew from other tables; no vision shard is touched and no video opened.

    Raises:
        UserError: no tables, no cache, tables at another tick rate, or another run holds the cache.
    """
    tables, store = LabelTables(labels), open_store(out)
    fingerprint = read_fingerprint(store)
    if fingerprint.tick_hz != tables.clock.tick_hz:
        raise UserError(
            f"{store.url} was made at {fingerprint.tick_hz} ticks a second, {labels} has {tables.clock.tick_hz}; "
            "prepare with the same --tick-hz, or make another cache"
        )
    with store.lock(0, 1, say), _full_disk_told(store):
        ledger = Ledger(store)
        vision = {
            int(stem.removeprefix("vision-")): entry
            for stem, entry in sorted(ledger.entries.items())
            if stem.startswith("vision-") and ledger.is_whole(entry)
        }
        if not vision:
            raise UserError(
                f"{store.url} holds no finished shard; run 'dst cache-features' without --labels-only"
            )
        place = {failure.id: number for number, entry in vision.items() for failure in entry.failures}
        place |= {video_id: number for number, entry in vision.items() for video_id in entry.videos}
        sessions: dict[int, Rows] = {number: [] for number in vision}
        missing: list[Failure] = []
        for session in tables.sessions:
            if session["video_id"] in place:
                sessions[place[session["video_id"]]].append(session)
            else:
                reason = f"its video {session['video_id']} is not in the cache: run 'dst cache-features'"
                missing.append(Failure(id=session["session_id"], reason=reason))
        summary = Summary(shards_kept=len(vision))
        for number, entry in vision.items():
            named = tuple(missing) if number == min(vision) else ()
            made = make_labels(
                number, sessions[number], entry.videos, tables, store, fingerprint.storage, ledger, named
            )
            summary.failures += made.failures
        features_gone = ledger.entries.keys() - {shard_stem("labels", number) for number in vision}
        for stem in sorted(stem for stem in features_gone if stem.startswith("labels-")):
            remove(stem, store, ledger)
    return summary


def read_fingerprint(store: Store) -> Fingerprint:
    """Of the cache in a store.

    Raises:
        UserError: it holds no cache, or one of another version.
    """
    if not store.has("cache.json"):
        raise UserError(
            f"{store.url} holds no cache.json, so it is not a feature cache; run 'dst cache-features'"
        )
    return Fingerprint.parse(store.read_text("cache.json"), f"{store.url}/cache.json")


def _fingerprint(engine: Engine, tables: LabelTables, options: CacheOptions) -> Fingerprint:
    described = engine.described
    return Fingerprint(
        model=described.model,
        vision_sha256=described.vision_sha256,
        preprocessing=described.preprocessing,
        decoder=options.decoder,
        compute=described.compute,
        tick_hz=tables.clock.tick_hz,
        tokens_per_frame=described.tokens_per_frame,
        tiles=described.tiles,
        dim=described.dim,
        dtype=options.dtype,
        storage=options.storage,
    )


def _is_cache_of(store: Store, fingerprint: Fingerprint) -> bool:
    """Whether the store is a cache already.

    Raises:
        UserError: it is one of other settings, or holds something else.
    """
    foreign = store.names()  # asked first: another part of an array job may be writing cache.json just now
    if store.has("cache.json"):
        fingerprint.require_equal(read_fingerprint(store), store.url)
        return True
    if foreign:
        raise UserError(
            f"{store.url} holds {foreign[0]!r} but no cache.json, so it is not a feature cache; give another --out"
        )
    return False


@contextmanager
def _full_disk_told(store: Store) -> Iterator[None]:
    """What the system says of a full disk names no folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"there is no more room for the shards of {store.url} ({error.strerror}); finished ones are kept: "
            "free some room and run again"
        ) from error

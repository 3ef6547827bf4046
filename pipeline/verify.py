"""`dst verify`: a cache is checked from end to end, against its ledger, its plan, its fingerprint, its label tables."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.copies import local_copy
from pipeline.ledger import FOLDER, Entry, Failure, sha256_of
from pipeline.plan import LabelTables
from pipeline.shards import reader_of
from pipeline.storage import Store, open_store
from pipeline.verify_labels import LabelCheck
from pipeline.verify_ledger import AGAIN, SmallFiles, check_small_files, foreign_files, read_small_files
from pipeline.verify_vision import check_vision
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.shards import Fingerprint


@dataclass
class Report:
    """What a check found.

    Each of ``problems`` is a sentence that begins with the file and, where there are such, names record and tick.
    ``failures`` are what the ledger says could not be made, no fault of the cache. ``notes`` tell of harmless things.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    out: str | Path,
    labels: Path | None = None,
    *,
    on_plan: Callable[[int], None] = lambda files: None,
    on_file: Callable[[], None] = lambda: None,
) -> Report:
    """Check all of a cache, whatever is wrong with parts of it.

    A file whose bytes are not those that the ledger knows is not looked into.

    Args:
        out: a folder, or an address that fsspec knows.
        labels: label tables that the cache's sessions are compared with.
        on_plan: called with the number of files to check.
        on_file: called when a file was checked.

    Raises:
        UserError: there is no cache, its store cannot be reached, or the label tables cannot be read.
    """
    tables = LabelTables(labels) if labels is not None else None
    store = open_store(out)
    if not store.has("cache.json") and not store.names(FOLDER):
        raise UserError(
            f"{store.url} holds no cache.json, so it is not a feature cache; run 'dst cache-features'"
        )
    small = read_small_files(store)
    report = Report(
        counts=_counts(small),
        problems=[*small.problems, *check_small_files(small)],
        failures=[failure for entry in small.entries for failure in entry.failures],
        notes=list(foreign_files(store, small)),
    )
    files = {
        entry.file: (number, entry) for each in (small.vision, small.labels) for number, entry in each.items()
    }
    on_plan(len(files))
    contents = _Contents(small, small.fingerprint, tables) if small.fingerprint else None
    for file, path in _whole_files(store, [entry for _, entry in files.values()]):
        number, entry = files[file]
        if isinstance(path, str):
            report.problems.append(f"{file}: {path}")
        elif contents:
            report.problems.extend(contents.check(number, entry, path))
        on_file()
    if contents:
        report.problems.extend(contents.check_tables())
        report.counts["sessions"] = contents.num_sessions
    for told in (report.problems, report.notes):
        told[:] = map(_printable, told)
    report.failures = [
        Failure(id=_printable(failure.id), reason=_printable(failure.reason)) for failure in report.failures
    ]
    return report


class _Contents:
    """Looks into one file after the other."""

    def __init__(self, small: SmallFiles, fingerprint: Fingerprint, tables: LabelTables | None) -> None:
        self._small, self._fingerprint, self._tables = small, fingerprint, tables
        files = {video_id: entry.file for entry in small.vision.values() for video_id in entry.videos}
        self._labels = LabelCheck(Clock(fingerprint.tick_hz), files, tables)
        self._seen: set[int] = set()  # numbers of the label files whose sessions are known

    @property
    def num_sessions(self) -> int:
        return len(self._labels.sessions)

    def check(self, number: int, entry: Entry, path: Path) -> Iterator[str]:
        """What is wrong in a file: sentences that begin with its name."""
        if not entry.file.endswith(self._fingerprint.storage):
            return  # which is a problem already; nobody reads it
        try:
            reader = reader_of(path)
        except UserError as error:
            yield f"{entry.file}: {error}"
            return
        if entry.file.startswith("vision"):
            found = check_vision(reader, entry, self._fingerprint)
        else:
            found = self._labels.check(reader, entry, self._small.vision.get(number))
            self._seen.add(number)
        yield from (f"{entry.file}, {wrong}" for wrong in found)

    def check_tables(self) -> Iterator[str]:
        """What the label tables have otherwise; call it when all files were checked."""
        if self._tables is None:
            return
        if (rate := self._tables.clock.tick_hz) != self._fingerprint.tick_hz:
            yield f"{self._tables.folder}: it has {rate} ticks a second, the cache {self._fingerprint.tick_hz}"
            return  # so that every session differs
        plan, vision = self._small.plan, self._small.vision
        unseen = {video_id for n in plan.keys() - self._seen for video_id in plan[n].videos}
        unseen |= {video_id for n in vision.keys() - self._seen for video_id in vision[n].videos}
        missing = self._labels.missing(list(self._small.labels.values()), unseen)
        yield from (f"{self._tables.folder}: {wrong}" for wrong in missing)


def _counts(small: SmallFiles) -> Counter[str]:
    videos = [video for entry in small.vision.values() for video in entry.videos.values()]
    finished = small.plan.keys() & small.vision.keys() & small.labels.keys()
    return Counter(
        {
            "shards planned": len(small.plan),
            "shards finished": len(finished),
            "bytes": sum(entry.bytes for entry in small.entries),
            "videos": len(videos),
            "ticks": sum(video.ticks for video in videos),
            "unreadable ticks": sum(end - first for video in videos for first, end, _ in video.unreadable),
            "failed videos": sum(len(entry.failures) for entry in small.vision.values()),
            "failed sessions": sum(len(entry.failures) for entry in small.labels.values()),
        }
    )


def _whole_files(store: Store, entries: Iterable[Entry]) -> Iterator[tuple[str, Path | str]]:
    """Each file with its path, or with what its bytes are not; one is read while the one before it is looked into, and
    is then in the system's cache. Copies of remote files take no more room than that of two."""
    there = store.sizes()
    ahead: deque[tuple[str, Path, Future[Path | str]]] = deque()
    with tempfile.TemporaryDirectory(prefix="dst-") as scratch, ThreadPoolExecutor(1) as pool:

        def checked() -> Iterator[tuple[str, Path | str]]:
            file, folder, path = ahead.popleft()
            yield file, path.result()
            shutil.rmtree(folder, ignore_errors=True)

        for entry in entries:
            folder = Path(scratch, entry.file)
            ahead.append((entry.file, folder, pool.submit(_whole_file, store.url, entry, there, folder)))
            if len(ahead) > 1:
                yield from checked()
        while ahead:
            yield from checked()


def _whole_file(url: str, entry: Entry, there: Mapping[str, int], folder: Path) -> Path | str:
    try:
        if entry.file not in there:
            return f"the ledger has it, and it is not there; {AGAIN}"
        path = local_copy(f"{url}/{entry.file}", folder)
        size = path.stat().st_size
        if size != entry.bytes:
            return (
                f"it has {size} bytes, the ledger says {entry.bytes}; copy it again, or remove it and {AGAIN}"
            )
        if sha256_of(path) != entry.sha256:
            return (
                f"its bytes are not those that were written (sha256); copy it again, or remove it and {AGAIN}"
            )
    except (UserError, OSError) as error:
        return str(error)
    return path


def _printable(text: str) -> str:
    """A stranger's ids may hold what a terminal obeys."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )

"""From a corpus' annotations to label tables."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from data_manifests import Manifest, load_manifest
from pipeline.align import Aligned, align
from pipeline.counted import counted
from pipeline.dialogs import DialogIndex
from pipeline.sources.common import Annotated, Corpus, make_sessions
from pipeline.workers import in_order
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Marks, Picture, Rejects, Video, video_files
from schemas.tables import LabelWriter, table_of


@dataclass(frozen=True)
class Counts:
    """What was written: sessions by split, rows by table, rejects by reason; how often something was decided that
    no file says; how many assistant turns were joined to an earlier one of their tick; how many videos are not there,
    and where the first of them should be.
    """

    sessions: dict[str, int]
    rows: dict[str, int]
    rejects: dict[str, int]
    notes: dict[str, int]
    joined_turns: int
    missing_videos: int
    missing_video: str | None


@dataclass(frozen=True)
class _Task:
    """What every unit is read with."""

    source: str
    clock: Clock
    index: DialogIndex
    marks: Marks


@dataclass(frozen=True)
class _Read:
    """What one unit gave: its sessions with their videos and last ticks, and the rows of all tables, which are
    cheaper to hand from process to process than what they are made of."""

    sessions: list[dict[str, Any]]
    videos: list[tuple[Video, int]]
    video_uids: list[str]
    rows: dict[str, pa.Table]
    reasons: Counter[str]
    notes: Counter[str]
    joined_turns: int


def corpus_of(source: str) -> Corpus:
    """The module of a corpus.

    Raises:
        UserError: there is no manifest of that name, or one without a module.
    """
    load_manifest(source)
    name = f"pipeline.sources.{source}"
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{source} has a manifest, but nothing reads it: write pipeline/sources/{source}.py")
    return cast(Corpus, importlib.import_module(name))


def prepare(
    source: str,
    root: Path,
    out: Path,
    clock: Clock,
    dialogs: Path | None = None,
    level: str = "step",
    view: str | None = None,
    workers: int = 1,
    marks: Marks = "none",
    on_plan: Callable[[int], None] = lambda units: None,
    on_unit: Callable[[], None] = lambda: None,
) -> Counts:
    """Write the label tables of a corpus to ``out/<source>``; they replace those there when all is written.

    The same files give the same bytes, however many workers read them.

    Args:
        source: the corpus.
        root: its folder.
        out: the folder of all label tables.
        clock: the ticks.
        dialogs: a file or folder of dialogues; None takes ``root/dialogs`` where that is there.
        level: which annotations are the steps, ``step`` or ``substep``.
        view: the camera of sessions whose dialogue names none; None lets the corpus choose.
        workers: processes that read.
        marks: of a corpus of pictures: ``drawn`` gives each a tick for each mark, with it and those before it drawn.
        on_plan: called once with the number of units (recordings, files, or some pictures), for a progress bar.
        on_unit: called after each.

    Raises:
        UserError: nothing that can be used; the tables of an earlier run stay as they were.
    """
    corpus, manifest = corpus_of(source), load_manifest(source)
    _check(manifest, corpus, root, dialogs, level, view, marks)
    if dialogs is None and corpus.LEVELS and (root / "dialogs").exists():
        dialogs = root / "dialogs"
    rejects = Rejects()
    index = DialogIndex(dialogs, rejects)
    units = corpus.units(root, level, view, index.video_uids, rejects)
    on_plan(len(units))
    totals = _Totals(source)
    with LabelWriter(out / source) as writer:
        totals.add(writer, _packed(source, [], [], rejects))
        with closing(in_order(_read_unit, _Task(source, clock, index, marks), units, workers)) as results:
            for read in results:
                totals.add(writer, read)
                on_unit()
        totals.add(writer, _packed(source, [], [], _unclaimed(index, totals.video_uids)))
        if not totals.splits:
            reasons = ", ".join(f"{reason} ({number})" for reason, number in totals.reasons.most_common())
            raise UserError(
                f"{root} gave no session; what was read and not used: {reasons or 'nothing'}; "
                f"see what {source} looks like with 'dst sample --source {source}'"
            )
        writer.add_videos(totals.video_rows())
        counts = totals.counts(dict(writer.rows))
        settings: dict[str, Any] = {"marks": marks}
        if corpus.LEVELS:
            settings = {"dialogs": dialogs and str(dialogs), "level": level, "view": view}
        about = {"source": source, "root": str(root), **settings, "tick_hz": clock.tick_hz, **asdict(counts)}
        writer.add_about(json.dumps(about, indent=2) + "\n")
    return counts


def _check(
    manifest: Manifest,
    corpus: Corpus,
    root: Path,
    dialogs: Path | None,
    level: str,
    view: str | None,
    marks: Marks,
) -> None:
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder, so there is no {manifest.name}; ask for it at {manifest.ask_at}, "
            f"or make a synthetic one with 'dst sample --source {manifest.name} --out {root}'"
        )
    if not corpus.LEVELS:
        if dialogs is not None or level != "step" or view is not None:
            raise UserError(
                f"{manifest.name} has pictures, not dialogues; leave --dialogs, --level and --view away"
            )
        return
    if marks != "none":
        raise UserError(f"{manifest.name} has no pictures to draw marks on; leave --marks away")
    if level not in corpus.LEVELS:
        raise UserError(f"{manifest.name} has no level {level!r}; known: {', '.join(corpus.LEVELS)}")
    views = [known.name for known in manifest.views]
    if view is not None and view not in views:
        raise UserError(f"{manifest.name} has no view {view!r}; known: {', '.join(views) or 'its only one'}")


def _read_unit(task: _Task, unit: Any) -> _Read:
    rejects = Rejects()
    read = list(corpus_of(task.source).read(unit, rejects))
    annotated = [each for each in read if isinstance(each, Annotated)]
    sessions = [counted(each, task.clock, task.marks) for each in read if isinstance(each, Picture)]
    for session in make_sessions(task.source, annotated, task.index, rejects):
        aligned = align(session, task.clock, rejects)
        if aligned is not None:
            sessions.append((session.video, aligned))
    return _packed(task.source, sessions, [stretch.video_uid for stretch in annotated], rejects)


def _packed(
    source: str, sessions: list[tuple[Video, Aligned]], video_uids: list[str], rejects: Rejects
) -> _Read:
    aligned = [session for _, session in sessions]
    frames = [session.frames for session in aligned]
    return _Read(
        sessions=[{**session.session, "source": source} for session in aligned],
        videos=[(video, session.last_tick) for video, session in sessions],
        video_uids=video_uids,
        rows={
            "steps": table_of("steps", (row for session in aligned for row in session.steps)),
            "turns": table_of("turns", (row for session in aligned for row in session.turns)),
            "frames": pa.concat_tables(frames) if frames else table_of("frames", []),
            "points": table_of("points", (row for session in aligned for row in session.points)),
            "rejects": table_of("rejects", map(vars, rejects.rows)),
        },
        reasons=Counter(reject.reason for reject in rejects.rows),
        notes=rejects.notes,
        joined_turns=sum(session.joined_turns for session in aligned),
    )


def _unclaimed(index: DialogIndex, known: set[str]) -> Rejects:
    rejects = Rejects()
    for video_uid in index.video_uids:
        if video_uid not in known:
            for place in index.places(video_uid):
                rejects.add(place.file, place.locator, "unknown video_uid", video_uid)
    return rejects


class _Totals:
    """What has been written so far, and the videos that sessions use, each once, and how far."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.video_uids: set[str] = set()
        self.splits: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.joined_turns = 0
        self._videos: dict[str, Video] = {}
        self._last_tick: dict[str, int] = {}

    def add(self, writer: LabelWriter, read: _Read) -> None:
        for video, last_tick in read.videos:
            if self._videos.setdefault(video.video_id, video) != video:
                raise UserError(
                    f"{video.uri} and {self._videos[video.video_id].uri} both have the id {video.video_id!r}; "
                    "rename one of them"
                )
            self._last_tick[video.video_id] = max(last_tick, self._last_tick.get(video.video_id, 0))
        writer.add_sessions(read.sessions, [video.recording_id for video, _ in read.videos], read.rows)
        writer.add_rejects(read.rows["rejects"])
        self.video_uids.update(read.video_uids)
        self.splits.update(session["split"] for session in read.sessions)
        self.reasons += read.reasons
        self.notes += read.notes
        self.joined_turns += read.joined_turns

    def video_rows(self) -> list[dict[str, object]]:
        return [
            {"source": self._source, **asdict(video), "last_tick_needed": self._last_tick[video_id]}
            for video_id, video in sorted(self._videos.items())
        ]

    def counts(self, rows: dict[str, int]) -> Counts:
        files = [video_files(video.uri) for video in self._videos.values()]
        gaps = [[path for path in parts if not os.path.isfile(path)] for parts in files]
        missing = [parts[0] for parts in gaps if parts]
        return Counts(
            dict(self.splits),
            rows,
            dict(self.reasons),
            dict(self.notes),
            self.joined_turns,
            len(missing),
            str(missing[0]) if missing else None,
        )

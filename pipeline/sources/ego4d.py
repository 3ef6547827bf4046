"""Ego4D GoalStep: people cook and do other tasks for minutes to hours, some of them in several videos.

Licence: the annotations MIT, the videos under the Ego4D licence agreement. Layout under the corpus' root, where
all but one annotation file may be absent::

    annotations/goalstep_{train,val,valid,test}.json
    annotations/goalstep_video_groups.tsv
    video_540ss/<uid>.mp4

A file's name is the split of its videos; the official test file gives no times, so it makes no steps. The
segments of a video are its steps, the segments inside those its substeps; a session's plan holds either, and of
these the ones that are themselves ``essential``. A segment with ``is_continued`` is one more span of the latest
earlier one of the same category and description; where there is none, it is a step like any other.

A ``video_uid`` ``grp-<uid>`` stands for a group: the videos that the groups file lists from ``<uid>`` on, one after
the other, with times that run over all of them. Such a group is one recording, also where one of its videos is
annotated by itself.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from data_manifests import Manifest, load_manifest
from pipeline.sources.common import Annotated, make_video, read_json, safe_id, span_of
from pipeline.sources.tables import table_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split
from schemas.states import SourceRow, Step

LEVELS: tuple[str, ...] = ("step", "substep")
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_NOT_ESSENTIAL = ("optional", "irrelevant", "unsure")
_UID = re.compile(r"[A-Za-z0-9_-]+")
_Groups = dict[str, tuple[str, ...]]  # members by ``grp-<first member>``; there may be only one
_STRAY = " `´,;:/\\-"  # found at the end of goals


@dataclass(frozen=True)
class _Record:
    """One video with the files of its parts; one that is only spoken about has no split and an empty ``value``."""

    video_uid: str
    parts: tuple[Path, ...]
    file: Path
    split: Split | None
    value: Mapping[str, Any]


@dataclass(frozen=True)
class _Unit:
    """One recording: mostly one video."""

    recording_id: str
    level: str
    records: tuple[_Record, ...]


class _Segment(NamedTuple):
    """A segment as it is in the file; ``step_id`` counts its place at each level, as in ``S3.1``."""

    step_id: str
    locator: str
    value: Any


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The recordings in the order in which the files name them; see `common.Corpus`."""
    manifest = load_manifest("ego4d")
    groups = _read_groups(root, manifest, rejects)
    records = _read_records(root, manifest, groups, rejects)
    for uid in sorted(filter(_is_uid, set(spoken) - records.keys())):
        parts = _parts(root, uid, groups)
        if parts and all(map(os.path.isfile, parts)):
            records[uid] = _Record(uid, parts, root, None, {})
    if not records and not manifest.find(root, "goalstep"):
        raise manifest.nothing_found(root, ("goalstep",))
    recording_of = {
        uid: group if len(members) > 1 else members[0]
        for group, members in groups.items()
        for uid in (group, *members)
    }
    recordings: dict[str, list[_Record]] = {}
    for uid, record in records.items():
        if record.parts:
            recordings.setdefault(recording_of.get(uid, uid), []).append(record)
            continue
        for locator in [segment.locator for segment in _segments(record)] or [f"video {uid}"]:
            rejects.add(record.file, locator, "unknown video group", uid)
    return [
        _Unit(recording_id, level, tuple(_of_one_split(records, rejects)))
        for recording_id, records in recordings.items()
    ]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """The videos of one recording."""
    for record in unit.records:
        video_id = safe_id("ego4d", record.video_uid)
        yield Annotated(
            video_uid=record.video_uid,
            video=make_video(video_id, unit.recording_id, record.parts, rejects),
            split=record.split,
            goal=_goal(record.value),
            steps=_steps(record, unit.level, rejects),
            source_file=str(record.file),
        )


def _of_one_split(records: list[_Record], rejects: Rejects) -> Iterator[_Record]:
    """The videos of a recording that are in the split of its group, or of its first video: no recording crosses
    splits."""
    annotated = [record for record in records if record.split] or records
    first = next((record for record in annotated if record.video_uid.startswith("grp-")), annotated[0])
    for record in records:
        if record.split in (first.split, None):
            yield record
            continue
        for locator in [segment.locator for segment in _segments(record)] or [f"video {record.video_uid}"]:
            detail = f"{first.video_uid} is in {first.split}"
            rejects.add(record.file, locator, "its recording is in another split", detail)


def _read_groups(root: Path, manifest: Manifest, rejects: Rejects) -> _Groups:
    groups: _Groups = {}
    known: set[str] = set()
    for path in manifest.find(root, "groups"):
        rows = table_rows(path, "\t", 2, rejects)
        _, header = next(rows, (1, []))
        if "video_group" not in header:
            raise UserError(f"{path} has no column 'video_group' in its first row; fetch the file again")
        column = header.index("video_group")
        for number, cells in rows:
            members = _literal(cells[column]) if column < len(cells) else None
            if not isinstance(members, list) or not members or not all(map(_is_uid, members)):
                rejects.add(path, f"row {number}", "not a list of videos", "\t".join(cells))
            elif len(set(members)) < len(members) or known.intersection(members):
                rejects.add(path, f"row {number}", "video in two groups", "\t".join(cells))
            else:
                groups[f"grp-{members[0]}"] = tuple(members)
                known.update(members)
    return groups


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _is_uid(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _UID.fullmatch(value) is not None


def _parts(root: Path, uid: str, groups: _Groups) -> tuple[Path, ...]:
    """The files of a video in order, whether they are there or not; none for an unknown group."""
    members = groups.get(uid, ()) if uid.startswith("grp-") else (uid,)
    manifest = load_manifest("ego4d")
    return tuple(manifest.path(root, f"video_540ss/{member}.mp4") for member in members)


def _read_records(root: Path, manifest: Manifest, groups: _Groups, rejects: Rejects) -> dict[str, _Record]:
    """The annotated videos by ``video_uid``. The val file goes by two names, so a video may be there twice."""
    records: dict[str, _Record] = {}
    for path in manifest.find(root, "goalstep"):
        split = _SPLITS.get(path.stem.split("_")[1])
        if split is None:
            rejects.add(path, "file name", "unknown file", "not goalstep_{train|val|valid|test}.json")
            continue
        content = read_json(path, rejects)
        videos = content.get("videos") if isinstance(content, Mapping) else None
        if not isinstance(videos, list):
            raise UserError(f"{path} has no list 'videos'; fetch it again or take it away")
        for number, value in enumerate(videos, 1):
            uid = value.get("video_uid") if isinstance(value, Mapping) else None
            if not _is_uid(uid):
                rejects.add(path, f"videos {number}", "unknown form", f"video_uid {uid!r}")
                continue
            first = records.setdefault(uid, _Record(uid, _parts(root, uid, groups), path, split, value))
            if first.split != split:
                raise UserError(
                    f"video {uid!r} is in {first.split!r} by {first.file} and in {split!r} by {path}; "
                    "list it in one split"
                )
            if first.value is not value:
                detail = f"the first is in {first.file}"
                rejects.add(path, f"videos {number}, video {uid}", "second record of a video", detail)
    return records


def _segments(record: _Record) -> Iterator[_Segment]:
    """All segments of a video, each before those inside it. In the official test file they have a name of their own."""
    value = record.value.get("segments", record.value.get("step_segments"))
    yield from _numbered(value, f"video {record.video_uid}", "S")


def _numbered(value: Any, locator: str, step_id: str) -> Iterator[_Segment]:
    segments = value if isinstance(value, list) else [] if value is None else [value]
    for number, segment in enumerate(segments, 1):
        here = _Segment(f"{step_id}{number}", f"{locator}, segment {number}", segment)
        yield here
        if isinstance(segment, Mapping):
            yield from _numbered(segment.get("segments"), here.locator, f"{here.step_id}.")


def _steps(record: _Record, level: str, rejects: Rejects) -> tuple[Step, ...]:
    """The steps of a video in order of time; each other segment is a reject."""
    kept: list[tuple[Step, Mapping[str, Any]]] = []
    for segment in _segments(record):
        step = _step(segment, record.file, level, rejects)
        if step:
            kept.append((step, segment.value))
    kept.sort(key=lambda pair: pair[0].spans)
    steps: list[Step] = []
    latest: dict[str, int] = {}  # which step the last segment of a category and description is in
    for step, value in kept:
        words = (_text(value.get("step_category")), _text(value.get("step_description")))
        key = "\n".join(text.casefold().rstrip(". ") for text in words)  # a full stop comes and goes
        if value.get("is_continued") is True and key in latest:
            first = steps[latest[key]]
            spans, rows = (*first.spans, *step.spans), (*first.source_rows, *step.source_rows)
            steps[latest[key]] = replace(first, spans=spans, source_rows=rows)
        else:
            latest[key] = len(steps)
            steps.append(step)
    return tuple(steps)


def _step(segment: _Segment, file: Path, level: str, rejects: Rejects) -> Step | None:
    """One segment as a step with one span; None, and a reject, where it is none of this level."""
    value, locator = segment.value, segment.locator
    if not isinstance(value, Mapping):
        rejects.add(file, locator, "unknown form", f"{value!r} is no segment")
        return None
    name = _text(value.get("step_description")) or _text(value.get("step_category")).rpartition(": ")[2]
    parent = segment.step_id.rpartition(".")[0] or None
    start, end, relevant = (value.get(key) for key in ("start_time", "end_time", "is_relevant"))
    if segment.step_id.count(".") != LEVELS.index(level):
        rejects.add(file, locator, f"not the annotation of level {level}", name)
    elif start is None and end is None:
        rejects.add(file, locator, "no times", name)
    elif relevant in _NOT_ESSENTIAL:
        rejects.add(file, locator, f"is_relevant {relevant}", name)
    elif relevant != "essential":
        rejects.add(file, locator, "is_relevant unknown", f"{relevant!r}: {name}")
    elif not name:
        rejects.add(file, locator, "no description", f"{start} to {end}")
    elif span := span_of(start, end, file, locator, rejects):
        return Step(segment.step_id, name, (span,), level, parent, (SourceRow(str(file), locator),))
    return None


def _goal(value: Mapping[str, Any]) -> str:
    """The goal in words: its description, else its category such as ``COOKING:MAKE_OMELET``."""
    category = _text(value.get("goal_category")).rpartition(":")[2].replace("_", " ").capitalize()
    return _text(value.get("goal_description")).rstrip(_STRAY) or category or "Do the task"


def _text(value: object) -> str:
    """A text with single blanks; what is no text is empty."""
    return " ".join(value.split()) if isinstance(value, str) else ""

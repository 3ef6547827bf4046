"""EPIC-KITCHENS-100: unscripted cooking at home, every action narrated, seen by one head camera.

Licence: CC BY-NC 4.0. Layout under the corpus' root, where ``epic-kitchens-100-annotations/`` and
``EPIC-KITCHENS/`` may be left out, and the table of videos may be absent::

    epic-kitchens-100-annotations/EPIC_100_{train,validation}.csv
    epic-kitchens-100-annotations/EPIC_100_video_info.csv
    EPIC-KITCHENS/<participant>/videos/<video_id>.MP4

A video is one session, each of its narrations one step, in order of time: hundreds a video, which overlap. Times
are the ``HH:MM:SS.ss`` time stamps; the frame numbers beside them are not used. The split is that of the file a
video is in, train or val: the official test file has no labels.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from data_manifests import load_manifest
from pipeline.sources.common import Annotated, make_video, safe_id, span_of
from pipeline.sources.tables import named_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split
from schemas.states import SourceRow, Step

LEVELS: tuple[str, ...] = ("step",)
_SPLITS: dict[str, Split] = {"train": "train", "validation": "val"}  # by kind of file
_GOAL = "Kitchen activities, step by step"
_COLUMNS = ("video_id", "narration_id", "start_timestamp", "stop_timestamp", "narration")
_TIMESTAMP = re.compile(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)")


@dataclass(frozen=True)
class _Row:
    """One narration, as its file has it."""

    number: int
    narration_id: str
    start: str
    stop: str
    narration: str


@dataclass
class _Narrations:
    """The rows of one video, which all are in one file."""

    file: Path
    split: Split
    rows: list[_Row] = field(default_factory=list)


@dataclass(frozen=True)
class _Unit:
    """One video; ``narrations`` is None for one that only dialogues know."""

    root: Path
    video_id: str
    narrations: _Narrations | None
    duration_s: float | None


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The videos in order of their ids; see `common.Corpus`. A ``video_uid`` is a ``video_id``."""
    manifest = load_manifest("epickitchens")
    videos: dict[str, _Narrations] = {}
    seen: set[str] = set()
    for kind, split in _SPLITS.items():
        for path in manifest.find(root, kind):
            _read_narrations(path, split, videos, seen, rejects)
    filmed = {uid for uid in spoken if os.path.isfile(_path(root, uid))}
    if not filmed and not any(manifest.find(root, kind) for kind in _SPLITS):
        raise manifest.nothing_found(root, _SPLITS)
    durations: dict[str, float] = {}
    for path in manifest.find(root, "video_info"):
        durations.update(_read_durations(path, rejects))
    return [
        _Unit(root, video_id, videos.get(video_id), durations.get(video_id))
        for video_id in sorted(videos.keys() | filmed)
    ]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """The one session of a video."""
    session_id = safe_id("epickitchens", unit.video_id)
    path = _path(unit.root, unit.video_id)
    narrations = unit.narrations
    yield Annotated(
        video_uid=unit.video_id,
        video=make_video(session_id, unit.video_id, [path], rejects, declared_s=unit.duration_s),
        split=narrations.split if narrations else None,
        goal=_GOAL,
        steps=_steps(narrations, rejects) if narrations else (),
        source_file=str(narrations.file if narrations else path),
    )


def _read_narrations(
    path: Path, split: Split, videos: dict[str, _Narrations], seen: set[str], rejects: Rejects
) -> None:
    """Add the rows of a file to their videos; ``seen`` are the narration_ids so far, of all files."""
    for number, row in named_rows(path, ",", _COLUMNS, rejects):
        video_id, narration_id, start, stop, narration = (row[column] for column in _COLUMNS)
        if not (video_id and narration_id):
            rejects.add(path, f"row {number}", "no id", f"video {video_id!r}, narration {narration_id!r}")
        elif narration_id in seen:
            rejects.add(path, f"row {number}", "second row of one narration_id", narration_id)
        else:
            seen.add(narration_id)
            video = videos.setdefault(video_id, _Narrations(path, split))
            if video.file != path:
                raise UserError(
                    f"video {video_id!r} is in {video.file} and in {path} (row {number}), so in two splits; "
                    "take its rows out of one of them"
                )
            video.rows.append(_Row(number, narration_id, start, stop, narration))


def _read_durations(path: Path, rejects: Rejects) -> Iterator[tuple[str, float]]:
    for number, row in named_rows(path, ",", ("video_id", "duration"), rejects):
        try:
            seconds = float(row["duration"])
        except ValueError:
            seconds = math.nan
        if 0 < seconds < math.inf:
            yield row["video_id"], seconds
        else:
            rejects.add(path, f"row {number}", "not a duration", f"{row['duration']!r} of {row['video_id']}")


def _steps(narrations: _Narrations, rejects: Rejects) -> tuple[Step, ...]:
    """One step for each narration, in order of time."""
    found: list[tuple[float, float, _Row]] = []
    for row in narrations.rows:
        locator, times = f"row {row.number}", f"{row.start} to {row.stop}"
        start, stop = _seconds(row.start), _seconds(row.stop)
        if start is None or stop is None:
            rejects.add(narrations.file, locator, "not a time", times)
        elif not row.narration:
            rejects.add(narrations.file, locator, "no narration", times)
        elif span := span_of(start, stop, narrations.file, locator, rejects):
            found.append((*span, row))
    found.sort(key=lambda entry: (*entry[:2], entry[2].number))
    return tuple(
        Step(
            row.narration_id,
            row.narration,
            ((start, stop),),
            source_rows=(SourceRow(str(narrations.file), f"row {row.number}"),),
        )
        for start, stop, row in found
    )


def _seconds(timestamp: str) -> float | None:
    """Seconds of ``HH:MM:SS.ss``, None where it is not of that form."""
    match = _TIMESTAMP.fullmatch(timestamp)
    return float(int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])) if match else None


def _path(root: Path, video_id: str) -> Path:
    name = f"{video_id.partition('_')[0]}/videos/{video_id}.MP4"
    return load_manifest("epickitchens").path(root, name, f"EPIC-KITCHENS/{name}")

"""EgoExoLearn: people do what a video they have watched demonstrates, in kitchens and laboratories.

Licence: MIT. Layout under the corpus' root, where either annotation and the table of videos may be absent::

    annotations/coarse_annotations/l1/<video_uid>.json
    annotations/fine_annotation_{trainval_en,test}.csv
    annotations/video_meta_downsampled.json
    videos/<video_uid>.mp4

A video is one session. At level ``step`` its steps are the coarse entries, their numbered lines made one; at level
``substep`` the fine rows, named by their narration without the words about hands. All times are seconds. Only
what the wearer of the camera sees is used: the demonstrations (view ``exo``) are not. The split is the ``subset`` of
a video's fine rows, those without a narration included, as all rows of the test file are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_manifests import load_manifest
from pipeline.sources.common import Annotated, make_video, read_json, safe_id, span_of
from pipeline.sources.tables import named_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split
from schemas.states import SourceRow, Step

LEVELS: tuple[str, ...] = ("step", "substep")
_COLUMNS = ("video_uid", "annotation_id", "subset", "view", "start_sec", "end_sec")
_NARRATIONS = ("narration_en_no_hand_prompt", "narration_en")  # the first that says something
_SUBSETS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
_NUMBER = re.compile(r"^\s*\d+[.)](?!\d)")


@dataclass(frozen=True)
class _Source:
    """One fine row or coarse entry, as its file has it."""

    file: Path
    locator: str
    id: str
    start: object
    end: object
    text: str


_Timed = tuple[tuple[float, float], _Source]


@dataclass
class _Known:
    """All that is said about one video, its coarse entries still in their file.

    ``split`` is with the place that says so. ``exo`` is None where nothing says what its view is.
    """

    fine: list[_Source] = field(default_factory=list)
    coarse: Path | None = None
    split: tuple[Split, str] | None = None
    exo: bool | None = None
    scene: str = ""
    task: str = ""
    duration_s: float | None = None


@dataclass(frozen=True)
class _Unit:
    """One video."""

    root: Path
    uid: str
    level: str
    known: _Known


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The videos in order of their uids, those that only demonstrate left out; see `common.Corpus`."""
    manifest = load_manifest("egoexolearn")
    videos: dict[str, _Known] = {}
    for path in manifest.find(root, "fine"):
        _read_fine(path, videos, rejects)
    for path in manifest.find(root, "coarse"):
        videos.setdefault(path.stem, _Known()).coarse = path
    for path in manifest.find(root, "meta"):
        _read_meta(path, videos, rejects)
    used = {uid for uid, known in videos.items() if known.fine or known.coarse}
    used |= {uid for uid in spoken if os.path.isfile(_path(root, uid))}
    if not used and not manifest.find(root, "fine"):
        raise manifest.nothing_found(root, ("fine", "coarse"))
    return [_Unit(root, uid, level, videos.get(uid, _Known())) for uid in sorted(used)]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """The one session of a video."""
    known, path = unit.known, _path(unit.root, unit.uid)
    coarse, declared_s = _read_coarse(known.coarse, rejects) if known.coarse else ([], None)
    steps: list[_Timed] = []
    for level, sources in (("step", coarse), ("substep", known.fine)):
        timed = list(_timed(sources, level, known.exo, rejects))
        if level == unit.level:
            steps = sorted(timed, key=lambda entry: entry[0])
            continue
        for _, source in timed:
            reason = f"not the annotation of level {unit.level}"
            rejects.add(source.file, source.locator, reason, source.text)
    named = [source for _, source in steps] or coarse or known.fine
    video_id = safe_id("egoexolearn", unit.uid)
    yield Annotated(
        video_uid=unit.uid,
        video=make_video(video_id, unit.uid, [path], rejects, declared_s=declared_s or known.duration_s),
        split=known.split[0] if known.split else None,
        goal=_goal(known),
        steps=tuple(
            Step(
                source.id or f"S{number}",
                source.text,
                (span,),
                source_rows=(SourceRow(str(source.file), source.locator),),
            )
            for number, (span, source) in enumerate(steps, 1)
        ),
        source_file=str(named[0].file if named else path),
    )


def _read_fine(path: Path, videos: dict[str, _Known], rejects: Rejects) -> None:
    for number, row in named_rows(path, ",", _COLUMNS, rejects):
        locator = f"row {number}"
        uid, subset = row["video_uid"], row["subset"]
        if not uid or subset not in _SUBSETS:
            reason = "unknown subset" if uid else "no video_uid"
            rejects.add(path, locator, reason, f"video {uid!r}, subset {subset!r}")
            continue
        known = videos.setdefault(uid, _Known())
        known.split = known.split or (_SUBSETS[subset], f"{path}, row {number}")
        if known.split[0] != subset:
            raise UserError(
                f"video {uid!r} is in {known.split[0]!r} by {known.split[1]} and in {subset!r} by {path}, "
                f"row {number}; give it one subset"
            )
        known.exo = known.exo is not False and row["view"] != "ego"
        known.scene = known.scene or row.get("scene", "")
        text = next((row[column] for column in _NARRATIONS if row.get(column)), "")
        if row["view"] == "ego":
            source = _Source(path, locator, row["annotation_id"], row["start_sec"], row["end_sec"], text)
            known.fine.append(source)
        else:
            rejects.add(path, locator, "exo view", text)


def _read_coarse(path: Path, rejects: Rejects) -> tuple[list[_Source], float | None]:
    """The entries of a video, and the longest duration they declare for it."""
    sources, durations = [], []
    for locator, entry in _entries(path, rejects):
        text = _one_line(_text(entry.get("textAttribute_en")))
        sources.append(
            _Source(path, locator, _text(entry.get("id")), entry.get("start"), entry.get("end"), text)
        )
        durations.append(_positive(entry.get("duration")))
    return sources, max(filter(None, durations), default=None)


def _read_meta(path: Path, videos: dict[str, _Known], rejects: Rejects) -> None:
    for locator, entry in _entries(path, rejects):
        uid = _text(entry.get("video_uid"))
        if not uid:
            rejects.add(path, locator, "no video_uid", ", ".join(entry))
            continue
        known = videos.setdefault(uid, _Known())
        view, frames, fps = _text(entry.get("view")), entry.get("num_frames"), entry.get("fps")
        if known.exo is None and view:
            known.exo = view != "ego"
        known.scene = _text(entry.get("scene")) or known.scene
        known.task = _text(entry.get("task"))
        rate, count = _positive(fps), _positive(frames)
        if rate and count:
            known.duration_s = count / rate
        elif frames is not None or fps is not None:
            rejects.add(path, locator, "not a duration", f"{frames} frames at {fps} fps")


def _entries(path: Path, rejects: Rejects) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings in a file's list, each with its place."""
    entries = read_json(path, rejects)
    if not isinstance(entries, list):
        rejects.add(path, "file", "unknown form", "not a list")
        return
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, Mapping):
            yield f"entry {number}", entry
        else:
            rejects.add(path, f"entry {number}", "unknown form", "not a mapping")


def _timed(sources: Iterable[_Source], level: str, exo: bool | None, rejects: Rejects) -> Iterator[_Timed]:
    """Those that can be a step, with their spans."""
    seen: set[tuple[object, ...]] = set()
    for source in sources:
        times = f"{source.start} to {source.end}"
        if exo:
            rejects.add(source.file, source.locator, "exo view", source.text)
        elif not source.text:
            reason = "no text" if level == "step" else "no narration"
            rejects.add(source.file, source.locator, reason, times)
        elif (same := (source.id, times, source.text)) in seen:
            rejects.add(source.file, source.locator, "the same as an earlier one", source.id)
        elif span := span_of(source.start, source.end, source.file, source.locator, rejects):
            seen.add(same)
            yield span, source


def _one_line(text: str) -> str:
    """Lines without their numbers, joined: ``1. Wash.\\n2. Cut.`` is ``Wash. Cut.``"""
    lines = (_NUMBER.sub("", line).strip() for line in text.splitlines())
    return " ".join(line for line in lines if line)


def _goal(known: _Known) -> str:
    if known.task:
        return f"Follow the demonstrated task: {known.task}"
    return f"Follow the demonstrated {known.scene} task" if known.scene else "Follow the demonstrated task"


def _text(value: object) -> str:
    return str(value).strip() if isinstance(value, str | int) else ""


def _positive(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < 1e9 else None


def _path(root: Path, uid: str) -> Path:
    return load_manifest("egoexolearn").path(root, f"videos/{uid}.mp4", f"{uid}.mp4")

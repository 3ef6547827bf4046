"""Assembly101: people put toys together and take them apart, seen by four head cameras and eight fixed ones.

Licence: CC BY-NC 4.0. Layout under the corpus' root, where the labels, the fine rows or the mistakes may be
absent::

    annotations/coarse-annotations/coarse_labels/{assembly,disassembly}_<sequence>.txt
    annotations/coarse-annotations/coarse_splits/{train,val,test}_coarse_{assembly,disassembly}.txt
    annotations/fine-grained-annotations/{train,validation,test}.csv
    annotations/assembly101-mistake-detection/annots/<sequence>.csv
    videos/<sequence>/<view>.mp4

All frame numbers count at 30 fps. A recording (``sequence``) holds an assembly and mostly a disassembly after
it: two sessions on one video. Where its steps come from:

- level ``step``: the coarse labels; for an assembly without them, the ``correct`` rows of its mistake file;
  for a recording that has neither, its fine rows;
- level ``substep``: the fine rows.

Fine rows do not say which activity they belong to. Where a recording has coarse labels of both, those that
start at or after the first disassembly label are the disassembly; else all are one session, an assembly.
Identical rows (the official fine files repeat each for every view) count once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_manifests import load_manifest
from pipeline.sources.assembly101_annotations import ACTIVITIES, Recording, read_annotations
from pipeline.sources.common import Annotated, make_video, safe_id
from schemas.records import Rejects, Video
from schemas.states import SourceRow

LEVELS: tuple[str, ...] = ("step", "substep")
_OTHER_VIEW = "sessions seen by the camera their dialogue names, not the one chosen"
_VIDEO_UID = re.compile(r"(assembly|disassembly)_([^/]+)__([^/]+)")


@dataclass(frozen=True)
class _Unit:
    """One recording; ``spoken`` are the (activity, view) that dialogues are about."""

    root: Path
    sequence: str
    recording: Recording
    spoken: tuple[tuple[str, str], ...]
    level: str
    view: str | None


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The recordings in order of their names; see `common.Corpus`.

    A ``video_uid`` is ``{assembly|disassembly}_<sequence>__<view>``. Without dialogues, an activity is seen by
    ``view``, or by the first one of the manifest whose file is there.
    """
    manifest = load_manifest("assembly101")
    views = {known.name for known in manifest.views}
    before = len(rejects.rows)
    recordings = read_annotations(root, manifest, rejects)
    matches = [match for match in map(_VIDEO_UID.fullmatch, spoken) if match and match[3] in views]
    found = any(recording.files() for recording in recordings.values()) or len(rejects.rows) > before
    if not found and not matches:
        raise manifest.nothing_found(root, ("coarse", "fine", "mistakes"))
    about: dict[str, list[tuple[str, str]]] = {}
    for match in matches:
        about.setdefault(match[2], []).append((match[1], match[3]))
    return [
        _Unit(root, sequence, recordings[sequence], tuple(about.get(sequence, ())), level, view)
        for sequence in sorted(recordings.keys() | about.keys())
    ]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """The activities of one recording, each on every view it is spoken about.

    A recording that gives none is a reject by itself, beside those of its files' rows.
    """
    before = len(rejects.rows)
    found = list(_activities(unit, rejects))
    if not found and len(rejects.rows) == before:
        source = unit.recording.split[1] if unit.recording.split else unit.root
        rejects.add(source, f"recording {unit.sequence}", "no steps")
    yield from found


def _activities(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    recording, sequence = unit.recording, unit.sequence
    if recording.split and not recording.files() and not unit.spoken:
        rejects.add(recording.split[1], f"recording {sequence}", "no annotation")
    plans = recording.plans(unit.level, rejects, sequence)
    videos: dict[str, Video] = {}
    for activity in ACTIVITIES:
        views = [view for spoken, view in unit.spoken if spoken == activity]
        mistakes = recording.mistakes if activity == "assembly" else None
        if not views and activity in plans:
            views = [unit.view or _first_view(unit)]
        if not views and mistakes:
            mistakes.reject(rejects, sequence, "no assembly they belong to", mistakes=True)
        wrong = sorted(mistakes.mistakes) if mistakes else []
        for view in views:
            if unit.view not in (None, view):
                rejects.notes[_OTHER_VIEW] += 1
            if view not in videos:
                videos[view] = _video(unit, view, rejects)
            steps = plans.get(activity, ())
            source_file = steps[0].source_rows[0].file if steps else str(unit.root)
            yield Annotated(
                video_uid=f"{activity}_{sequence}__{view}",
                video=videos[view],
                split=recording.split[0] if recording.split else None,
                goal=_goal(activity, recording.toy),
                steps=steps,
                source_file=source_file,
                mistakes=tuple(span for span, _ in wrong) if mistakes else None,
                mistake_rows=tuple(SourceRow(str(mistakes.path), f"row {n}") for _, n in wrong)
                if mistakes
                else (),
            )


def _goal(activity: str, toy: str) -> str:
    verb = "Assemble" if activity == "assembly" else "Disassemble"
    return f"{verb} {f'a toy {toy}' if toy else 'the toy'}"


def _first_view(unit: _Unit) -> str:
    names = [view.name for view in load_manifest("assembly101").views]
    return next((name for name in names if _path(unit, name).is_file()), names[0])


def _video(unit: _Unit, view: str, rejects: Rejects) -> Video:
    rotation = next(known.rotation_deg for known in load_manifest("assembly101").views if known.name == view)
    video_id = safe_id("assembly101", unit.sequence, view)
    return make_video(video_id, unit.sequence, [_path(unit, view)], rejects, rotation)


def _path(unit: _Unit, view: str) -> Path:
    return load_manifest("assembly101").path(unit.root, f"videos/{unit.sequence}/{view}.mp4")

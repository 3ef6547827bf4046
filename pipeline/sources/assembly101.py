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
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_manifests import Manifest, load_manifest
from pipeline.decode import DecodeError, probe_duration
from pipeline.dialogs import Dialog, session_range, template_dialog
from pipeline.sources.assembly101_annotations import ACTIVITIES, Plan, Recording, read_annotations
from schemas.errors import UserError
from schemas.records import Rejects, Session, Video

LEVELS = ("step", "substep")
_VIDEO_UID = re.compile(r"(assembly|disassembly)_([^/]+)__([^/]+)")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class _Words:
    """A dialogue on one view, with the ending of its session's id; without a dialogue, the template's place."""

    view: str
    dialog: Dialog | None = None
    ending: str = ""


def read(
    root: Path,
    dialogs: Mapping[str, list[Dialog]],
    rejects: Rejects,
    *,
    level: str = "step",
    view: str | None = None,
) -> Iterator[Session]:
    """Read the corpus, recording by recording in order of their names.

    Each dialogue is a session on the view its ``video_uid`` names, with its own steps where it brings some;
    an annotated activity without dialogues is one session with the template dialogue.

    Args:
        root: the folder that holds ``annotations`` and ``videos``.
        dialogs: by ``video_uid``, ``{assembly|disassembly}_<sequence>__<view>``.
        rejects: takes all rows that are not used.
        level: where steps come from, ``step`` or ``substep``.
        view: the camera of sessions without dialogues; None takes the first of the manifest whose file is
            there.

    Raises:
        UserError: no annotations, an unknown level or view, a file that cannot be read, a recording in two
            splits.
    """
    manifest = load_manifest("assembly101")
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r} for assembly101; known: {', '.join(LEVELS)}")
    cameras = _Cameras(root, manifest, view, rejects)
    recordings = read_annotations(root, manifest, rejects)
    spoken = _by_recording(dialogs, cameras, rejects)
    if not spoken and not any(recording.files() for recording in recordings.values()):
        looked_for = ", ".join(str(root / manifest.files[kind]) for kind in ("coarse", "fine", "mistakes"))
        raise UserError(f"no Assembly101 annotations: nothing at {looked_for}; ask at {manifest.ask_at}")
    for sequence in sorted(recordings.keys() | {sequence for sequence, _ in spoken}):
        yield from _sessions(sequence, recordings[sequence], spoken, cameras, level)


def _sessions(
    sequence: str,
    recording: Recording,
    spoken: Mapping[tuple[str, str], list[_Words]],
    cameras: _Cameras,
    level: str,
) -> Iterator[Session]:
    plans = recording.plans(level)
    made: set[str] = set()
    used: set[Path] = set()
    for activity in ACTIVITIES:
        plan = plans.get(activity)
        template = [_Words(cameras.choose(sequence))] if plan else []
        for words in spoken.get((sequence, activity), template):
            session = _session(sequence, activity, recording, plan, words, cameras)
            if session is not None:
                made.add(activity)
                used |= plan.files if plan and session.steps is plan.steps else set()
                yield session
    reason = "steps are read from elsewhere" if made else "no steps" if recording.split else "no split"
    for rows in recording.files():
        left = (0 if rows.path in used else rows.count) + (0 if "assembly" in made else len(rows.mistakes))
        if left:
            cameras.rejects.add(rows.path, f"recording {sequence}", reason, f"{left} rows")
    if recording.split and not made and not recording.files():
        cameras.rejects.add(recording.split[1], f"recording {sequence}", "no annotation")


def _session(
    sequence: str,
    activity: str,
    recording: Recording,
    plan: Plan | None,
    words: _Words,
    cameras: _Cameras,
) -> Session | None:
    dialog = words.dialog
    split = recording.split[0] if recording.split else dialog.split if dialog else None
    steps = plan.steps if plan else ()
    if dialog and dialog.steps is not None:
        steps = dialog.steps
    session_id = "/".join(
        _UNSAFE.sub("-", part)
        for part in ("assembly101", f"{activity}_{sequence}__{words.view}", words.ending)
        if part
    )
    if split is None or not steps:
        if dialog:  # annotated rows are accounted for file by file
            cameras.rejects.add(dialog.source_file, session_id, "no steps" if split else "no split")
        return None
    verb = "Assemble" if activity == "assembly" else "Disassemble"
    goal = (dialog and dialog.goal) or f"{verb} {f'a toy {recording.toy}' if recording.toy else 'the toy'}"
    mistakes = None
    if activity == "assembly" and recording.mistakes:
        mistakes = tuple(sorted(recording.mistakes.mistakes))
    turns = dialog.turns if dialog else template_dialog(goal, steps, mistakes, session_id)
    start_s, end_s = session_range(steps, turns)
    return Session(
        session_id=session_id,
        video=cameras.video(sequence, words.view),
        split=split,
        goal=goal,
        steps=steps,
        turns=turns,
        start_s=start_s,
        end_s=end_s,
        dialog_origin="generated" if dialog else "template",
        knowledge=dialog.knowledge if dialog else None,
        user_type=dialog.user_type if dialog else None,
        quality=dialog.quality if dialog else None,
        mistakes=mistakes,
    )


def _by_recording(
    dialogs: Mapping[str, list[Dialog]], cameras: _Cameras, rejects: Rejects
) -> dict[tuple[str, str], list[_Words]]:
    found: dict[tuple[str, str], list[_Words]] = {}
    for video_uid in sorted(dialogs):
        match = _VIDEO_UID.fullmatch(video_uid)
        if match is None or match[3] not in cameras.rotations:
            reason = "unknown view" if match else "unknown video_uid"
            for dialog in dialogs[video_uid]:
                rejects.add(dialog.source_file, video_uid, reason)
            continue
        counts: dict[str, int] = defaultdict(int)
        for dialog in dialogs[video_uid]:
            kind = dialog.user_type or "dialog"
            words = _Words(match[3], dialog, f"{kind}_{counts[kind]}")
            counts[kind] += 1
            found.setdefault((match[2], match[1]), []).append(words)
    return found


class _Cameras:
    """The views of the corpus, and the video each recording is read from."""

    def __init__(self, root: Path, manifest: Manifest, chosen: str | None, rejects: Rejects) -> None:
        self.root, self.chosen, self.rejects = root, chosen, rejects
        self.rotations = {view.name: view.rotation_deg for view in manifest.views}
        self._videos: dict[tuple[str, str], Video] = {}
        if chosen is not None and chosen not in self.rotations:
            raise UserError(f"unknown view {chosen!r} for assembly101; known: {', '.join(self.rotations)}")

    def choose(self, sequence: str) -> str:
        there = (view for view in self.rotations if self._path(sequence, view).is_file())
        return self.chosen or next(there, next(iter(self.rotations)))

    def video(self, sequence: str, view: str) -> Video:
        if (sequence, view) not in self._videos:
            path = self._path(sequence, view)
            video_id = f"assembly101/{_UNSAFE.sub('-', sequence)}/{view}"
            self._videos[sequence, view] = Video(
                video_id, sequence, str(path), self.rotations[view], self._duration(path)
            )
        return self._videos[sequence, view]

    def _path(self, sequence: str, view: str) -> Path:
        return self.root / "videos" / sequence / f"{view}.mp4"

    def _duration(self, path: Path) -> float | None:
        if not path.is_file():
            return None
        try:
            return probe_duration(path)
        except DecodeError as error:
            self.rejects.add(path, "header", "video cannot be opened", error)
            return None

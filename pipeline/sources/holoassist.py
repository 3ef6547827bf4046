"""HoloAssist: an instructor watches a student at a task through a HoloLens, and guides by voice.

Licence: CDLA-Permissive-2.0. Layout under the corpus' root, with the labels as one file a video, as one list of
the same records, or as both (then a video's own file counts), and with the split lists also in ``splits/``, the
videos also in ``video_pitch_shifted/``::

    labels/<id>.json
    data-annotation-trainval-v1_1.json
    {train,val,test}-v1_2.txt
    <id>/Export_py/Video_pitchshift.mp4

A video is a recording, and one session. A record is a list of events in seconds of the video:

- level ``step``: each coarse action is a step, called what its sentence says;
- level ``substep``: each fine action is a step, called verb, adjective, noun and adverbial;
- at both levels, the fine actions whose correctness begins with "Wrong" are the mistakes;
- conversations are the dialogue: the instructor is the assistant, the student the user. Their ends are not used.

The goal is the record's type of task. Splits are by video, as the lists say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_manifests import load_manifest
from pipeline.jsonfile import Place, json_records
from pipeline.sources.common import Annotated, make_video, safe_id, span_of
from pipeline.sources.tables import table_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split, Turn
from schemas.states import SourceRow, Step

LEVELS: tuple[str, ...] = ("step", "substep")
_LABELS = ("labels", "label_list")  # kinds of files
_LABEL_OF = {"step": "Coarse grained action", "substep": "Fine grained action"}
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
_ROLES: dict[str, Literal["user", "assistant"]] = {"instructor": "assistant", "student": "user"}
_MOVES = {"start": "initiative", "reply": "responsive"}
_CLOCK_TIME = re.compile(r"(\d\d?):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")
_LONGEST_S = (
    1e6  # no recording takes days; numbers as long as JSON allows, infinity and NaN are refused with it
)


@dataclass(frozen=True)
class _Unit:
    """One video; ``place`` is its record, None where it has none, ``within`` what tells its events from those of
    other videos of the file."""

    root: Path
    video_uid: str
    split: Split | None
    level: str
    place: Place | None = None
    within: str = ""


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The videos in order of their ids; see `common.Corpus`. A ``video_uid`` is the video's id."""
    manifest = load_manifest("holoassist")
    files = [path for kind in _LABELS for path in manifest.find(root, kind)]
    records: dict[str, tuple[Place, str]] = {}
    for path in files:
        found = [(_video_uid(place, record), place) for place, record in json_records(path, rejects)]
        if not found:
            rejects.add(path, "file", "empty file", "a list without records")
        for uid, place in found:
            if uid in records:
                first = records[uid][0]
                where = f"{uid}, the first is in {first.file}, {first.locator}"
                rejects.add(path, place.locator, "second record of one video", where)
            else:
                records[uid] = (place, f"{uid}, " if len(found) > 1 else "")
    uids = records.keys() | {uid for uid in spoken if os.path.isfile(_path(root, uid))}
    if not files and not uids:
        raise manifest.nothing_found(root, _LABELS)
    splits = _read_splits(manifest.find(root, "splits"), uids, rejects)
    return [_Unit(root, uid, splits.get(uid), level, *records.get(uid, ())) for uid in sorted(uids)]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """One video with all that its events say."""
    file, record = (unit.place.file, unit.place.read()) if unit.place else (unit.root, {})
    events = _Events(file, unit.level, rejects)
    for number, event in enumerate(record.get("events", ()), 1):
        if isinstance(event, Mapping):
            events.add(f"{unit.within}event {event.get('id', f'no. {number}')}", event)
        else:
            rejects.add(file, f"{unit.within}event no. {number}", "unknown form", "not a mapping")
    declared_s = _duration(record, file, unit.within, rejects)
    video_id = safe_id("holoassist", unit.video_uid)
    yield Annotated(
        video_uid=unit.video_uid,
        video=make_video(
            video_id, unit.video_uid, [_path(unit.root, unit.video_uid)], rejects, declared_s=declared_s
        ),
        split=unit.split,
        goal=_words(record, "taskType") or unit.video_uid.rpartition("-")[2].replace("_", " "),
        steps=events.steps(),
        source_file=str(file),
        turns=tuple(sorted(events.turns, key=lambda turn: turn.t_s)) or None,
        mistakes=tuple(span for span, _ in sorted(events.mistakes)) if events.judged else None,
        mistake_rows=tuple(row for _, row in sorted(events.mistakes)),
    )


@dataclass
class _Events:
    """What the events of one video are used for; ``judged`` is whether any says if something was right or wrong."""

    file: Path
    level: str
    rejects: Rejects
    actions: list[tuple[tuple[float, float], str, SourceRow]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    mistakes: list[tuple[tuple[float, float], SourceRow]] = field(default_factory=list)
    judged: bool = False

    def add(self, locator: str, event: Mapping[str, Any]) -> None:
        label, attributes = event.get("label"), event.get("attributes")
        attributes = attributes if isinstance(attributes, Mapping) else {}
        if label in _LABEL_OF.values():
            self._add_action(locator, event, attributes)
        elif label == "Conversation":
            self._add_turn(locator, event, attributes)
        elif label == "Narration":
            self.rejects.add(self.file, locator, "narration", _text(attributes, "Long form description"))
        else:
            self.rejects.add(self.file, locator, "unknown label", label)

    def _add_action(self, locator: str, event: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        coarse = event["label"] == _LABEL_OF["step"]
        if coarse:
            name = _text(attributes, "Action sentence") or _words(attributes, "Verb", "Noun")
        else:
            name = _words(attributes, "Verb", "Adjective", "Noun", "adverbial")
        wrong = not coarse and _text(attributes, "Action Correctness").startswith("Wrong")
        is_step = event["label"] == _LABEL_OF[self.level]
        self.judged = self.judged or not coarse
        if not is_step and not wrong:
            self.rejects.add(self.file, locator, f"not the annotation of level {self.level}", name)
            return
        start, end = event.get("start"), event.get("end")
        span = span_of(start, end, self.file, locator, self.rejects)
        if span and wrong:
            self.mistakes.append((span, SourceRow(str(self.file), locator)))
        if span and is_step and name:
            self.actions.append((span, name, SourceRow(str(self.file), locator)))
        elif span and is_step:
            self.rejects.add(self.file, locator, "no action", f"{start} to {end}")

    def _add_turn(self, locator: str, event: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        purpose, text = _text(attributes, "Conversation Purpose"), _text(attributes, "Transcription")
        speaker, _, rest = purpose.partition("-")
        move, _, about = rest.partition("_")
        if speaker not in _ROLES:
            self.rejects.add(self.file, locator, "unknown speaker", f"{purpose}: {text}")
        elif not text:
            self.rejects.add(self.file, locator, "empty transcription", purpose)
        elif set(re.findall(r"[^\W_]+", text.lower())) == {"unintelligible"}:
            self.rejects.add(self.file, locator, "unintelligible", f"{purpose}: {text}")
        elif span := span_of(event.get("start"), event.get("start"), self.file, locator, self.rejects):
            labels = (_MOVES.get(move.partition("-")[0], ""), about.strip())
            source_row = SourceRow(str(self.file), locator)
            self.turns.append(
                Turn(span[0], _ROLES[speaker], text, tuple(filter(None, labels)), None, source_row)
            )

    def steps(self) -> tuple[Step, ...]:
        """Each action as a step of its own, in order of time."""
        ordered = sorted(self.actions, key=lambda action: action[0])
        return tuple(
            Step(f"S{n}", name, (span,), source_rows=(row,)) for n, (span, name, row) in enumerate(ordered, 1)
        )


def _video_uid(place: Place, record: Any) -> str:
    if not isinstance(record, Mapping) or not isinstance(record.get("events"), list):
        raise UserError(
            f"{place.file} has no list 'events' in {place.locator}; fetch the file again or take it away"
        )
    return _text(record, "video_name") or place.file.stem


def _read_splits(files: Sequence[Path], uids: Collection[str], rejects: Rejects) -> dict[str, Split]:
    """Which split each video is listed in; listed ones that are not among ``uids`` are rejects."""
    listed: dict[str, tuple[Split, Path]] = {}
    for path in files:
        name = path.stem.removesuffix("-v1_2")
        if name not in _SPLITS:
            rejects.add(path, "file name", "unknown file", "not {train|val|test}-v1_2.txt")
            continue
        for number, (uid, *_) in table_rows(path, "\t", 1, rejects):
            if not uid:
                continue
            first, first_path = listed.setdefault(uid, (_SPLITS[name], path))
            if first != _SPLITS[name]:
                raise UserError(
                    f"video {uid!r} is in {first!r} by {first_path} and in {name!r} by {path}, row {number}; "
                    "list it in one split"
                )
            if uid not in uids:
                rejects.add(path, f"row {number}", "no annotation", uid)
    return {uid: split for uid, (split, _) in listed.items()}


def _path(root: Path, video_uid: str) -> Path:
    name = f"{video_uid}/Export_py/Video_pitchshift.mp4"
    return load_manifest("holoassist").path(root, name, f"video_pitch_shifted/{name}")


def _duration(record: Mapping[str, Any], file: Path, within: str, rejects: Rejects) -> float | None:
    """Seconds of the video as its record has them: ``raw``, else ``seconds``, which is cut to whole ones."""
    video = record.get("videoMetadata")
    declared = video.get("duration") if isinstance(video, Mapping) else None
    if declared is None:
        return None
    raw = declared.get("raw") if isinstance(declared, Mapping) else None
    value = declared.get("seconds") if isinstance(declared, Mapping) and raw is None else raw
    match = _CLOCK_TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    seconds = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else value
    if isinstance(seconds, int | float) and 0 < seconds < _LONGEST_S:
        return float(seconds)
    rejects.add(file, f"{within}videoMetadata.duration", "not a duration", declared)
    return None


def _text(values: Mapping[str, Any], key: str) -> str:
    """A text without blanks around it; empty where it is absent, or "none", which stands for nothing."""
    value = values.get(key)
    text = value.strip() if isinstance(value, str) else ""
    return "" if text.lower() == "none" else text


def _words(values: Mapping[str, Any], *keys: str) -> str:
    """The texts that are there, one after the other, with blanks for underscores."""
    return " ".join(filter(None, (_text(values, key) for key in keys))).replace("_", " ")

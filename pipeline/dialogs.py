"""Dialogues and dialog states as they come in files, for any corpus."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.jsonfile import Place, json_records
from schemas.errors import UserError
from schemas.records import Rejects, Split, Turn
from schemas.states import SourceRow, Step, parse_dst

_NOT_TURNS = ("system", "DST_UPDATE", "frames")
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+(\S.*)$", re.MULTILINE)

_Entries = list[tuple[str, Any]]  # what a conversation holds, each with where it is


@dataclass(frozen=True)
class Dialog:
    """One dialogue about a video, as its file has it.

    ``turns`` are none where a file gives the plan alone. ``steps`` is the dialogue's own plan, None where the file
    gives none. ``split`` is what the file's name says, None where it says nothing.
    """

    video_uid: str
    turns: tuple[Turn, ...]
    source_file: str
    goal: str | None = None
    knowledge: str | None = None
    user_type: str | None = None
    quality: float | None = None
    steps: tuple[Step, ...] | None = None
    split: Split | None = None


@dataclass(frozen=True)
class _Part:
    """One conversation with all that is said about it; ``dst`` is the place of a plan given by itself."""

    file: Path
    locator: str
    about: Mapping[str, Any]
    entries: _Entries

    def continues(self, other: _Part) -> bool:
        """Whether this is a later clip of the same dialogue, which long ones are cut into."""
        keys = ("user_id", "user_type")
        same = all(self.about.get(key) == other.about.get(key) for key in keys)
        return same and self.file == other.file and bool(self.about.get("clip_idx"))


class DialogIndex:
    """Where in their files the dialogues of each video are; what is said is read when a video's turn comes.

    A ``.json`` file holds one record or a list of them, a ``.jsonl`` file one a line. What a record is, its keys
    tell:

    - ``conversations``: generated dialogues, several a video;
    - ``conversation``: one dialogue, with or without ``metadata``; one whose ``clip_idx`` is not 0 goes on with the
      record of the same video, ``user_id`` and ``user_type`` before it;
    - ``dst`` beside either: the plan of these dialogues, in any form `parse_dst` reads;
    - ``dst`` alone: the plan of the video's dialogues that have none (of one ``user_type``, if it names one), or
      of the template dialogue, where there are none;
    - entries of the role ``DST_UPDATE`` in a conversation without ``dst``: its plan, start by start and end by end.

    Args:
        path: a file, or a folder whose ``*.json`` and ``*.jsonl`` are read in order of their names; None is none.
        rejects: takes what has no place in the index.

    Raises:
        UserError: no such file, a folder without dialogues, or a file that is not whole JSON.
    """

    def __init__(self, path: Path | None, rejects: Rejects) -> None:
        self._places: dict[str, list[Place]] = {}
        for file in _files(path) if path else ():
            empty = True
            for place, record in json_records(file, rejects):
                empty = False
                uid = record.get("video_uid") if isinstance(record, Mapping) else None
                if isinstance(uid, str) and uid:
                    self._places.setdefault(uid, []).append(place)
                else:
                    rejects.add(file, place.locator, "unknown form", "no video_uid")
            if empty:
                rejects.add(file, "file", "empty file")

    @property
    def video_uids(self) -> list[str]:
        """The videos there is something about, in order."""
        return sorted(self._places)

    def places(self, video_uid: str) -> list[Place]:
        """Where the records about a video are."""
        return self._places.get(video_uid, [])

    def of(self, video_uid: str, rejects: Rejects) -> list[Dialog]:
        """The dialogues of one video, in the order of the files."""
        parts: list[_Part] = []
        plans: dict[str | None, _Part] = {}
        for place in self.places(video_uid):
            for part in _parts(place, place.read(), rejects):
                before = next((n for n in reversed(range(len(parts))) if part.continues(parts[n])), None)
                if not part.entries and part.about.get("dst"):
                    _add_plan(plans, part, rejects)
                elif before is not None:
                    if part.about.get("dst") not in (None, parts[before].about.get("dst")):
                        where = f"the first is in {parts[before].locator}"
                        rejects.add(part.file, part.locator, "second DST of one dialogue", where)
                    parts[before] = replace(parts[before], entries=[*parts[before].entries, *part.entries])
                else:
                    parts.append(part)
        read = [_dialog(part, rejects) for part in parts]
        return list(_with_plans(video_uid, [dialog for dialog in read if dialog], plans, rejects))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is not there; give a file or folder of dialogues with --dialogs")
    found = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if not found:
        raise UserError(f"{path} holds no *.json and no *.jsonl; give a folder of dialogues with --dialogs")
    return found


def _parts(place: Place, record: Mapping[str, Any], rejects: Rejects) -> Iterator[_Part]:
    """The conversations of one record; a plan given by itself is one without entries."""
    several = record.get("conversations")
    if isinstance(several, list) and several:
        parts = [(f"{place.locator}, conversation {n}", part) for n, part in enumerate(several, 1)]
    elif "conversation" in record:
        parts = [(place.locator, record)]
    elif "dst" in record:
        yield _Part(place.file, place.locator, record, [])
        return
    else:
        keys = ", ".join(sorted(map(str, record)))
        rejects.add(place.file, place.locator, "unknown form", f"keys {keys}")
        return
    meta = record.get("metadata")
    for locator, part in parts:
        conversation = part.get("conversation") if isinstance(part, Mapping) else None
        if not isinstance(conversation, list) or not conversation:
            rejects.add(place.file, locator, "unknown form", "no list 'conversation'")
            continue
        about = {**record, **(meta if isinstance(meta, Mapping) else {}), **part}
        entries = [(f"{locator}, turn {n}", entry) for n, entry in enumerate(conversation, 1)]
        yield _Part(place.file, locator, about, entries)


def _add_plan(plans: dict[str | None, _Part], part: _Part, rejects: Rejects) -> None:
    first = plans.setdefault(_text(part.about.get("user_type")), part)
    if first is not part:
        where = f"the first is in {first.file}, {first.locator}"
        rejects.add(part.file, part.locator, "second DST of one dialogue", where)


def _with_plans(
    video_uid: str, dialogs: Sequence[Dialog], plans: Mapping[str | None, _Part], rejects: Rejects
) -> Iterator[Dialog]:
    """Dialogues with the plans that were given apart from them; plans without a dialogue become one without turns."""
    steps = {kind: _steps(part, rejects) for kind, part in plans.items()}
    used: set[str | None] = set()
    for dialog in dialogs:
        kind = next((kind for kind in (dialog.user_type, None) if kind in plans), "")
        if dialog.steps is None and kind in plans:
            used.add(kind)
            dialog = replace(dialog, steps=steps[kind])
        yield dialog
    for kind, part in plans.items():
        if kind in used or steps[kind] is None:
            continue
        if dialogs:
            rejects.add(part.file, part.locator, "no dialogue for this DST", video_uid)
        else:
            yield _described(part, (), steps[kind])


def _dialog(part: _Part, rejects: Rejects) -> Dialog | None:
    turns = tuple(_turns(part, rejects))
    has_plan = bool(part.about.get("dst")) or any(_role(entry) == "DST_UPDATE" for _, entry in part.entries)
    if not turns and not has_plan:
        rejects.add(part.file, part.locator, "no turns", part.about["video_uid"])
        return None
    steps = _steps(part, rejects) if has_plan else None
    if has_plan and steps is None:
        for turn in turns:
            where = turn.source_row or SourceRow(str(part.file), part.locator)
            rejects.add(*where, "dialogue with unreadable DST", f"{turn.role}: {turn.text}")
        return None
    return _described(part, turns, steps)


def _described(part: _Part, turns: tuple[Turn, ...], steps: tuple[Step, ...] | None) -> Dialog:
    about = part.about
    hint = re.search(r"(?<![a-z])(train|validation|val|test)(?![a-z])", part.file.stem.lower())
    return Dialog(
        video_uid=about["video_uid"],
        turns=turns,
        source_file=str(part.file),
        goal=_text(about.get("inferred_goal") or about.get("task_goal")),
        knowledge=_text(about.get("inferred_knowledge") or about.get("knowledge")),
        user_type=_text(about.get("user_type")),
        quality=_quality(about),
        steps=steps,
        split=_SPLITS[hint[1]] if hint else None,
    )


def _turns(part: _Part, rejects: Rejects) -> Iterator[Turn]:
    for where, entry in part.entries:
        if not isinstance(entry, Mapping):
            rejects.add(part.file, where, "unknown form", "a turn is a mapping")
            continue
        role, text, time = entry.get("role"), _text(entry.get("content")), _number(entry.get("time"))
        if role in _NOT_TURNS:
            continue
        if role not in ("user", "assistant"):
            rejects.add(part.file, where, "unknown role", role)
        elif text is None:
            rejects.add(part.file, where, "empty content", f"of the {role}")
        elif time is None:
            rejects.add(part.file, where, "no time", entry.get("time", ""))
        else:
            progress, labels = _text(entry.get("progress")), _labels(entry.get("labels"))
            yield Turn(time, role, text, labels, progress, SourceRow(str(part.file), where))


def _steps(part: _Part, rejects: Rejects) -> tuple[Step, ...] | None:
    """The plan of a conversation; None, and a reject, where it cannot be read."""
    try:
        if not part.about.get("dst"):
            return tuple(_steps_of_updates(part))
        steps = parse_dst(part.about["dst"])
    except ValueError as error:
        rejects.add(part.file, part.locator, "unreadable DST", error)
        return None
    rows = [SourceRow(str(part.file), f"{part.locator}, dst {n}") for n in range(1, len(steps) + 1)]
    return tuple(
        replace(step, source_rows=(row,) * len(step.spans)) for step, row in zip(steps, rows, strict=True)
    )


def _steps_of_updates(part: _Part) -> Iterator[Step]:
    """Steps from entries ``{"role": "DST_UPDATE", "time", "content": [{"id", "transition"}]}``.

    A step ``S3`` is called what line 3 of the numbered knowledge says, if there is one; lines that nothing starts
    are steps that never start. Their ``start_frame`` and ``end_frame`` are not used.
    """
    knowledge = _text(part.about.get("inferred_knowledge") or part.about.get("knowledge")) or ""
    names = {f"S{number}": name.strip() for number, name in _NUMBERED.findall(knowledge)}
    starts: dict[str, list[tuple[float, SourceRow]]] = {}
    ends: dict[str, list[float]] = {}
    for where, entry in part.entries:
        if _role(entry) != "DST_UPDATE":
            continue
        time, content = _number(entry.get("time")), entry.get("content")
        if time is None or not isinstance(content, list):
            raise ValueError(f"{where} is a DST_UPDATE without a time or a list of transitions")
        for update in content:
            transition = update.get("transition") if isinstance(update, Mapping) else None
            given = update.get("id") if transition else None
            step_id = str(given) if isinstance(given, (str, int)) and not isinstance(given, bool) else None
            open_spans = len(starts.get(step_id or "", ())) - len(ends.get(step_id or "", ()))
            if step_id and transition == "start" and open_spans == 0:
                starts.setdefault(step_id, []).append((time, SourceRow(str(part.file), where)))
            elif step_id and transition == "complete" and open_spans == 1:
                ends.setdefault(step_id, []).append(time)
            else:
                raise ValueError(
                    f"{where} has the transition {update!r}, which cannot follow those before it"
                )
    if starts.keys() <= names.keys():  # else the knowledge numbers something else
        starts = {step_id: starts.get(step_id, []) for step_id in names}
    for step_id, started in starts.items():
        closed = [*ends.get(step_id, ()), math.inf]
        spans = tuple((start, end) for (start, _), end in zip(started, closed, strict=False))
        yield Step(step_id, names.get(step_id, step_id), spans, source_rows=tuple(row for _, row in started))


def _role(entry: Any) -> Any:
    return entry.get("role") if isinstance(entry, Mapping) else None


def _labels(labels: Any) -> tuple[str, ...]:
    """``"initiative|instruction,feedback"`` or a list, to single labels."""
    parts = re.split(r"[|,]", labels) if isinstance(labels, str) else labels
    if not isinstance(parts, list):
        return ()
    return tuple(str(part).strip() for part in parts if str(part).strip())


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _quality(about: Mapping[str, Any]) -> float | None:
    rated = about.get("auto_quality_eval", about.get("quality"))
    return _number(rated.get("final_score") if isinstance(rated, Mapping) else rated)

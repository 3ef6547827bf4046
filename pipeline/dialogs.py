"""Dialogues: read from the files they come in, or made from the plan where there is none."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.records import Rejects, Split, Turn
from schemas.states import Step, parse_dst

MARGIN_S = 2.0
_NOT_TURNS = ("system", "DST_UPDATE", "frames")
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_GOAL = (
    "I want to do this: {}. Will you help me?",
    "Please guide me: {}.",
    "My task is: {}. Tell me what to do.",
)
_INSTRUCTION = ("Next: {}.", "The next step is: {}.", "Now go on with this: {}.")
_FEEDBACK = ("Well done, that is finished: {}.", "Good, this step is complete: {}.", "That is done: {}.")
_CORRECTION = (
    "Wait, that is not right. Please check what you just did.",
    "Careful, there is a mistake. Please undo it before you go on.",
    "That does not belong there. Have another look.",
)
_CLOSING = ("That was the last step. Great work!", "All steps are done, you have finished.", "We are done!")


@dataclass(frozen=True)
class Dialog:
    """One dialogue about a video, as its file has it.

    ``steps`` is its own plan, None where the file gives none. ``split`` is what the file's name says, None
    where it says nothing.
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
class _Plan:
    steps: tuple[Step, ...]
    file: Path
    locator: str


def read_dialogs(path: Path, rejects: Rejects) -> dict[str, list[Dialog]]:
    """Read a file of dialogues, or all ``*.json`` and ``*.jsonl`` of a folder in order of their names.

    A ``.json`` file holds one record or a list of them, a ``.jsonl`` file one a line. What a record is, its
    keys tell:

    - ``conversations``: generated dialogues, several a video;
    - ``conversation``: one dialogue, with or without ``metadata``;
    - ``dst`` beside either: the plan of these dialogues, in any form `parse_dst` reads;
    - ``dst`` alone: the plan of the video's dialogues that have none (of one ``user_type``, if it names one).

    Entries of the roles ``system``, ``DST_UPDATE`` and ``frames`` are not utterances and are passed over; the
    states are computed from the plan. Anything else that cannot be used is a reject.

    Returns:
        The dialogues by ``video_uid``, in the order of the files.

    Raises:
        UserError: no such file, a folder without dialogues, or a file that is not JSON.
    """
    dialogs: list[Dialog] = []
    plans: dict[tuple[str, str | None], _Plan] = {}
    for file in _files(path):
        for locator, record in _records(file, rejects):
            try:
                dialogs += _read_record(file, locator, record, plans, rejects)
            except ValueError as error:
                rejects.add(file, locator, "unreadable DST", error)
    by_video: dict[str, list[Dialog]] = {}
    used: set[tuple[str, str | None]] = set()
    for dialog in dialogs:
        keys = ((dialog.video_uid, dialog.user_type), (dialog.video_uid, None))
        key = next((key for key in keys if key in plans), None)
        if dialog.steps is None and key is not None:
            used.add(key)
            dialog = replace(dialog, steps=plans[key].steps)
        by_video.setdefault(dialog.video_uid, []).append(dialog)
    for key, plan in plans.items():
        if key not in used:
            rejects.add(plan.file, plan.locator, "no dialogue for this DST", key[0])
    return by_video


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is not there; give a file or folder of dialogues with --dialogs")
    found = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if not found:
        raise UserError(f"{path} holds no *.json and no *.jsonl; give a folder of dialogues with --dialogs")
    return found


def _records(file: Path, rejects: Rejects) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix != ".jsonl":
            value = json.loads(text)
            records = value if isinstance(value, list) else [value]
            yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
            return
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); fetch it again or take it away") from None
    lines = [(f"row {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    broken = 0
    for locator, line in lines:
        try:
            yield locator, json.loads(line)
        except ValueError as error:
            rejects.add(file, locator, "not JSON", error)
            broken += 1
    if lines and broken == len(lines):
        raise UserError(f"no line of {file} is JSON; fetch it again or take it away")


def _read_record(
    file: Path,
    locator: str,
    record: Any,
    plans: dict[tuple[str, str | None], _Plan],
    rejects: Rejects,
) -> list[Dialog]:
    if not isinstance(record, Mapping) or not isinstance(record.get("video_uid"), str):
        rejects.add(file, locator, "unknown form", "no video_uid")
        return []
    if isinstance(record.get("conversations"), list):
        parts = [(f"{locator}, conversation {n}", part) for n, part in enumerate(record["conversations"], 1)]
    elif "conversation" in record:
        parts = [(locator, record)]
    elif "dst" in record:
        key = (record["video_uid"], _text(record.get("user_type")))
        if key in plans:
            rejects.add(file, locator, "second DST of one dialogue", f"the first is in {plans[key].file}")
        else:
            plans[key] = _Plan(tuple(parse_dst(record["dst"])), file, locator)
        return []
    else:
        rejects.add(file, locator, "unknown form", f"keys {', '.join(sorted(map(str, record)))}")
        return []
    read = (_dialog(file, where, record, part, rejects) for where, part in parts)
    return [dialog for dialog in read if dialog is not None]


def _dialog(
    file: Path, locator: str, record: Mapping[str, Any], part: Any, rejects: Rejects
) -> Dialog | None:
    if not isinstance(part, Mapping) or not isinstance(part.get("conversation"), list):
        rejects.add(file, locator, "unknown form", "no list 'conversation'")
        return None
    turns = _turns(file, locator, part["conversation"], rejects)
    if not turns:
        rejects.add(file, locator, "no turns", record["video_uid"])
        return None
    meta = record.get("metadata")
    about = {**record, **(meta if isinstance(meta, Mapping) else {}), **part}
    dst = about.get("dst")
    hint = re.search(r"(?<![a-z])(train|validation|val|test)(?![a-z])", file.stem.lower())
    return Dialog(
        video_uid=record["video_uid"],
        turns=turns,
        source_file=str(file),
        goal=_text(about.get("inferred_goal") or about.get("task_goal")),
        knowledge=_text(about.get("inferred_knowledge") or about.get("knowledge")),
        user_type=_text(about.get("user_type")),
        quality=_quality(about),
        steps=None if dst is None else tuple(parse_dst(dst)),
        split=_SPLITS[hint[1]] if hint else None,
    )


def _turns(file: Path, locator: str, conversation: list[Any], rejects: Rejects) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number, entry in enumerate(conversation, 1):
        where = f"{locator}, turn {number}"
        if not isinstance(entry, Mapping):
            rejects.add(file, where, "unknown form", "a turn is a mapping")
            continue
        role, text, time = entry.get("role"), _text(entry.get("content")), _number(entry.get("time"))
        if role in _NOT_TURNS:
            continue
        if role not in ("user", "assistant"):
            rejects.add(file, where, "unknown role", role)
        elif text is None:
            rejects.add(file, where, "empty content", f"of the {role}")
        elif time is None:
            rejects.add(file, where, "no time", entry.get("time", ""))
        else:
            labels = _labels(entry.get("labels"))
            turns.append(Turn(time, role, text, labels, _text(entry.get("progress"))))
    return tuple(turns)


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


def session_range(steps: Sequence[Step], turns: Sequence[Turn]) -> tuple[float, float]:
    """Start and end in seconds of a session: all that happens in it, and 2 s on either side, from 0 on."""
    starts = [step.start for step in steps] + [turn.t_s for turn in turns]
    times = [t for t in starts + [step.end for step in steps] if math.isfinite(t)]
    return max(0.0, min(times) - MARGIN_S), max(times) + MARGIN_S


def template_dialog(
    goal: str, steps: Sequence[Step], mistakes: Sequence[tuple[float, float]] | None, seed_text: str
) -> tuple[Turn, ...]:
    """The dialogue a plan implies, for recordings nobody wrote one for.

    The user tells the goal a second before the first step; the assistant gives an instruction at each start,
    feedback at each completion, a correction at the start of each mistake, and closes at the last end.

    Args:
        steps: those without a start are passed over, those without an end get no feedback.
        mistakes: half-open spans in seconds, or None.
        seed_text: chooses the wording; the same text gives the same words everywhere.

    Returns:
        Turns in order of time; none when no step starts.
    """
    seen = [step for step in steps if math.isfinite(step.start)]
    if not seen:
        return ()
    # (seconds, rank among equals, wordings, what it is about): praise for a step precedes the next one
    events = [(max(0.0, min(step.start for step in seen) - 1.0), 0, _GOAL, goal)]
    events += [(step.start, 3, _INSTRUCTION, step.name) for step in seen]
    ended = [step for step in seen if math.isfinite(step.end)]
    events += [(step.end, 4 if step.end == step.start else 1, _FEEDBACK, step.name) for step in ended]
    events += [(start, 2, _CORRECTION, "") for start, _ in mistakes or ()]
    if ended:
        events.append((max(step.end for step in ended), 5, _CLOSING, ""))
    events.sort(key=lambda event: event[:2])
    return tuple(_say(*event, f"{seed_text}/{index}") for index, event in enumerate(events))


def _say(t_s: float, rank: int, wordings: Sequence[str], about: str, seed_text: str) -> Turn:
    choice = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") % len(wordings)
    text = wordings[choice].format(about.strip().rstrip("."))
    if rank == 0:
        return Turn(t_s, "user", text, ("goal",))
    kind = {1: "feedback", 2: "correction", 3: "instruction", 4: "feedback", 5: "closing"}[rank]
    return Turn(t_s, "assistant", text, ("initiative", kind))

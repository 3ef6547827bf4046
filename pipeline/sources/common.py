"""What the corpora have in common: ids, videos, splits, and sessions with and without dialogues."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.decode import DecodeError, probe_duration
from pipeline.dialogs import Dialog, DialogIndex
from pipeline.jsonfile import parse
from pipeline.template import session_range, template_dialog
from schemas.errors import UserError
from schemas.records import DialogOrigin, Picture, Rejects, Session, Split, Turn, Video, joined_uri
from schemas.states import SourceRow, Step

HASHED = "sessions of recordings without an official split, placed by a hash of the recording's id"
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Annotated:
    """One annotated stretch of a video, before it is known who talks about it.

    Args:
        video_uid: the name by which dialogues know it.
        split: None where the corpus does not say.
        video: where several stretches share a ``recording_id``, one unit holds them all.
        steps: those of the corpus; none leaves it to a dialogue to bring its own.
        source_file: what rejects name.
        turns: the corpus' own human dialogue, None where it has none.
        mistakes: half-open spans in seconds, None where the corpus does not say.
        mistake_rows: where each of them was read.
    """

    video_uid: str
    video: Video
    split: Split | None
    goal: str
    steps: tuple[Step, ...]
    source_file: str
    turns: tuple[Turn, ...] | None = None
    mistakes: tuple[tuple[float, float], ...] | None = None
    mistake_rows: tuple[SourceRow, ...] = ()


class Corpus(Protocol):
    """What a module of `pipeline.sources` offers: its files cut into units, each of which a worker reads alone."""

    LEVELS: tuple[str, ...]
    """What a step can be: ``step``, and ``substep`` where the corpus is annotated twice. A corpus of pictures, whose
    objects are counted, has none, and with it no views and no dialogues."""

    def units(
        self, root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects
    ) -> list[Any]:
        """All there is to read, in order of the sessions, as values that can be pickled.

        Args:
            root: the corpus' folder.
            level: one of ``LEVELS``, where there are any.
            view: a camera, None where the user has not chosen one.
            spoken: each ``video_uid`` that has dialogues; those with a video and without annotations are units too.
            rejects: takes what belongs to no unit.

        Raises:
            UserError: no annotations there, or one of them cannot be read.
        """

    def read(self, unit: Any, rejects: Rejects) -> Iterator[Annotated | Picture]:
        """What one unit holds. Each row of its files is in a step, a turn, a mistake, a point, or among the rejects."""


def safe_id(*parts: str) -> str:
    """Parts joined to an id that can name a record: other characters than letters, digits, '-', '_' become '-'."""
    return "/".join(_UNSAFE.sub("-", part) for part in parts if part)


def make_video(
    video_id: str,
    recording_id: str,
    files: Sequence[Path],
    rejects: Rejects,
    rotation_deg: int = 0,
    declared_s: float | None = None,
) -> Video:
    """A video and its duration: that of its files, and where one is not at hand, what the annotations declare.

    Args:
        files: one, or several that are one after the other.
        rejects: takes a file that cannot be opened.
        declared_s: duration in seconds as the annotations have it.
    """
    duration: float | None = 0.0
    for path in files:
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
            duration = None
            continue
        try:
            seconds = probe_duration(path)
            duration = None if duration is None else duration + seconds
        except DecodeError as error:
            rejects.add(path, "header", "video cannot be opened", error)
            duration = None
    if duration is None:
        duration = declared_s
    return Video(video_id, recording_id, joined_uri(files), rotation_deg, duration)


def hashed_split(recording_id: str) -> Split:
    """A split for a recording that none is given for: 80 % train, 10 % val, 10 % test, by a hash of its id."""
    place = int.from_bytes(hashlib.sha256(recording_id.encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def read_json(path: Path, rejects: Rejects) -> Any:
    """A whole JSON file.

    Raises:
        UserError: it cannot be read, or is not whole.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"), rejects)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}); fetch it again or take it away") from None


def span_of(
    start: object, end: object, file: Path, locator: str, rejects: Rejects, scale: float = 1.0
) -> tuple[float, float] | None:
    """Seconds ``value / scale`` of a start and an end as a file has them; None, and a reject, where they are none."""
    try:
        if isinstance(start, bool) or isinstance(end, bool):
            raise TypeError
        first, last = float(start), float(end)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        first = last = math.nan
    if not (math.isfinite(first) and math.isfinite(last) and first >= 0):
        rejects.add(file, locator, "not a time", f"{start} to {end}")
    elif last < first:
        rejects.add(file, locator, "ends before it starts", f"{start} to {end}")
    else:
        return first / scale, last / scale
    return None


def make_sessions(
    source: str, annotated: Sequence[Annotated], index: DialogIndex, rejects: Rejects
) -> Iterator[Session]:
    """The sessions of what one unit holds: one for each given dialogue of a stretch; without any, one with the
    human dialogue, else with the template's.

    Stretches of one recording get one split: what the corpus says, else what a file of dialogues is named after,
    else a hash of the recording's id.
    """
    spoken = [(stretch, index.of(stretch.video_uid, rejects)) for stretch in annotated]
    official = {stretch.video.recording_id: stretch.split for stretch in annotated if stretch.split}
    named: dict[str, Split] = dict(official)
    for stretch, dialogs in spoken:
        recording_id = stretch.video.recording_id
        for split in (dialog.split for dialog in dialogs if dialog.split and recording_id not in official):
            if named.setdefault(recording_id, split) != split:
                raise UserError(
                    f"recording {recording_id!r} is in {named[recording_id]!r} and in {split!r} by the names of its "
                    "files of dialogues; give each recording one split"
                )
    for stretch, dialogs in spoken:
        recording_id = stretch.video.recording_id
        if dialogs and all(dialog.steps is not None for dialog in dialogs):
            reason = "the dialogues bring their own steps"
            rejects.add_rows(stretch.steps, reason, stretch.video_uid)
        if dialogs and all(dialog.turns for dialog in dialogs):
            reason = "the dialogues bring their own words"
            rejects.add_rows(stretch.turns or (), reason, stretch.video_uid)
        made = False
        counts: dict[str, int] = defaultdict(int)
        for dialog in dialogs or (None,):
            kind = "" if dialog is None else dialog.user_type or ("dialog" if dialog.turns else "dst")
            kind = safe_id(kind)  # counted as it is written: other letters become the same one
            ending = kind and f"{kind}_{counts[kind]}"
            counts[kind] += 1
            split = stretch.split or named.get(recording_id) or hashed_split(recording_id)
            session = _session(safe_id(source, stretch.video_uid, ending), stretch, split, dialog, rejects)
            if session is None:
                continue
            if recording_id not in named:
                rejects.notes[HASHED] += 1
            made = True
            yield session
        if not made:
            rejects.add_rows(stretch.mistake_rows, "no steps", stretch.video_uid)
            if not dialogs or not all(dialog.turns for dialog in dialogs):
                rejects.add_rows(stretch.turns or (), "no steps", stretch.video_uid)


def _session(
    session_id: str, annotated: Annotated, split: Split, dialog: Dialog | None, rejects: Rejects
) -> Session | None:
    steps = annotated.steps if dialog is None or dialog.steps is None else dialog.steps
    source_file = dialog.source_file if dialog else annotated.source_file
    if not any(math.isfinite(step.start) for step in steps):
        rejects.add(source_file, session_id, "no steps")
        rejects.add_rows(dialog.turns if dialog else (), "no steps", session_id)
        return None
    goal = (dialog and dialog.goal) or annotated.goal
    origin: DialogOrigin
    if dialog and dialog.turns:
        turns, origin = dialog.turns, "generated"
    elif annotated.turns is not None:
        turns, origin = annotated.turns, "human"
    else:
        turns, origin = template_dialog(goal, steps, annotated.mistakes, session_id), "template"
    start_s, end_s = session_range(steps, turns, annotated.mistakes)
    return Session(
        session_id=session_id,
        video=annotated.video,
        split=split,
        goal=goal,
        steps=steps,
        turns=turns,
        start_s=start_s,
        end_s=end_s,
        dialog_origin=origin,
        source_file=source_file,
        knowledge=dialog.knowledge if dialog else None,
        user_type=dialog.user_type if dialog else None,
        quality=dialog.quality if dialog else None,
        mistakes=annotated.mistakes,
        mistake_rows=annotated.mistake_rows,
    )

"""WTaG (Watch, Talk and Guide): people cook one of three recipes while an instructor sees what they see.

Licence: MIT (code). Layout under the corpus' root::

    T<n>/Video/Video.mpeg
    T<n>/Video/VideoMpegTiming.txt                  two lines: first and last tick of the video
    T<n>/StepDetection/StepDetection.txt            tab separated: start, end, text
    T<n>/TextASR/InstructorAnnotations_intent.txt   tab separated: start, end, text, intents
    T<n>/TextASR/UserAnnotations_intent.txt         the same

All times are ticks of 100 ns on the clock of the headset. A recording is one session:

- steps: each row of ``StepDetection.txt`` by itself, but for ``Start`` and ``Done``, which frame the task;
- turns: the real words of both people, the instructor being the assistant, each said when it begins. Where
  the intent stands in brackets behind the words, it stays there: brackets may be words too. Without words of the
  instructor there is no dialogue;
- split: the first 40 folders in order of their names are train, the others val. ``T55a`` and ``T55b`` are
  left out, as the corpus' authors do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_manifests import load_manifest
from pipeline.sources.common import Annotated, make_video, safe_id, span_of
from schemas.errors import UserError
from schemas.records import Rejects, Split, Turn
from schemas.states import SourceRow, Step

LEVELS: tuple[str, ...] = ("step",)
_ANNOTATIONS = ("timing", "steps", "instructor", "user")
_LEFT_OUT = ("T55a", "T55b")
_NUM_TRAIN, _NUM_RECORDINGS = 40, 56
_DEPENDS = "recordings whose split depends on which others are there: the whole of wtag has {}"
_TICKS_PER_S = 10_000_000
_MARKERS = ("start", "done")
_LINE_END = re.compile(rb"\r\n|\r|\n")

_Role = Literal["user", "assistant"]
_WORDS: tuple[tuple[_Role, str], ...] = (
    ("user", "UserAnnotations_intent.txt"),
    ("assistant", "InstructorAnnotations_intent.txt"),
)


@dataclass(frozen=True)
class _Unit:
    """One recording; ``split`` is None for one that has dialogues and a video, but no annotations."""

    folder: Path
    split: Split | None


@dataclass(frozen=True)
class _Row:
    """A row with its span in seconds; ``more`` are the cells after the text."""

    locator: str
    span: tuple[float, float]
    text: str
    more: tuple[str, ...]


def units(root: Path, level: str, view: str | None, spoken: Collection[str], rejects: Rejects) -> list[_Unit]:
    """The recordings in order of their names, which are their ``video_uid`` too; see `common.Corpus`."""
    manifest = load_manifest("wtag")
    annotated = {path.parents[1].name for kind in _ANNOTATIONS for path in manifest.find(root, kind)}
    filmed = {path.parents[1].name for path in manifest.find(root, "videos")}
    used = sorted(annotated.difference(_LEFT_OUT))
    others = sorted((filmed & set(spoken)).difference(annotated, _LEFT_OUT))
    if not used and not others:
        raise manifest.nothing_found(root, _ANNOTATIONS)
    for kind in _ANNOTATIONS:
        for path in manifest.find(root, kind):
            if path.parents[1].name in _LEFT_OUT:
                _reject_rows(path, "left out by the corpus' authors", rejects)
    if len(used) != _NUM_RECORDINGS:
        rejects.notes[_DEPENDS.format(_NUM_RECORDINGS)] += len(used)
    split_of: dict[str, Split] = {name: "train" if n < _NUM_TRAIN else "val" for n, name in enumerate(used)}
    return [_Unit(root / name, split_of.get(name)) for name in sorted([*used, *others])]


def read(unit: _Unit, rejects: Rejects) -> Iterator[Annotated]:
    """The one session of a recording."""
    folder, name = unit.folder, unit.folder.name
    steps: tuple[Step, ...] = ()
    turns: tuple[Turn, ...] | None = None
    declared_s: float | None = None
    source_file = folder / "StepDetection" / "StepDetection.txt"
    if unit.split is not None:
        timing = _timing(folder / "Video" / "VideoMpegTiming.txt", rejects)
        if timing is None:
            for path in (source_file, *(folder / "TextASR" / file for _, file in _WORDS)):
                _reject_rows(path, "no timing", rejects)
            return
        declared_s = (timing[1] - timing[0]) / _TICKS_PER_S
        steps = _steps(source_file, timing[0], rejects)
        turns = _turns(folder / "TextASR", timing[0], rejects)
    recipe = name.rpartition("_")[2] if "_" in name else ""
    yield Annotated(
        video_uid=name,
        video=make_video(
            safe_id("wtag", name), name, [folder / "Video" / "Video.mpeg"], rejects, declared_s=declared_s
        ),
        split=unit.split,
        goal=f"Cook: {recipe}" if recipe else "Follow the recipe",
        steps=steps,
        source_file=str(source_file),
        turns=turns,
    )


def _timing(path: Path, rejects: Rejects) -> tuple[int, int] | None:
    """First and last tick of the video; None, and a reject, where the file does not tell them."""
    try:
        cells = path.read_text(encoding="utf-8-sig").split()
        first, last = (int(cell) for cell in cells)
        if first < last:
            return first, last
        problem = f"{first} to {last}"
    except FileNotFoundError:
        problem = "there is no such file"
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; mend it or take its recording away"
        ) from None
    except ValueError as error:
        problem = f"not two lines with a number each ({error})"
    rejects.add(path, f"recording {path.parents[1].name}", "no timing", problem)
    return None


def _steps(path: Path, first_tick: int, rejects: Rejects) -> tuple[Step, ...]:
    rows = []
    for row in _rows(path, first_tick, rejects):
        if row.text.lower() in _MARKERS:
            rejects.add(path, row.locator, "start or end marker", row.text)
        elif any(row.more):
            rejects.add(path, row.locator, "too many columns", f"{3 + len(row.more)} of 3")
        else:
            rows.append(row)
    rows.sort(key=lambda row: row.span)
    return tuple(
        Step(f"S{n}", row.text, (row.span,), source_rows=(SourceRow(str(path), row.locator),))
        for n, row in enumerate(rows, 1)
    )


def _turns(folder: Path, first_tick: int, rejects: Rejects) -> tuple[Turn, ...] | None:
    """What both say, in order of time, the user first; None, and rejects, where the instructor says nothing."""
    said = [(role, folder / name, list(_rows(folder / name, first_tick, rejects))) for role, name in _WORDS]
    for _, path, rows in said:
        if not rows and any(other.exists() for _, other, _ in said):
            reason = "empty file" if path.exists() else "no such file"
            rejects.add(path, f"recording {folder.parent.name}", reason, "nothing that was said can be used")
    if not any(rows for role, _, rows in said if role == "assistant"):
        for _, path, rows in said:
            for row in rows:
                rejects.add(path, row.locator, "no words of the instructor", row.text)
        return None
    turns = [
        Turn(row.span[0], role, row.text, _labels(row), source_row=SourceRow(str(path), row.locator))
        for role, path, rows in said
        for row in rows
    ]
    return tuple(sorted(turns, key=lambda turn: turn.t_s))


def _labels(row: _Row) -> tuple[str, ...]:
    """The intents behind a text, several in one cell or in several."""
    parts = (part.strip() for cell in row.more for part in re.split(r"[|,]", cell))
    return tuple(filter(None, parts))


def _rows(path: Path, first_tick: int, rejects: Rejects) -> Iterator[_Row]:
    """Rows with a span and a text. Quotes are words: nothing in these files is quoted."""
    for number, cells in enumerate(_cells(path, rejects), 1):
        locator = f"row {number}"
        if cells is None or not any(cells):
            continue
        if len(cells) < 3:
            rejects.add(path, locator, "too few columns", f"{len(cells)} of 3")
            continue
        start, end = (_since(cell, first_tick) for cell in cells[:2])
        span = span_of(start, end, path, locator, rejects, scale=_TICKS_PER_S)
        if span and not cells[2]:
            rejects.add(path, locator, "empty text", f"{cells[0]} to {cells[1]}")
        elif span:
            yield _Row(locator, span, cells[2], tuple(cells[3:]))


def _cells(path: Path, rejects: Rejects) -> Iterator[list[str] | None]:
    """The cells of each line, None for one that is not UTF-8."""
    for number, line in enumerate(_lines(path), 1):
        try:
            yield [cell.strip() for cell in line.decode().split("\t")]
        except UnicodeDecodeError as error:
            rejects.add(path, f"row {number}", "unreadable row", error)
            yield None


def _lines(path: Path) -> list[bytes]:
    """All lines, whichever way they end; none where there is no such file."""
    try:
        lines = _LINE_END.split(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend it or take it away") from None
    return lines if lines[-1] else lines[:-1]


def _reject_rows(path: Path, reason: str, rejects: Rejects) -> None:
    """Note that no row of a file is used, if it has any."""
    if lines := _lines(path):
        rejects.add(path, f"rows 1-{len(lines)}", reason, f"recording {path.parents[1].name}")


def _since(cell: str, first_tick: int) -> int | str:
    """Ticks since the video began, whole: as floats, ticks since the year 1 are 12.8 microseconds apart."""
    try:
        return int(cell) - first_tick
    except ValueError:
        return cell

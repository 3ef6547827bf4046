"""What the annotation files of Assembly101 say about each recording."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_manifests import Manifest
from pipeline.sources.common import span_of
from pipeline.sources.tables import named_rows, table_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split
from schemas.states import SourceRow, Step

ANNOTATION_FPS = 30
ACTIVITIES = ("assembly", "disassembly")
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_LABELS = ("correct", "mistake", "correction")
_FINE_COLUMNS = ("video", "start_frame", "end_frame", "action_cls")

_Segment = tuple[float, float, str]


@dataclass
class Rows:
    """What one file says about one recording; times in seconds, each with the numbers of its rows.

    Rows that are identical (the official fine files repeat each for every view) are one segment.
    """

    path: Path
    segments: dict[_Segment, list[int]] = field(default_factory=dict)
    mistakes: list[tuple[tuple[float, float], int]] = field(default_factory=list)

    def add(self, span: tuple[float, float], action: str, row: int) -> None:
        self.segments.setdefault((*span, action), []).append(row)

    def reject(self, rejects: Rejects, sequence: str, reason: str, mistakes: bool = False) -> None:
        """Note that the segments, or the mistakes, were not used."""
        lists = [[row] for _, row in self.mistakes] if mistakes else self.segments.values()
        self._reject_rows([row for numbers in lists for row in numbers], rejects, sequence, reason)

    def reject_repeated(self, rejects: Rejects, sequence: str) -> None:
        """Note the rows that say what an earlier row says."""
        rows = [row for numbers in self.segments.values() for row in numbers[1:]]
        self._reject_rows(rows, rejects, sequence, "the same as an earlier one")

    def _reject_rows(self, rows: list[int], rejects: Rejects, sequence: str, reason: str) -> None:
        if rows:
            ranges = _ranges(sorted(rows))
            rejects.add(self.path, f"rows {ranges}", reason, f"recording {sequence}, {len(rows)} rows")


def _ranges(rows: list[int]) -> str:
    """``2-5, 8`` for 2, 3, 4, 5, 8."""
    starts = [row for row, before in zip(rows, [None, *rows], strict=False) if before != row - 1]
    ends = [row for row, after in zip(rows, [*rows[1:], None], strict=True) if after != row + 1]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


@dataclass
class Recording:
    """All that is known of one recording; ``coarse`` is by activity, ``split`` with the file that says so.
    ``mistakes`` is None where nobody has judged it."""

    coarse: dict[str, Rows] = field(default_factory=dict)
    fine: dict[Path, Rows] = field(default_factory=dict)
    mistakes: Rows | None = None
    split: tuple[Split, Path] | None = None
    toy: str = ""

    def files(self) -> list[Rows]:
        return [*self.coarse.values(), *([self.mistakes] if self.mistakes else []), *self.fine.values()]

    def plans(self, level: str, rejects: Rejects, sequence: str) -> dict[str, tuple[Step, ...]]:
        """The steps of each activity that has some, at level ``step`` or ``substep``; other rows are rejects."""
        fine = list(self.fine.values())
        found: dict[str, list[Rows]] = {}
        if level == "step":
            found = {activity: [rows] for activity, rows in self.coarse.items() if rows.segments}
            if self.mistakes and self.mistakes.segments:
                found.setdefault("assembly", [self.mistakes])
        if level == "substep" or not found:
            border = self._first_disassembly()
            parts = {
                "assembly": [_part(rows, 0.0, border) for rows in fine],
                "disassembly": [_part(rows, border, math.inf) for rows in fine],
            }
            found = {name: part for name, part in parts.items() if any(rows.segments for rows in part)}
        used = {rows.path for parts in found.values() for rows in parts}
        for rows in self.files():
            if rows.path in used:
                rows.reject_repeated(rejects, sequence)
            else:
                rows.reject(rejects, sequence, f"not the annotation of level {level}")
        return {activity: _steps(parts) for activity, parts in found.items()}

    def _first_disassembly(self) -> float:
        if any(activity not in self.coarse for activity in ACTIVITIES):
            return math.inf
        return min((start for start, _, _ in self.coarse["disassembly"].segments), default=math.inf)


def _part(rows: Rows, first: float, last: float) -> Rows:
    """The segments that start in ``[first, last)``."""
    return Rows(
        rows.path, {segment: row for segment, row in rows.segments.items() if first <= segment[0] < last}
    )


def _steps(parts: list[Rows]) -> tuple[Step, ...]:
    """One step for each action, in order of first starts; an action done again is one more span."""
    spans: dict[str, list[tuple[float, float]]] = {}
    source_rows: dict[str, list[SourceRow]] = {}
    segments = [(segment, rows.path, numbers) for rows in parts for segment, numbers in rows.segments.items()]
    for (start, end, action), path, numbers in sorted(segments, key=lambda entry: entry[0][:2]):
        spans.setdefault(action, []).append((start, end))
        source_rows.setdefault(action, []).append(SourceRow(str(path), f"row {numbers[0]}"))
    return tuple(
        Step(f"S{n}", action, tuple(spans[action]), source_rows=tuple(source_rows[action]))
        for n, action in enumerate(spans, 1)
    )


def read_annotations(root: Path, manifest: Manifest, rejects: Rejects) -> defaultdict[str, Recording]:
    """Read all annotation files under a root.

    Returns:
        The recordings by sequence; asked for one that is not annotated, an empty one.

    Raises:
        UserError: a file that cannot be read or lacks a column, a recording in two splits.
    """
    recordings: defaultdict[str, Recording] = defaultdict(Recording)
    for path in manifest.find(root, "coarse"):
        activity, _, sequence = path.stem.partition("_")
        if activity in ACTIVITIES and sequence:
            recordings[sequence].coarse[activity] = _read_coarse(path, rejects)
        else:
            rejects.add(path, "file name", "unknown file", "not {assembly|disassembly}_<sequence>.txt")
    for path in manifest.find(root, "mistakes"):
        recordings[path.stem].mistakes = _read_mistakes(path, rejects)
    for path in manifest.find(root, "splits"):
        split, _, activity = path.stem.partition("_coarse_")
        if split in _SPLITS and activity in ACTIVITIES:
            _read_split(path, _SPLITS[split], recordings, rejects)
        else:
            rejects.add(path, "file name", "unknown file", "not {train|val|test}_coarse_<activity>.txt")
    listed = {sequence for sequence, recording in recordings.items() if recording.split}
    for path in manifest.find(root, "fine"):
        if path.stem in _SPLITS:  # lists of action names lie beside them
            _read_fine(path, recordings, listed, rejects)
    return recordings


def _read_coarse(path: Path, rejects: Rejects) -> Rows:
    found, before = Rows(path), len(rejects.rows)
    for number, cells in table_rows(path, "\t", 3, rejects):
        span = _span(path, number, cells[0], cells[1], cells[2], rejects)
        if span:
            found.add(span, cells[2], number)
    if not found.segments and len(rejects.rows) == before:
        rejects.add(path, "file", "empty file")
    return found


def _read_mistakes(path: Path, rejects: Rejects) -> Rows | None:
    """None where not one row was understood: such a file has judged nothing."""
    found, before, judged = Rows(path), len(rejects.rows), False
    for number, cells in table_rows(path, ",", 6, rejects):
        start, end, verb, this, that, label = cells[:6]
        action = f"{verb} {this} {'from' if verb == 'detach' else 'to'} {that}" if all(cells[2:5]) else ""
        named = action if label == "correct" else label  # only a step needs a name
        span = _span(path, number, start, end, named, rejects)
        if span is None:
            continue
        judged = judged or label in _LABELS
        if label == "correct":
            found.add(span, action, number)
        elif label == "mistake":
            found.mistakes.append((span, number))
        else:
            reason = "correction row" if label == "correction" else "unknown label"
            rejects.add(path, f"row {number}", reason, f"{label}: {action}")
    if not judged and len(rejects.rows) == before:
        rejects.add(path, "file", "empty file")
    return found if judged else None


def _read_split(path: Path, split: Split, recordings: defaultdict[str, Recording], rejects: Rejects) -> None:
    for _, cells in table_rows(path, "\t", 1, rejects):
        if not cells[0]:
            continue
        name = cells[0].removesuffix(".txt")
        activity, _, rest = name.partition("_")
        sequence = rest if activity in ACTIVITIES else name
        _set_split(recordings[sequence], sequence, split, path)
        if len(cells) > 3:
            recordings[sequence].toy = cells[3].replace("_", " ")


def _read_fine(
    path: Path, recordings: defaultdict[str, Recording], listed: set[str], rejects: Rejects
) -> None:
    for number, row in named_rows(path, ",", _FINE_COLUMNS, rejects):
        video, start, end, action = (row[column] for column in _FINE_COLUMNS)
        span = _span(path, number, start, end, action, rejects)
        if span is None:
            continue
        sequence = video.partition("/")[0].removesuffix(".mp4")
        recording = recordings[sequence]
        recording.fine.setdefault(path, Rows(path)).add(span, action, number)
        if sequence not in listed:
            _set_split(recording, sequence, _SPLITS[path.stem], path)
        recording.toy = recording.toy or row.get("toy_name", "").replace("_", " ")


def _set_split(recording: Recording, sequence: str, split: Split, path: Path) -> None:
    recording.split = recording.split or (split, path)
    if recording.split[0] != split:
        raise UserError(
            f"recording {sequence!r} is in {recording.split[0]!r} by {recording.split[1]} and in {split!r} "
            f"by {path}; list it in one split"
        )


def _span(
    path: Path, number: int, start: str, end: str, action: str, rejects: Rejects
) -> tuple[float, float] | None:
    """Seconds of two frame numbers; None, and a reject, where the row tells no span or no action."""
    span = span_of(start, end, path, f"row {number}", rejects, scale=ANNOTATION_FPS)
    if span and not action:
        rejects.add(path, f"row {number}", "no action", f"{start} to {end}")
        return None
    return span

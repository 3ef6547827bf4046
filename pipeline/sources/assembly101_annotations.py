"""What the annotation files of Assembly101 say about each recording."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_manifests import Manifest
from pipeline.sources.tables import table_rows
from schemas.errors import UserError
from schemas.records import Rejects, Split
from schemas.states import Step

ANNOTATION_FPS = 30
ACTIVITIES = ("assembly", "disassembly")
_SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_FINE_COLUMNS = ("video", "start_frame", "end_frame", "action_cls")

_Segment = tuple[float, float, str]


@dataclass
class Rows:
    """What one file says about one recording; times in seconds. ``count`` is of rows that are no mistakes."""

    path: Path
    count: int = 0
    segments: dict[_Segment, None] = field(default_factory=dict)  # identical rows are one segment
    mistakes: list[tuple[float, float]] = field(default_factory=list)

    def add(self, span: tuple[float, float], action: str) -> None:
        self.count += 1
        self.segments[(*span, action)] = None


@dataclass(frozen=True)
class Plan:
    """Steps, and the files they come from."""

    steps: tuple[Step, ...]
    files: frozenset[Path]


@dataclass
class Recording:
    """All that is known of one recording; ``coarse`` is by activity, ``split`` with the file that says so."""

    coarse: dict[str, Rows] = field(default_factory=dict)
    fine: dict[Path, Rows] = field(default_factory=dict)
    mistakes: Rows | None = None
    split: tuple[Split, Path] | None = None
    toy: str = ""

    def files(self) -> list[Rows]:
        return [*self.coarse.values(), *([self.mistakes] if self.mistakes else []), *self.fine.values()]

    def plans(self, level: str) -> dict[str, Plan]:
        """The steps of each activity that has some, at ``level`` ``step`` or ``substep``."""
        if level == "step":
            found = {activity: rows for activity, rows in self.coarse.items() if rows.segments}
            if self.mistakes and self.mistakes.segments:
                found.setdefault("assembly", self.mistakes)
            if found:
                return {activity: _plan(list(rows.segments), [rows]) for activity, rows in found.items()}
        fine = list(self.fine.values())
        segments = [segment for rows in fine for segment in rows.segments]
        border = self._first_disassembly()
        parts = {
            "assembly": [segment for segment in segments if segment[0] < border],
            "disassembly": [segment for segment in segments if segment[0] >= border],
        }
        return {activity: _plan(part, fine) for activity, part in parts.items() if part}

    def _first_disassembly(self) -> float:
        if any(activity not in self.coarse for activity in ACTIVITIES):
            return math.inf
        return min((start for start, _, _ in self.coarse["disassembly"].segments), default=math.inf)


def _plan(segments: list[_Segment], rows: list[Rows]) -> Plan:
    """One step for each action, in order of first starts; an action done again is one more span."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for start, end, action in sorted(segments, key=lambda segment: segment[:2]):
        spans.setdefault(action, []).append((start, end))
    steps = (Step(f"S{n}", action, tuple(spans[action])) for n, action in enumerate(spans, 1))
    return Plan(tuple(steps), frozenset(part.path for part in rows))


def read_annotations(root: Path, manifest: Manifest, rejects: Rejects) -> defaultdict[str, Recording]:
    """Read all annotation files under a root.

    Returns:
        The recordings by sequence; asked for one that is not annotated, an empty one.

    Raises:
        UserError: a file that cannot be read or lacks a column, a recording in two splits.
    """
    recordings: defaultdict[str, Recording] = defaultdict(Recording)
    for path in sorted(root.glob(manifest.files["coarse"])):
        activity, _, sequence = path.stem.partition("_")
        if activity in ACTIVITIES and sequence:
            recordings[sequence].coarse[activity] = _read_coarse(path, rejects)
        else:
            rejects.add(path, "file name", "unknown file", "not {assembly|disassembly}_<sequence>.txt")
    for path in sorted(root.glob(manifest.files["mistakes"])):
        recordings[path.stem].mistakes = _read_mistakes(path, rejects)
    for path in sorted(root.glob(manifest.files["splits"])):
        split, _, activity = path.stem.partition("_coarse_")
        if split in _SPLITS and activity in ACTIVITIES:
            _read_split(path, _SPLITS[split], recordings, rejects)
        else:
            rejects.add(path, "file name", "unknown file", "not {train|val|test}_coarse_<activity>.txt")
    listed = {sequence for sequence, recording in recordings.items() if recording.split}
    for path in sorted(root.glob(manifest.files["fine"])):
        if path.stem in _SPLITS:  # lists of action names lie beside them
            _read_fine(path, recordings, listed, rejects)
    return recordings


def _read_coarse(path: Path, rejects: Rejects) -> Rows:
    found = Rows(path)
    for number, cells in table_rows(path, "\t", 3, rejects):
        span = _span(path, number, cells[0], cells[1], cells[2], rejects)
        if span:
            found.add(span, cells[2])
    return found


def _read_mistakes(path: Path, rejects: Rejects) -> Rows:
    found = Rows(path)
    for number, cells in table_rows(path, ",", 6, rejects):
        start, end, verb, this, that, label = cells[:6]
        action = f"{verb} {this} {'from' if verb == 'detach' else 'to'} {that}" if all(cells[2:5]) else ""
        span = _span(path, number, start, end, action, rejects)
        if span and label == "correct":
            found.add(span, action)
        elif span and label == "mistake":
            found.mistakes.append(span)
        elif span:
            reason = "correction row" if label == "correction" else "unknown label"
            rejects.add(path, f"row {number}", reason, f"{label}: {action}")
    return found


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
    rows = table_rows(path, ",", len(_FINE_COLUMNS), rejects)
    _, header = next(rows, (1, []))
    for column in _FINE_COLUMNS:
        if column not in header:
            raise UserError(f"{path} has no column {column!r} in its first row; fetch the file again")
    video, start, end, action = (header.index(column) for column in _FINE_COLUMNS)
    toy = header.index("toy_name") if "toy_name" in header else len(header)
    for number, cells in rows:
        if len(cells) < len(header):
            rejects.add(path, f"row {number}", "too few columns", f"{len(cells)} of {len(header)}")
            continue
        span = _span(path, number, cells[start], cells[end], cells[action], rejects)
        if span is None:
            continue
        sequence = cells[video].partition("/")[0].removesuffix(".mp4")
        recording = recordings[sequence]
        recording.fine.setdefault(path, Rows(path)).add(span, cells[action])
        if sequence not in listed:
            _set_split(recording, sequence, _SPLITS[path.stem], path)
        if toy < len(cells) and not recording.toy:
            recording.toy = cells[toy].replace("_", " ")


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
    """Seconds of two frame numbers; None, and a reject, where the row tells no action or no span."""
    try:
        first, last = float(start), float(end)
    except ValueError:
        first = last = math.nan
    if not (math.isfinite(first) and math.isfinite(last) and first >= 0):
        rejects.add(path, f"row {number}", "not a frame number", f"{start} to {end}")
    elif last < first:
        rejects.add(path, f"row {number}", "ends before it starts", f"{start} to {end}")
    elif not action:
        rejects.add(path, f"row {number}", "no action", f"{start} to {end}")
    else:
        return first / ANNOTATION_FPS, last / ANNOTATION_FPS
    return None

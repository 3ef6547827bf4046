"""What a corpus module yields, before it is placed on the clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from schemas.errors import UserError
from schemas.states import SourceRow, Step

Split = Literal["train", "val", "test"]
DialogOrigin = Literal["human", "generated", "template", "none"]  # none: an image whose objects are counted

Marks = Literal["none", "drawn"]
"""How the marks of a picture are shown: ``drawn`` on it, a tick for each, or not at all."""


@dataclass(frozen=True)
class Video:
    """One video: a file, or several that are one after the other. Cameras of one recording share ``recording_id``,
    and with it their split. An image is a video of one tick; with ``marks``, pixels ``(x, y)`` of its objects in the
    order of marking, tick k is the image with the first k of them drawn."""

    video_id: str
    recording_id: str
    uri: str  # a path, or `joined_uri` of several
    rotation_deg: int = 0  # counter-clockwise, what makes the picture upright
    duration_s: float | None = None  # None where neither the file is at hand nor the annotations say
    marks: tuple[tuple[float, float], ...] | None = None


_JOINED = "concat:"


def joined_uri(paths: Sequence[Path]) -> str:
    """The uri of a video whose parts are several files, in the notation of FFmpeg's concat protocol.

    Raises:
        UserError: one of several paths holds the separator ``|``.
    """
    if len(paths) > 1 and any("|" in str(path) for path in paths):
        raise UserError(f"a path of {', '.join(map(str, paths))} holds the character '|'; rename it")
    return str(paths[0]) if len(paths) == 1 else _JOINED + "|".join(map(str, paths))


def video_parts(uri: str) -> list[str]:
    """The uris of a video's files, in order: paths, or urls such as ``s3://bucket/part.mp4``."""
    return uri.removeprefix(_JOINED).split("|") if uri.startswith(_JOINED) else [uri]


def video_files(uri: str) -> list[Path]:
    """The files of a video that lies here, in order."""
    return [Path(part) for part in video_parts(uri)]


@dataclass(frozen=True)
class Turn:
    """One utterance at ``t_s`` seconds of its video; ``source_row`` is None for one that no file holds."""

    t_s: float
    role: Literal["user", "assistant"]
    text: str
    labels: tuple[str, ...] = ()
    progress: str | None = None
    source_row: SourceRow | None = None


@dataclass(frozen=True)
class Session:
    """One supervised stretch of a video, ``[start_s, end_s]``: a plan, when its steps happen, what is said.

    ``mistakes`` are half-open spans in seconds, None where the corpus does not say; ``mistake_rows`` say, one by
    one, where they were read.
    """

    session_id: str
    video: Video
    split: Split
    goal: str
    steps: tuple[Step, ...]
    turns: tuple[Turn, ...]
    start_s: float
    end_s: float
    dialog_origin: DialogOrigin
    source_file: str  # what rejects name
    knowledge: str | None = None
    user_type: str | None = None
    quality: float | None = None
    mistakes: tuple[tuple[float, float], ...] | None = None
    mistake_rows: tuple[SourceRow, ...] = ()


class Point(NamedTuple):
    """One object of a picture: where it is, in pixels of the file, and where that was read."""

    x: float
    y: float
    source_row: SourceRow


@dataclass(frozen=True)
class Picture:
    """One picture whose objects, all of one category, are counted; ``points`` are in any order."""

    picture_id: str
    path: Path
    width: int
    height: int
    split: Split
    category: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Reject:
    """One thing of the source that was not used, and why."""

    source_file: str
    locator: str
    reason: str
    detail: str = ""


@dataclass
class Rejects:
    """Collects what is not used; nothing is dropped without passing here.

    ``notes`` count what was used although the files do not say how, by what was done about it.
    """

    rows: list[Reject] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, source_file: object, locator: object, reason: str, detail: object = "") -> None:
        self.rows.append(Reject(str(source_file), str(locator), reason, str(detail)))

    def add_rows(self, used: Iterable[Step | Turn | SourceRow], reason: str, about: str) -> None:
        """One for each row that these were read from."""
        for each in used:
            if isinstance(each, Step):
                rows, detail = each.source_rows, f"{about}: {each.name}"
            elif isinstance(each, Turn):
                rows, detail = (each.source_row,) if each.source_row else (), f"{about}: {each.text}"
            else:
                rows, detail = (each,), about
            for row in rows:
                self.add(*row, reason, detail)

"""What a corpus module yields, before it is placed on the clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from schemas.states import Step

Split = Literal["train", "val", "test"]
DialogOrigin = Literal["human", "generated", "template"]


@dataclass(frozen=True)
class Video:
    """One video file. Cameras of one recording share ``recording_id``, and with it their split."""

    video_id: str
    recording_id: str
    uri: str
    rotation_deg: int = 0  # counter-clockwise, what makes the picture upright
    duration_s: float | None = None  # None where the file is not at hand


@dataclass(frozen=True)
class Turn:
    """One utterance at ``t_s`` seconds of its video."""

    t_s: float
    role: Literal["user", "assistant"]
    text: str
    labels: tuple[str, ...] = ()
    progress: str | None = None


@dataclass(frozen=True)
class Session:
    """One supervised stretch of a video, ``[start_s, end_s]``: a plan, when its steps happen, what is said.

    ``mistakes`` are half-open spans in seconds; None where the corpus does not say.
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
    knowledge: str | None = None
    user_type: str | None = None
    quality: float | None = None
    mistakes: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class Reject:
    """One thing of the source that was not used, and why."""

    source_file: str
    locator: str
    reason: str
    detail: str = ""


@dataclass
class Rejects:
    """Collects what is not used; nothing is dropped without passing here."""

    rows: list[Reject] = field(default_factory=list)

    def add(self, source_file: object, locator: object, reason: str, detail: object = "") -> None:
        self.rows.append(Reject(str(source_file), str(locator), reason, str(detail)))

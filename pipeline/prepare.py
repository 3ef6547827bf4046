"""From a corpus' annotations to label tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_manifests import load_manifest
from pipeline.align import align
from pipeline.dialogs import read_dialogs
from pipeline.sources import assembly101
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects, Session, Video
from schemas.tables import LabelWriter

SOURCES: dict[str, Callable[..., Iterator[Session]]] = {"assembly101": assembly101.read}
"""The corpora that can be prepared; all take what `assembly101.read` takes."""


@dataclass(frozen=True)
class Counts:
    """What was written: sessions by split, rows by table, rejects by reason, and how many assistant turns were
    joined to an earlier one of their tick."""

    sessions: dict[str, int]
    rows: dict[str, int]
    rejects: dict[str, int]
    joined_turns: int


def prepare(
    source: str,
    root: Path,
    out: Path,
    clock: Clock,
    dialogs: Path | None = None,
    level: str = "step",
    view: str | None = None,
) -> Counts:
    """Write the label tables of a corpus to ``out/<source>``; they replace those there when all is written.

    Args:
        source: the corpus.
        root: its folder.
        out: the folder of all label tables.
        clock: the ticks.
        dialogs: a file or folder of dialogues; None takes ``root/dialogs`` where that is there.
        level: which annotations are the steps, ``step`` or ``substep``.
        view: the camera of sessions whose dialogue names none; None lets the corpus choose.

    Raises:
        UserError: nothing that can be used; the tables of an earlier run stay as they were.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    manifest = load_manifest(source)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder, so there is no {source}; ask for it at {manifest.ask_at}, "
            f"or make a synthetic one with 'dst sample --source {source} --out {root}'"
        )
    rejects = Rejects()
    if dialogs is None and (root / "dialogs").exists():
        dialogs = root / "dialogs"
    spoken = read_dialogs(dialogs, rejects) if dialogs else {}
    sessions = SOURCES[source](root, spoken, rejects, level=level, view=view)
    splits: Counter[str] = Counter()
    joined_turns = 0
    videos = _Videos(source)
    with LabelWriter(out / source) as writer:
        for session in sessions:
            aligned = align(session, clock, rejects, str(root))
            if aligned is None:
                continue
            videos.need(session.video, aligned.last_tick)
            row = {**aligned.session, "source": source}
            writer.add_session(row, session.video.recording_id, aligned.steps, aligned.turns, aligned.frames)
            splits[session.split] += 1
            joined_turns += aligned.joined_turns
        reasons = Counter(reject.reason for reject in rejects.rows)
        if not splits:
            counted = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
            raise UserError(
                f"{root} gave no session; what was read and not used: {counted or 'nothing'}; "
                f"see what {source} looks like with 'dst sample --source {source}'"
            )
        writer.add_videos(videos.rows())
        writer.add_rejects(asdict(reject) for reject in rejects.rows)
    return Counts(dict(splits), dict(writer.rows), dict(reasons), joined_turns)


class _Videos:
    """The videos that sessions use, each once, and how far."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._videos: dict[str, Video] = {}
        self._last_tick: dict[str, int] = {}

    def need(self, video: Video, last_tick: int) -> None:
        if self._videos.setdefault(video.video_id, video) != video:
            raise UserError(
                f"{video.uri} and {self._videos[video.video_id].uri} both have the id {video.video_id!r}; "
                "rename one of them"
            )
        self._last_tick[video.video_id] = max(last_tick, self._last_tick.get(video.video_id, 0))

    def rows(self) -> list[dict[str, object]]:
        return [
            {"source": self._source, **asdict(video), "last_tick_needed": self._last_tick[video_id]}
            for video_id, video in sorted(self._videos.items())
        ]

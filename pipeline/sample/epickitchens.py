"""Writes the toy world as a corpus in EPIC-KITCHENS-100's official layout."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from pipeline.sample.render import HEIGHT, WIDTH, Clip, whole
from pipeline.sample.world import (
    ANNOTATION_FPS,
    PARTS,
    TOYS,
    VERBS,
    Episode,
    Recording,
    Span,
    part_name,
)
from schemas.files import write_text

ANNOTATIONS = "epic-kitchens-100-annotations"
_COLUMNS = (
    *("narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp"),
    *("stop_timestamp", "start_frame", "stop_frame", "narration", "verb", "verb_class"),
    *("noun", "noun_class", "all_nouns", "all_noun_classes"),
)
_NOUNS = (*(part_name(part) for part in range(len(PARTS))), *TOYS)
_VERBS = ("take", *VERBS.values())
_VIDEOS_EACH = 3  # recordings of one participant

MOST_EPISODES, LEAST_SESSIONS = 1, 18


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """What the toy world keeps for test is in the validation file too: the official test file has no labels."""
    videos = {video_id(number): recording for number, recording in enumerate(recordings)}
    folder = out / ANNOTATIONS
    for name, splits in (("train", ("train",)), ("validation", ("val", "test"))):
        chosen = {uid: recording for uid, recording in videos.items() if recording.split in splits}
        rows = [row for uid, recording in chosen.items() for row in _narrations(uid, recording)]
        write_text(folder / f"EPIC_100_{name}.csv", _table(_COLUMNS, sorted(rows)))
    info = [(uid, *_info(recording)) for uid, recording in videos.items()]
    write_text(
        folder / "EPIC_100_video_info.csv", _table(("video_id", "duration", "fps", "resolution"), info)
    )
    return [
        whole(recording, out / uid.partition("_")[0] / "videos" / f"{uid}.MP4")
        for uid, recording in videos.items()
    ]


def video_id(number: int) -> str:
    """The id of a recording's video, such as ``P02_03``."""
    return f"P{number // _VIDEOS_EACH + 1:02d}_{number % _VIDEOS_EACH + 1:02d}"


def _narrations(uid: str, recording: Recording) -> list[tuple[str, ...]]:
    """Two a step, numbered in order of time: the part is taken; while that is being told, it is attached."""
    told: list[tuple[int, int, Episode, Span, str]] = []
    for episode in recording.episodes:
        for step in episode.steps:
            quarter = (step.end - step.start) // 4
            told.append((step.start, step.end - quarter, episode, step, "take"))
            told.append((step.start + quarter, step.end, episode, step, VERBS[episode.task]))
    told.sort(key=lambda narration: narration[:2])
    return [_row(uid, number, recording, *narration) for number, narration in enumerate(told)]


def _row(
    uid: str,
    number: int,
    recording: Recording,
    start: int,
    stop: int,
    episode: Episode,
    step: Span,
    verb: str,
) -> tuple[str, ...]:
    nouns = [part_name(step.part)] if verb == "take" else [part_name(step.part), TOYS[episode.toy]]
    places = [_NOUNS.index(noun) for noun in nouns]
    rate = Fraction(*recording.fps) / ANNOTATION_FPS
    return (
        f"{uid}_{number}",
        uid.partition("_")[0],
        uid,
        f"{_timestamp((start + stop) // 2)}0",
        _timestamp(start),
        _timestamp(stop),
        str(max(1, int(start * rate))),
        str(max(1, int(stop * rate))),
        f"{verb} {nouns[0]}" + (f" {'from' if verb == 'detach' else 'to'} {nouns[1]}" if nouns[1:] else ""),
        verb,
        str(_VERBS.index(verb)),
        nouns[0],
        str(places[0]),
        str(nouns),
        str(places),
    )


def _timestamp(frame: int) -> str:
    """An annotation frame as ``HH:MM:SS.ss``."""
    hundredths = round(Fraction(frame * 100, ANNOTATION_FPS))
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _info(recording: Recording) -> tuple[str, ...]:
    rate = Fraction(*recording.fps)
    frames = int(recording.duration * rate)
    return f"{float(frames / rate):.6f}", str(float(rate)), f"{WIDTH}x{HEIGHT}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()

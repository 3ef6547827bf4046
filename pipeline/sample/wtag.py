"""Writes the toy world as a corpus in WTaG's official layout.

Its ``Video.mpeg`` are MPEG-4 files, as the recorder of the official corpus writes under that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.sample.render import Clip, whole
from pipeline.sample.world import (
    ANNOTATION_FPS,
    Episode,
    Recording,
    step_name,
)
from schemas.files import write_text

_TICKS_PER_S = 10_000_000
_FIRST_TICK = 638_000_000_000_000_000  # ticks count from the year 1: autumn of 2022
_LEFT_OUT = "T55a"
_TICKS_PER_LETTER = 600_000  # how long it takes to say something

MOST_EPISODES, LEAST_SESSIONS = 1, 45  # the first 40 recordings are train


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """As in the official files, there are blank lines, marker rows and stray quotes, some files end their lines with
    CRLF, some have the intents in brackets behind the words, and the recording ``T55a`` is to be left out."""
    for number, recording in enumerate(recordings, 1):
        _write_recording(out / f"T{number}", number, recording)
    _write_recording(out / _LEFT_OUT, 0, recordings[0])
    return [whole(recording, out / f"T{n}/Video/Video.mpeg") for n, recording in enumerate(recordings, 1)]


def _write_recording(folder: Path, number: int, recording: Recording) -> None:
    [episode] = recording.episodes
    first = _FIRST_TICK + number * 3600 * _TICKS_PER_S
    last = first + round(recording.duration * _TICKS_PER_S)
    line_end = "\r\n" if number % 4 == 0 else "\n"
    files = {
        "Video/VideoMpegTiming.txt": f"{first}\n{last}\n",
        "StepDetection/StepDetection.txt": _steps(episode, first),
        "TextASR/UserAnnotations_intent.txt": _words(episode, "user", first, number),
        "TextASR/InstructorAnnotations_intent.txt": _words(episode, "assistant", first, number),
    }
    for name, text in files.items():
        write_text(folder / name, text.replace("\n", line_end))


def _tick(frame: int, first: int) -> int:
    return first + round(frame * _TICKS_PER_S / ANNOTATION_FPS)


def _steps(episode: Episode, first: int) -> str:
    """The steps between a marker before the hands come and one after they go."""
    spans = [(0, episode.hands_at, "Start")]
    spans += sorted((step.start, step.end, step_name(episode.task, step.part)) for step in episode.steps)
    spans.append((episode.hands_gone, episode.end, "Done"))
    return "".join(f"{_tick(start, first)}\t{_tick(end, first)}\t{text}\n" for start, end, text in spans)


def _words(episode: Episode, role: str, first: int, number: int) -> str:
    """What one of the two says; of every fifth recording, the first words begin with a quote that nothing closes."""
    words = sorted((word for word in episode.words if word.role == role), key=lambda word: word.frame)
    rows: list[str] = []
    for word in words:
        start = _tick(word.frame, first)
        quote = '"' if number % 5 == 0 and not rows else ""
        intent = f" [{word.labels}]" if number % 3 == 0 else f"\t{word.labels}"
        rows.append(f"{start}\t{start + len(word.text) * _TICKS_PER_LETTER}\t{quote}{word.text}{intent}\n")
    return "\n".join(rows[:2]) + "".join(rows[2:])

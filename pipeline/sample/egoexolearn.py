"""Writes the toy world as a corpus in EgoExoLearn's official layout."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.sample.render import HEIGHT, WIDTH, Clip, whole
from pipeline.sample.world import (
    ANNOTATION_FPS,
    TOYS,
    VERBS,
    Episode,
    Recording,
    part_name,
    step_name,
)
from schemas.files import write_text

_FPS = 25
_COLUMNS = ("video_uid", "annotation_id", "subset", "view", "scene", "start_sec", "end_sec")
_NARRATIONS = ("narration_en", "narration_en_hand_prompt", "narration_en_no_hand_prompt")

MOST_EPISODES, LEAST_SESSIONS = 1, 18


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """Each third recording has a demonstration too, seen from outside (``exo``): fine rows and no video."""
    recordings = [replace(recording, fps=(_FPS, 1)) for recording in recordings]
    annotations = out / "annotations"
    trainval: list[Sequence[object]] = []
    test: list[Sequence[object]] = []
    for number, recording in enumerate(recordings):
        coarse = json.dumps(_coarse(number, recording))
        write_text(annotations / "coarse_annotations" / "l1" / f"{video_uid(number)}.json", coarse)
        if recording.split == "test":
            test += [row[: len(_COLUMNS)] for row in _fine(number, recording, "ego")]
        else:
            trainval += _fine(number, recording, "ego")
            trainval += _fine(number, recording, "exo") if number % 3 == 0 else ()
    rng = np.random.default_rng([recordings[0].seed[0], len(recordings)])
    for name, columns, rows in (
        ("trainval_en", (*_COLUMNS, *_NARRATIONS), trainval),
        ("test", _COLUMNS, test),
    ):
        text = io.StringIO()
        shuffled = [rows[place] for place in rng.permutation(len(rows))]
        csv.writer(text, lineterminator="\n").writerows([columns, *shuffled])
        write_text(annotations / f"fine_annotation_{name}.csv", text.getvalue())
    meta = [entry for number, recording in enumerate(recordings) for entry in _meta(number, recording)]
    write_text(annotations / "video_meta_downsampled.json", json.dumps(meta))
    folder = out / "videos"
    return [whole(recording, folder / f"{video_uid(n)}.mp4") for n, recording in enumerate(recordings)]


def video_uid(number: int, view: str = "ego") -> str:
    """The uid of a recording's video, or of its demonstration."""
    return f"{'bee9' if view == 'ego' else 'c0ff'}{number:04x}-ac78-11ee-819f-80615f12b59e"


def _coarse(number: int, recording: Recording) -> list[dict[str, Any]]:
    """One entry a step, of two numbered lines."""
    return [
        {
            "start": step.start / ANNOTATION_FPS,
            "end": step.end / ANNOTATION_FPS,
            "attribute": str(step.part),
            "duration": _frames(recording) / _FPS,
            "id": f"c{number:03d}p{step.part:02d}",
            "type": 0,
            "textAttribute_en": f"1. Take the {part_name(step.part)}. \n"
            f"2. {_sentence(step_name(episode.task, step.part))}.",
        }
        for episode in recording.episodes
        for step in episode.steps
    ]


def _fine(number: int, recording: Recording, view: str) -> Iterator[Sequence[object]]:
    """Two rows a step: the part is picked up, then attached or detached."""
    for episode in recording.episodes:
        for step in episode.steps:
            middle = (step.start + step.end) // 2
            hand, part = ("left", "right")[step.hand], part_name(step.part)
            halves = ((step.start, middle, "pick up"), (middle, step.end, VERBS[episode.task]))
            for half, (start, end, verb) in enumerate(halves):
                yield (
                    *(video_uid(number, view), f"{view}{number:03d}{step.part:02d}{half}"),
                    *(recording.split, view, _scene(episode)),
                    *(start / ANNOTATION_FPS, end / ANNOTATION_FPS),
                    f"{_sentence(verb)} the {part} with the {hand} hand.",
                    json.dumps({hand: f"{verb} the {part}"}),
                    f"{_sentence(verb)} the {part}.",
                )


def _meta(number: int, recording: Recording) -> Iterator[dict[str, Any]]:
    [episode] = recording.episodes
    for view in ("ego", "exo") if number % 3 == 0 and recording.split != "test" else ("ego",):
        yield {
            "video_uid": video_uid(number, view),
            "num_frames": _frames(recording),
            "fps": _FPS,
            "width": WIDTH,
            "height": HEIGHT,
            "view": view,
            "scene": _scene(episode),
            "task": episode.goal(),
        }


def _scene(episode: Episode) -> str:
    return "lab" if episode.toy < len(TOYS) // 2 else "kitchen"


def _frames(recording: Recording) -> int:
    return int(recording.duration * _FPS)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]

"""Writes the toy world as a corpus in the layout of Ego4D GoalStep, some recordings as groups of several videos."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.sample.render import Clip
from pipeline.sample.world import (
    ANNOTATION_FPS,
    TOYS,
    Recording,
    part_name,
    step_name,
)
from schemas.files import write_text

MOST_EPISODES, LEAST_SESSIONS = 1, 18


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """Every sixth recording is a group of two or three videos, cut in the middle of steps.

    In every recording some steps are cut into a segment and its continuation, some segments are not essential, some
    texts are untidy. Unlike the official one, the test file has times.
    """
    uids = [_uids(recording, number) for number, recording in enumerate(recordings)]
    clips = [
        clip
        for recording, parts in zip(recordings, uids, strict=True)
        for clip in _clips(recording, out / "v2" / "video_540ss", parts)
    ]
    annotations = out / "v2" / "annotations"
    for split in ("train", "val", "test"):
        videos = [_video(r, parts) for r, parts in zip(recordings, uids, strict=True) if r.split == split]
        content = {
            "version": "1.0",
            "description": f"Synthetic Goal-Step ({split})",
            "split": split,
            "videos": videos,
        }
        write_text(annotations / f"goalstep_{split}.json", json.dumps(content, indent=1) + "\n")
    rows = "".join(f"synthetic\t{parts}\n" for parts in uids)
    write_text(annotations / "goalstep_video_groups.tsv", f"university\tvideo_group\n{rows}")
    return clips


def _uids(recording: Recording, number: int) -> list[str]:
    """Names of the videos of a recording, in order."""
    parts = 2 + number // 6 % 2 if number % 6 == 5 else 1
    return [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{recording.seed}/{part}")) for part in range(parts)]


def _clips(recording: Recording, folder: Path, uids: list[str]) -> Iterator[Clip]:
    """Files one after the other: from one to the next in the middle of a step, with no frame lost or shown twice."""
    rate, steps = Fraction(*recording.fps), recording.episodes[0].steps
    start = Fraction(0)
    for part, uid in enumerate(uids, 1):
        end = recording.duration
        if part < len(uids):
            step = steps[part * len(steps) // len(uids)]
            end = round(Fraction(step.start + step.end, 2 * ANNOTATION_FPS) * rate) / rate
        yield Clip(recording, folder / f"{uid}.mp4", start, end)
        start = end


def _video(recording: Recording, uids: list[str]) -> dict[str, Any]:
    [episode] = recording.episodes
    segments = [*_essential(recording), *_others(recording)]
    return {
        "video_uid": uids[0] if len(uids) == 1 else f"grp-{uids[0]}",
        "start_time": 0.0,
        "end_time": round(float(recording.duration), 5),
        "goal_category": f"TOYS:{TOYS[episode.toy].upper().replace(' ', '_')}",
        "goal_description": f"{episode.goal()}`",
        "goal_wikihow_url": "",
        "summary": [],
        "is_procedural": True,
        "segments": sorted(segments, key=lambda segment: (segment["start_time"], segment["end_time"])),
    }


def _essential(recording: Recording) -> Iterator[dict[str, Any]]:
    """The steps with two substeps each; of the second one and every third after it, each is a segment of its own."""
    [episode] = recording.episodes
    for number, step in enumerate(episode.steps):
        noun, name = part_name(step.part), step_name(episode.task, step.part)
        category = f"Toys: {name.capitalize()}"
        middle = (step.start + step.end) // 2
        halves = [
            _segment(step.start, middle, f"Toys: Pick up {noun}", f"pick up the {noun}. "),
            _segment(middle, step.end, category, f"put the {noun}  in its place"),
        ]
        halves += [
            _segment(shown.start, shown.end, "Toys: Show", f"show the {noun}", "optional")
            for shown in episode.shown
            if shown.part == step.part
        ]
        if number % 3 == 1:
            yield _segment(step.start, middle, category, f"{name} ", inside=halves[:1])
            again = name.capitalize()
            yield _segment(middle, step.end, category, again, inside=halves[1:], continued=True)
        else:
            yield _segment(step.start, step.end, category, name, inside=halves)


def _others(recording: Recording) -> Iterator[dict[str, Any]]:
    [episode] = recording.episodes
    first = min(step.start for step in episode.steps)
    yield _segment(episode.hands_at, first, "General activity: Get ready", "Shows the hands", "irrelevant")
    for start, end in episode.raised:
        yield _segment(start, end, "General activity: Raise a hand", "Hesitates", "unsure", continued=True)


def _segment(
    start: int,
    end: int,
    category: str,
    description: str,
    relevant: str = "essential",
    inside: list[dict[str, Any]] | None = None,
    continued: bool = False,
) -> dict[str, Any]:
    return {
        "start_time": round(start / ANNOTATION_FPS, 5),
        "end_time": round(end / ANNOTATION_FPS, 5),
        "step_category": category,
        "step_description": description,
        "is_continued": continued,
        "is_procedural": bool(inside),
        "is_relevant": relevant,
        "summary": [],
        "segments": inside or [],
    }

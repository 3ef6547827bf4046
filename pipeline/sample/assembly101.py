"""Writes the toy world as a corpus in Assembly101's official layout, with dialogs and DST beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.sample.render import Clip, whole
from pipeline.sample.world import (
    ANNOTATION_FPS,
    PARTS,
    TOYS,
    VERBS,
    Episode,
    Recording,
    part_name,
    step_name,
)
from schemas.files import write_text

VIEW = "C10095_rgb"
_FINE_COLUMNS = (
    *("id", "video", "start_frame", "end_frame", "action_id", "verb_id", "noun_id"),
    *("action_cls", "verb_cls", "noun_cls", "toy_id", "toy_name", "is_shared", "is_RGB"),
)

MOST_EPISODES, LEAST_SESSIONS = 2, 18


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """Coarse labels, mistakes, fine rows and splits, and beside them generated dialogs and DST rows."""
    annotations = out / "annotations"
    for recording in recordings:
        for episode in recording.episodes:
            name = f"{episode.task}_{recording.sequence}.txt"
            write_text(annotations / "coarse-annotations" / "coarse_labels" / name, _coarse(episode))
            if episode.task == "assembly":
                folder = annotations / "assembly101-mistake-detection" / "annots"
                write_text(folder / f"{recording.sequence}.csv", _mistakes(episode))
    for split in ("train", "val", "test"):
        chosen = [recording for recording in recordings if recording.split == split]
        for task in VERBS:
            lines = [
                f"{task}_{r.sequence}.txt\tshared\t{_toy_id(e)}\t{TOYS[e.toy]}\n"
                for r in chosen
                for e in r.episodes
                if e.task == task
            ]
            folder = annotations / "coarse-annotations" / "coarse_splits"
            write_text(folder / f"{split}_coarse_{task}.txt", "".join(lines))
        fine = annotations / "fine-grained-annotations" / f"{'validation' if split == 'val' else split}.csv"
        write_text(fine, _fine(chosen))
        write_text(out / "dialogs" / f"generated_{split}.json", _dialogs(chosen))
        write_text(out / "dialogs" / f"dst_{split}.jsonl", _dst(chosen))
    folder = out / "videos"
    return [whole(r, folder / r.sequence / f"{VIEW}.mp4") for r in recordings]


def _toy_id(episode: Episode) -> str:
    return f"{chr(97 + episode.toy)}{episode.toy + 1:02d}"


def _uid(recording: Recording, episode: Episode) -> str:
    return f"{episode.task}_{recording.sequence}__{VIEW}"


def _action(episode: Episode, part: int) -> str:
    return f"{VERBS[episode.task]} {part_name(part)}"


def _coarse(episode: Episode) -> str:
    return "".join(f"{s.start}\t{s.end}\t{_action(episode, s.part)}\n" for s in episode.steps)


def _mistakes(episode: Episode) -> str:
    """Rows in order of time: a step is correct but for the stretch in which its part is upside down."""
    rows = []
    for step in episode.steps:
        start = step.start
        for wrong in (w for w in episode.upside_down if w.part == step.part):
            rows += [
                (start, wrong.start, step.part, "correct", ""),
                (wrong.start, wrong.end, step.part, "mistake", "wrong position"),
            ]
            start = wrong.end
        rows.append((start, step.end, step.part, "correct", ""))
    return "".join(
        f"{a},{b},attach,{part_name(p)},chassis,{label},{note}\n" for a, b, p, label, note in sorted(rows)
    )


def _fine(recordings: list[Recording]) -> str:
    """Two rows a step: the part is picked up, then attached or detached."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FINE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    verbs = ("pick up", *VERBS.values())
    steps = [(r, e, s) for r in recordings for e in r.episodes for s in e.steps]
    for number, (recording, episode, step) in enumerate(steps):
        noun = part_name(step.part)
        middle = (step.start + step.end) // 2
        spans = ((step.start, middle, "pick up"), (middle, step.end, VERBS[episode.task]))
        for half, (start, end, verb) in enumerate(spans):
            verb_id = verbs.index(verb)
            row = {
                "id": f"{2 * number + half:07d}",
                "video": f"{recording.sequence}/{VIEW}.mp4",
                "start_frame": f"{start:09d}",
                "end_frame": f"{end:09d}",
                "action_id": f"{verb_id * len(PARTS) + step.part:04d}",
                "verb_id": f"{verb_id:04d}",
                "noun_id": f"{step.part:04d}",
                "action_cls": f"{verb} {noun}",
                "verb_cls": verb,
                "noun_cls": noun,
                "toy_id": _toy_id(episode),
                "toy_name": TOYS[episode.toy],
                "is_shared": 1,
                "is_RGB": 1,
            }
            writer.writerow(row)
    return text.getvalue()


def _dialogs(recordings: list[Recording]) -> str:
    videos: list[dict[str, Any]] = []
    for recording in recordings:
        for episode, user_type in zip(recording.episodes, recording.user_types, strict=True):
            words = sorted(episode.words, key=lambda w: w.frame)
            plan = [f"{n}. {step_name(episode.task, part)}" for n, part in enumerate(episode.plan, 1)]
            conversation = [{"role": "system", "content": "You are a proactive assistant."}] + [
                {"role": w.role, "time": w.frame / ANNOTATION_FPS, "content": w.text, "labels": w.labels}
                for w in words
            ]
            videos.append(
                {
                    "video_uid": _uid(recording, episode),
                    "inferred_goal": episode.goal(),
                    "inferred_knowledge": "\n".join([episode.goal(), *plan]),
                    "conversations": [{"user_type": user_type, "conversation": conversation}],
                }
            )
    return json.dumps(videos, indent=1) + "\n"


def _dst(recordings: list[Recording]) -> str:
    """One JSON line a session; steps in the order of the plan, whatever the order they are done in."""
    lines = []
    for recording in recordings:
        for episode in recording.episodes:
            times = {s.part: (s.start / ANNOTATION_FPS, s.end / ANNOTATION_FPS) for s in episode.steps}
            dst = [
                {
                    "type": "step",
                    "id": f"S{number}",
                    "start_ts": times[part][0],
                    "end_ts": times[part][1],
                    "name": step_name(episode.task, part),
                }
                for number, part in enumerate(episode.plan, 1)
            ]
            lines.append(json.dumps({"video_uid": _uid(recording, episode), "dst": dst}) + "\n")
    return "".join(lines)

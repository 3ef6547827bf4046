"""Writes the toy world as a corpus in HoloAssist's official layout, one file of labels a video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.sample.render import HEIGHT, WIDTH, Clip, whole
from pipeline.sample.world import (
    ANNOTATION_FPS,
    PARTS,
    TOYS,
    VERBS,
    Episode,
    Recording,
    Utterance,
    part_name,
)
from schemas.files import write_text

_PURPOSES = {
    "initiative|instruction": "instructor-start-conversation_describing high-level instruction",
    "initiative|hint": "instructor-start-conversation_follow-up instruction",
    "initiative|feedback": "instructor-start-conversation_confirming the previous action",
    "initiative|correction": "instructor-start-conversation_correct the wrong action",
    "initiative|closing": "instructor-start-conversation_closing remarks",
    "response|answer": "instructor-reply-to-student_answering questions",
    "response|acknowledgement": "instructor-reply-to-student_confirming the previous action",
    "initiative|goal": "student-start-conversation_other",
    "initiative|question": "student-start-conversation_ask questions",
    "other|generic": "student-reply-to-instructor_other",
}
_WORD_FRAMES = 10  # how long a word takes

MOST_EPISODES, LEAST_SESSIONS = 1, 18


def write_annotations(out: Path, recordings: Sequence[Recording]) -> list[Clip]:
    """As in the corpus, some words cannot be understood, and one event ends before it starts; both in the first
    file."""
    names = [_name(number, recording) for number, recording in enumerate(recordings, 1)]
    for name, recording in zip(names, recordings, strict=True):
        spoiled = recording is recordings[0]
        text = json.dumps(_record(name, recording, spoiled), indent=2)
        write_text(out / "labels" / f"{name}.json", text + "\n")
    for split in ("train", "val", "test"):
        chosen = [name for name, recording in zip(names, recordings, strict=True) if recording.split == split]
        write_text(out / f"{split}-v1_2.txt", "".join(f"{name}\n" for name in chosen))
    files = [out / name / "Export_py" / "Video_pitchshift.mp4" for name in names]
    return [whole(recording, file) for recording, file in zip(recordings, files, strict=True)]


def _name(number: int, recording: Recording) -> str:
    return f"R{number:03d}-toys-{TOYS[recording.episodes[0].toy].replace(' ', '_')}"


def _record(name: str, recording: Recording, spoiled: bool) -> dict[str, Any]:
    [episode] = recording.episodes
    rate = Fraction(*recording.fps)
    hundredths = round(int(recording.duration * rate) / rate * 100)
    minutes, rest = divmod(hundredths, 6000)
    raw = f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"
    video = {"container": "mov", "codec": "h264", "resolution": {"w": WIDTH, "h": HEIGHT}, "rotate": 0}
    return {
        "batch": "synthetic",
        "videoMetadata": {
            "video": {**video, "fps": round(float(rate), 2)},
            "duration": {"raw": raw, "seconds": hundredths // 100},
        },
        "taskType": episode.goal().lower().replace("the ", ""),
        "video_name": name,
        "events": _events(episode, spoiled),
    }


def _events(episode: Episode, spoiled: bool) -> list[dict[str, Any]]:
    """In order of their starts; words of one frame in the order they are said in."""
    events = [_event("Narration", 0, episode.end, {"Long form description": _narration(episode)})]
    for step in episode.steps:
        verb, middle = VERBS[episode.task], (step.start + step.end) // 2
        colour, kind = PARTS[step.part]
        sentence = f"The student {verb}es the {part_name(step.part)}."
        coarse = {"Action sentence": sentence, "Verb": verb, "Adjective": colour, "Noun": kind}
        events.append(_event("Coarse grained action", step.start, step.end, coarse))
        events.append(_fine(step.start, middle, "pick_up", step.part))
        events.append(_fine(middle, step.end, verb, step.part, adverbial="to_chassis"))
    for wrong in episode.upside_down:
        explanation = f"The {part_name(wrong.part)} is upside down."
        events.append(
            _fine(
                wrong.start, wrong.end, "hold", wrong.part, "Wrong Action, corrected by student", explanation
            )
        )
    for word in sorted(episode.words, key=lambda word: word.frame):
        end = word.frame + _WORD_FRAMES * len(word.text.split())
        events.append(_event("Conversation", word.frame, end, _conversation(word)))
    if spoiled:
        mumbled = Utterance(episode.hands_at, "user", "*unintelligible*", "other|generic")
        events.append(_event("Conversation", mumbled.frame, mumbled.frame + 20, _conversation(mumbled)))
        events.append(_fine(episode.hands_gone, episode.hands_gone - 3, "rest", episode.plan[0]))
    events.sort(key=lambda event: event["start"])
    return [{"id": number, **event} for number, event in enumerate(events, 1)]


def _event(label: str, start: int, end: int, attributes: dict[str, str]) -> dict[str, Any]:
    times = {"start": start / ANNOTATION_FPS, "end": end / ANNOTATION_FPS}
    return {"label": label, **times, "type": "range", "attributes": attributes}


def _narration(episode: Episode) -> str:
    parts = ", ".join(f"the {part_name(step.part)}" for step in episode.steps)
    return f"The student {VERBS[episode.task]}es {parts}."


def _fine(
    start: int,
    end: int,
    verb: str,
    part: int,
    correctness: str = "Correct Action",
    explanation: str = "none",
    adverbial: str = "none",
) -> dict[str, Any]:
    colour, kind = PARTS[part]
    attributes = {
        "Action Correctness": correctness,
        "Incorrect Action Explanation": explanation,
        "Incorrect Action Corrected by": "none",
        "Verb": verb,
        "Adjective": colour,
        "Noun": kind,
        "adverbial": adverbial,
    }
    return _event("Fine grained action", start, end, attributes)


def _conversation(word: Utterance) -> dict[str, str]:
    return {
        "Conversation Purpose": _PURPOSES[word.labels],
        "Transcription": word.text,
        "Transcription Confidence": "none",
    }

"""HoloAssist: records written by hand in both layouts, the synthetic corpus, and the real excerpts."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import polars as pl
import pytest
from conftest import put

from pipeline.prepare import prepare
from pipeline.sample.corpus import write_sample
from pipeline.sample.render import write_videos
from pipeline.sample.world import make_recordings, part_name
from pipeline.sources import holoassist
from pipeline.sources.common import Annotated
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects
from schemas.tables import read_table, validate_labels

COARSE, FINE, TALK = "Coarse grained action", "Fine grained action", "Conversation"
START = "instructor-start-conversation_"


def event(number: int, label: str, start: object, end: object, **attributes: object) -> dict[str, Any]:
    named = {key.replace("_", " "): value for key, value in attributes.items()}
    return {"id": number, "label": label, "start": start, "end": end, "type": "range", "attributes": named}


def words(number: int, start: object, purpose: str, text: str, end: object = None) -> dict[str, Any]:
    return event(number, TALK, start, end, Conversation_Purpose=purpose, Transcription=text)


def record(duration: dict[str, Any], events: list[Any], **more: str) -> dict[str, Any]:
    return {**more, "videoMetadata": {"duration": duration}, "events": events}


CORRECT = {"Action_Correctness": "Correct Action"}
WRONG = {"Action_Correctness": "Wrong Action, corrected by student"}
EVENTS: list[Any] = [
    event(178, "Narration", 0.1, 60, Long_form_description="All of it."),
    event(4, COARSE, 20.0, 30.5, Action_sentence=" The student opens it. ", Verb="open", Noun="lid"),
    event(3, COARSE, 5.4, 20.0, Action_sentence="The student opens it.", Verb="open", Noun="lid"),
    event(5, COARSE, 31, 40, Action_sentence="none", Verb="take_out", Adjective="red", Noun="battery_door"),
    event(6, COARSE, 41, 42, Action_sentence="", Verb="none", Noun=" "),
    event(7, COARSE, 45, 44, Action_sentence="Back in time."),
    event(8, COARSE, "soon", 44, Action_sentence="Some day."),
    event(9, COARSE, 50, 50, Action_sentence="At once."),
    event(11, FINE, 8, 9, Verb="pull", Adjective="very_red", Noun="knob", adverbial="to_left", **CORRECT),
    event(10, FINE, 7, 9.5, Verb="grab", Adjective="none", Noun="knob", adverbial="none", **WRONG),
    event(12, FINE, 12, 12.25, Verb="drop", Noun="knob", **WRONG),
    event(13, FINE, 14, 13, Verb="drop", Noun="knob", **WRONG),
    event(14, FINE, 16, 15, Verb="push", Noun="knob", **CORRECT),
    event(15, FINE, 17, 18, Verb="none", **CORRECT),
    words(20, 9.0, START + "follow-up", " Open *unintelligible* it. ", end=3),
    words(21, 2.25, "student-start-conversation_ask questions", "Now?"),
    words(22, 2.25, "instructor-reply-to-student_other", "None of that."),
    words(23, 2.0, "student-reply-to-instructor_other", "*Unintelligible*, *unintelligible*."),
    words(24, 3.0, START + "other", "none"),
    words(25, 3.0, START + "other", ""),
    words(26, 3.0, "narrator-start-conversation_other", "Once upon a time."),
    words(27, None, START + "other", "When?"),
    event(28, "Gesture", 1, 2),
    "not an event",
]
TRAY = "z2-june-22-gladom_disassemble"
FIRST = record({"raw": "00:01:10.25"}, EVENTS, video_name="R1-7July-Go_Pro", taskType=" set_up gopro ")
SECOND = record({"seconds": 45}, [EVENTS[1]], video_name=TRAY, taskType="none")
THIRD = record({"raw": "1 minute", "seconds": 60}, [EVENTS[8], EVENTS[1]])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "holoassist"
    for name, content in (("any name", FIRST), ("z2", SECOND), ("z3-third", THIRD)):
        put(root, f"labels/{name}.json", content)
    return root


def read(root: Path, rejects: Rejects | None = None, level: str = "step", *spoken: str) -> Any:
    rejects = Rejects() if rejects is None else rejects
    units = holoassist.units(root, level, None, spoken, rejects)
    stretches = [stretch for unit in units for stretch in holoassist.read(unit, rejects)]
    assert [stretch.video_uid for stretch in stretches] == sorted(stretch.video_uid for stretch in stretches)
    return {stretch.video_uid: stretch for stretch in stretches}


def plan(stretch: Annotated) -> list[tuple[str, str, tuple[tuple[float, float], ...], str]]:
    return [(s.step_id, s.name, s.spans, s.source_rows[0].locator) for s in stretch.steps]


def listed(rejects: Rejects, name: str = "any name.json") -> list[str]:
    return [f"{r.locator}: {r.reason}" for r in rejects.rows if Path(r.source_file).name == name]


def test_a_record_worked_by_hand(corpus: Path) -> None:
    rejects = Rejects()
    first, second, third = read(corpus, rejects).values()
    assert plan(first) == [
        ("S1", "The student opens it.", ((5.4, 20.0),), "event 3"),
        ("S2", "The student opens it.", ((20.0, 30.5),), "event 4"),
        ("S3", "take out battery door", ((31.0, 40.0),), "event 5"),
        ("S4", "At once.", ((50.0, 50.0),), "event 9"),
    ]
    file = corpus / "labels" / "any name.json"
    assert first.steps[0].source_rows == ((str(file), "event 3"),)
    assert first.mistakes == ((7.0, 9.5), (12.0, 12.25))
    assert first.mistake_rows == ((str(file), "event 10"), (str(file), "event 12"))
    assert [(t.t_s, t.role, t.text, t.labels, t.source_row) for t in first.turns] == [
        (2.25, "user", "Now?", ("initiative", "ask questions"), (str(file), "event 21")),
        (2.25, "assistant", "None of that.", ("responsive", "other"), (str(file), "event 22")),
        (9.0, "assistant", "Open *unintelligible* it.", ("initiative", "follow-up"), (str(file), "event 20")),
    ]
    assert (first.goal, first.split, first.source_file) == ("set up gopro", None, str(file))
    video = first.video
    assert (video.video_id, video.recording_id) == ("holoassist/R1-7July-Go_Pro", "R1-7July-Go_Pro")
    assert video.uri == str(corpus / "R1-7July-Go_Pro" / "Export_py" / "Video_pitchshift.mp4")
    assert (video.rotation_deg, video.duration_s) == (0, 70.25)
    assert listed(rejects) == [
        *("event 178: narration", "event 6: no action", "event 7: ends before it starts"),
        *("event 8: not a time", "event 11: not the annotation of level step"),
        *("event 13: ends before it starts", "event 14: not the annotation of level step"),
        *("event 15: not the annotation of level step", "event 23: unintelligible"),
        *("event 24: empty transcription", "event 25: empty transcription"),
        *("event 26: unknown speaker", "event 27: not a time", "event 28: unknown label"),
        "event no. 24: unknown form",
    ]
    assert (second.video_uid, second.goal) == (TRAY, "gladom disassemble")
    assert (second.turns, second.mistakes, second.video.duration_s) == (None, None, 45.0)
    assert (third.goal, third.mistakes, third.video.duration_s) == ("third", (), None)
    assert "videoMetadata.duration: not a duration" in listed(rejects, "z3-third.json")


def test_level_substep(corpus: Path) -> None:
    rejects = Rejects()
    first, second, _ = read(corpus, rejects, level="substep").values()
    assert plan(first) == [
        ("S1", "grab knob", ((7.0, 9.5),), "event 10"),
        ("S2", "pull very red knob to left", ((8.0, 9.0),), "event 11"),
        ("S3", "drop knob", ((12.0, 12.25),), "event 12"),
    ]
    assert first.mistakes == ((7.0, 9.5), (12.0, 12.25))
    assert second.steps == ()
    assert listed(rejects)[1:11] == [
        *(f"event {number}: not the annotation of level substep" for number in (4, 3, 5, 6, 7, 8, 9)),
        *("event 13: ends before it starts", "event 14: ends before it starts", "event 15: no action"),
    ]


def test_one_list_says_the_same_as_one_file_a_video(corpus: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    name = "data-annotation-trainval-v1_1.json"
    put(whole, name, "\ufeff" + json.dumps([SECOND, FIRST, {**THIRD, "video_name": "z3-third"}], indent=1))
    rejects, others = Rejects(), Rejects()
    found, apart = read(whole, rejects), read(corpus, others)
    for uid, stretch in found.items():
        assert [row[:3] for row in plan(stretch)] == [row[:3] for row in plan(apart[uid])]
        assert (stretch.goal, stretch.mistakes) == (apart[uid].goal, apart[uid].mistakes)
        assert str(stretch.steps[0].source_rows[0]).startswith(f"{whole / name}, {uid}, event ")
    assert Counter(r.reason for r in rejects.rows) == Counter(r.reason for r in others.rows)
    assert "R1-7July-Go_Pro, event 178: narration" in listed(rejects, name)


def test_a_second_record_of_one_video(corpus: Path) -> None:
    put(corpus, "labels/a_copy.json", {**FIRST, "taskType": "the copy"})
    rejects = Rejects()
    assert read(corpus, rejects)["R1-7July-Go_Pro"].goal == "the copy"  # by the order of the files
    assert listed(rejects) == ["record 1: second record of one video"]


def test_files_and_a_list_at_once(corpus: Path) -> None:
    name = "data-annotation-trainval-v1_1.json"
    fourth = record({"seconds": 50}, [EVENTS[1]], video_name="z4-fourth")
    put(corpus, name, [{**FIRST, "taskType": "the list"}, fourth, SECOND])
    rejects = Rejects()
    found = read(corpus, rejects)
    assert list(found) == ["R1-7July-Go_Pro", TRAY, "z3-third", "z4-fourth"]
    assert found["R1-7July-Go_Pro"].goal == "set up gopro"
    assert found["z4-fourth"].steps[0].source_rows == ((str(corpus / name), "z4-fourth, event 4"),)
    assert listed(rejects, name) == [f"record {n}: second record of one video" for n in (1, 3)]


@pytest.mark.parametrize("name", ["labels/none.json", "data-annotation-trainval-v1_1.json"])
@pytest.mark.parametrize("content", ["[]", "\ufeff [\n]\n"])
def test_a_file_without_records(corpus: Path, tmp_path: Path, name: str, content: str) -> None:
    put(corpus, name, content)
    rejects = Rejects()
    assert len(read(corpus, rejects)) == 3
    assert listed(rejects, Path(name).name) == ["file: empty file"]
    put(tmp_path / "alone", name, content)
    with pytest.raises(UserError, match=r"gave no session.*empty file \(1\)"):
        prepare("holoassist", tmp_path / "alone", tmp_path / "out", Clock())


@pytest.mark.parametrize("folder", [".", "splits"])
def test_splits(corpus: Path, folder: str) -> None:
    put(corpus, f"{folder}/train-v1_2.txt", "R1-7July-Go_Pro\r\n\r\n  \r\nR0-away\r\n")
    put(corpus, f"{folder}/test-v1_2.txt", "\n \nz3-third")
    put(corpus, f"{folder}/notes-v1_2.txt", "z3-third\n")
    rejects = Rejects()
    found = read(corpus, rejects)
    assert {uid: stretch.split for uid, stretch in found.items()} == {
        "R1-7July-Go_Pro": "train",
        TRAY: None,
        "z3-third": "test",
    }
    assert listed(rejects, "train-v1_2.txt") == ["row 4: no annotation"]
    assert listed(rejects, "notes-v1_2.txt") == ["file name: unknown file"]
    put(corpus, f"{folder}/val-v1_2.txt", "z3-third\n")
    with pytest.raises(UserError, match=r"'z3-third' is in 'test' by .*test-v1_2.* and in 'val' by .*row 1"):
        read(corpus)


def test_a_video_that_only_dialogues_are_about(corpus: Path) -> None:
    assert "R9-new-toy_car" not in read(corpus, None, "step", "R9-new-toy_car")
    put(corpus, "video_pitch_shifted/R9-new-toy_car/Export_py/Video_pitchshift.mp4", "no video")
    rejects = Rejects()
    new = read(corpus, rejects, "step", "R9-new-toy_car", "z3-third", "R9" * 200)["R9-new-toy_car"]
    assert (new.goal, new.steps, new.turns, new.mistakes) == ("toy car", (), None, None)
    assert new.video.uri.endswith("video_pitch_shifted/R9-new-toy_car/Export_py/Video_pitchshift.mp4")
    assert listed(rejects, "Video_pitchshift.mp4") == ["header: video cannot be opened"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(FIRST)[:-30], r"cut\.json is not whole JSON"),
        ([FIRST, {"video_name": "x"}], r"cut\.json has no list 'events' in record 2"),
        ("5", r"cut\.json has no list 'events' in record 1"),
    ],
)
def test_a_file_that_cannot_be_used(corpus: Path, content: Any, sentence: str) -> None:
    put(corpus, "labels/cut.json", content)
    with pytest.raises(UserError, match=sentence):
        read(corpus)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels/\*\.json.*data-annotation-trainval.*holoassist\.github"):
        read(tmp_path)


# The synthetic corpus, with the videos of its first two recordings.

RECORDINGS = make_recordings(18, seed=4, most_episodes=1)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "holoassist"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.sample.corpus.write_videos", lambda clips, on_video: write_videos(clips[:2], on_video)
        )
        write_sample("holoassist", root, sessions=18, seed=4)
    return root


def test_the_synthetic_corpus_is_what_happened(synthetic: Path, tmp_path: Path) -> None:
    """Read from the tables, and compared with the recordings they are drawn and written from."""
    prepare("holoassist", synthetic, tmp_path, Clock())
    labels = tmp_path / "holoassist"
    assert validate_labels(labels) == []
    sessions = read_table(labels, "sessions").to_pylist()
    steps, turns = pl.read_parquet(labels / "steps.parquet"), pl.read_parquet(labels / "turns.parquet")
    mistaken = pl.read_parquet(labels / "frames.parquet").filter("mistake")
    assert len(sessions) == len(RECORDINGS)
    assert any(recording.episodes[0].upside_down for recording in RECORDINGS)
    pairs = [pair for recording in RECORDINGS for pair in pairwise(recording.episodes[0].words)]
    assert any(ask.role == "user" and answer.frame == ask.frame for ask, answer in pairs)
    for session, recording in zip(sessions, RECORDINGS, strict=True):
        [episode] = recording.episodes
        assert (session["split"], session["dialog_origin"]) == (recording.split, "human")
        assert session["goal"] == episode.goal().lower().replace("the ", "")
        mine = pl.col("session_id") == session["session_id"]
        begun = sorted(episode.steps, key=lambda step: step.start)
        assert [
            (name, round(spans[0]["start_s"] * 30, 6), round(spans[0]["end_s"] * 30, 6))
            for name, spans in steps.filter(mine).select("name", "spans").rows()
        ] == [(f"The student attaches the {part_name(s.part)}.", s.start, s.end) for s in begun]
        spoken = turns.filter(mine).select("role", "text", "t_s").rows()
        assert [(role, text) for role, text, _ in spoken] == [(w.role, w.text) for w in episode.words]
        assert [round(t_s * 30, 6) for _, _, t_s in spoken] == [word.frame for word in episode.words]
        spans = [(math.ceil(wrong.start / 15), math.ceil(wrong.end / 15)) for wrong in episode.upside_down]
        ticks = {tick for first, stop in spans for tick in range(first, stop)}
        assert set(mistaken.filter(mine)["tick"].to_list()) == ticks
    reasons = Counter(row["reason"] for row in read_table(labels, "rejects").to_pylist())
    num_fine = 1 + 2 * sum(len(recording.episodes[0].steps) for recording in RECORDINGS)
    assert reasons == {"narration": 18, "unintelligible": 1, "not the annotation of level step": num_fine}


def test_the_declared_duration_is_that_of_the_video(synthetic: Path, tmp_path: Path) -> None:
    prepare("holoassist", synthetic, tmp_path, Clock(), level="substep")
    videos = {row["recording_id"]: row for row in read_table(tmp_path / "holoassist", "videos").to_pylist()}
    for number, path in enumerate(sorted((synthetic / "labels").glob("*.json"))):
        declared = json.loads(path.read_text())["videoMetadata"]["duration"]
        hours, minutes, seconds = declared["raw"].split(":")
        expected = Fraction(hours) * 3600 + Fraction(minutes) * 60 + Fraction(seconds)
        assert declared["seconds"] == int(expected)
        video = Path(videos[path.stem]["uri"])
        assert video.is_file() == (number < 2)
        if video.is_file():
            with av.open(str(video)) as container:
                rate = Fraction(container.streams.video[0].average_rate)
                decoded = sum(1 for _ in container.decode(video=0)) / rate
            assert abs(decoded - expected) <= Fraction(1, 200)
            expected = decoded
        assert videos[path.stem]["duration_s"] == pytest.approx(float(expected), abs=1e-4)
    reasons = Counter(row["reason"] for row in read_table(tmp_path / "holoassist", "rejects").to_pylist())
    assert reasons["ends before it starts"] == 1


def test_the_same_arguments_give_the_same_bytes(synthetic: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.sample.corpus.write_videos", lambda clips, on_video: None)
    write_sample("holoassist", tmp_path / "again", sessions=18, seed=4)
    for path in sorted((tmp_path / "again").rglob("*.*")):
        assert path.read_bytes() == (synthetic / path.relative_to(tmp_path / "again")).read_bytes()
    for workers in (1, 2):
        prepare("holoassist", synthetic, tmp_path / str(workers), Clock(), workers=workers)
    for path in (tmp_path / "1" / "holoassist").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "holoassist" / path.name).read_bytes()


# The real excerpts, where they lie beside the repository: read in place, with a second reading of our own.

EXCERPTS = Path(__file__).parents[2] / "shared" / "samples" / "holoassist"
FILES = sorted(EXCERPTS.glob("labels/*.json"))


@pytest.mark.parametrize("level", ["step", "substep"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_excerpts(file: Path, level: str, tmp_path: Path) -> None:
    prepare("holoassist", EXCERPTS, tmp_path, Clock(), level=level)
    labels = tmp_path / "holoassist"
    assert validate_labels(labels) == []
    real = json.loads(file.read_text(encoding="utf-8"))
    session_id = f"holoassist/{real['video_name']}"
    tables = {name: read_table(labels, name).to_pylist() for name in ("sessions", "steps", "turns", "frames")}
    rows = {name: [r for r in table if r["session_id"] == session_id] for name, table in tables.items()}
    assert rows["sessions"][0]["goal"] == real["taskType"]
    chosen = [e for e in real["events"] if e["label"] == (COARSE if level == "step" else FINE)]
    spans = [(row["spans"][0]["start_s"], row["spans"][0]["end_s"]) for row in rows["steps"]]
    assert spans == sorted((e["start"], e["end"]) for e in chosen)
    if level == "step":
        sentences = {(e["start"], e["end"]): e["attributes"]["Action sentence"] for e in chosen}
        assert [row["name"] for row in rows["steps"]] == [sentences[span] for span in spans]
    roles = {"instructor": "assistant", "student": "user"}
    said = [(e["start"], e["attributes"]) for e in real["events"] if e["label"] == TALK]
    spoken = [
        (t_s, about["Transcription"].strip(), roles[about["Conversation Purpose"].partition("-")[0]])
        for t_s, about in said
    ]
    assert [(row["t_s"], row["text"], row["role"]) for row in rows["turns"]] == spoken
    told = {math.ceil(t_s * 2) for t_s, _, role in spoken if role == "assistant"}
    assert {row["tick"] for row in rows["frames"] if row["speak"]} == told
    wrong = [e for e in real["events"] if e["attributes"].get("Action Correctness", "")[:5] == "Wrong"]
    assert [row["mistake"] for row in rows["frames"]] == [
        any(e["start"] <= row["t_s"] < e["end"] for e in wrong) for row in rows["frames"]
    ]
    rejects = [row for row in read_table(labels, "rejects").to_pylist() if row["source_file"] == str(file)]
    used = {id(e) for e in (*chosen, *wrong)}
    unused = Counter(f"event {e['id']}" for e in real["events"] if id(e) not in used and e["label"] != TALK)
    assert Counter(row["locator"] for row in rejects) == unused

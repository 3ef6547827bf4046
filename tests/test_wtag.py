"""WTaG: folders written by hand with the oddities of the official ones, and the synthetic corpus read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import put

from pipeline.prepare import Counts, prepare
from pipeline.sample.corpus import write_sample
from pipeline.sample.render import Clip, write_videos
from pipeline.sources import wtag
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.tables import read_table, validate_labels

TIMING = "Video/VideoMpegTiming.txt"
STEPS = "StepDetection/StepDetection.txt"
INSTRUCTOR = "TextASR/InstructorAnnotations_intent.txt"
USER = "TextASR/UserAnnotations_intent.txt"
DEPENDS = "recordings whose split depends on which others are there: the whole of wtag has 56"
FIRST = 637_512_345_678_901_234  # ticks since the year 1, which no float holds exactly


def row(start_s: float, end_s: float, *cells: str) -> str:
    return "\t".join([str(FIRST + round(start_s * 1e7)), str(FIRST + round(end_s * 1e7)), *cells])


def put_recording(folder: Path, seconds: int = 60) -> None:
    """One step, a question, an answer."""
    put(folder, TIMING, f"{FIRST}\n{FIRST + seconds * 10_000_000}\n")
    put(folder, STEPS, row(10, 20, "Boil water.") + "\n")
    put(folder, USER, row(8, 8.5, "Now?", "Question") + "\n")
    put(folder, INSTRUCTOR, row(9, 11, "Boil it.", "Instruction") + "\n")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One recording with all that can be odd in its rows, one that is plain, one to leave out, one without timing."""
    root = tmp_path / "wtag"
    steps = [
        row(0, 8, "Start"),
        row(20, 30.5, "Stir the \xe9gg"),
        "",
        row(10, 25, '"Boil" water'),
        row(10, 24, "Light the fire"),
        row(30, 28, "Backwards"),
        f"{FIRST - 5}\t{FIRST + 5}\tBefore the video",
        f"soon\t{FIRST}\tNot a number",
        row(1, 2),
        row(1, 2, " "),
        row(50, 60, "DONE", ""),
        row(31, 32, "Stir", "", "again"),
    ]
    odd = root / "T5_pinwheels"
    put(odd, TIMING, f"\ufeff{FIRST}\r\n{FIRST + 600_000_000}\r\n\r\n")
    lines = [line.encode() for line in steps]
    put(odd, STEPS, b"\xef\xbb\xbf" + b"\r\n".join([*lines, b"1\t2\t\xff"]))
    said = [
        row(9.5, 10, 'He said "go', "Instruction|Start, Feedback", "Other"),
        row(0.5, 1, '"Hi', ""),
        row(12, 12, "", "Instruction"),
        row(13, 14, "Stop (no, go) [Correction]"),
    ]
    put(odd, INSTRUCTOR, "\n".join(said))
    put(odd, USER, row(9.5, 9.7, "Ready?", "Question") + "\n\n" + row(4, 5, 'So "this"?') + "\n")
    for name in ("T10", "T55a", "T6"):
        put_recording(root / name)
    put(root / "T6", TIMING, f"{FIRST}\n")
    return root


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    assert validate_labels(folder) == []
    names = ("videos", "sessions", "steps", "turns", "rejects")
    return {name: read_table(folder, name).to_pylist() for name in names}


def where(found: dict[str, list[dict[str, Any]]], root: Path) -> list[tuple[str, str, str]]:
    rows = [(Path(r["source_file"]), r["locator"], r["reason"]) for r in found["rejects"]]
    return sorted((path.relative_to(root).as_posix(), *rest) for path, *rest in rows)


def test_recordings_worked_by_hand(corpus: Path, tmp_path: Path) -> None:
    counts = prepare("wtag", corpus, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    assert [(s["session_id"], s["goal"], s["split"], s["dialog_origin"]) for s in found["sessions"]] == [
        ("wtag/T10", "Follow the recipe", "train", "human"),
        ("wtag/T5_pinwheels", "Cook: pinwheels", "train", "human"),
    ]
    assert [(v["video_id"], v["recording_id"], v["duration_s"]) for v in found["videos"]] == [
        ("wtag/T10", "T10", 60.0),
        ("wtag/T5_pinwheels", "T5_pinwheels", 60.0),
    ]
    assert found["videos"][0]["uri"] == str(corpus / "T10" / "Video" / "Video.mpeg")
    odd = corpus / "T5_pinwheels"
    steps = [s for s in found["steps"] if s["session_id"] == "wtag/T5_pinwheels"]
    assert [(s["step_id"], s["name"], s["spans"], s["source_rows"]) for s in steps] == [
        ("S1", "Light the fire", [{"start_s": 10.0, "end_s": 24.0}], [f"{odd / STEPS}, row 5"]),
        ("S2", '"Boil" water', [{"start_s": 10.0, "end_s": 25.0}], [f"{odd / STEPS}, row 4"]),
        ("S3", "Stir the égg", [{"start_s": 20.0, "end_s": 30.5}], [f"{odd / STEPS}, row 2"]),
    ]
    turns = [t for t in found["turns"] if t["session_id"] == "wtag/T5_pinwheels"]
    assert [(t["t_s"], t["role"], t["text"], t["labels"]) for t in turns] == [
        (0.5, "assistant", '"Hi', []),
        (4.0, "user", 'So "this"?', []),
        (9.5, "user", "Ready?", ["Question"]),
        (9.5, "assistant", 'He said "go', ["Instruction", "Start", "Feedback", "Other"]),
        (13.0, "assistant", "Stop (no, go) [Correction]", []),
    ]
    assert [t["source_row"] for t in turns[1:3]] == [f"{odd / USER}, row 3", f"{odd / USER}, row 1"]
    assert [t["tick"] for t in turns] == [1, 8, 19, 19, 26]  # those on a tick are not one late
    assert counts.sessions == {"train": 2}
    assert counts.missing_videos == 2
    assert counts.notes == {DEPENDS: 3}  # T6 takes its place among the first 40 too


def test_every_row_that_is_not_used_is_listed(corpus: Path, tmp_path: Path) -> None:
    prepare("wtag", corpus, tmp_path / "out", Clock(2.0))
    odd, left_out = f"T5_pinwheels/{STEPS}", "left out by the corpus' authors"
    assert where(tables(tmp_path / "out" / "wtag"), corpus) == [
        *((f"T55a/{name}", "rows 1-1", left_out) for name in (STEPS, INSTRUCTOR, USER)),
        (f"T55a/{TIMING}", "rows 1-2", left_out),
        (f"T5_pinwheels/{STEPS}", "row 1", "start or end marker"),
        (odd, "row 10", "empty text"),
        (odd, "row 11", "start or end marker"),
        (odd, "row 12", "too many columns"),
        (odd, "row 13", "unreadable row"),
        (odd, "row 6", "ends before it starts"),
        (odd, "row 7", "not a time"),
        (odd, "row 8", "not a time"),
        (odd, "row 9", "too few columns"),
        (f"T5_pinwheels/{INSTRUCTOR}", "row 3", "empty text"),
        *((f"T6/{name}", "rows 1-1", "no timing") for name in (STEPS, INSTRUCTOR, USER)),
        (f"T6/{TIMING}", "recording T6", "no timing"),
    ]


@pytest.mark.parametrize(
    "timing", [None, "", f"{FIRST}\nsoon\n", f"{FIRST}\n{FIRST}\n", f"{FIRST}\n1\n2\n", b"\xff\n"]
)
def test_without_timing_no_row_of_a_recording_is_used(tmp_path: Path, timing: str | bytes | None) -> None:
    root = tmp_path / "wtag"
    put_recording(root / "T1")
    put_recording(root / "T2")
    put(root / "T2", USER, "\r".join(["a", "", row(1, 2, "Ready?"), "b\r\nc"]))
    put(root / "T2", INSTRUCTOR, "")
    (root / "T2" / TIMING).unlink()
    if timing is not None:
        put(root / "T2", TIMING, timing)
    prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    assert [s["session_id"] for s in found["sessions"]] == ["wtag/T1"]
    assert where(found, root / "T2") == [
        (STEPS, "rows 1-1", "no timing"),
        (USER, "rows 1-5", "no timing"),
        (TIMING, "recording T2", "no timing"),
    ]


def test_the_first_40_names_are_train(tmp_path: Path) -> None:
    root = tmp_path / "wtag"
    names = [f"T{n}" for n in range(1, 44)] + ["T55a", "T55b"]
    for name in names:
        put_recording(root / name)
    counts = prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    val = {s["session_id"] for s in found["sessions"] if s["split"] == "val"}
    assert val == {"wtag/T7", "wtag/T8", "wtag/T9"}  # "T43" is before "T5", "T9" is last
    assert counts.sessions == {"train": 40, "val": 3}
    assert counts.rejects == {"left out by the corpus' authors": 8}  # four files each
    assert counts.notes == {DEPENDS: 43}
    for number in range(44, 57):
        put_recording(root / f"T{number}")
    counts = prepare("wtag", root, tmp_path / "out", Clock(2.0))
    assert (counts.sessions, counts.notes) == ({"train": 40, "val": 16}, {})


def test_what_is_said_and_what_is_done_may_be_absent(tmp_path: Path) -> None:
    """Of two files of words, one that gives none is told; the user's alone are no dialogue of an assistant."""
    root = tmp_path / "wtag"
    asked = row(12, 13, "Ready?", "Question")
    words: dict[str, tuple[str | None, str | None]] = {  # of the instructor, of the user
        "T1": (None, None),
        "T2": ("", f"{asked}\n{asked}\n"),
        "T3": (None, asked),
        "T4": (row(9, 11, "Boil it."), "\n"),
        "T5": (row(9, 11, ""), asked),
        "T6": (row(9, 11, "Boil it."), asked),
        "T7": ("", ""),
    }
    for name, contents in words.items():
        put_recording(root / name)
        for file, text in zip((INSTRUCTOR, USER), contents, strict=True):
            if text is None:
                (root / name / file).unlink()
            else:
                put(root / name, file, text)
    (root / "T6" / STEPS).unlink()
    prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    origins = {s["session_id"][5:]: s["dialog_origin"] for s in found["sessions"]}
    assert origins == {**dict.fromkeys(("T1", "T2", "T3", "T5", "T7"), "template"), "T4": "human"}
    assert [t["text"] for t in found["turns"] if t["session_id"] == "wtag/T4"] == ["Boil it."]
    assert where(found, root) == sorted(
        [
            (f"T2/{INSTRUCTOR}", "recording T2", "empty file"),
            *((f"T2/{USER}", f"row {n}", "no words of the instructor") for n in (1, 2)),
            (f"T3/{INSTRUCTOR}", "recording T3", "no such file"),
            (f"T3/{USER}", "row 1", "no words of the instructor"),
            (f"T4/{USER}", "recording T4", "empty file"),
            (f"T5/{INSTRUCTOR}", "row 1", "empty text"),
            (f"T5/{INSTRUCTOR}", "recording T5", "empty file"),
            (f"T5/{USER}", "row 1", "no words of the instructor"),
            (f"T6/{STEPS}", "wtag/T6", "no steps"),
            *((f"T6/{file}", "row 1", "no steps") for file in (INSTRUCTOR, USER)),
            *((f"T7/{file}", "recording T7", "empty file") for file in (INSTRUCTOR, USER)),
        ]
    )


@pytest.mark.parametrize("ends", ["\n", "\r", "\r\n"])
def test_lines_end_as_they_like(tmp_path: Path, ends: str) -> None:
    root = tmp_path / "wtag"
    put_recording(root / "T1")
    steps = [row(10, 20, "Boil."), row(5, 6, "DONE"), "", row(20, 30, "Po\u2028ur."), row(3, 4, "Wash.")]
    put(root / "T1", STEPS, ends.join(steps))
    put(root / "T1", TIMING, ends.join([str(FIRST), str(FIRST + 600_000_000), ""]))
    put(root / "T1", INSTRUCTOR, ends.join([row(9, 11, "Boil it."), row(19, 20, "Pour.", "Instruction"), ""]))
    prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    rows = [(s["name"], s["source_rows"]) for s in found["steps"]]
    lines = {"Wash.": 5, "Boil.": 1, "Po\u2028ur.": 4}
    assert rows == [(name, [f"{root / 'T1' / STEPS}, row {n}"]) for name, n in lines.items()]
    assert [(t["t_s"], t["text"], t["labels"]) for t in found["turns"]] == [
        (8.0, "Now?", ["Question"]),
        (9.0, "Boil it.", []),
        (19.0, "Pour.", ["Instruction"]),
    ]
    assert where(found, root) == [(f"T1/{STEPS}", "row 2", "start or end marker")]


def test_dialogues_about_videos_without_annotations(tmp_path: Path) -> None:
    root = tmp_path / "wtag"
    put_recording(root / "T1")
    path = root / "T9_coffee" / "Video" / "Video.mpeg"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w", format="mp4") as container:  # what is inside counts, not the name
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for _ in range(75):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    put(root / "T55a", "Video/Video.mpeg", path.read_bytes())
    dst = '[{"type": "step", "id": "A", "start_ts": 0.5, "end_ts": 1.5, "name": "Grind"}]'
    said = '[{"role": "assistant", "time": 1, "content": "Go on."}]'
    uids = ("T9_coffee", "T8", "T55a", "../wtag/T9_coffee")
    lines = [f'{{"video_uid": "{uid}", "dst": {dst}, "conversation": {said}}}' for uid in uids]
    put(root, "dialogs/talk.jsonl", "\n".join(lines))
    counts = prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    assert [(s["session_id"], s["goal"], s["dialog_origin"]) for s in found["sessions"]] == [
        ("wtag/T1", "Follow the recipe", "human"),
        ("wtag/T9_coffee/dialog_0", "Cook: coffee", "generated"),
    ]
    assert found["videos"][1]["duration_s"] == 3.0
    assert [(r["locator"], r["reason"]) for r in found["rejects"]] == [
        ("row 4", "unknown video_uid"),
        ("row 3", "unknown video_uid"),
        ("row 2", "unknown video_uid"),
    ]
    assert counts.missing_videos == 1


def test_generated_dialogues_take_the_place_of_the_real_one(tmp_path: Path) -> None:
    root = tmp_path / "wtag"
    put_recording(root / "T1")
    said = '[{"role": "assistant", "time": 8, "content": "Go on."}]'
    put(root, "dialogs/talk.json", f'{{"video_uid": "T1", "conversation": {said}}}')
    prepare("wtag", root, tmp_path / "out", Clock(2.0))
    found = tables(tmp_path / "out" / "wtag")
    assert [t["text"] for t in found["turns"]] == ["Go on."]
    assert [s["name"] for s in found["steps"]] == ["Boil water."]
    reason = "the dialogues bring their own words"
    assert where(found, root) == [(f"T1/{name}", "row 1", reason) for name in (INSTRUCTOR, USER)]


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "wtag"
    put(root, "readme.txt", "")
    with pytest.raises(UserError, match=r"VideoMpegTiming\.txt.*StepDetection\.txt.*ask at https"):
        prepare("wtag", root, tmp_path / "out", Clock(2.0))
    put_recording(root / "T1")
    (root / "T1" / USER).unlink()
    (root / "T1" / USER).mkdir()
    with pytest.raises(UserError, match=r"UserAnnotations_intent\.txt cannot be read"):
        prepare("wtag", root, tmp_path / "out", Clock(2.0))
    assert list((tmp_path / "out").iterdir()) == []


# ---- the synthetic corpus


def write(out: Path, seed: int, encoded: int = 0) -> tuple[list[Clip], list[int]]:
    """A corpus of 45 sessions with so many of its videos; returned are all that it asks for, and what it announces."""
    asked: list[Clip] = []
    plans: list[int] = []

    def some(clips: Sequence[Clip], on_video: Callable[[], None]) -> None:
        asked.extend(clips)
        write_videos(clips[:encoded], on_video)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sample.corpus.write_videos", some)
        write_sample("wtag", out, sessions=45, seed=seed, on_plan=plans.append)
    return asked, plans


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Counts]:
    """A corpus with one of its videos, its label tables, what they hold."""
    folder = tmp_path_factory.mktemp("wtag")
    clips, plans = write(folder / "data", 5, encoded=1)
    assert [clip.path for clip in clips] == [
        folder / "data" / f"T{n}" / "Video" / "Video.mpeg" for n in range(1, 46)
    ]
    assert plans == [45]
    counts = prepare("wtag", folder / "data", folder / "out", Clock(2.0))
    return folder / "data", folder / "out" / "wtag", counts


def lines_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines() if line]


def test_the_sample_read_again(sample: tuple[Path, Path, Counts]) -> None:
    """Each row of each file, split at its tabs, is where the tables have it."""
    data, labels, counts = sample
    found = tables(labels)
    steps, turns, rejects = [], [], 0
    for number in range(1, 46):
        folder = data / f"T{number}"
        first, last = (int(line) for line in (folder / TIMING).read_text().split())
        video = next(v for v in found["videos"] if v["video_id"] == f"wtag/T{number}")
        # that of T1 is measured, the others are declared
        assert video["duration_s"] == pytest.approx((last - first) / 1e7, abs=0.04 if number == 1 else 0)
        for start, end, text in lines_of(folder / STEPS):
            if text in ("Start", "Done"):
                rejects += 1
            else:
                steps.append((f"wtag/T{number}", text, (int(start) - first) / 1e7, (int(end) - first) / 1e7))
        for name, role in ((USER, "user"), (INSTRUCTOR, "assistant")):
            for start, _, text, *more in lines_of(folder / name):
                labels_of = more[0].replace(",", "|").split("|") if more else []
                turns.append((f"wtag/T{number}", role, (int(start) - first) / 1e7, text, labels_of))
    assert sorted(steps) == sorted(
        (s["session_id"], s["name"], span["start_s"], span["end_s"])
        for s in found["steps"]
        for span in s["spans"]
    )
    assert sorted(turns) == sorted(
        (t["session_id"], t["role"], t["t_s"], t["text"], t["labels"]) for t in found["turns"]
    )
    assert (counts.sessions, counts.missing_videos) == ({"train": 40, "val": 5}, 44)
    assert counts.rejects == {"start or end marker": rejects, "left out by the corpus' authors": 4}
    assert (rejects, counts.notes) == (90, {DEPENDS: 45})
    texts = [t["text"] for t in found["turns"]]
    assert any(text.startswith('"') for text in texts)
    assert any(text.endswith("]") for text in texts)
    assert any(b"\r\n" in (data / f"T{n}" / STEPS).read_bytes() for n in range(1, 9))


def test_the_sample_keeps_its_bytes(sample: tuple[Path, Path, Counts], tmp_path: Path) -> None:
    data, labels, _ = sample
    write(tmp_path / "again", 5, encoded=1)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file()
    )
    assert all((data / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    write(tmp_path / "other", 6)
    assert (tmp_path / "other" / "T1" / STEPS).read_bytes() != (data / "T1" / STEPS).read_bytes()
    prepare("wtag", data, tmp_path / "two", Clock(2.0), workers=2)
    for table in sorted(labels.iterdir()):
        assert (tmp_path / "two" / "wtag" / table.name).read_bytes() == table.read_bytes()


def test_a_sample_has_both_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sessions 44 is too few.*at least 45"):
        write_sample("wtag", tmp_path / "few", sessions=44, seed=5)
    assert not (tmp_path / "few").exists()


def test_levels() -> None:
    assert wtag.LEVELS == ("step",)

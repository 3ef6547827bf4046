"""EgoExoLearn: its layout written by hand, the synthetic corpus, and the real excerpt."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import pytest
from conftest import put, rows_of

from pipeline.prepare import prepare
from pipeline.sample.corpus import write_sample
from pipeline.sample.render import Clip, write_videos
from pipeline.sample.world import make_recordings, part_name
from pipeline.sources import egoexolearn
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects
from schemas.tables import validate_labels

FINE, COARSE = "annotations/fine_annotation_trainval_en.csv", "annotations/coarse_annotations/l1"
META = "annotations/video_meta_downsampled.json"
COLUMNS = "video_uid,annotation_id,subset,view,scene,start_sec,end_sec"
HEADER = f"{COLUMNS},narration_en,narration_en_hand_prompt,narration_en_no_hand_prompt"


def entry(start: Any, end: Any, text: Any, name: str, duration: Any = 90.5) -> dict[str, Any]:
    about = {"start": start, "end": end, "attribute": "3", "duration": duration, "id": name, "type": 0}
    return {**about, "textAttribute_en": text}


def rejects_of(out: Path) -> list[tuple[str, ...]]:
    rows = [tuple(row.values()) for row in rows_of(out / "egoexolearn", "rejects")]
    return sorted((Path(file).name, *rest) for file, *rest in rows)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Below a folder EgoExoLearn: ``aa`` with all annotations, ``bb`` coarse alone, ``cc`` fine alone, ``dd`` of the
    test file, ``ff`` a demonstration."""
    root = tmp_path / "data" / "EgoExoLearn"
    fine = [
        "\ufeff" + HEADER,
        "aa,f9,val,ego,lab,20.5,21.25,The left hand stirs.,{},Stir.",
        'aa,f1,val,ego,lab,2.0,3.0,"The hand opens, then rests.",{},"Open, then rest."',
        "aa,f2,val,ego,lab,2.0,2.5,The right hand holds it.,{},",
        "aa,f11,val,ego,lab,8.0,9.0,Stir, then rest.,{},Stir.",
        "aa,f3,val,ego,lab,5.0,4.0,Stir.,{},Stir.",
        "aa,f4,val,ego,lab,soon,4.0,Stir.,{},Stir.",
        "aa,f5,val,ego,lab,6.0,7.0,,{},",
        'aa,f1,val,ego,lab,2.0,3.0,"The hand opens, then rests.",{},"Open, then rest."',
        "aa,f6,dev,ego,lab,8.0,9.0,Stir.,{},Stir.",
        ",f7,val,ego,lab,8.0,9.0,Stir.,{},Stir.",
        "aa,f8,val,ego,lab,8.0",
        "cc,f10,train,ego,kitchen,1.5,2.5,Cut.,{},",
        "aa,,val,ego,lab,30.0,31.0,Pour.,{},Pour.",
        "aa,x1,val,exo,lab,1.0,2.0,A person stirs.,{},Stir.",
    ]
    put(root, FINE, "\r\n".join(fine))
    test = [COLUMNS, "dd,t1,test,ego,kitchen,3.0,4.0", "dd,t2,test,ego,kitchen,1.0,2.0"]
    put(root, "annotations/fine_annotation_test.csv", "\n".join(test) + "\n")
    aa: list[Any] = [
        entry(20.0, 30, "1. Take a bowl. \n2) Add 2.5 cups\nof water,\n\n3. Stir for\n1.5 minutes.", "c2"),
        entry(2, 25.5, "Wash the pot.", "c1"),
        entry(2.0, 10.0, " 1. Open it.", ""),
        entry(31.0, 30.0, "1. Stir.", "c3"),
        entry(None, 30.0, "1. Stir.", "c4"),
        entry(31.0, 32.0, "1. \n2. ", "c5"),
        entry(31.0, 32.0, None, "c6"),
        entry(2, 25.5, "1. Wash the pot.", "c1"),
        "note",
    ]
    put(root, f"{COARSE}/aa.json", json.dumps(aa))
    put(root, f"{COARSE}/bb.json", json.dumps([entry(1.0, 2.0, "1. Pour.", "c1", duration=None)]))
    for uid in ("dd", "ff"):
        put(root, f"{COARSE}/{uid}.json", json.dumps([entry(1.0, 4.0, "1. Cut.", "c1")]))
    meta: list[Any] = [
        {"video_uid": "aa", "num_frames": 50, "fps": 25, "view": "ego", "scene": "lab", "task": "Dilution"},
        {"video_uid": "bb", "num_frames": 255, "fps": 25, "view": "ego", "scene": "kitchen"},
        {"video_uid": "ff", "num_frames": 255, "fps": 25, "view": "exo", "scene": "kitchen"},
        {"video_uid": "zz", "num_frames": 255, "fps": 0, "view": "exo", "scene": "kitchen"},
        {"fps": 25},
    ]
    put(root, META, json.dumps(meta))
    put(root, "bb.mp4", "no video")
    return root.parent


def plans(labels: Path) -> dict[str, list[tuple[str, str, float, float]]]:
    found: dict[str, list[tuple[str, str, float, float]]] = {}
    for row in rows_of(labels, "steps"):
        name = row["session_id"].removeprefix("egoexolearn/")
        [span] = row["spans"]
        found.setdefault(name, []).append((row["step_id"], row["name"], span["start_s"], span["end_s"]))
    return found


def test_steps_are_the_coarse_entries(corpus: Path, tmp_path: Path) -> None:
    prepare("egoexolearn", corpus, tmp_path, Clock())
    labels = tmp_path / "egoexolearn"
    assert validate_labels(labels) == []
    assert plans(labels) == {
        "aa": [
            ("S1", "Open it.", 2.0, 10.0),
            ("c1", "Wash the pot.", 2.0, 25.5),
            ("c2", "Take a bowl. Add 2.5 cups of water, Stir for 1.5 minutes.", 20.0, 30.0),
        ],
        "bb": [("c1", "Pour.", 1.0, 2.0)],
        "dd": [("c1", "Cut.", 1.0, 4.0)],
    }
    sessions = {row["session_id"].removeprefix("egoexolearn/"): row for row in rows_of(labels, "sessions")}
    assert (sessions["aa"]["split"], sessions["dd"]["split"]) == ("val", "test")
    assert sessions["aa"]["goal"] == "Follow the demonstrated task: Dilution"
    assert sessions["bb"]["goal"] == sessions["dd"]["goal"] == "Follow the demonstrated kitchen task"
    base = corpus / "EgoExoLearn"
    assert [(row["recording_id"], row["duration_s"], row["uri"]) for row in rows_of(labels, "videos")] == [
        ("aa", 90.5, str(base / "videos" / "aa.mp4")),
        ("bb", 10.2, str(base / "bb.mp4")),
        ("dd", 90.5, str(base / "videos" / "dd.mp4")),
    ]
    rows = [row["source_rows"] for row in rows_of(labels, "steps")]
    assert rows[:3] == [[f"{base / COARSE / 'aa.json'}, entry {n}"] for n in (3, 2, 1)]


TRAINVAL, TEST = "fine_annotation_trainval_en.csv", "fine_annotation_test.csv"
BAD = [
    (TRAINVAL, "row 5", "too many columns", "11 of 10"),
    (TRAINVAL, "row 6", "ends before it starts", "5.0 to 4.0"),
    (TRAINVAL, "row 7", "not a time", "soon to 4.0"),
    (TRAINVAL, "row 8", "no narration", "6.0 to 7.0"),
    (TRAINVAL, "row 9", "the same as an earlier one", "f1"),
    (TRAINVAL, "row 10", "unknown subset", "video 'aa', subset 'dev'"),
    (TRAINVAL, "row 11", "no video_uid", "video '', subset 'val'"),
    (TRAINVAL, "row 12", "too few columns", "6 of 10"),
    (TRAINVAL, "row 15", "exo view", "Stir."),
    (TEST, "row 2", "no narration", "3.0 to 4.0"),
    (TEST, "row 3", "no narration", "1.0 to 2.0"),
    ("aa.json", "entry 4", "ends before it starts", "31.0 to 30.0"),
    ("aa.json", "entry 5", "not a time", "None to 30.0"),
    ("aa.json", "entry 6", "no text", "31.0 to 32.0"),
    ("aa.json", "entry 7", "no text", "31.0 to 32.0"),
    ("aa.json", "entry 8", "the same as an earlier one", "c1"),
    ("aa.json", "entry 9", "unknown form", "not a mapping"),
    ("ff.json", "entry 1", "exo view", "Cut."),
    ("video_meta_downsampled.json", "entry 4", "not a duration", "255 frames at 0 fps"),
    ("video_meta_downsampled.json", "entry 5", "no video_uid", "fps"),
]


def test_every_row_that_is_not_used_is_listed(corpus: Path, tmp_path: Path) -> None:
    (corpus / "EgoExoLearn" / "bb.mp4").unlink()
    prepare("egoexolearn", corpus, tmp_path / "step", Clock())
    reason = "not the annotation of level step"
    texts = {2: "Stir.", 3: "Open, then rest.", 4: "The right hand holds it.", 13: "Cut.", 14: "Pour."}
    unused = [(TRAINVAL, f"row {n}", reason, text) for n, text in texts.items()]
    empty = [(TRAINVAL, "egoexolearn/cc", "no steps", ""), ("ff.json", "egoexolearn/ff", "no steps", "")]
    assert rejects_of(tmp_path / "step") == sorted([*BAD, *unused, *empty])

    prepare("egoexolearn", corpus, tmp_path / "substep", Clock(), level="substep")
    reason = "not the annotation of level substep"
    unused = [
        ("aa.json", "entry 1", reason, "Take a bowl. Add 2.5 cups of water, Stir for 1.5 minutes."),
        ("aa.json", "entry 2", reason, "Wash the pot."),
        ("aa.json", "entry 3", reason, "Open it."),
        ("bb.json", "entry 1", reason, "Pour."),
        ("dd.json", "entry 1", reason, "Cut."),
    ]
    empty = [(f"{uid}.json", f"egoexolearn/{uid}", "no steps", "") for uid in ("bb", "dd", "ff")]
    assert rejects_of(tmp_path / "substep") == sorted([*BAD, *unused, *empty])


def test_substeps_are_the_fine_rows(corpus: Path, tmp_path: Path) -> None:
    prepare("egoexolearn", corpus, tmp_path, Clock(), level="substep")
    labels = tmp_path / "egoexolearn"
    assert validate_labels(labels) == []
    assert plans(labels) == {
        "aa": [
            ("f2", "The right hand holds it.", 2.0, 2.5),
            ("f1", "Open, then rest.", 2.0, 3.0),
            ("f9", "Stir.", 20.5, 21.25),
            ("S4", "Pour.", 30.0, 31.0),
        ],
        "cc": [("f10", "Cut.", 1.5, 2.5)],
    }
    assert [row["split"] for row in rows_of(labels, "sessions")] == ["val", "train"]
    assert [row["duration_s"] for row in rows_of(labels, "videos")] == [90.5, None]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            FINE,
            HEADER.replace("subset", "split"),
            r"trainval_en\.csv has no column 'subset'.*fetch",
        ),
        (
            "annotations/fine_annotation_more.csv",
            f"{COLUMNS}\naa,f0,test,exo,lab,1.0,2.0",
            r"'aa' is in 'test' by .*more\.csv, row 2 and in 'val' by .*trainval_en\.csv, row 2; give",
        ),
        (f"{COARSE}/aa.json", '[{"start": 1.0', r"aa\.json is not whole JSON"),
    ],
)
def test_what_cannot_be_read_is_named(
    corpus: Path, tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    put(corpus / "EgoExoLearn", name, text)
    with pytest.raises(UserError, match=sentence):
        prepare("egoexolearn", corpus, tmp_path / "labels", Clock())


def test_nothing_but_demonstrations(tmp_path: Path) -> None:
    (tmp_path / "exo").mkdir()
    with pytest.raises(UserError, match=r"no egoexolearn annotations.*fine_.*l1.*ask at https://github"):
        prepare("egoexolearn", tmp_path / "exo", tmp_path / "labels", Clock())
    put(tmp_path / "exo", FINE, f"{HEADER}\nee,x1,train,exo,lab,1.0,2.0,A person stirs.,{{}},Stir.\n")
    with pytest.raises(UserError, match=r"gave no session.*exo view \(1\)"):
        prepare("egoexolearn", tmp_path / "exo", tmp_path / "labels", Clock())


def test_a_video_that_only_dialogues_know(corpus: Path) -> None:
    put(corpus, "EgoExoLearn/videos/gg.mp4", "no video")
    units = egoexolearn.units(corpus, "step", None, ("gg", "hh", "g" * 400, "../gg"), Rejects())
    assert [unit.uid for unit in units] == ["aa", "bb", "cc", "dd", "ff", "gg"]


# ---- the synthetic corpus; only a video that a test looks at is encoded


def write(out: Path, monkeypatch: pytest.MonkeyPatch, encoded: int = 0) -> list[Clip]:
    """A corpus of 18 sessions with so many of its videos; returned are all that it asks for."""
    asked: list[Clip] = []

    def some(clips: Sequence[Clip], on_video: Callable[[], None]) -> None:
        asked.extend(clips)
        write_videos(clips[:encoded], on_video)

    monkeypatch.setattr("pipeline.sample.corpus.write_videos", some)
    write_sample("egoexolearn", out, 18, seed=4)
    return asked


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_sample_tells_what_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sample"
    clips = write(out, monkeypatch, encoded=1)
    meta = {row["video_uid"]: row for row in json.loads((out / META).read_text())}
    with av.open(str(clips[0].path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        assert container.streams.video[0].average_rate == 25
    assert (meta[clips[0].path.stem]["num_frames"], meta[clips[0].path.stem]["fps"]) == (frames, 25)
    trainval, test = read_csv(out / FINE), read_csv(out / "annotations" / TEST)
    assert "narration_en" not in test[0]
    assert {row["view"] for row in trainval} == {"ego", "exo"}
    assert [row["video_uid"] for row in test] != sorted(row["video_uid"] for row in test)
    for clip, recording in zip(clips, make_recordings(18, 4, most_episodes=1), strict=True):
        uid, steps = clip.path.stem, recording.episodes[0].steps
        assert clip.path == out / "videos" / f"{uid}.mp4"
        coarse = json.loads((out / COARSE / f"{uid}.json").read_text())
        assert [(row["start"], row["end"]) for row in coarse] == [(s.start / 30, s.end / 30) for s in steps]
        for row, step in zip(coarse, steps, strict=True):
            assert row["textAttribute_en"].count(part_name(step.part)) == 2
        mine = [row for row in trainval + test if row["video_uid"] == uid]
        assert {(row["subset"], row["view"]) for row in mine} == {(recording.split, "ego")}
        starts, ends = ({float(row[key]) for row in mine} for key in ("start_sec", "end_sec"))
        assert starts > {step.start / 30 for step in steps}
        assert ends > {step.end / 30 for step in steps}


def test_each_row_of_the_sample_is_a_step_or_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sample"
    write(out, monkeypatch)
    counts = prepare("egoexolearn", out, tmp_path, Clock(), level="substep")
    labels = tmp_path / "egoexolearn"
    assert validate_labels(labels) == []
    assert set(counts.sessions) == {"train", "val"}  # the rows of the test file have no narration
    rows = read_csv(out / FINE)
    used: dict[str, list[tuple[str, str, float, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["video_uid"], float(row["start_sec"]))):
        step = (row["annotation_id"], row["narration_en_no_hand_prompt"])
        times = (float(row["start_sec"]), float(row["end_sec"]))
        if row["view"] == "ego":
            used.setdefault(row["video_uid"], []).append((*step, *times))
    assert plans(labels) == used
    reasons = Counter(row["reason"] for row in rows_of(labels, "rejects"))
    coarse = [entry for path in (out / COARSE).iterdir() for entry in json.loads(path.read_text())]
    assert reasons == {
        "exo view": sum(row["view"] == "exo" for row in rows),
        "no narration": len(read_csv(out / "annotations" / TEST)),
        "not the annotation of level substep": len(coarse),
        "no steps": 18 - len(used),
    }


def test_the_sample_and_its_tables_are_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digests(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    for name in ("first", "second"):
        write(tmp_path / name, monkeypatch)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    for name, workers in (("one", 1), ("two", 2)):
        prepare("egoexolearn", tmp_path / "first", tmp_path / name, Clock(), workers=workers)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


# ---- the real excerpt, where it lies beside the repository: read in place

EXCERPT = Path(__file__).parents[2] / "shared" / "samples" / "egoexolearn"


@pytest.mark.parametrize("root", [path for path in (EXCERPT,) if path.is_dir()])
def test_the_excerpt(root: Path, tmp_path: Path) -> None:
    prepare("egoexolearn", root, tmp_path, Clock())
    labels = tmp_path / "egoexolearn"
    assert validate_labels(labels) == []
    found = plans(labels)
    paths = sorted((root / "EgoExoLearn" / COARSE).glob("*.json"))
    assert list(found) == [path.stem for path in paths]
    for path in paths:
        entries = sorted(json.loads(path.read_text()), key=lambda row: (row["start"], row["end"]))
        for (step_id, name, *span), row in zip(found[path.stem], entries, strict=True):
            assert (step_id, *span) == (row["id"], row["start"], row["end"])
            words = [word for word in row["textAttribute_en"].split() if not word.rstrip(".").isdigit()]
            assert name.split() == words
    durations = {path.stem: json.loads(path.read_text())[0]["duration"] for path in paths}
    assert {row["recording_id"]: row["duration_s"] for row in rows_of(labels, "videos")} == durations
    fine = read_csv(root / "EgoExoLearn" / "annotations" / TEST)
    reasons = Counter(row["reason"] for row in rows_of(labels, "rejects"))
    assert reasons == {"no narration": len(fine), "no steps": len({row["video_uid"] for row in fine})}

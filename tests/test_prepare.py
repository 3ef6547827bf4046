"""From annotation files to label tables: Assembly101's layout written by hand, and the real excerpts."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_manifests import load_manifest
from pipeline.dialogs import read_dialogs, template_dialog
from pipeline.prepare import prepare
from pipeline.sources import assembly101
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects, Session
from schemas.shards import is_safe_key
from schemas.states import Step
from schemas.tables import TABLES, read_table, validate_labels

COARSE = "annotations/coarse-annotations/coarse_labels"
SPLITS = "annotations/coarse-annotations/coarse_splits"
FINE = "annotations/fine-grained-annotations"
MISTAKES = "annotations/assembly101-mistake-detection/annots"
HEADER = (
    "id,video,start_frame,end_frame,action_id,verb_id,noun_id,action_cls,verb_cls,noun_cls,"
    "toy_id,toy_name,is_shared,is_RGB"
)
HEAD_CAMERA = "HMC_21110305_mono10bit"


def put(root: Path, name: str, text: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fine_row(number: int, video: str, start: str, end: str, action: str) -> str:
    return f"{number},{video},{start},{end},1,2,3,{action},a,b,c01,fire_truck,0,1"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four recordings: all annotations; mistakes and fine rows; fine rows alone; labels in no split."""
    root = tmp_path / "assembly101"
    labels = (
        "000000300\t000000600\tattach wheel\r\n"
        "000000600\t000000900\tattach roof\r\n"
        "\r\n"
        "12\tsoon\tattach x\r\n"
        '000000900\t000001200\t"attach wheel"\r\n'
        "900\t800\tattach y\r\n"
        "5\r\n"
        "1500\t1500\tinspect toy"
    )
    put(root, f"{COARSE}/assembly_one.txt", b"\xef\xbb\xbf" + labels.encode())
    put(root, f"{COARSE}/disassembly_one.txt", "2100\t2400\tdetach wheel\n")
    put(root, f"{COARSE}/assembly_four.txt", "30\t60\tattach wheel\n60\t90\tattach roof\n")
    put(root, f"{COARSE}/notes.txt", "not labels\n")
    put(root, f"{SPLITS}/train_coarse_assembly.txt", "assembly_one.txt\tshared\tc01\tdump_truck\r\n")
    put(root, f"{SPLITS}/train_coarse_disassembly.txt", "disassembly_one.txt\tshared\tc01\tdump_truck\n\n")
    put(root, f"{SPLITS}/val_coarse_assembly.txt", "assembly_five.txt\tshared\tc01\tsuv\n")
    put(
        root, f"{MISTAKES}/one.csv", '600,750,attach,roof,body,mistake,"wrong, upside down"\r\n750,900,attach'
    )
    rows = [
        "300,600,attach,wheel,chassis,correct,",
        "600,660,detach,wheel,chassis,mistake,shouldn't have happened",
        "660,690,attach,wheel,chassis,correction,",
        "690,900,detach,wheel,chassis,correct,",
        "900,990,attach,wheel,chassis,correct,",
        "990,999,attach,wheel,chassis,perhaps,",
        '999,1002,attach,"wheel,chassis,correct,',
        "1002,1005,attach,,chassis,correct,",
    ]
    put(root, f"{MISTAKES}/two.csv", "\r\n".join(rows))
    fine = [
        HEADER,
        fine_row(1, "one/C10095_rgb.mp4", "000000300", "000000330", "pick up wheel"),
        fine_row(2, "two/C10095_rgb.mp4", "300", "330", "pick up wheel"),
        fine_row(3, "two/C10115_rgb.mp4", "300", "330", "pick up wheel"),
    ]
    put(root, f"{FINE}/validation.csv", "\n".join(fine) + "\n")
    fine = [
        "\ufeff" + HEADER,
        fine_row(4, "three", "000000090", "000000120", "screw wheel"),
        fine_row(5, "three", "000000060", "000000090", "pick up wheel"),
        fine_row(6, "three", "000000120", "000000150", "pick up wheel"),
        "7,three,1,2",
        fine_row(8, "three", "inf", "2", "pick up wheel"),
    ]
    put(root, f"{FINE}/test.csv", "\r\n".join(fine))
    put(root, f"{FINE}/actions.csv", "id,action_id\n1,2\n")
    return root


def read_all(root: Path, rejects: Rejects | None = None, **options: Any) -> dict[str, Session]:
    sessions = list(assembly101.read(root, {}, rejects or Rejects(), **options))
    assert all(is_safe_key(session.session_id) for session in sessions)
    return {session.session_id.removeprefix("assembly101/"): session for session in sessions}


def plan(session: Session) -> dict[str, list[tuple[float, float]]]:
    assert [step.step_id for step in session.steps] == [f"S{n + 1}" for n in range(len(session.steps))]
    return {step.name: list(step.spans) for step in session.steps}


def test_sessions_worked_by_hand(corpus: Path) -> None:
    sessions = read_all(corpus)
    assert list(sessions) == [
        f"assembly_one__{HEAD_CAMERA}",
        f"disassembly_one__{HEAD_CAMERA}",
        f"assembly_three__{HEAD_CAMERA}",
        f"assembly_two__{HEAD_CAMERA}",
    ]
    one, apart, three, two = sessions.values()
    assert plan(one) == {
        "attach wheel": [(10.0, 20.0), (30.0, 40.0)],
        "attach roof": [(20.0, 30.0)],
        "inspect toy": [(50.0, 50.0)],
    }
    assert (one.split, one.goal, one.mistakes) == ("train", "Assemble a toy dump truck", ((20.0, 25.0),))
    assert (one.start_s, one.end_s) == (7.0, 52.0)  # the user speaks a second before the first step
    assert (one.video.video_id, one.video.recording_id) == (f"assembly101/one/{HEAD_CAMERA}", "one")
    assert one.video.uri == str(corpus / "videos" / "one" / f"{HEAD_CAMERA}.mp4")
    assert (one.video.rotation_deg, one.video.duration_s) == (90, None)
    assert plan(apart) == {"detach wheel": [(70.0, 80.0)]}
    assert (apart.goal, apart.mistakes, apart.video) == ("Disassemble a toy dump truck", None, one.video)
    assert plan(two) == {
        "attach wheel to chassis": [(10.0, 20.0), (30.0, 33.0)],
        "detach wheel from chassis": [(23.0, 30.0)],
    }
    assert (two.split, two.goal, two.mistakes) == ("val", "Assemble a toy fire truck", ((20.0, 22.0),))
    assert plan(three) == {"pick up wheel": [(2.0, 3.0), (4.0, 5.0)], "screw wheel": [(3.0, 4.0)]}
    assert (three.split, three.mistakes, three.start_s, three.end_s) == ("test", None, 0.0, 7.0)


def test_every_row_that_is_not_used_is_listed(corpus: Path) -> None:
    rejects = Rejects()
    read_all(corpus, rejects)
    assert sorted((Path(r.source_file).name, r.locator, r.reason, r.detail) for r in rejects.rows) == [
        ("assembly_four.txt", "recording four", "no split", "2 rows"),
        ("assembly_one.txt", "row 4", "not a frame number", "12 to soon"),
        ("assembly_one.txt", "row 6", "ends before it starts", "900 to 800"),
        ("assembly_one.txt", "row 7", "too few columns", "1 of 3"),
        ("notes.txt", "file name", "unknown file", "not {assembly|disassembly}_<sequence>.txt"),
        ("one.csv", "row 2", "too few columns", "3 of 6"),
        ("test.csv", "row 5", "too few columns", "4 of 14"),
        ("test.csv", "row 6", "not a frame number", "inf to 2"),
        ("two.csv", "row 3", "correction row", "correction: attach wheel to chassis"),
        ("two.csv", "row 6", "unknown label", "perhaps: attach wheel to chassis"),
        ("two.csv", "row 7", "unreadable row", "unexpected end of data"),
        ("two.csv", "row 8", "no action", "1002 to 1005"),
        ("val_coarse_assembly.txt", "recording five", "no annotation", ""),
        ("validation.csv", "recording one", "steps are read from elsewhere", "1 rows"),
        ("validation.csv", "recording two", "steps are read from elsewhere", "2 rows"),
    ]


def test_substeps_come_from_the_fine_rows(corpus: Path) -> None:
    rows = [HEADER, *(fine_row(n, "one", f"{n}", f"{n + 9}", "turn toy") for n in (300, 2099, 2100, 2300))]
    put(corpus, f"{FINE}/validation.csv", "\n".join(rows))
    rejects = Rejects()
    sessions = read_all(corpus, rejects, level="substep")
    one, apart, three = sessions.values()
    assert plan(one) == {"turn toy": [(10.0, 309 / 30), (2099 / 30, 2108 / 30)]}
    assert plan(apart) == {"turn toy": [(70.0, 2109 / 30), (2300 / 30, 2309 / 30)]}
    assert three.mistakes is None
    unused = [
        (Path(r.source_file).name, r.reason, r.detail) for r in rejects.rows if "recording" in r.locator
    ]
    assert ("assembly_one.txt", "steps are read from elsewhere", "4 rows") in unused
    assert ("two.csv", "no split", "4 rows") in unused


def test_one_view_a_recording(corpus: Path) -> None:
    assert [view.name for view in load_manifest("assembly101").views][:5] == [
        *(HEAD_CAMERA, "HMC_21179183_mono10bit", "HMC_84355350_mono10bit", "HMC_84358933_mono10bit"),
        "C10095_rgb",
    ]
    put(corpus, "videos/one/C10404_rgb.mp4", "no video")
    put(corpus, "videos/one/C10118_rgb.mp4", "no video")
    rejects = Rejects()
    video = read_all(corpus, rejects)["assembly_one__C10118_rgb"].video
    assert (video.rotation_deg, video.duration_s) == (0, None)
    opened = [r.source_file for r in rejects.rows if r.reason == "video cannot be opened"]
    assert opened == [video.uri]  # once, though two sessions use it
    assert set(read_all(corpus, view="C10095_rgb")) >= {
        "assembly_one__C10095_rgb",
        "assembly_two__C10095_rgb",
    }
    with pytest.raises(UserError, match=r"unknown view 'front'.*C10404_rgb"):
        read_all(corpus, view="front")
    with pytest.raises(UserError, match=r"unknown level 'action'.*substep"):
        read_all(corpus, level="action")


def generated(
    sequence: str, activity: str = "assembly", view: str = "C10095_rgb", **more: Any
) -> dict[str, Any]:
    words = [
        {"role": "system", "content": "Be helpful."},
        {"role": "user", "time": 9.0, "content": "Hello."},
        {
            "role": "assistant",
            "time": 10.2,
            "content": "Take it.",
            "labels": "initiative|instruction,feedback",
        },
        {"role": "assistant", "time": 10.4, "content": "Look.", "progress": "The wheel is on."},
    ]
    talk = {"user_type": "no_talk", "conversation": words, "auto_quality_eval": {"final_score": 9.5}}
    uid = f"{activity}_{sequence}__{view}"
    return {
        "video_uid": uid,
        "inferred_goal": "Build it",
        "inferred_knowledge": "1. Do",
        "conversations": [talk],
        **more,
    }


DST = [{"type": "step", "id": "A", "start_ts": 10.0, "end_ts": 12.0, "name": "put it on"}]


def test_dialogs_become_sessions(corpus: Path, tmp_path: Path) -> None:
    one, unknown = generated("one"), generated("one", view="front")
    one["conversations"] *= 2
    folder = corpus / "dialogs"
    put(folder, "generated_train.json", json.dumps([one, generated("nine"), unknown, {"what": 1}, 5]))
    bare = {"video_uid": "assembly_nine__C10095_rgb", "dst": "step\tA\t10\t12\tput it on"}
    lines = [
        json.dumps(bare),
        json.dumps({**bare, "video_uid": "assembly_ten__C10095_rgb"}),
        '{"video_uid": "as',
    ]
    put(folder, "dst.jsonl", "\n".join(lines))
    counts = prepare("assembly101", corpus, tmp_path / "labels", Clock())
    labels = tmp_path / "labels" / "assembly101"
    assert validate_labels(labels) == []
    sessions = {row["session_id"]: row for row in read_table(labels, "sessions").to_pylist()}
    assert list(sessions) == [
        "assembly101/assembly_nine__C10095_rgb/no_talk_0",
        "assembly101/assembly_one__C10095_rgb/no_talk_0",
        "assembly101/assembly_one__C10095_rgb/no_talk_1",
        f"assembly101/disassembly_one__{HEAD_CAMERA}",
        f"assembly101/assembly_three__{HEAD_CAMERA}",
        f"assembly101/assembly_two__{HEAD_CAMERA}",
    ]
    nine = sessions["assembly101/assembly_nine__C10095_rgb/no_talk_0"]
    assert (nine["split"], nine["num_steps"], nine["goal"], nine["knowledge"]) == (
        "train",
        1,
        "Build it",
        "1. Do",
    )
    assert (nine["dialog_origin"], nine["user_type"], nine["quality"]) == ("generated", "no_talk", 9.5)
    assert (nine["first_tick"], nine["num_ticks"]) == (14, 15)  # from 9 - 2 s to 12 + 2 s
    turns = [t for t in read_table(labels, "turns").to_pylist() if t["session_id"] == nine["session_id"]]
    assert [(t["tick"], t["role"], t["text"], t["labels"], t["progress"]) for t in turns] == [
        (18, "user", "Hello.", [], None),
        (21, "assistant", "Take it.", ["initiative", "instruction", "feedback"], None),
        (21, "assistant", "Look.", [], "The wheel is on."),
    ]
    frames = pl.read_parquet(labels / "frames.parquet").filter(pl.col("session_id") == nine["session_id"])
    assert frames.filter("speak").select("tick", "response").rows() == [(21, "Take it. Look.")]
    assert frames.filter("dst_update").select("tick", "transitions").rows() == [(20, [1]), (24, [2])]
    rejects = {(Path(r["source_file"]).name, r["locator"], r["reason"]) for r in rows_of(labels, "rejects")}
    assert rejects >= {
        ("dst.jsonl", "row 2", "no dialogue for this DST"),
        ("dst.jsonl", "row 3", "not JSON"),
        ("generated_train.json", "record 4", "unknown form"),
        ("generated_train.json", "record 5", "unknown form"),
        ("generated_train.json", "assembly_one__front", "unknown view"),
    }
    templates = [row for row in rows_of(labels, "turns") if "/no_talk" not in row["session_id"]]
    joined = len([t for t in templates if t["role"] == "assistant"]) - len(
        {(t["session_id"], t["tick"]) for t in templates if t["role"] == "assistant"}
    )
    assert counts.joined_turns == 3 + joined
    assert counts.sessions == {"train": 4, "val": 1, "test": 1}
    assert counts.rows == {name: len(rows_of(labels, name)) for name in TABLES}
    assert counts.rejects == Counter(row["reason"] for row in rows_of(labels, "rejects"))


def rows_of(labels: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(labels, name).to_pylist()
    return rows


def test_a_dialog_needs_a_split_and_steps(corpus: Path, tmp_path: Path) -> None:
    path = put(tmp_path, "talk.json", json.dumps([generated("nine", dst=DST), generated("one", "assembly")]))
    other = put(tmp_path, "more_val.json", json.dumps(generated("ten")))
    rejects = Rejects()
    dialogs = {**read_dialogs(path, rejects), **read_dialogs(other, rejects)}
    assert rejects.rows == []
    list(assembly101.read(corpus, dialogs, rejects))
    refused = {(Path(r.source_file).name, r.locator, r.reason) for r in rejects.rows}
    assert ("talk.json", "assembly101/assembly_nine__C10095_rgb/no_talk_0", "no split") in refused
    assert ("more_val.json", "assembly101/assembly_ten__C10095_rgb/no_talk_0", "no steps") in refused


def test_forms_of_dialogs(tmp_path: Path) -> None:
    prepared = {
        "video_uid": "v",
        "conversation": [
            {"role": "frames", "start": 0, "end": 3},
            {
                "role": "assistant",
                "time": "1.5",
                "content": " Hi ",
                "labels": ["a", "b"],
                "progress": "none yet",
            },
        ],
        "metadata": {"user_type": "talk_more", "task_goal": "Tea", "knowledge": "Boil.", "quality": 8.0},
    }
    training = {
        "video_uid": "v",
        "inferred_goal": "Tea",
        "conversation": [
            {"role": "DST_UPDATE", "time": 1.0, "content": [{"id": "S1", "transition": "start"}]},
            {"role": "user", "time": 2.0, "content": "Hi"},
            {"role": "robot", "time": 2.0, "content": "Hi"},
            {"role": "user", "content": "Hi"},
            {"role": "user", "time": 2.0, "content": " "},
            {"role": "user", "time": 2.0, "content": [{}]},
            "Hi",
        ],
        "dst": DST,
        "quality": 3.5,
    }
    records = [
        prepared,
        training,
        {"video_uid": "v", "conversation": []},
        {"video_uid": "v", "conversation": training["conversation"], "dst": [{"id": "S1", "start_ts": 1}]},
        {"video_uid": "v", "conversations": [{"user_type": "x"}]},
    ]
    path = put(tmp_path, "dst_training.jsonl", "\n".join(map(json.dumps, records)))
    rejects = Rejects()
    first, second = read_dialogs(path, rejects)["v"]
    assert (first.goal, first.knowledge, first.user_type, first.quality) == ("Tea", "Boil.", "talk_more", 8.0)
    assert (first.steps, first.split) == (None, None)
    [turn] = first.turns
    assert (turn.t_s, turn.text, turn.labels, turn.progress) == (1.5, "Hi", ("a", "b"), "none yet")
    assert second.steps == (Step("A", "put it on", ((10.0, 12.0),)),)
    assert (second.quality, second.user_type, len(second.turns)) == (3.5, None, 1)
    problems = [(r.locator, r.reason) for r in rejects.rows]
    assert problems[:5] == [
        ("row 2, turn 3", "unknown role"),
        ("row 2, turn 4", "no time"),
        ("row 2, turn 5", "empty content"),
        ("row 2, turn 6", "empty content"),
        ("row 2, turn 7", "unknown form"),
    ]
    assert ("row 3", "no turns") in problems
    assert ("row 4", "unreadable DST") in problems
    assert problems[-1] == ("row 5, conversation 1", "unknown form")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=6), st.text(max_size=5))
def test_the_template_says_each_thing_once(spans: list[tuple[int, int]], seed_text: str) -> None:
    steps = [Step(f"S{n}", f"step {n}.", ((float(a), float(a + b)),)) for n, (a, b) in enumerate(spans)]
    turns = template_dialog("make {tea}", steps, [(3.0, 4.0)], seed_text)
    if not steps:
        assert turns == ()
        return
    assert turns == template_dialog("make {tea}", steps, [(3.0, 4.0)], seed_text)
    assert [turn.t_s for turn in turns] == sorted(turn.t_s for turn in turns)
    said = Counter((turn.labels[-1], turn.t_s) for turn in turns)
    expected = Counter([("instruction", s.start) for s in steps] + [("feedback", s.end) for s in steps])
    goal = ("goal", max(0.0, min(a for a, _ in spans) - 1.0))
    assert said == expected + Counter([goal, ("correction", 3.0), ("closing", max(s.end for s in steps))])


def test_events_after_the_end_of_the_video_are_rejects(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "videos" / "one" / "C10095_rgb.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        for _ in range(62):  # 31 s
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    prepare("assembly101", corpus, tmp_path / "labels", Clock())
    labels = tmp_path / "labels" / "assembly101"
    assert validate_labels(labels) == []
    video = rows_of(labels, "videos")[0]
    assert (video["duration_s"], video["last_tick_needed"]) == (31.0, 61)
    rejects = [(r["locator"].removeprefix("assembly101/"), r["reason"]) for r in rows_of(labels, "rejects")]
    late = "assembly_one__C10095_rgb"
    assert [pair for pair in rejects if "step" in pair[0]] == [
        (f"{late} step S1 end", "outside the video"),
        (f"{late} step S3 start", "outside the video"),
        (f"{late} step S3 end", "outside the video"),
    ]
    assert ("disassembly_one__C10095_rgb", "no ticks") in rejects
    frames = pl.read_parquet(labels / "frames.parquet").filter(pl.col("session_id").str.ends_with(late))
    assert frames["dst_state"].to_list()[-1] == [1, 2, 0]
    assert frames.filter("mistake")["tick"].to_list() == list(range(40, 50))


def test_the_same_input_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        prepare("assembly101", corpus, tmp_path / name, Clock())
        files = sorted((tmp_path / name / "assembly101").iterdir())
        assert [file.name for file in files] == sorted(f"{table}.parquet" for table in TABLES)
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def spoil_dialogs(root: Path) -> None:
    text = json.dumps([generated("one")])
    put(root, "dialogs/generated_train.json", text[: len(text) // 2])


def spoil_splits(root: Path) -> None:
    put(root, f"{SPLITS}/test_coarse_disassembly.txt", "disassembly_one.txt\tshared\n")


def spoil_columns(root: Path) -> None:
    put(root, f"{FINE}/train.csv", HEADER.replace("action_cls", "action") + "\n")


def spoil_ids(root: Path) -> None:
    for sequence in ("six.a", "six-a"):
        put(root, f"{MISTAKES}/{sequence}.csv", "30,60,attach,wheel,chassis,correct,\n")
    put(root, f"{SPLITS}/val_coarse_assembly.txt", "assembly_six.a.txt\nassembly_six-a.txt\n")


def spoil_hints(root: Path) -> None:
    for split in ("train", "val"):
        put(root, f"dialogs/generated_{split}.json", json.dumps(generated("nine", dst=DST)))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_dialogs, r"generated_train\.json is not whole JSON"),
        (spoil_splits, r"recording 'one' is in 'test' by .*test_coarse.* and in 'train' by .*train_coarse"),
        (spoil_columns, r"train\.csv has no column 'action_cls'"),
        (spoil_ids, r"six\.a/.*six-a/.*both have the id 'assembly101/six-a/"),
        (spoil_hints, r"recording 'nine' is in 'train' and in 'val'"),
    ],
)
def test_an_error_leaves_the_old_tables(corpus: Path, tmp_path: Path, spoil: Any, sentence: str) -> None:
    out = tmp_path / "labels"
    prepare("assembly101", corpus, out, Clock())
    before = {file: file.read_bytes() for file in (out / "assembly101").iterdir()}
    spoil(corpus)
    with pytest.raises(UserError, match=sentence):
        prepare("assembly101", corpus, out, Clock())
    assert {file: file.read_bytes() for file in (out / "assembly101").iterdir()} == before
    assert [path.name for path in out.iterdir()] == ["assembly101"]


def test_two_sessions_with_one_id(corpus: Path, tmp_path: Path) -> None:
    first, second = generated("one"), generated("one")
    first["conversations"][0]["user_type"], second["conversations"][0]["user_type"] = "a b", "a.b"
    path = put(tmp_path, "talk.json", json.dumps([first, second]))
    with pytest.raises(
        UserError, match="two sessions have the id 'assembly101/assembly_one__C10095_rgb/a-b_0'"
    ):
        prepare("assembly101", corpus, tmp_path / "labels", Clock(), dialogs=path)
    assert list((tmp_path / "labels").iterdir()) == []


def test_what_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    with pytest.raises(UserError, match=r"nowhere is not a folder.*dst sample --source assembly101 --out"):
        prepare("assembly101", tmp_path / "nowhere", out, Clock())
    with pytest.raises(UserError, match="unknown source 'assembly'; known: assembly101"):
        prepare("assembly", corpus, out, Clock())
    with pytest.raises(UserError, match=r"talk is not there.*--dialogs"):
        prepare("assembly101", corpus, out, Clock(), dialogs=tmp_path / "talk")
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"coarse_labels.*fine-grained.*annots.*ask at https"):
        prepare("assembly101", tmp_path / "empty", out, Clock())
    put(tmp_path / "little", f"{COARSE}/assembly_one.txt", "1\t2\tattach wheel\n")
    with pytest.raises(UserError, match=r"gave no session.*no split \(1\)"):
        prepare("assembly101", tmp_path / "little", out, Clock())
    assert list(out.iterdir()) == []


# The real excerpts, where they lie beside the repository: read in place, with a second reading of our own.

EXCERPTS = Path(__file__).parents[2] / "shared" / "samples"
CORPORA = [path for path in (EXCERPTS / "assembly101",) if path.is_dir()]


@pytest.mark.parametrize("root", CORPORA)
def test_the_excerpts_at_level_step(root: Path, tmp_path: Path) -> None:
    prepare("assembly101", root, tmp_path, Clock())
    labels = tmp_path / "assembly101"
    assert validate_labels(labels) == []
    sessions = {row["session_id"]: row for row in rows_of(labels, "sessions")}
    corrections = 0
    for path in (root / MISTAKES).glob("*.csv"):
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        corrections += sum(row[5] == "correction" for row in rows)
        session = sessions.pop(f"assembly101/assembly_{path.stem}__{HEAD_CAMERA}")
        spans: dict[str, list[tuple[int, int]]] = {}
        for row in sorted(rows, key=lambda row: int(row[0])):
            if row[5] == "correct":
                preposition = {"attach": "to", "detach": "from"}[row[2]]
                name = f"{row[2]} {row[3]} {preposition} {row[4]}"
                spans.setdefault(name, []).append((int(row[0]), int(row[1])))
        steps = [row for row in rows_of(labels, "steps") if row["session_id"] == session["session_id"]]
        assert [row["name"] for row in steps] == list(spans)
        for row in steps:
            frames = [(round(s["start_s"] * 30), round(s["end_s"] * 30)) for s in row["spans"]]
            assert frames == spans[row["name"]]
        ticks = pl.read_parquet(labels / "frames.parquet").filter(
            pl.col("session_id") == session["session_id"]
        )
        wrong = [(int(row[0]), int(row[1])) for row in rows if row[5] == "mistake"]
        for tick, mistake in ticks.select("tick", "mistake").rows():
            assert mistake == any(start <= tick * 15 < end for start, end in wrong)
    assert sessions == {}
    with (root / FINE / "validation.csv").open(encoding="utf-8-sig", newline="") as file:
        fine = Counter(row["video"] for row in csv.DictReader(file))
    reasons = Counter(row["reason"] for row in rows_of(labels, "rejects"))
    assert reasons == {"correction row": corrections, "steps are read from elsewhere": len(fine)}
    unused = [row["detail"] for row in rows_of(labels, "rejects") if row["reason"].startswith("steps")]
    assert sorted(unused) == sorted(f"{count} rows" for count in fine.values())


@pytest.mark.parametrize("root", CORPORA)
def test_the_excerpts_at_level_substep(root: Path, tmp_path: Path) -> None:
    prepare("assembly101", root, tmp_path, Clock(), level="substep")
    labels = tmp_path / "assembly101"
    assert validate_labels(labels) == []
    found = set()
    for row in rows_of(labels, "steps"):
        sequence = row["session_id"].removeprefix("assembly101/assembly_").partition("__")[0]
        for span in row["spans"]:
            found.add((sequence, round(span["start_s"] * 30), round(span["end_s"] * 30), row["name"]))
    with (root / FINE / "validation.csv").open(encoding="utf-8-sig", newline="") as file:
        expected = {
            (row["video"], int(row["start_frame"]), int(row["end_frame"]), row["action_cls"])
            for row in csv.DictReader(file)
        }
    assert found == expected


@pytest.mark.parametrize("root", [path for path in CORPORA if (EXCERPTS / "proassist").is_dir()])
def test_the_excerpts_of_dialogs(root: Path, tmp_path: Path) -> None:
    prepare("assembly101", root, tmp_path, Clock(), dialogs=EXCERPTS / "proassist")
    labels = tmp_path / "assembly101"
    assert validate_labels(labels) == []
    record = json.loads((EXCERPTS / "proassist" / "dst_training_v4.json").read_text())
    session = f"assembly101/{record['video_uid']}/dialog_0"
    turns = [row for row in rows_of(labels, "turns") if row["session_id"] == session]
    spoken = [turn for turn in record["conversation"] if turn["role"] in ("user", "assistant")]
    assert [(row["role"], row["text"], row["t_s"]) for row in turns] == [
        (turn["role"], turn["content"], turn["time"])
        for turn in sorted(spoken, key=lambda turn: turn["time"])
    ]
    steps = [row for row in rows_of(labels, "steps") if row["session_id"] == session]
    assert [(row["step_id"], row["spans"][0]["start_s"], row["spans"][0]["end_s"]) for row in steps] == [
        (entry["id"], entry["start_ts"], entry["end_ts"]) for entry in record["dst"]
    ]

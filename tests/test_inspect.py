"""What label tables hold: counted a second time row by row, and worked out by hand for tables made by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from conftest import rows_of

from pipeline.inspect import read_session, rejects_by_reason, summary, timeline
from pipeline.shards import LabelledSession
from schemas.errors import UserError
from schemas.tables import TABLES, LabelWriter, label_folders, table_of, validate_labels

STATES = {2: [0, 0], 3: [1, 0], 4: [1, 0], 5: [2, 0], 6: [2, 2], 7: [2, 2]}
SAID = {3: "Open it.", 5: "Good."}


def session_row(name: str, video: str, split: str, first: int, ticks: int, **more: Any) -> dict[str, Any]:
    source = name.split("/")[0]
    row = {"session_id": name, "video_id": video, "source": source, "split": split, "first_tick": first}
    row |= {"goal": "Use\nthe box", "knowledge": None, "num_ticks": ticks, "tick_hz": 2.0, "num_steps": 2}
    return row | {"user_type": None, "dialog_origin": "human", "quality": None} | more


def step_row(name: str, step: int, text: str, *spans: tuple[float, float]) -> dict[str, Any]:
    times = [{"start_s": start, "end_s": end} for start, end in spans]
    row = {"session_id": name, "step": step, "step_id": f"S{step + 1}", "name": text, "parent": None}
    return row | {"spans": times, "source_rows": ["x"] * len(spans)}


def turn_row(name: str, turn: int, tick: int, t: float, role: str, text: str) -> dict[str, Any]:
    row = {"session_id": name, "turn": turn, "tick": tick, "t_s": t, "role": role, "text": text}
    return row | {"labels": [], "progress": None, "source_row": None}


def frame_row(name: str, split: str, tick: int, response: str | None, **more: Any) -> dict[str, Any]:
    row = {"session_id": name, "split": split, "tick": tick, "t_s": tick / 2, "speak": response is not None}
    row |= {"response": response, "dst_update": False, "dst_state": [0, 0], "transitions": [0, 0]}
    return row | {"mistake": None} | more


def video_row(video: str, recording: str, last: int) -> dict[str, Any]:
    row = {"video_id": video, "source": video.split("/")[0], "recording_id": recording}
    return row | {"uri": f"/{video}.mp4", "rotation_deg": 90, "duration_s": None, "last_tick_needed": last}


def frames_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TABLES["frames"])


def toy_a() -> list[dict[str, Any]]:
    """Frames of ``toy/a``: step 1 from tick 3 to 5, step 2 within tick 6, mistakes at 5 and at the end."""
    transitions = {3: [1, 0], 5: [2, 0], 6: [0, 3]}
    return [
        frame_row(
            "toy/a",
            "train",
            tick,
            SAID.get(tick),
            dst_update=tick in transitions,
            dst_state=state,
            transitions=transitions.get(tick, [0, 0]),
            mistake=tick in (5, 7),
        )
        for tick, state in STATES.items()
    ]


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora: ``toy`` with train (three sessions on two cameras of one recording) and val, ``alone`` with test."""
    labels = tmp_path_factory.mktemp("hand")
    with LabelWriter(labels / "toy") as writer:
        steps = [
            step_row("toy/a", 0, "open\nit", (1.2, 1.9), (2.1, 2.4)),
            step_row("toy/a", 1, "shut", (2.6, 2.7)),
        ]
        turns = [
            turn_row("toy/a", 0, 2, 0.8, "user", " Help\nme "),
            turn_row("toy/a", 1, 3, 1.1, "assistant", "Open it."),
            turn_row("toy/a", 2, 5, 2.4, "assistant", "Good."),
            turn_row("toy/a", 3, 5, 2.4, "user", "Thanks."),
        ]
        row = session_row("toy/a", "toy/v1", "train", 2, 6, dialog_origin="template")
        writer.add_session(row, "r1", steps, turns, frames_of(toy_a()))
        quiet = [
            frame_row("toy/b", "train", t, None, dst_state=[0] * 5, transitions=[0] * 5) for t in range(4)
        ]
        writer.add_session(
            session_row("toy/b", "toy/v1", "train", 0, 4, num_steps=5), "r1", [], [], frames_of(quiet)
        )
        loud = [frame_row("toy/d", "train", t, "Hm." if t == 9 else None) for t in (8, 9)]
        writer.add_session(session_row("toy/d", "toy/v2", "train", 8, 2), "r1", [], [], frames_of(loud))
        words = [(0, -0.3, "user", "Hello?"), (120, 59.96, "user", "Bye!")]
        turns = [turn_row("toy/c", place, *each) for place, each in enumerate(words)]
        steps = [step_row("toy/c", 0, "never"), step_row("toy/c", 1, "nor this")]
        silent = [frame_row("toy/c", "val", t, None, mistake=False) for t in range(121)]
        writer.add_session(
            session_row("toy/c", "toy/v3", "val", 0, 121), "r3", steps, turns, frames_of(silent)
        )
        writer.add_videos(
            [video_row("toy/v1", "r1", 7), video_row("toy/v2", "r1", 9), video_row("toy/v3", "r3", 120)]
        )
        reasons = ["rare", "often", "often", "also rare", "often"]
        rejects = [
            {"source_file": f"f{number}.csv", "locator": f"row {number}", "reason": reason, "detail": ""}
            for number, reason in enumerate(reasons)
        ]
        writer.add_rejects(table_of("rejects", rejects))
    with LabelWriter(labels / "alone") as writer:
        only = frames_of([frame_row("alone/e", "test", 0, None)])
        writer.add_session(session_row("alone/e", "alone/v", "test", 0, 1), "r9", [], [], only)
        writer.add_videos([video_row("alone/v", "r9", 0)])
        reject = {"source_file": "e", "locator": "row 7", "reason": "rare", "detail": ""}
        writer.add_rejects(table_of("rejects", [reject]))
    assert validate_labels(labels / "toy") == validate_labels(labels / "alone") == []
    return labels


# ---- where tables are


def test_folders_of_labels(hand: Path, tmp_path: Path) -> None:
    shutil.copytree(hand, tmp_path / "labels")
    shutil.copytree(hand / "toy", tmp_path / "labels" / ".toy.tmp")  # what an interrupted writer leaves
    (tmp_path / "labels" / "notes").mkdir()
    assert label_folders(tmp_path / "labels") == [tmp_path / "labels/alone", tmp_path / "labels/toy"]
    assert label_folders(hand / "toy") == [hand / "toy"]
    with pytest.raises(UserError, match=r"notes holds no label tables; run 'dst prepare --source S' first"):
        label_folders(tmp_path / "labels" / "notes")


# ---- counts


def test_summary_worked_by_hand(hand: Path) -> None:
    alone, train, val, everything = summary(hand)
    assert train == {
        "source": "toy",
        "split": "train",
        "videos": 2,
        "recordings": 1,
        "sessions": 3,
        "hours": pytest.approx(6 / 3600),  # 6 + 4 + 2 ticks of half a second
        "video_hours": pytest.approx(9 / 3600),  # ticks 0 to 7 and 0 to 9
        "speaking_share": 3 / 12,
        "speaks_a_minute": pytest.approx(30),
        "updates_a_minute": pytest.approx(30),  # ticks 3, 5 and 6
        "users_a_minute": pytest.approx(20),
        "steps_a_session": 3.0,
        "max_steps": 5,
        "mistake_share": 2 / 6,  # only one session is judged
        "dialog_origin": "human 2, template 1",
    }
    assert (val["split"], val["hours"], val["mistake_share"]) == ("val", pytest.approx(60.5 / 3600), 0.0)
    assert (everything["split"], everything["sessions"], everything["recordings"]) == ("all", 4, 2)
    assert everything["speaking_share"] == 3 / 133
    assert everything["mistake_share"] == 2 / 127
    # A corpus with one split needs no row for all of them.
    assert (alone["source"], alone["split"], alone["mistake_share"]) == ("alone", "test", None)
    assert summary(hand / "alone") == [alone]


def test_summary_counted_row_by_row(labels: Path) -> None:
    folder = labels / "assembly101"
    sessions, videos = (
        rows_of(folder, "sessions"),
        {row["video_id"]: row for row in rows_of(folder, "videos")},
    )
    frames, turns = rows_of(folder, "frames"), rows_of(folder, "turns")
    found = summary(labels)
    assert [row["split"] for row in found] == ["train", "val", "test", "all"]
    for row in found:
        chosen = {each["session_id"]: each for each in sessions if row["split"] in (each["split"], "all")}
        ticks = [each for each in frames if each["session_id"] in chosen]
        users = [each for each in turns if each["session_id"] in chosen and each["role"] == "user"]
        judged = [each["mistake"] for each in ticks if each["mistake"] is not None]
        seen = {each["video_id"] for each in chosen.values()}
        minutes = len(ticks) / 2 / 60
        assert (row["source"], row["sessions"], row["videos"]) == ("assembly101", len(chosen), len(seen))
        assert row["recordings"] == len({videos[video]["recording_id"] for video in seen})
        assert row["hours"] == pytest.approx(minutes / 60)
        length = sum(videos[video]["last_tick_needed"] + 1 for video in seen) / 2
        assert row["video_hours"] == pytest.approx(length / 3600)
        assert row["speaking_share"] == pytest.approx(sum(each["speak"] for each in ticks) / len(ticks))
        assert row["speaks_a_minute"] == pytest.approx(sum(each["speak"] for each in ticks) / minutes)
        assert row["updates_a_minute"] == pytest.approx(sum(each["dst_update"] for each in ticks) / minutes)
        assert row["users_a_minute"] == pytest.approx(len(users) / minutes)
        plans = [each["num_steps"] for each in chosen.values()]
        assert (row["steps_a_session"], row["max_steps"]) == (
            pytest.approx(sum(plans) / len(plans)),
            max(plans),
        )
        assert row["mistake_share"] == pytest.approx(sum(judged) / len(judged))
        assert 0 < len(judged) < len(ticks) or row["split"] == "val"
        assert row["dialog_origin"] == f"generated {len(chosen)}"


def test_rejects_by_reason(hand: Path, labels: Path) -> None:
    assert rejects_by_reason(hand) == [
        {"source": "alone", "reason": "rare", "count": 1, "example": "e, row 7"},
        {"source": "toy", "reason": "often", "count": 3, "example": "f1.csv, row 1"},
        {"source": "toy", "reason": "also rare", "count": 1, "example": "f3.csv, row 3"},
        {"source": "toy", "reason": "rare", "count": 1, "example": "f0.csv, row 0"},
    ]
    rows = rows_of(labels / "assembly101", "rejects")
    found = {row["reason"]: row["count"] for row in rejects_by_reason(labels)}
    assert found == Counter(row["reason"] for row in rows)
    first = {row["reason"]: f"{row['source_file']}, {row['locator']}" for row in reversed(rows)}
    assert {row["reason"]: row["example"] for row in rejects_by_reason(labels)} == first


# ---- one session


def test_a_session_has_its_rows_and_no_others(labels: Path) -> None:
    folder = labels / "assembly101"
    videos = {row["video_id"]: row for row in rows_of(folder, "videos")}
    for row in rows_of(folder, "sessions")[::5]:
        session = read_session(labels, row["session_id"])
        video = videos[row["video_id"]]
        assert session.meta == {**row, "uri": video["uri"], "rotation_deg": video["rotation_deg"]}
        assert session.frames.schema.equals(TABLES["frames"])
        for name, found in (
            ("frames", session.frames.to_pylist()),
            ("steps", session.steps),
            ("turns", session.turns),
        ):
            expected = [each for each in rows_of(folder, name) if each["session_id"] == row["session_id"]]
            assert found == expected
            assert expected


def test_a_session_that_is_not_there(hand: Path) -> None:
    with pytest.raises(UserError, match=r"no session 'toy/cc'; the nearest are toy/c, toy/[abd], toy/[abd]$"):
        read_session(hand, "toy/cc")
    with pytest.raises(UserError, match=r"no session 'zzz'; the nearest are alone/e$"):
        read_session(hand / "alone", "zzz")


def test_timeline_worked_by_hand(hand: Path) -> None:
    assert timeline(read_session(hand, "toy/a")) == [
        "toy/a",
        "  goal    Use the box",
        "  split   train",
        "  video   /toy/v1.mp4",
        "  lasts   00:03.0, 6 ticks at 2 Hz",
        "  steps   2, of which 2 start and 2 complete",
        "  dialog  template, 4 turns",
        "   time    tick  what",
        "00:01.0       2  first tick",
        "00:00.8       2  user: Help me",
        "00:01.2       3  step 1 starts: open it",
        "00:01.1       3  assistant: Open it.",
        "00:02.4       5  user: Thanks.",
        "00:02.4       5  step 1 completes: open it",
        "00:02.5       5  a mistake begins",
        "00:02.4       5  assistant: Good.",
        "00:02.6       6  step 2 starts and completes: shut",
        "00:03.0       6  the mistake ends",
        "00:03.5       7  a mistake begins",
        "00:03.5       7  last tick",
    ]


def test_timeline_of_a_plan_that_never_starts(hand: Path) -> None:
    assert timeline(read_session(hand, "toy/c"))[4:] == [
        "  lasts   01:00.5, 121 ticks at 2 Hz",
        "  steps   2, of which 0 start and 0 complete",
        "  dialog  human, 2 turns",
        "   time    tick  what",
        "00:00.0       0  first tick",
        "-00:00.3       0  user: Hello?",
        "01:00.0     120  user: Bye!",
        "01:00.0     120  last tick",
    ]


def test_timeline_completes_one_step_before_it_starts_another() -> None:
    """Whichever comes first in the plan; here step 2 goes before step 1."""
    rows = [
        frame_row("a", "val", 0, None, dst_update=True, dst_state=[0, 1], transitions=[0, 1]),
        frame_row("a", "val", 1, None, dst_update=True, dst_state=[1, 2], transitions=[1, 2]),
    ]
    session = LabelledSession(
        session_row("a", "v", "val", 0, 2, uri="/v.mp4", rotation_deg=0),
        [step_row("a", 0, "last", (0.5, 9.0)), step_row("a", 1, "first", (0.0, 0.5))],
        [],
        frames_of(rows),
    )
    assert timeline(session)[-4:-1] == [
        "00:00.0       0  step 2 starts: first",
        "00:00.5       1  step 2 completes: first",
        "00:00.5       1  step 1 starts: last",
    ]


# ---- tables that are not as they should be


def test_damaged_tables(hand: Path, tmp_path: Path) -> None:
    labels = tmp_path / "toy"
    shutil.copytree(hand / "toy", labels)
    whole = (labels / "frames.parquet").read_bytes()
    (labels / "frames.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"frames\.parquet cannot be read .*run 'dst prepare' again"):
        summary(labels)
    (labels / "frames.parquet").write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    for read in (summary, lambda folder: read_session(folder, "toy/a")):
        with pytest.raises(UserError, match=r"frames\.parquet cannot be read .*run 'dst prepare' again"):
            read(labels)
    (labels / "frames.parquet").unlink()
    with pytest.raises(UserError, match=r"toy holds no frames\.parquet; run 'dst prepare' first"):
        summary(labels)
    pl.DataFrame({"reason": ["a"]}).write_parquet(labels / "rejects.parquet")
    with pytest.raises(UserError, match=r"rejects\.parquet has other columns than this version writes"):
        rejects_by_reason(labels)


def test_importing_it_is_light() -> None:
    code = "import sys, pipeline.inspect; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pipeline.inspect" in done.stdout.split()
    assert not {"torch", "polars", "matplotlib", "av"} & set(done.stdout.split())

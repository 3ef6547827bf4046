"""The commands about corpora and labels: what is there, preparing all of it, and looking at it."""

from __future__ import annotations

import csv
import errno
import io
import json
from pathlib import Path

import polars as pl
import pytest
from test_cli import in_one_line, mistake, run

from schemas.tables import LabelWriter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a piece of three corpora: one whole, one with a JSON cut in the middle, one incomplete."""
    root = tmp_path / "data"
    files = {
        "epickitchens/EPIC_100_video_info.csv": "video_id,duration,fps,resolution\nP01_01,30.0,59.94,1x1\n",
        "epickitchens/EPIC_100_train.csv": (
            "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,narration\n"
            "P01_01_0,P01,P01_01,00:00:01.00,00:00:03.50,open door\n"
            "P01_01_1,P01,P01_01,00:00:04.00,00:00:03.00,close door\n"
        ),
        "ego4d/v2/annotations/goalstep_val.json": '{"videos": [{"video_uid": "a", "segments": [{"start_',
        "wtag/T1/StepDetection/StepDetection.txt": "637000000010000000\t637000000030000000\tBoil water\n",
        "wtag/T1/Video/VideoMpegTiming.txt": "637000000000000000\n637000000100000000\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_sources_tells_what_is_there_and_what_is_missing(data: Path) -> None:
    result = run("sources", "--data", data)
    assert result.exit_code == 0
    blocks = {block.split(":")[0]: block.splitlines() for block in result.stdout.strip().split("\n\n")}
    known = ["assembly101", "ego4d", "egoexolearn", "epickitchens", "fsc147", "holoassist", "wtag"]
    assert list(blocks) == known
    lines = {(name, line.split()[0]): line.split() for name, block in blocks.items() for line in block[2:]}
    assert lines["assembly101", "mistakes"][1:5] == ["missing", "0", "of", "328"]
    train = ["incomplete", "1", "of", "1", "(3", "of", "67,218", "rows)"]
    assert lines["epickitchens", "train"][1:] == [*train, str(data / "epickitchens/EPIC_100_train.csv")]
    assert lines["epickitchens", "video_info"][1] == "there"
    assert lines["wtag", "timing"][1:5] == ["incomplete", "1", "of", "56"]
    assert lines["ego4d", "goalstep"][-1] == str(data / "ego4d/v2/annotations/goalstep_*.json")
    assert blocks["wtag"][-1] == f"  next: dst prepare --source wtag --root {data / 'wtag'}"
    assert "; ask at https://holoassist" in blocks["holoassist"][1]
    assert "; more at https://github.com/yuweibao/WTaG" in blocks["wtag"][1]


def test_prepare_all_does_what_it_can(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    result = run("prepare", "--source", "all", "--root", data, "--out", out)
    assert result.exit_code == 1
    assert "goalstep_val.json is not whole JSON" in result.stderr
    assert "could not be prepared: ego4d" in result.stderr
    assert f"labels of epickitchens, wtag in {out}" in result.stdout
    assert "1 of 1 videos are not there yet" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["epickitchens", "wtag"]
    [step] = pl.read_parquet(out / "wtag/steps.parquet").to_dicts()
    assert (step["name"], step["spans"]) == ("Boil water", [{"start_s": 1.0, "end_s": 3.0}])
    about = json.loads((out / "epickitchens/about.json").read_text())
    assert (about["level"], about["tick_hz"], about["rejects"]) == ("step", 2.0, {"ends before it starts": 1})


def test_prepare_all_needs_something(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sentence = mistake("prepare", "--source", "all", "--root", tmp_path / "empty")
    assert sentence == (
        f"{tmp_path}/empty holds no corpus; see what belongs where with 'dst sources --data {tmp_path}/empty'"
    )
    assert "--dialogs and --view are for one corpus" in mistake(
        "prepare", "--source", "all", "--dialogs", "d"
    )


@pytest.mark.parametrize(
    ("source", "arguments", "sentence"),
    [
        ("epickitchens", ["--level", "substep"], "epickitchens has no level 'substep'; known: step"),
        ("epickitchens", ["--view", "left"], "epickitchens has no view 'left'; known: its only one"),
        ("wtag", ["--dialogs", "nowhere"], "nowhere is not there; give a file or folder of dialogues"),
        ("holoassist", [], "data/holoassist is not a folder, so there is no holoassist; ask for it at https"),
    ],
)
def test_mistakes_of_prepare(
    data: Path, tmp_path: Path, source: str, arguments: list[str], sentence: str
) -> None:
    root = data / source
    found = mistake("prepare", "--source", source, "--root", root, "--out", tmp_path / "labels", *arguments)
    assert sentence in found
    assert not (tmp_path / "labels" / source).exists()


def test_tables_never_replace_something_else(data: Path, tmp_path: Path) -> None:
    sentence = mistake("prepare", "--source", "wtag", "--root", data / "wtag", "--out", data)
    assert sentence == f"{data / 'wtag'} holds 'T1', which new label tables would replace; give another --out"
    assert (data / "wtag/T1/Video/VideoMpegTiming.txt").is_file()
    prepare = ("prepare", "--source", "wtag", "--root", data / "wtag", "--out", tmp_path / "labels")
    assert run(*prepare).exit_code == 0
    (tmp_path / "labels/wtag/notes.txt").write_text("mine")
    assert "wtag holds 'notes.txt', which" in mistake(*prepare)
    assert (tmp_path / "labels/wtag/notes.txt").read_text() == "mine"


def test_a_link_to_another_disk_stays_one(data: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/keep.txt").write_text("mine")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/wtag").symlink_to(tmp_path / "disk/wtag")
    for _ in range(2):
        result = run("prepare", "--source", "wtag", "--root", data / "wtag", "--out", tmp_path / "labels")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "labels/wtag").is_symlink()
        assert (tmp_path / "disk/wtag/frames.parquet").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["keep.txt", "wtag"]
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["wtag"]


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_where_a_folder_should_be(data: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    found = mistake("prepare", "--source", "wtag", "--root", data / "wtag", "--out", tmp_path / out)
    assert found.startswith(f"{tmp_path}/file")
    assert found.endswith("what was there before is as it was")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Arrow says when the disk is full while it writes."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr("schemas.tables.pq.ParquetWriter.write_table", full)
    found = mistake(
        "prepare", "--source", "wtag", "--root", data / "wtag", "--out", tmp_path / "labels", "--workers", "1"
    )
    assert found == "Error writing bytes to file; what was there before is as it was"
    assert list((tmp_path / "labels").iterdir()) == []


def test_names_that_look_like_something_else(data: Path, tmp_path: Path) -> None:
    """Colons, brackets and braces in paths and reasons are only letters."""
    root = tmp_path / "a:b [bold] {1} 'é"
    (data / "wtag").rename(root)
    out = tmp_path / "out:[red]"
    result = run("prepare", "--source", "wtag", "--root", root, "--out", out, "--workers", "1")
    assert result.exit_code == 0, result.output
    assert f"such as {root}/T1/Video/Video.mpeg" in result.stdout
    assert "1 wtag" not in result.stdout
    assert run("inspect", out).exit_code == 0


def test_a_name_that_no_file_can_have(data: Path, tmp_path: Path) -> None:
    path = data / "epickitchens/EPIC_100_train.csv"
    path.write_text(path.read_text().replace("P01_01,", "P" + "0" * 300 + ",", 1))
    result = run("prepare", "--source", "epickitchens", "--root", path.parent, "--out", tmp_path / "labels")
    assert result.exit_code == 0, result.output


def test_a_header_in_another_encoding_is_shown(data: Path, tmp_path: Path) -> None:
    path = data / "epickitchens/EPIC_100_train.csv"
    text = path.read_text()
    for damaged, told in (
        (text.replace(",", ";").encode(), "its first row is 'narration_id;participant_id"),
        (text.encode("utf-16"), "its first row cannot be read as UTF-8"),
        (b"", "it is empty"),
    ):
        path.write_bytes(damaged)
        assert told in mistake(
            "prepare", "--source", "epickitchens", "--root", path.parent, "--out", tmp_path / "l"
        )


def test_tables_without_sessions(tmp_path: Path) -> None:
    with LabelWriter(tmp_path / "toy"):
        pass
    for arguments in ((), ("--csv",), ("--session", "x")):
        assert (
            mistake("inspect", tmp_path, *arguments)
            == f"{tmp_path} holds no session; run 'dst prepare' again"
        )


def test_kinds_of_dialogue_that_are_written_alike_stay_apart(data: Path, tmp_path: Path) -> None:
    said = [{"role": "assistant", "time": 2.0, "content": "Boil it."}]
    parts = [{"user_type": kind, "conversation": said} for kind in ("说话", "..", "a b", "a-b")]
    path = data / "wtag/dialogs/talk.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"video_uid": "T1", "conversations": parts}))
    result = run("prepare", "--source", "wtag", "--root", data / "wtag", "--out", tmp_path / "labels")
    assert result.exit_code == 0, result.output
    sessions = pl.read_parquet(tmp_path / "labels/wtag/sessions.parquet")
    endings = [session.removeprefix("wtag/T1/") for session in sessions["session_id"]]
    assert endings == ["--_0", "--_1", "a-b_0", "a-b_1"]
    assert sessions["user_type"].to_list() == ["说话", "..", "a b", "a-b"]


def test_inspect_prints_tables_csv_and_a_session(labels: Path, tmp_path: Path) -> None:
    sessions = pl.read_parquet(labels / "assembly101/sessions.parquet")
    result = run("inspect", labels)
    assert result.exit_code == 0
    text = in_one_line(result.stdout)
    assert "assembly101 train val test all" in text
    counts = [str(sessions.filter(pl.col("split") == split).height) for split in ("train", "val", "test")]
    assert f" sessions {' '.join(counts)} {sessions.height} " in text
    rows = list(csv.DictReader(io.StringIO(run("inspect", labels, "--csv").stdout)))
    assert [row["split"] for row in rows] == ["train", "val", "test", "all"]
    assert [row["sessions"] for row in rows] == [*counts, str(sessions.height)]
    first = sessions.row(0, named=True)
    picture = tmp_path / "picture.png"
    shown = run("inspect", labels, "--session", first["session_id"], "--out", picture)
    assert shown.exit_code == 0
    assert first["goal"] in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_mistakes_of_inspect(labels: Path, tmp_path: Path) -> None:
    assert "holds no label tables; run 'dst prepare" in mistake("inspect", tmp_path)
    assert "has no session 'x'; the nearest are assembly101/" in mistake("inspect", labels, "--session", "x")
    assert mistake("inspect", labels, "--session", "x", "--csv").startswith("--csv goes with the counts")
    assert mistake("inspect", labels, "--out", "x").endswith("name the session with --session")

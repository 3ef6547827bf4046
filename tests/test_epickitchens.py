"""EPIC-KITCHENS-100: its layout written by hand, the synthetic corpus, and the real excerpt."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import polars as pl
import pytest
from conftest import put, rows_of

from pipeline.prepare import prepare
from pipeline.sample import epickitchens as sample
from pipeline.sample.corpus import write_sample
from pipeline.sample.render import Clip, write_videos
from pipeline.sample.world import make_recordings
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.tables import validate_labels

FOLDER = "epic-kitchens-100-annotations"
HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,"
    "stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)


def narration(video: str, number: int | str, start: str, stop: str, text: str, nouns: str = "['pan']") -> str:
    cells = [f"{video}_{number}", video[:3], video, "00:00:00.100", start, stop, "1", "2", text]
    return ",".join([*cells, "take", "0", "pan", "5", nouns, "[5]"])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two training videos and one for validation, with rows of each kind that cannot be used."""
    root = tmp_path / "data" / "epickitchens"
    train = [
        "\ufeff" + HEADER,
        narration("P01_02", 10, "00:01:05.30", "00:01:07.10", "put down pan"),
        narration("P01_02", 2, "00:00:03.00", "00:00:09.00", '"take pan, and lid"', "\"['pan', 'lid']\""),
        narration("P01_02", 3, "00:00:03.00", "00:00:04.50", "open lid"),
        narration("P30_101", 0, "01:02:03.04", "01:02:03.04", "close oven"),
        "",
        narration("P01_02", 4, "00:00:09.00", "00:00:08.00", "stir"),
        narration("P01_02", 5, "9.0", "10.0", "stir"),
        narration("P01_02", 6, "00:61:00.00", "00:62:00.00", "stir"),
        narration("P01_02", 7, "00:00:10.00", "00:00:11.00", ""),
        narration("P01_02", 2, "00:00:12.00", "00:00:13.00", "stir"),
        "P01_02_8,P01,P01_02,x",
        narration("P01_02", 9, "00:00:10.00", "00:00:11.00", "stir") + ",more",
        narration("", 1, "00:00:10.00", "00:00:11.00", "stir"),
        narration("P01_02", 12, "00:00:10.00", "00:00:11.00", '"stir'),
        narration("P01_02", 13, "00:00:14.00", "00:00:14.25", "open lid"),
    ]
    put(root, f"{FOLDER}/EPIC_100_train.csv", "\r\n".join(train))
    put(
        root,
        f"{FOLDER}/EPIC_100_validation.csv",
        f"{HEADER}\n{narration('P02_01', 0, '00:00:20.00', '00:00:21.00', 'wash pan')}\n",
    )
    info = ["video_id,duration,fps,resolution", "P01_02,70.5,59.94,1920x1080", "P30_101,long,50.0,1920x1080"]
    put(root, f"{FOLDER}/EPIC_100_video_info.csv", "\n".join([*info, "P09_09,-1,50.0,1920x1080", ""]))
    return root


def test_sessions_worked_by_hand(corpus: Path, tmp_path: Path) -> None:
    prepare("epickitchens", corpus, tmp_path, Clock())
    labels = tmp_path / "epickitchens"
    assert validate_labels(labels) == []
    sessions = rows_of(labels, "sessions")
    assert [(row["session_id"], row["split"], row["num_steps"]) for row in sessions] == [
        ("epickitchens/P01_02", "train", 4),
        ("epickitchens/P02_01", "val", 1),
        ("epickitchens/P30_101", "train", 1),
    ]
    assert {row["goal"] for row in sessions} == {"Kitchen activities, step by step"}
    train = corpus / FOLDER / "EPIC_100_train.csv"
    found = [
        (row["step_id"], row["name"], *row["spans"][0].values(), row["source_rows"])
        for row in rows_of(labels, "steps")
    ]
    assert found == [
        ("P01_02_3", "open lid", 3.0, 4.5, [f"{train}, row 4"]),
        ("P01_02_2", "take pan, and lid", 3.0, 9.0, [f"{train}, row 3"]),
        ("P01_02_13", "open lid", 14.0, 14.25, [f"{train}, row 16"]),
        ("P01_02_10", "put down pan", 65.3, 67.1, [f"{train}, row 2"]),
        ("P02_01_0", "wash pan", 20.0, 21.0, [f"{corpus / FOLDER / 'EPIC_100_validation.csv'}, row 2"]),
        ("P30_101_0", "close oven", 3723.04, 3723.04, [f"{train}, row 5"]),
    ]
    assert [(row["recording_id"], row["duration_s"], row["uri"]) for row in rows_of(labels, "videos")] == [
        ("P01_02", 70.5, str(corpus / "P01" / "videos" / "P01_02.MP4")),
        ("P02_01", None, str(corpus / "P02" / "videos" / "P02_01.MP4")),
        ("P30_101", None, str(corpus / "P30" / "videos" / "P30_101.MP4")),
    ]


def test_every_row_that_is_not_used_is_listed(corpus: Path, tmp_path: Path) -> None:
    prepare("epickitchens", corpus, tmp_path, Clock())
    found = [
        (Path(row["source_file"]).name, row["locator"], row["reason"], row["detail"])
        for row in rows_of(tmp_path / "epickitchens", "rejects")
    ]
    train, info = "EPIC_100_train.csv", "EPIC_100_video_info.csv"
    quoted = next(row for row in found if row[1] == "row 15")
    assert quoted[:3] == (train, "row 15", "unreadable row")
    assert sorted(row for row in found if row != quoted) == sorted(
        [
            (train, "row 7", "ends before it starts", "9.0 to 8.0"),
            (train, "row 8", "not a time", "9.0 to 10.0"),
            (train, "row 9", "not a time", "00:61:00.00 to 00:62:00.00"),
            (train, "row 10", "no narration", "00:00:10.00 to 00:00:11.00"),
            (train, "row 11", "second row of one narration_id", "P01_02_2"),
            (train, "row 12", "too few columns", "4 of 15"),
            (train, "row 13", "too many columns", "16 of 15"),
            (train, "row 14", "no id", "video '', narration '_1'"),
            (info, "row 3", "not a duration", "'long' of P30_101"),
            (info, "row 4", "not a duration", "'-1' of P09_09"),
        ]
    )


def spoil_columns(root: Path) -> None:
    put(root, f"{FOLDER}/EPIC_100_train.csv", HEADER.replace("stop_timestamp", "stop") + "\n")


def spoil_empty(root: Path) -> None:
    put(root, f"{FOLDER}/EPIC_100_video_info.csv", "")


def spoil_splits(root: Path) -> None:
    row = narration("P01_02", 99, "00:00:01.00", "00:00:02.00", "stir")
    put(root, f"{FOLDER}/EPIC_100_validation.csv", f"{HEADER}\n{row}\n")


def spoil_files(root: Path) -> None:
    for name in ("train", "validation"):
        (root / FOLDER / f"EPIC_100_{name}.csv").unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_columns, r"EPIC_100_train\.csv has no column 'stop_timestamp'.*fetch"),
        (spoil_empty, r"EPIC_100_video_info\.csv has no column 'video_id'"),
        (spoil_splits, r"'P01_02' is in .*EPIC_100_train\.csv and in .*validation\.csv \(row 2\), so in two"),
        (spoil_files, r"no epickitchens annotations.*EPIC_100_train\.csv.*ask at https"),
    ],
)
def test_what_cannot_be_read_is_named(
    corpus: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(corpus)
    with pytest.raises(UserError, match=sentence):
        prepare("epickitchens", corpus, tmp_path / "labels", Clock())


def test_a_video_that_only_dialogues_know(corpus: Path, tmp_path: Path) -> None:
    dst = [{"type": "step", "id": "A", "start_ts": 1.0, "end_ts": 1.5, "name": "boil water"}]
    talk = [{"role": "assistant", "time": 1.0, "content": "Boil water."}]
    records = [
        {"video_uid": uid, "conversation": talk, "dst": dst} for uid in ("P07_01", "P08_01", "P" * 400)
    ]
    put(corpus, "dialogs/test.json", json.dumps(records))
    there = corpus / "EPIC-KITCHENS" / "P07" / "videos" / "P07_01.MP4"
    there.parent.mkdir(parents=True)
    with av.open(str(there), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        for _ in range(60):
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    prepare("epickitchens", corpus, tmp_path, Clock())
    labels = tmp_path / "epickitchens"
    assert validate_labels(labels) == []
    [video] = [row for row in rows_of(labels, "videos") if row["recording_id"] == "P07_01"]
    assert (video["uri"], video["duration_s"]) == (str(there), 2.4)
    [session] = [row for row in rows_of(labels, "sessions") if row["video_id"] == "epickitchens/P07_01"]
    assert (session["split"], session["num_steps"], session["dialog_origin"]) == ("test", 1, "generated")
    unknown = [row for row in rows_of(labels, "rejects") if row["reason"] == "unknown video_uid"]
    assert [(row["locator"], row["detail"]) for row in unknown] == [
        ("record 2", "P08_01"),
        ("record 3", "P" * 400),
    ]


# ---- the synthetic corpus; only a video that a test looks at is encoded


def write(out: Path, monkeypatch: pytest.MonkeyPatch, encoded: int = 0) -> list[Clip]:
    """A corpus of 18 sessions with so many of its videos; returned are all that it asks for."""
    asked: list[Clip] = []

    def some(clips: Sequence[Clip], on_video: Callable[[], None]) -> None:
        asked.extend(clips)
        write_videos(clips[:encoded], on_video)

    monkeypatch.setattr("pipeline.sample.corpus.write_videos", some)
    write_sample("epickitchens", out, 18, seed=4)
    return asked


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def seconds(stamp: str) -> float:
    hours, minutes, rest = stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def test_the_sample_tells_what_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sample"
    clips = write(out, monkeypatch, encoded=1)
    names = [clip.path.stem for clip in clips]
    assert [clip.path.relative_to(out).as_posix() for clip in clips] == [
        f"{name[:3]}/videos/{name}.MP4" for name in names
    ]
    info = {row["video_id"]: row for row in read_csv(out / FOLDER / "EPIC_100_video_info.csv")}
    assert list(info) == names
    with av.open(str(clips[0].path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        frames = sum(1 for _ in container.decode(video=0))
    assert float(info[names[0]]["fps"]) == pytest.approx(float(rate))
    assert float(info[names[0]]["duration"]) == pytest.approx(float(frames / rate), abs=1e-5)
    rows = {name: read_csv(out / FOLDER / f"EPIC_100_{name}.csv") for name in ("train", "validation")}
    for table in rows.values():
        ids = [row["narration_id"] for row in table]
        assert ids == sorted(ids)
        assert [int(name.rpartition("_")[2]) for name in ids] != sorted(
            int(name.rpartition("_")[2]) for name in ids
        )
    for name, recording in zip(names, make_recordings(18, 4, most_episodes=1), strict=True):
        table = rows["train" if recording.split == "train" else "validation"]
        told = sorted((row for row in table if row["video_id"] == name), key=lambda row: row["narration"])
        steps = recording.episodes[0].steps
        assert len(told) == 2 * len(steps)
        for step in steps:
            both = [
                (seconds(row["start_timestamp"]), seconds(row["stop_timestamp"]))
                for row in told
                if seconds(row["start_timestamp"]) < step.end / 30 - 0.01
                and seconds(row["stop_timestamp"]) > step.start / 30 + 0.01
                and row["noun"] == sample.part_name(step.part)
            ]
            first, second = sorted(both)
            assert (first[0], second[1]) == pytest.approx((step.start / 30, step.end / 30), abs=0.006)
            assert second[0] < first[1]  # they overlap


def test_the_sample_and_its_tables_are_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        write(tmp_path / name, monkeypatch)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.csv")]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    digests = []
    for workers in (1, 2):
        labels = tmp_path / f"labels{workers}"
        prepare("epickitchens", tmp_path / "first", labels, Clock(), workers=workers)
        written = sorted((labels / "epickitchens").iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written})
    assert digests[0] == digests[1]


def expected_steps(root: Path) -> list[tuple[str, str, float, float]]:
    """Rows of all annotation files in order of their videos and times, read by the csv module alone."""
    paths = [root / FOLDER / f"EPIC_100_{name}.csv" for name in ("train", "validation")]
    rows = [row for path in paths if path.is_file() for row in read_csv(path)]
    steps = [
        (
            row["video_id"],
            seconds(row["start_timestamp"]),
            seconds(row["stop_timestamp"]),
            row["narration_id"],
            row["narration"],
        )
        for row in rows
    ]
    return [(name, text, start, stop) for _, start, stop, name, text in sorted(steps)]


def check_steps(labels: Path, root: Path) -> int:
    assert validate_labels(labels) == []
    found = [
        (row["step_id"], row["name"], row["spans"][0]["start_s"], row["spans"][0]["end_s"])
        for row in rows_of(labels, "steps")
    ]
    expected = expected_steps(root)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row[2:] == pytest.approx(wanted[2:], abs=1e-9)
    assert rows_of(labels, "rejects") == []
    return len(found)


def test_each_narration_of_the_sample_is_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sample", monkeypatch)
    counts = prepare("epickitchens", tmp_path / "sample", tmp_path, Clock())
    assert check_steps(tmp_path / "epickitchens", tmp_path / "sample") > 100
    assert set(counts.sessions) == {"train", "val"}
    assert sum(counts.sessions.values()) == 18


# ---- the real excerpt, where it lies beside the repository: read in place

EXCERPT = Path(__file__).parents[2] / "shared" / "samples" / "epickitchens"


@pytest.mark.parametrize("root", [path for path in (EXCERPT,) if path.is_dir()])
def test_the_excerpt(root: Path, tmp_path: Path) -> None:
    prepare("epickitchens", root, tmp_path, Clock())
    labels = tmp_path / "epickitchens"
    assert check_steps(labels, root) == 165
    assert {row["split"] for row in rows_of(labels, "sessions")} == {"val"}
    info = {row["video_id"]: float(row["duration"]) for row in read_csv(next(root.glob("*/*video_info.csv")))}
    videos = {row["recording_id"]: row["duration_s"] for row in rows_of(labels, "videos")}
    assert videos == {name: info[name] for name in ("P01_11", "P09_07")}
    frames = pl.read_parquet(labels / "frames.parquet").filter(pl.col("session_id").str.ends_with("P09_07"))
    rows = [row for path in root.glob("*/*validation.csv") for row in read_csv(path)]
    spans = sorted(
        (seconds(row["start_timestamp"]), seconds(row["stop_timestamp"]))
        for row in rows
        if row["video_id"] == "P09_07"
    )
    for tick, state in frames.select("tick", "dst_state").rows():
        # a hundredth of a second never lies within a millionth of a tick, but on it
        assert state == [(tick / 2 >= start - 1e-6) + (tick / 2 >= stop - 1e-6) for start, stop in spans]

"""From annotation files to label tables: Assembly101's layout written by hand, and the real excerpts."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest
from conftest import put, rows_of

from data_manifests import load_manifest
from pipeline.dialogs import DialogIndex
from pipeline.prepare import prepare
from pipeline.sources import assembly101
from pipeline.sources.common import make_sessions
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.records import Rejects, Session
from schemas.shards import is_safe_key
from schemas.tables import TABLES, validate_labels

COARSE = "annotations/coarse-annotations/coarse_labels"
SPLITS = "annotations/coarse-annotations/coarse_splits"
FINE = "annotations/fine-grained-annotations"
MISTAKES = "annotations/assembly101-mistake-detection/annots"
HEADER = (
    "id,video,start_frame,end_frame,action_id,verb_id,noun_id,action_cls,verb_cls,noun_cls,toy_id,toy_name"
)
HEAD_CAMERA = "HMC_21110305_mono10bit"


def fine_row(number: int, video: str, start: str, end: str, action: str) -> str:
    return f"{number},{video},{start},{end},1,2,3,{action},a,b,c01,fire_truck"


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
    row = '600,750,attach,roof,body,mistake,"wrong, upside down"'
    put(root, f"{MISTAKES}/one.csv", f"{row}\r\n750,900,attach")
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


def read_all(
    root: Path, rejects: Rejects | None = None, level: str = "step", view: str | None = None
) -> dict[str, Session]:
    rejects = rejects or Rejects()
    index = DialogIndex(None, rejects)
    annotated = [
        list(assembly101.read(u, rejects)) for u in assembly101.units(root, level, view, (), rejects)
    ]
    sessions = [s for stretches in annotated for s in make_sessions("assembly101", stretches, index, rejects)]
    assert all(is_safe_key(session.session_id) for session in sessions)
    return {session.session_id.removeprefix("assembly101/"): session for session in sessions}


def plan(session: Session) -> dict[str, list[tuple[float, float]]]:
    assert [step.step_id for step in session.steps] == [f"S{n + 1}" for n in range(len(session.steps))]
    return {step.name: list(step.spans) for step in session.steps}


def split_by_hash(recording: str) -> str:
    """80 % train, 10 % val, 10 % test, by the first 8 bytes of a hash."""
    place = int(hashlib.sha256(recording.encode()).hexdigest()[:16], 16) / 16**16
    return "train" if place < 0.8 else "val" if place < 0.9 else "test"


def test_sessions_worked_by_hand(corpus: Path) -> None:
    rejects = Rejects()
    sessions = read_all(corpus, rejects)
    names = ("assembly_four", "assembly_one", "disassembly_one", "assembly_three", "assembly_two")
    assert list(sessions) == [f"{name}__{HEAD_CAMERA}" for name in names]
    four, one, apart, three, two = sessions.values()
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
    assert plan(four) == {"attach wheel": [(1.0, 2.0)], "attach roof": [(2.0, 3.0)]}
    assert (four.split, four.goal, rejects.notes.total()) == (split_by_hash("four"), "Assemble the toy", 1)


def test_every_row_that_is_not_used_is_listed(corpus: Path) -> None:
    rejects = Rejects()
    read_all(corpus, rejects)
    assert sorted((Path(r.source_file).name, r.locator, r.reason, r.detail) for r in rejects.rows) == [
        ("assembly_one.txt", "row 4", "not a time", "12 to soon"),
        ("assembly_one.txt", "row 6", "ends before it starts", "900 to 800"),
        ("assembly_one.txt", "row 7", "too few columns", "1 of 3"),
        ("notes.txt", "file name", "unknown file", "not {assembly|disassembly}_<sequence>.txt"),
        ("one.csv", "row 2", "too few columns", "3 of 6"),
        ("test.csv", "row 5", "too few columns", "4 of 12"),
        ("test.csv", "row 6", "not a time", "inf to 2"),
        ("two.csv", "row 3", "correction row", "correction: attach wheel to chassis"),
        ("two.csv", "row 6", "unknown label", "perhaps: attach wheel to chassis"),
        ("two.csv", "row 7", "unreadable row", "unexpected end of data"),
        ("two.csv", "row 8", "no action", "1002 to 1005"),
        ("val_coarse_assembly.txt", "recording five", "no annotation", ""),
        ("validation.csv", "rows 2", "not the annotation of level step", "recording one, 1 rows"),
        ("validation.csv", "rows 3-4", "not the annotation of level step", "recording two, 2 rows"),
    ]


def test_substeps_come_from_the_fine_rows(corpus: Path) -> None:
    rows = [HEADER, *(fine_row(n, "one", f"{n}", f"{n + 9}", "turn toy") for n in (300, 2099, 2100, 2300))]
    put(corpus, f"{FINE}/validation.csv", "\n".join(rows))
    rejects = Rejects()
    one, apart, three = read_all(corpus, rejects, level="substep").values()
    assert plan(one) == {"turn toy": [(10.0, 309 / 30), (2099 / 30, 2108 / 30)]}
    assert plan(apart) == {"turn toy": [(70.0, 2109 / 30), (2300 / 30, 2309 / 30)]}
    assert three.mistakes is None
    unused = [(Path(r.source_file).name, r.locator, r.detail) for r in rejects.rows if "level" in r.reason]
    assert sorted(unused) == [
        ("assembly_four.txt", "rows 1-2", "recording four, 2 rows"),
        ("assembly_one.txt", "rows 1-2, 5, 8", "recording one, 4 rows"),
        ("disassembly_one.txt", "rows 1", "recording one, 1 rows"),
        ("two.csv", "rows 1, 4-5", "recording two, 3 rows"),
    ]
    assert [(r.locator, r.detail) for r in rejects.rows if r.reason == "no assembly they belong to"] == [
        ("rows 2", "recording two, 1 rows")
    ]


def test_rows_that_say_the_same_count_once(corpus: Path) -> None:
    put(
        corpus,
        f"{COARSE}/assembly_four.txt",
        "30\t60\tattach\n60\t90\tlook\n030\t60\t attach\n30\t61\tattach\n",
    )
    for level, expected in (
        ("step", ("assembly_four.txt", "rows 3", "recording four, 1 rows")),
        ("substep", ("validation.csv", "rows 4", "recording two, 1 rows")),
    ):
        rejects = Rejects()
        sessions = read_all(corpus, rejects, level)
        same = [r for r in rejects.rows if r.reason == "the same as an earlier one"]
        assert [(Path(r.source_file).name, r.locator, r.detail) for r in same] == [expected]
        if level == "step":
            assert plan(sessions[f"assembly_four__{HEAD_CAMERA}"])["attach"] == [(1.0, 2.0), (1.0, 61 / 30)]


@pytest.mark.parametrize("text", [b"", b"\xef\xbb\xbf", b"\r\n \n"])
def test_empty_labels_are_named(corpus: Path, text: bytes) -> None:
    """So is a recording that gives nothing, by the list that names it, or by the corpus."""
    names = ("disassembly_one", "assembly_six", "assembly_seven")
    empty = [str(put(corpus, f"{COARSE}/{name}.txt", text)) for name in names]
    listed = put(corpus, f"{SPLITS}/test_coarse_assembly.txt", "assembly_six.txt\tshared\tc01\tsuv\n")
    rejects = Rejects()
    sessions = {name.partition("__")[0] for name in read_all(corpus, rejects)}
    assert sessions == {"assembly_four", "assembly_one", "assembly_three", "assembly_two"}
    found = [(r.source_file, r.locator, r.reason) for r in rejects.rows]
    assert sorted(row[:2] for row in found if row[2] == "empty file") == sorted((p, "file") for p in empty)
    assert [row for row in found if row[2] == "no steps"] == [
        (str(corpus), "recording seven", "no steps"),
        (str(listed), "recording six", "no steps"),
    ]


@pytest.mark.parametrize(
    ("text", "mistakes", "reasons"),
    [
        ("", None, ["empty file"]),
        ("\r\n\r\n", None, ["empty file"]),
        ("30,60,attach,roof,body,maybe,\nx,2,attach,roof,body,mistake,\n1", None, "row rejects"),
        ("30,60,attach,roof,body,correction,\n", (), ["correction row"]),
        ("30,60,attach,roof,body,correct,\n", (), ["not the annotation of level step"]),
        ("300,330,attach,,,mistake,\n30,60,detach,,,mistake,", ((1.0, 2.0), (10.0, 11.0)), []),
    ],
)
def test_a_file_of_which_nothing_is_understood_has_judged_nothing(
    corpus: Path, text: str, mistakes: tuple[tuple[float, float], ...] | None, reasons: list[str] | str
) -> None:
    if reasons == "row rejects":
        reasons = ["unknown label", "not a time", "too few columns"]
    path = put(corpus, f"{MISTAKES}/one.csv", text)
    rejects = Rejects()
    session = read_all(corpus, rejects)[f"assembly_one__{HEAD_CAMERA}"]
    assert session.mistakes == mistakes
    assert [r.reason for r in rejects.rows if r.source_file == str(path)] == reasons
    rows = {(1.0, 2.0): "row 2", (10.0, 11.0): "row 1"}
    assert session.mistake_rows == tuple((str(path), rows[span]) for span in mistakes or ())


def test_a_corpus_of_empty_files_says_so(tmp_path: Path) -> None:
    put(tmp_path, f"{MISTAKES}/one.csv", "")
    with pytest.raises(UserError, match=r"gave no session.*empty file \(1\), no steps \(1\)"):
        prepare("assembly101", tmp_path, tmp_path / "out", Clock())


def test_dialogues_choose_their_view(corpus: Path, tmp_path: Path) -> None:
    """What was chosen holds for the others; how many it does not hold for is noted."""
    words = [{"role": "assistant", "time": 12.0, "content": "Good."}]
    uids = ["assembly_one__C10115_rgb", "assembly_one__C10404_rgb"]
    talks = [{"video_uid": uid, "conversation": words} for uid in uids]
    put(corpus, "dialogs/talk.json", json.dumps([*talks, talks[0]]))
    note = "sessions seen by the camera their dialogue names, not the one chosen"
    for view, others in ((None, 0), ("C10404_rgb", 1), ("C10095_rgb", 2)):
        counts = prepare("assembly101", corpus, tmp_path / "labels", Clock(), view=view)
        assert counts.notes.get(note, 0) == others
        sessions = rows_of(tmp_path / "labels" / "assembly101", "sessions")
        seen = {row["session_id"].split("/")[1] for row in sessions}
        names = ("assembly_two", "assembly_three", "assembly_four", "disassembly_one")
        assert seen == {*uids, *(f"{name}__{view or HEAD_CAMERA}" for name in names)}


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
    assert {name.rpartition("__")[2] for name in read_all(corpus, view="C10095_rgb")} == {"C10095_rgb"}
    with pytest.raises(UserError, match=r"assembly101 has no view 'front'.*C10404_rgb"):
        prepare("assembly101", corpus, corpus / "out", Clock(), view="front")
    with pytest.raises(UserError, match=r"assembly101 has no level 'action'.*substep"):
        prepare("assembly101", corpus, corpus / "out", Clock(), level="action")


def test_each_step_names_its_rows(corpus: Path, tmp_path: Path) -> None:
    """The row a span names holds the frames the span was made from."""
    for level in ("step", "substep"):
        prepare("assembly101", corpus, tmp_path / level, Clock(), level=level)
        steps = rows_of(tmp_path / level / "assembly101", "steps")
        assert steps
        for step in steps:
            assert len(step["source_rows"]) == len(step["spans"])
            for span, source_row in zip(step["spans"], step["source_rows"], strict=True):
                path, _, number = source_row.partition(", row ")
                frames = [str(round(t * 30)) for t in span.values()]
                line = Path(path).read_text(encoding="utf-8-sig").splitlines()[int(number) - 1]
                cells = [cell.lstrip("0") for cell in line.replace("\t", ",").split(",")]
                assert cells[:2] == frames or cells[2:4] == frames
                assert step["name"].split()[0] in line


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
    video = next(row for row in rows_of(labels, "videos") if row["recording_id"] == "one")
    assert (video["duration_s"], video["last_tick_needed"]) == (31.0, 61)
    rejects = [
        (Path(r["source_file"]).name, r["locator"], r["reason"], r["detail"])
        for r in rows_of(labels, "rejects")
    ]
    late = "assembly_one__C10095_rgb"
    event = f"assembly101/{late} step"
    assert [row for row in rejects if row[2] == "outside the video"] == [
        (
            "assembly_one.txt",
            "row 5",
            "outside the video",
            f"{event} S1 end: 30.000 to 40.000 s, attach wheel",
        ),
        (
            "assembly_one.txt",
            "row 8",
            "outside the video",
            f"{event} S3 start: 50.000 to 50.000 s, inspect toy",
        ),
    ]
    assert ("assembly101/disassembly_one__C10095_rgb", "no ticks") in [row[1:3] for row in rejects]
    frames = pl.read_parquet(labels / "frames.parquet").filter(pl.col("session_id").str.ends_with(late))
    assert frames["dst_state"].to_list()[-1] == [1, 2, 0]
    assert frames.filter("mistake")["tick"].to_list() == list(range(40, 50))


def test_the_same_input_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    digests = []
    for workers in (1, 1, 2):
        counts = prepare("assembly101", corpus, tmp_path / str(len(digests)), Clock(), workers=workers)
        files = sorted((tmp_path / str(len(digests)) / "assembly101").iterdir())
        names = ["about.json", *sorted(f"{table}.parquet" for table in TABLES)]
        assert [file.name for file in files] == names
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1] == digests[2]
    about = json.loads(files[0].read_text())
    assert (about["source"], about["root"], about["level"]) == ("assembly101", str(corpus), "step")
    assert (about["tick_hz"], about["dialogs"], about["view"]) == (2.0, None, None)
    found = {name: pl.read_parquet(file) for name, file in zip(sorted(TABLES), files[1:], strict=True)}
    assert about["rows"] == counts.rows == {name: table.height for name, table in found.items()}
    assert about["rejects"] == counts.rejects == Counter(found["rejects"]["reason"])
    assert about["sessions"] == counts.sessions == Counter(found["sessions"]["split"])
    assert about["missing_videos"] == counts.missing_videos == 4  # "one" has two sessions on its video
    assert sum(counts.notes.values()) == 1


@pytest.mark.parametrize(
    ("names", "text", "sentence"),
    [
        (["dialogs/talk.json"], '[{"video_uid": "assem', r"talk\.json is not whole JSON"),
        (
            [f"{SPLITS}/test_coarse_disassembly.txt"],
            "disassembly_one.txt\tshared\n",
            r"recording 'one' is in 'test' by .*test_coarse.* and in 'train' by .*train_coarse",
        ),
        ([f"{FINE}/train.csv"], HEADER.replace("_cls", "") + "\n", r"train\.csv has no column 'action_cls'"),
        (
            [f"{MISTAKES}/six.a.csv", f"{MISTAKES}/six-a.csv"],
            "30,60,attach,wheel,chassis,correct,\n",
            r"six\.a/.*six-a/.*both have the id 'assembly101/six-a/",
        ),
    ],
)
def test_an_error_leaves_the_old_tables(
    corpus: Path, tmp_path: Path, names: list[str], text: str, sentence: str
) -> None:
    out = tmp_path / "labels"
    prepare("assembly101", corpus, out, Clock())
    before = {file: file.read_bytes() for file in (out / "assembly101").iterdir()}
    for name in names:
        put(corpus, name, text)
    with pytest.raises(UserError, match=sentence):
        prepare("assembly101", corpus, out, Clock())
    assert {file: file.read_bytes() for file in (out / "assembly101").iterdir()} == before
    assert [path.name for path in out.iterdir()] == ["assembly101"]


def test_what_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    with pytest.raises(UserError, match=r"nowhere is not a folder.*dst sample --source assembly101 --out"):
        prepare("assembly101", tmp_path / "nowhere", out, Clock())
    with pytest.raises(UserError, match=r"unknown source 'assembly'; known: .*assembly101"):
        prepare("assembly", corpus, out, Clock())
    with pytest.raises(UserError, match=r"talk is not there.*--dialogs"):
        prepare("assembly101", corpus, out, Clock(), dialogs=tmp_path / "talk")
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"coarse_labels.*fine-grained.*annots.*ask at https"):
        prepare("assembly101", tmp_path / "empty", out, Clock())
    put(tmp_path / "little", f"{COARSE}/assembly_one.txt", "1\tsoon\tattach wheel\n1\t2\n")
    with pytest.raises(UserError, match=r"gave no session.*not a time \(1\), too few columns \(1\)"):
        prepare("assembly101", tmp_path / "little", out, Clock())
    assert list(out.iterdir()) == []


# The real excerpts, where they lie beside the repository: read in place, with a second reading of our own.

EXCERPTS = Path(__file__).parents[2] / "shared" / "samples"
CORPORA = [path for path in (EXCERPTS / "assembly101",) if path.is_dir()]


def fine_rows(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / FINE / "validation.csv").read_text("utf-8-sig").splitlines()))


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
            seen = [(round(s["start_s"] * 30), round(s["end_s"] * 30)) for s in row["spans"]]
            assert seen == spans[row["name"]]
        frames = pl.read_parquet(labels / "frames.parquet")
        ticks = frames.filter(pl.col("session_id") == session["session_id"])
        wrong = [(int(row[0]), int(row[1])) for row in rows if row[5] == "mistake"]
        for tick, mistake in ticks.select("tick", "mistake").rows():
            assert mistake == any(start <= tick * 15 < end for start, end in wrong)
    assert sessions == {}
    fine: dict[str, list[int]] = {}
    for number, fine_cells in enumerate(fine_rows(root), 2):
        fine.setdefault(fine_cells["video"], []).append(number)
    rejects = rows_of(labels, "rejects")
    reasons = Counter(row["reason"] for row in rejects)
    assert reasons == {"correction row": corrections, "not the annotation of level step": len(fine)}
    unused = {row["detail"]: row["locator"] for row in rejects if row["reason"].startswith("not")}
    for sequence, numbers in fine.items():
        parts = unused[f"recording {sequence}, {len(numbers)} rows"].removeprefix("rows ").split(", ")
        ranges = [[int(end) for end in (*part.split("-"), part.split("-")[0])[:2]] for part in parts]
        assert [n for first, last in ranges for n in range(first, last + 1)] == numbers


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
    assert found == {
        (row["video"], int(row["start_frame"]), int(row["end_frame"]), row["action_cls"])
        for row in fine_rows(root)
    }

"""FSC147: a layout made by hand with every kind of wrong input, a sample read a second time, and what is told of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import put, rows_of
from PIL import Image
from scipy import ndimage
from test_cli import in_one_line, mistake, run

from pipeline.inspect import summary
from pipeline.prepare import prepare
from pipeline.sample.corpus import write_sample
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.tables import TABLES, validate_labels

ANNOTATIONS, SPLITS = "annotation_FSC147_384.json", "Train_Test_Val_FSC_147.json"
CATEGORIES, PICTURES = "ImageClasses_FSC147.txt", "images_384_VarV2"


def picture(root: Path, name: str, width: int = 200, height: int = 100, **options: Any) -> Path:
    path = root / PICTURES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 90, 90)).save(path, "JPEG", **options)
    return path


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two good pictures, one without a category whose points are mostly wrong, and one of each that cannot be used."""
    root = tmp_path / "data/fsc147"
    wrong = [
        [200.5, 3],
        [-1, 3],
        [3, 100.01],
        ["x", 1],
        [1],
        [math.nan, 1],
        [True, 1],
        None,
        [1, 2, 3],
        [10**400, 1],
    ]
    annotated: dict[str, Any] = {
        "a.jpg": {"H": 400, "W": 800, "points": [[150, 10], [20, 40], [10, 55], [100, 49.9], [5, 99]]},
        "edges.jpg": {"points": [[200, 100], *wrong, [7, 7.5], [0, 0], [7, 7.5]]},
        "empty.jpg": {"points": []},
        "broken.jpg": {"points": [[1, 1]]},
        "gone.jpg": {"points": [[1, 1]]},
        "list.jpg": {"points": {"x": 1}},
        "none.jpg": {"H": 400},
        "nowhere.jpg": {"points": [[1, 1]]},
        "moving.gif": {"points": [[1, 1]]},
        "named.jpg": {"points": [[1, 1]]},
        "twice.jpg": {"points": [[1, 1]]},
    }
    splits = {
        "train": ["a.jpg", "edges.jpg", "twice.jpg", "a.jpg", 7],
        "val": ["empty.jpg", "twice.jpg", "broken.jpg", "none.jpg", "list.jpg"],
        "test": ["gone.jpg", "bare.jpg", "moving.gif", "named.jpg"],
        "val_coco": ["empty.jpg"],
        "spare": ["a.jpg"],
    }
    categories = (
        b"a.jpg\tsea shells\nedges.jpg\n\nempty.jpg\tgeese\r\nempty.jpg\tants\nx.jpg\tants\n\xff.jpg\tants\n"
    )
    put(root, ANNOTATIONS, annotated)
    put(root, SPLITS, splits)
    put(root, CATEGORIES, categories + b"twice.jpg\tred\tdiscs\nnone.jpg\t\n")
    for name in ("a.jpg", "edges.jpg", "empty.jpg", "twice.jpg", "none.jpg", "list.jpg", "nowhere.jpg"):
        picture(root, name)
    put(root, f"{PICTURES}/broken.jpg", "no picture")
    for name in ("moving.gif", "named.jpg"):  # which the cache would take for a video, and not open
        Image.new("RGB", (20, 10)).save(root / PICTURES / name, "GIF")
    return root


def tables_of(root: Path, out: Path, **options: Any) -> dict[str, list[dict[str, Any]]]:
    prepare("fsc147", root, out, Clock(2.0), **options)
    assert validate_labels(out / "fsc147") == []
    return {name: rows_of(out / "fsc147", name) for name in TABLES}


# ---- by hand


def test_a_picture_worked_by_hand(made: Path, tmp_path: Path) -> None:
    tables = tables_of(made, tmp_path / "out")
    sessions = {row["session_id"]: row for row in tables["sessions"]}
    assert list(sessions) == ["fsc147/a", "fsc147/edges", "fsc147/empty"]
    assert [row["goal"] for row in sessions.values()] == ["sea shells", "objects", "geese"]
    assert [row["split"] for row in sessions.values()] == ["train", "train", "val"]
    ids = {"session_id": "fsc147/a", "video_id": "fsc147/a", "source": "fsc147", "split": "train"}
    plan = {"goal": "sea shells", "knowledge": None, "num_steps": 0, "user_type": None, "quality": None}
    clock = {"first_tick": 0, "num_ticks": 1, "tick_hz": 2.0}
    assert sessions["fsc147/a"] == ids | plan | clock | {"dialog_origin": "none"}
    ids = {"video_id": "fsc147/a", "recording_id": "fsc147/a", "source": "fsc147"}
    file = {"uri": str(made / PICTURES / "a.jpg"), "rotation_deg": 0, "duration_s": None}
    assert tables["videos"][0] == ids | file | {"last_tick_needed": 0, "marks": None}
    ids = {"session_id": "fsc147/a", "split": "train", "tick": 0}
    silent = {"t_s": 0.0, "speak": False, "response": None, "mistake": None}
    nothing_done = {"dst_update": False, "dst_state": [], "transitions": []}
    assert tables["frames"][0] == ids | silent | nothing_done
    points = [row for row in tables["points"] if row["session_id"] == "fsc147/a"]
    # rows of 50 pixels: 40, 49.9 and 10 in the first, 99 and 55 in the second, each from left to right
    assert [(row["point"], row["x_px"], row["y_px"]) for row in points] == [
        *((0, 20, 40), (1, 100, 49.9), (2, 150, 10)),
        *((3, 5, 99), (4, 10, 55)),
    ]
    assert [row["x"] for row in points] == pytest.approx([-0.8, 0.0, 0.5, -0.95, -0.9])
    assert [row["y"] for row in points] == pytest.approx([-0.2, -0.002, -0.8, 0.98, 0.1])
    assert points[0]["source_row"] == f"{made / ANNOTATIONS}, a.jpg, point 2"
    # The corners belong to the picture; what is marked twice stays.
    edges = [(row["x"], row["y"]) for row in tables["points"] if row["session_id"] == "fsc147/edges"]
    assert edges == [(-1, -1), (pytest.approx(-0.93), pytest.approx(-0.85)), edges[1], (1, 1)]
    assert not [row for row in tables["points"] if row["session_id"] == "fsc147/empty"]
    assert tables["steps"] == tables["turns"] == []


def test_what_is_wrong_is_a_reject(made: Path, tmp_path: Path) -> None:
    text = (made / ANNOTATIONS).read_text()
    twice = text.replace('"empty.jpg":', '"empty.jpg": {"points": [[1, 1]]}, "empty.jpg":')
    put(made, ANNOTATIONS, twice)
    assert twice != text
    result = run("prepare", "--source", "fsc147", "--root", made, "--out", tmp_path, "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "1 images without a category, whose goal is now 'objects'" in result.stdout
    assert "1 objects of JSON files with a name more than once, of which the last counts" in result.stdout
    rejects = rows_of(tmp_path / "fsc147", "rejects")
    found = [(Path(row["source_file"]).name, row["locator"], row["reason"]) for row in rejects]
    points = [(number, "outside the image") for number in (2, 3, 4)]
    points += [(number, "not a point") for number in (5, 6, 7, 8, 9, 10, 11)]
    assert Counter(found) == Counter(
        [
            *((ANNOTATIONS, f"edges.jpg, point {number}", reason) for number, reason in points),
            (ANNOTATIONS, "gone.jpg", "image is not there"),
            ("broken.jpg", "header", "image cannot be opened"),
            ("named.jpg", "header", "image cannot be opened"),
            (ANNOTATIONS, "moving.gif", "not a JPEG, PNG, WebP or BMP"),
            (ANNOTATIONS, "list.jpg", "no points"),
            (ANNOTATIONS, "none.jpg", "no points"),
            (ANNOTATIONS, "nowhere.jpg", "in no split"),
            (SPLITS, "val, row 2", "in two splits"),
            (SPLITS, "train, row 4", "second row of one image"),
            (SPLITS, "train, row 5", "not a name"),
            (SPLITS, "bare.jpg", "no annotation"),
            (SPLITS, "spare", "not a split"),
            (CATEGORIES, "row 2", "too few columns"),
            (CATEGORIES, "row 5", "second row of one image"),
            (CATEGORIES, "row 6", "no annotation"),
            (CATEGORIES, "row 7", "unreadable row"),
            (CATEGORIES, "row 8", "too many columns"),
            (CATEGORIES, "row 9", "no category"),
        ]
    )


def test_two_pictures_whose_names_make_one_id(tmp_path: Path) -> None:
    """The second is a reject, and the first stays."""
    root, names = tmp_path / "data", ["b c.jpg", "b-c.jpg", "b-c.jpeg"]
    put(root, ANNOTATIONS, {name: {"points": [[number, 1]]} for number, name in enumerate(names)})
    put(root, SPLITS, {"train": names, "val": [], "test": []})
    for name in names:
        picture(root, name)
    tables = tables_of(root, tmp_path / "out")
    assert [(row["session_id"], row["x_px"]) for row in tables["points"]] == [("fsc147/b-c", 0)]
    assert [(row["locator"], row["reason"], row["detail"]) for row in tables["rejects"]] == [
        ("b-c.jpeg", "second image of one id", "b c.jpg"),
        ("b-c.jpg", "second image of one id", "b c.jpg"),
    ]


def test_drawn_marks_are_ticks(made: Path, tmp_path: Path) -> None:
    options = ("--root", made, "--out", tmp_path, "--workers", "1", "--marks", "drawn")
    assert run("prepare", "--source", "fsc147", *options).exit_code == 0
    labels = tmp_path / "fsc147"
    assert validate_labels(labels) == []
    videos = {row["video_id"]: row for row in rows_of(labels, "videos")}
    assert videos["fsc147/a"]["marks"] == [[20, 40], [100, 49.9], [150, 10], [5, 99], [10, 55]]
    assert videos["fsc147/empty"]["marks"] == []  # which is drawn, as nothing
    assert [row["last_tick_needed"] for row in videos.values()] == [5, 4, 0]
    assert [row["num_ticks"] for row in rows_of(labels, "sessions")] == [6, 5, 1]
    ticks = [
        (row["tick"], row["t_s"]) for row in rows_of(labels, "frames") if row["session_id"] == "fsc147/a"
    ]
    assert ticks == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 2.5)]
    assert json.loads((labels / "about.json").read_text())["marks"] == "drawn"


def test_the_size_is_that_of_the_upright_picture(made: Path, tmp_path: Path) -> None:
    """A camera held upright writes the picture lying, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(made, "a.jpg", 100, 200, exif=exif)
    points = [row for row in tables_of(made, tmp_path / "out")["points"] if row["session_id"] == "fsc147/a"]
    assert [row["x"] for row in points] == pytest.approx([-0.8, 0.0, 0.5, -0.95, -0.9])


def test_the_official_folders(made: Path, tmp_path: Path) -> None:
    """The files of a clone of the repository lie in its folder ``data``; the table of categories need not be there."""
    clone = tmp_path / "clone/LearningToCountEverything/data"
    shutil.copytree(made, clone)
    (clone / CATEGORIES).unlink()
    tables = tables_of(tmp_path / "clone", tmp_path / "out")
    assert [row["goal"] for row in tables["sessions"]] == ["objects"] * 3
    assert tables["videos"][0]["uri"] == str(clone / PICTURES / "a.jpg")
    about = json.loads((tmp_path / "out/fsc147/about.json").read_text())
    assert about["notes"] == {"images without a category, whose goal is now 'objects'": 3}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--dialogs", "d"],
            "fsc147 has pictures, not dialogues; leave --dialogs, --level and --view away",
        ),
        (
            ["--level", "substep"],
            "fsc147 has pictures, not dialogues; leave --dialogs, --level and --view away",
        ),
        (
            ["--view", "left"],
            "fsc147 has pictures, not dialogues; leave --dialogs, --level and --view away",
        ),
        (
            ["--source", "wtag", "--marks", "drawn"],
            "wtag has no pictures to draw marks on; leave --marks away",
        ),
        (
            ["--source", "all", "--marks", "drawn"],
            "--marks is for one corpus of pictures; name it with --source",
        ),
    ],
)
def test_options_that_do_not_fit(made: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    out = tmp_path / "out"
    assert mistake("prepare", "--source", "fsc147", "--root", made, "--out", out, *arguments) == sentence
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            ANNOTATIONS,
            None,
            r"no fsc147 annotations: nothing at .*/annotation_FSC147_384\.json; ask at https",
        ),
        (SPLITS, None, r"no fsc147 annotations: nothing at .*/Train_Test_Val_FSC_147\.json; ask at https"),
        (
            ANNOTATIONS,
            "[1, 2]",
            r"annotation_FSC147_384\.json is not a table by name but '\[1, 2\]'; fetch it",
        ),
        (ANNOTATIONS, '{"a.jpg": {"poi', r"annotation_FSC147_384\.json is not whole JSON"),
        (SPLITS, "{}", r"gave no session; what was read and not used: in no split \(11\)"),
    ],
)
def test_files_that_cannot_be_used(
    made: Path, tmp_path: Path, name: str, content: str | None, sentence: str
) -> None:
    if content is None:
        (made / name).unlink()
    else:
        (made / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        prepare("fsc147", made, tmp_path / "out", Clock())
    assert not (tmp_path / "out/fsc147").exists()


# ---- the sample


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "fsc147"
    write_sample("fsc147", folder, sessions=96, seed=5)
    return folder


def annotations_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / ANNOTATIONS).read_text())
    return found


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_second_reading_of_a_sample(sampled: Path, tmp_path: Path) -> None:
    tables = tables_of(sampled, tmp_path)
    categories = dict(line.split("\t") for line in (sampled / CATEGORIES).read_text().splitlines())
    names = json.loads((sampled / SPLITS).read_text())
    split_of = {name: split for split, chosen in names.items() for name in chosen}
    marked: dict[str, list[dict[str, Any]]] = {}
    for row in tables["points"]:
        marked.setdefault(row["session_id"], []).append(row)
    assert tables["rejects"] == []
    assert len(tables["sessions"]) == len(annotations_of(sampled)) == 96
    for session in tables["sessions"]:
        name = session["session_id"].removeprefix("fsc147/") + ".jpg"
        assert (session["goal"], session["split"]) == (categories[name], split_of[name])
        with av.open(str(sampled / PICTURES / name)) as container:
            frame = next(container.decode(video=0))
        points = annotations_of(sampled)[name]["points"]
        wanted = sorted(points, key=lambda point: (point[1] // 50, point[0]))
        found = marked.get(session["session_id"], [])
        assert [[row["x_px"], row["y_px"]] for row in found] == wanted
        for row, (x, y) in zip(found, wanted, strict=True):
            assert (row["x"], row["y"]) == pytest.approx((2 * x / frame.width - 1, 2 * y / frame.height - 1))
            file, _, number = row["source_row"].rpartition(f", {name}, point ")
            assert (file, points[int(number) - 1]) == (str(sampled / ANNOTATIONS), [x, y])


def test_what_a_sample_holds(sampled: Path) -> None:
    annotated = annotations_of(sampled)
    names = json.loads((sampled / SPLITS).read_text())
    assert {split: len(chosen) for split, chosen in names.items()} == {"train": 68, "val": 14, "test": 14}
    assert sorted(name for chosen in names.values() for name in chosen) == sorted(annotated)
    for chosen in names.values():
        counts = [len(annotated[name]["points"]) for name in chosen]
        assert sum(21 <= count <= 60 for count in counts) == math.ceil((len(counts) - 1) / 12)
        assert sum(count == 0 for count in counts) == math.ceil((len(counts) - 3) / 30)
        assert max(counts) <= 60
    sizes = set()
    for name, annotation in annotated.items():
        with Image.open(sampled / PICTURES / name) as image:
            width, height = image.size
        assert (annotation["W"], annotation["H"]) == (2 * width, 2 * height)  # of an original
        sizes.add((width, height))
        assert len(annotation["box_examples_coordinates"]) == min(3, len(annotation["points"]))
        for (x, y), box in zip(annotation["points"], annotation["box_examples_coordinates"], strict=False):
            (left, top), (right, bottom) = box[0], box[2]
            assert left > -0.02
            assert right < width + 0.02
            assert (x, y) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.02)
            assert 13.9 <= right - left <= 40.1
    assert {height for _, height in sizes} == {384}
    assert (384, 384) in sizes
    assert max(sizes)[0] > 400


def test_each_point_is_an_object(sampled: Path) -> None:
    """Patches of the colour at the points, counted, in pictures where nothing touches and nothing has a hole."""
    categories = dict(line.split("\t") for line in (sampled / CATEGORIES).read_text().splitlines())
    looked_at = 0
    for name, annotation in annotations_of(sampled).items():
        points = np.array(annotation["points"]).reshape(-1, 2)
        look, shape = categories[name].split()
        if not len(points) or shape == "rings" or look in ("striped", "dotted"):
            continue
        box = annotation["box_examples_coordinates"][0]
        apart = np.hypot(*(points[:, None] - points[None]).T) + 1000 * np.eye(len(points))
        if apart.min() < box[2][0] - box[0][0]:
            continue
        image = np.asarray(Image.open(sampled / PICTURES / name)).astype(int)
        colour = image[int(points[0, 1]), int(points[0, 0])]
        patches, count = ndimage.label(np.abs(image - colour).max(axis=2) < 50)
        areas = ndimage.sum_labels(np.ones(patches.shape), patches, range(1, count + 1))
        centres = np.array(ndimage.center_of_mass(np.ones(patches.shape), patches, range(1, count + 1)))
        found = centres[areas > 20][:, ::-1] + 0.5  # of a pixel, its middle
        assert len(found) == len(points), name
        assert np.hypot(*(found[:, None] - points[None]).T).min(axis=0).max() < 1.5, name
        looked_at += 1
    assert looked_at > 30


def test_the_same_arguments_give_the_same_bytes(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, folder in ((5, "again"), (6, "other")):
        arguments = (
            "--source",
            "fsc147",
            "--out",
            tmp_path / folder,
            "--sessions",
            "96",
            "--seed",
            str(seed),
        )
        result = run("sample", *arguments)
        assert f"96 sessions in {tmp_path / folder}; next: dst prepare --source fsc147" in result.stdout
    assert hashes(tmp_path / "again") == hashes(sampled)
    assert hashes(tmp_path / "other")[f"{PICTURES}/1.jpg"] != hashes(sampled)[f"{PICTURES}/1.jpg"]
    monkeypatch.setattr("pipeline.sources.fsc147._IMAGES_A_UNIT", 20)
    units: list[int] = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare("fsc147", sampled, out, Clock(), marks="drawn", workers=workers, on_plan=units.append)
    assert units == [5, 5]
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")


def test_a_sample_needs_some_of_each_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sessions 6 is too few for all splits of fsc147; give at least 7"):
        write_sample("fsc147", tmp_path / "few", sessions=6, seed=0)
    write_sample("fsc147", tmp_path / "least", sessions=7, seed=0)
    assert all(json.loads((tmp_path / "least" / SPLITS).read_text()).values())


# ---- what is told


@pytest.fixture(scope="module")
def both(labels: Path, sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label tables of a corpus of dialogues and of one of pictures."""
    folder = tmp_path_factory.mktemp("out") / "labels"
    shutil.copytree(labels, folder)
    prepare("fsc147", sampled, folder, Clock(2.0), marks="drawn")
    return folder


def test_inspect_counts(both: Path, labels: Path, sampled: Path) -> None:
    text = in_one_line(run("inspect", both).stdout)
    assert "assembly101 train val test all" in text
    assert "fsc147 train val test all" in text
    found = list(csv.DictReader(io.StringIO(run("inspect", both, "--csv").stdout)))
    assert [row["source"] for row in found] == 4 * ["assembly101"] + 4 * ["fsc147"]
    assert all(row["sessions"] and not row["pictures"] for row in found[:4])
    assert summary(both)[:4] == summary(labels)
    annotated, names = annotations_of(sampled), json.loads((sampled / SPLITS).read_text())
    categories = dict(line.split("\t") for line in (sampled / CATEGORIES).read_text().splitlines())
    names["all"] = list(annotated)
    for row in found[4:]:
        chosen = names[row["split"]]
        counts = [len(annotated[name]["points"]) for name in chosen]
        whole = [sum(counts), min(counts), max(counts), sum(counts) + len(counts), len(counts)]
        assert [int(row[name]) for name in ("objects", "fewest", "most", "ticks", "pictures")] == whole
        assert int(row["categories"]) == len({categories[name] for name in chosen})
        quartiles = [float(row[name]) for name in ("lower_quartile", "median", "upper_quartile")]
        assert quartiles == pytest.approx(np.quantile(counts, [0.25, 0.5, 0.75]))
        assert float(row["mean"]) == pytest.approx(np.mean(counts))
        assert row["hours"] == ""


def test_inspect_draws_a_session(made: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    assert run("prepare", "--source", "fsc147", "--root", made, "--out", labels).exit_code == 0
    out = tmp_path / "picture.png"
    shown = run("inspect", labels, "--session", "fsc147/a", "--out", out)
    assert shown.stdout.splitlines() == [
        "fsc147/a",
        "  category sea shells",
        "  split    train",
        f"  picture  {made / PICTURES / 'a.jpg'}",
        "  ticks    1, marks none",
        "  objects  5",
        " mark       x       y  pixels",
        "    1  -0.800  -0.200  20, 40",
        "    2   0.000  -0.002  100, 49.9",
        "    3   0.500  -0.800  150, 10",
        "    4  -0.950   0.980  5, 99",
        "    5  -0.900   0.100  10, 55",
        f"picture in {out}",
    ]
    drawn = np.asarray(Image.open(out)).astype(int)
    assert drawn.shape == (200, 400, 3)  # twice as large
    green = drawn[..., 1] - drawn[..., 0] > 80
    for x, y in ((20, 40), (100, 49.9), (150, 10), (5, 99), (10, 55)):
        assert green[round(2 * y) - 8, round(2 * x)] or green[round(2 * y), round(2 * x) + 9]
    assert not green[100, 300]
    (made / PICTURES / "a.jpg").unlink()
    gone = run("inspect", labels, "--session", "fsc147/a", "--out", tmp_path / "none.png")
    assert gone.exit_code == 0
    assert f"no picture: {made / PICTURES / 'a.jpg'} is not there" in gone.stderr
    assert not (tmp_path / "none.png").exists()
    assert "not used, because" in run("inspect", labels).stdout


# ---- the check of tables


@pytest.mark.parametrize(
    ("table", "at", "values", "problem"),
    [
        ("points", 1, {"point": 7}, "the points of session fsc147/a are not counted from 0"),
        ("points", 0, {"session_id": "fsc147/zz"}, "points of session fsc147/zz, which is no picture's"),
        (
            "points",
            7,
            {"session_id": "fsc147/a"},
            "the points of session fsc147/a are not one after the other",
        ),
        ("points", 1, {"y_px": 50.0, "y": 0.0}, "the points of session fsc147/a are not in reading order"),
        ("points", 2, {"x": 1.01}, "session fsc147/a point 2: x is 1.01, outside the picture"),
        (
            "points",
            2,
            {"y": -1.0},
            "session fsc147/a point 2: y is -1.0, which is not y_px 10.0 of a whole number",
        ),
        (
            "points",
            3,
            {"x": -0.9504},
            "session fsc147/a point 3: x is -0.9504, which is not x_px 5.0 of a whole",
        ),
        ("points", 3, {"x": -0.9}, "the points of session fsc147/a are x of pictures of [100, 200] pixels"),
        (
            "points",
            4,
            {"x_px": 11.0, "x": -0.89},
            "session fsc147/a has other points than the marks of its video",
        ),
        ("videos", 0, {"marks": None}, "session fsc147/a has not a tick for each state of its picture, 1"),
        (
            "videos",
            2,
            {"last_tick_needed": 1},
            "session fsc147/empty has not a tick for each state of its picture, 1",
        ),
        (
            "videos",
            2,
            {"marks": [[1.0, 1.0]]},
            "session fsc147/empty has other points than the marks of its video",
        ),
    ],
)
def test_the_check_sees_what_is_wrong(
    made: Path, tmp_path: Path, table: str, at: int, values: dict[str, Any], problem: str
) -> None:
    tables_of(made, tmp_path, marks="drawn")
    rows = rows_of(tmp_path / "fsc147", table)
    rows[at] = rows[at] | values
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[table]), tmp_path / "fsc147" / f"{table}.parquet")
    problems = validate_labels(tmp_path / "fsc147")
    assert any(each.startswith(problem) for each in problems), problems

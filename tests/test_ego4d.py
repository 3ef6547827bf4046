"""Ego4D GoalStep: files written by hand, the real excerpt read a second time, the synthetic corpus and its groups."""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import polars as pl
import pytest
from conftest import put

from pipeline.cache import cache_features
from pipeline.decode import tick_frames
from pipeline.engines import Here
from pipeline.prepare import prepare
from pipeline.sample.corpus import write_sample
from pipeline.sample.render import Clip, Painter, write_videos
from pipeline.sample.world import make_recordings
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.tables import validate_labels

Steps = dict[str, tuple[str, str | None, list[tuple[float, float]]]]


def segment(start: Any, end: Any, name: Any, relevant: str = "essential", **more: Any) -> dict[str, Any]:
    times = {"start_time": start, "end_time": end}
    about = {"step_category": "Cook: Stir", "step_description": name, "is_continued": False}
    return {**times, **about, "is_relevant": relevant, "segments": [], **more}


def again(start: float, end: float, name: str, **more: Any) -> dict[str, Any]:
    return segment(start, end, name, is_continued=True, **more)


def record(uid: str, *segments: Any, goal: Any = "Make tea", **more: Any) -> dict[str, Any]:
    about = {"goal_category": "COOKING:MAKE_A_TEA", "goal_description": goal}
    return {"video_uid": uid, "start_time": 0, "end_time": 9, **about, "segments": list(segments), **more}


def table(labels: Path, name: str) -> list[dict[str, Any]]:
    return pl.read_parquet(labels / "ego4d" / f"{name}.parquet").to_dicts()


def plans(labels: Path) -> dict[str, Steps]:
    """Of each video, its steps by their ids in the order of the plan: name, parent, spans."""
    found: dict[str, Steps] = {}
    for row in table(labels, "steps"):
        spans = [(span["start_s"], span["end_s"]) for span in row["spans"]]
        assert len(row["source_rows"]) == len(spans)
        uid = row["session_id"].removeprefix("ego4d/")
        found.setdefault(uid, {})[row["step_id"]] = (row["name"], row["parent"], spans)
    return found


def rejects(labels: Path) -> list[tuple[str, str, str]]:
    return sorted((Path(r["source_file"]).name, r["locator"], r["reason"]) for r in table(labels, "rejects"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A train, a test and both val files, in the folder the download makes; two groups of videos."""
    root = tmp_path / "corpus"
    cut = [segment(3, 4, "peel"), segment(4, 5, "halve", "unsure"), segment(7, 8, "crush")]
    deep = [again(21, 22, "Peel", segments=[segment(1, 2, "deep")])]
    tea = [
        segment(10, 12, "  Boil\n water ", segments=cut[:2]),
        segment(20, 25, "pour", "optional", segments=deep),
        again(14, 16, "boil  WATER"),
        segment(16, 18, "boil water"),
        again(30, 31, "boil water", segments=cut[2:]),
        again(32, 33, "boil water", step_category="Cook: Heat"),
        segment(5, 6, None),
        segment(5, 6, "", step_category=None),
        segment(9, 8, "backwards"),
        segment(float("nan"), 8, "never"),
        segment("soon", 8, "never"),
        segment(None, None, "some time"),
        "what",
        segment(40, 41, "sip", "Essential"),
        segment(40, 41, "sip", ["optional", {"a": None}]),
    ]
    group = [segment(1, 2, "stir"), segment(7, 9, "serve", segments=[segment(7, 8, "lift")])]
    train = [record("one", *tea, goal=" Make tea`"), record("grp-a", *group, goal=None), {"no": "uid"}, 5]
    train += [record("one"), record("two", segments={"a": 1}), record("grp-x", *group), record("grp-y")]
    queries = [{"step_description": "slice", "segment_count": 2}]  # what the official test file has
    videos: dict[str, list[Any]] = {
        "train": train,
        "val": [record("five", group[0], goal=7, goal_category=None)],
        "valid": [record("five", group[0])],
        "test": [{"video_uid": "six", "step_segments": queries}],
    }
    for split, records in videos.items():
        put(root, f"v2/annotations/goalstep_{split}.json", {"videos": records})
    put(root, "v2/annotations/goalstep_split_stats.json", "not even JSON")
    rows = ["university\tvideo_group", "u\t['a', 'b', 'c']", "u\t['one']", "u\t[a]", "u\t[]"]
    rows += ["u\t['b', 'd']", "u", "u\t['five', '../six']", ""]
    put(root, "v2/annotations/goalstep_video_groups.tsv", "\n".join(rows))
    return root


def test_steps_worked_by_hand(corpus: Path, tmp_path: Path) -> None:
    counts = prepare("ego4d", corpus, tmp_path, Clock())
    assert counts.sessions == {"train": 2, "val": 1}
    assert validate_labels(tmp_path / "ego4d") == []
    assert plans(tmp_path) == {
        "one": {
            "S7": ("Stir", None, [(5, 6)]),
            "S1": ("Boil water", None, [(10, 12), (14, 16)]),
            "S4": ("boil water", None, [(16, 18), (30, 31)]),
            "S6": ("boil water", None, [(32, 33)]),
        },
        "grp-a": {"S1": ("stir", None, [(1, 2)]), "S2": ("serve", None, [(7, 9)])},
        "five": {"S1": ("stir", None, [(1, 2)])},
    }
    assert list(plans(tmp_path)["one"]) == ["S7", "S1", "S4", "S6"]  # in order of time
    path = corpus / "v2" / "annotations" / "goalstep_train.json"
    [boil] = [row for row in table(tmp_path, "steps") if row["name"] == "Boil water"]
    assert boil["source_rows"] == [f"{path}, video one, segment 1", f"{path}, video one, segment 3"]
    goals = [(row["session_id"][6:], row["goal"], row["split"]) for row in table(tmp_path, "sessions")]
    in_train = [("one", "Make tea", "train"), ("grp-a", "Make a tea", "train")]
    assert goals == [*in_train, ("five", "Do the task", "val")]
    folder = corpus / "v2" / "video_540ss"
    videos = {row["video_id"]: (row["recording_id"], row["uri"]) for row in table(tmp_path, "videos")}
    assert videos == {
        "ego4d/one": ("one", str(folder / "one.mp4")),
        "ego4d/five": ("five", str(folder / "five.mp4")),
        "ego4d/grp-a": ("grp-a", f"concat:{folder}/a.mp4|{folder}/b.mp4|{folder}/c.mp4"),
    }


def test_every_segment_that_is_not_used_is_listed(corpus: Path, tmp_path: Path) -> None:
    prepare("ego4d", corpus, tmp_path, Clock())
    level = "not the annotation of level step"
    in_train = [
        ("ego4d/two", "no steps"),
        ("video grp-a, segment 2, segment 1", level),
        *((f"video grp-x, segment {n}", "unknown video group") for n in ("1", "2", "2, segment 1")),
        ("video grp-y", "unknown video group"),
        *((f"video one, segment {n}", level) for n in ("1, segment 1", "1, segment 2", "5, segment 1")),
        *((f"video one, segment 2, segment 1{more}", level) for more in ("", ", segment 1")),
        ("video one, segment 2", "is_relevant optional"),
        ("video one, segment 8", "no description"),
        ("video one, segment 9", "ends before it starts"),
        *((f"video one, segment {n}", "not a time") for n in (10, 11)),
        ("video one, segment 12", "no times"),
        ("video one, segment 13", "unknown form"),
        *((f"video one, segment {n}", "is_relevant unknown") for n in (14, 15)),
        ("video two, segment 1", "no times"),
        *((f"videos {n}", "unknown form") for n in (3, 4)),
        ("videos 5, video one", "second record of a video"),
    ]
    elsewhere = [
        ("goalstep_split_stats.json", "file name", "unknown file"),
        ("goalstep_test.json", "ego4d/six", "no steps"),
        ("goalstep_test.json", "video six, segment 1", "no times"),
        ("goalstep_valid.json", "videos 1, video five", "second record of a video"),
        *(("goalstep_video_groups.tsv", f"row {n}", "not a list of videos") for n in (4, 5, 8)),
        ("goalstep_video_groups.tsv", "row 6", "video in two groups"),
        ("goalstep_video_groups.tsv", "row 7", "too few columns"),
    ]
    assert rejects(tmp_path) == sorted([*elsewhere, *(("goalstep_train.json", *row) for row in in_train)])
    unknown = [r["detail"] for r in table(tmp_path, "rejects") if r["reason"] == "is_relevant unknown"]
    assert unknown == ["'Essential': sip", "['optional', {'a': None}]: sip"]


def test_substeps_are_judged_by_themselves(corpus: Path, tmp_path: Path) -> None:
    counts = prepare("ego4d", corpus, tmp_path, Clock(), level="substep")
    assert plans(tmp_path) == {
        "one": {"S1.1": ("peel", "S1", [(3, 4), (21, 22)]), "S5.1": ("crush", "S5", [(7, 8)])},
        "grp-a": {"S2.1": ("lift", "S2", [(7, 8)])},
    }
    found = Counter(reason for _, _, reason in rejects(tmp_path))
    assert (counts.rejects, found["is_relevant unsure"]) == (found, 1)
    # the mappings of one, what is below a substep, the tops of grp-a, two, five and six
    assert found["not the annotation of level substep"] == 14 + 1 + 2 + 1 + 1 + 1


def test_a_group_is_one_recording(corpus: Path, tmp_path: Path) -> None:
    """Also where a member is annotated by itself, or spoken about and not annotated."""
    annotations = corpus / "v2" / "annotations"
    content = {"videos": [record("b", segment(1, 2, "stir"))]}
    talk = {"conversation": [{"role": "user", "time": 1.0, "content": "Hi"}], "dst": "step\tA\t1\t2\tput"}
    spoken = ("c", "seven", "eight", "../c", "grp-a", "grp-one", "d" * 400)
    lines = "".join(json.dumps({"video_uid": uid, **talk}) + "\n" for uid in spoken)
    put(corpus, "dialogs/dst_val.jsonl", lines)
    for name in ("c", "seven", "one", "../c"):
        put(corpus, f"v2/video_540ss/{name}.mp4", "no video")
    put(annotations, "goalstep_train_more.json", content)
    prepare("ego4d", corpus, tmp_path, Clock())
    recordings = {row["video_id"][6:]: row["recording_id"] for row in table(tmp_path, "videos")}
    singles = {"one": "one", "five": "five", "seven": "seven", "grp-one": "one"}
    assert recordings == {"grp-a": "grp-a", "b": "grp-a", "c": "grp-a", **singles}
    splits = {row["session_id"].split("/")[1]: row["split"] for row in table(tmp_path, "sessions")}
    in_train = dict.fromkeys(("one", "grp-one", "grp-a", "b", "c"), "train")  # where the annotations have it
    assert splits == {**in_train, "five": "val", "seven": "val"}
    unknown = [locator for _, locator, reason in rejects(tmp_path) if reason == "unknown video_uid"]
    assert unknown == ["row 3", "row 4", "row 7"]
    put(annotations, "goalstep_test.json", content)
    with pytest.raises(UserError, match=r"'b' is in 'test' by .*_test\.json and in 'train' by .*_more\.json"):
        prepare("ego4d", corpus, tmp_path, Clock())
    inside = segment(1, 2, "stir", segments=[segment(1, 2, "lift")])
    put(annotations, "goalstep_train_more.json", {"videos": []})
    put(annotations, "goalstep_test.json", {"videos": [record("b", inside, "what"), record("c")]})
    prepare("ego4d", corpus, tmp_path, Clock())
    of_group = {row["video_id"][6:] for row in table(tmp_path, "videos") if row["recording_id"] == "grp-a"}
    assert of_group == {"grp-a"}  # whose split counts, although its file is read after that of its members
    crossing = [row[:2] for row in rejects(tmp_path) if row[2] == "its recording is in another split"]
    where = ("video b, segment 1", "video b, segment 1, segment 1", "video b, segment 2", "video c")
    assert crossing == [("goalstep_test.json", locator) for locator in where]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("goalstep_val.json", '{"videos": [', r"goalstep_val\.json is not whole JSON.*fetch it again"),
        ("goalstep_val.json", {"videos": {}}, r"goalstep_val\.json has no list 'videos'; fetch it again"),
        ("goalstep_video_groups.tsv", "a\tb\n", r"groups\.tsv has no column 'video_group'"),
        ("goalstep_video_groups.tsv", "", r"groups\.tsv has no column 'video_group'"),
    ],
)
def test_unreadable_files(corpus: Path, tmp_path: Path, name: str, content: Any, sentence: str) -> None:
    put(corpus, f"v2/annotations/{name}", content)
    with pytest.raises(UserError, match=sentence):
        prepare("ego4d", corpus, tmp_path / "out", Clock())
    assert not (tmp_path / "out" / "ego4d").exists()


def test_where_files_may_lie(corpus: Path, tmp_path: Path) -> None:
    folder = corpus / "v2" / "annotations"
    for root in (corpus, corpus / "v2", folder):
        assert prepare("ego4d", root, tmp_path, Clock()).rows["sessions"] == 3
    (folder / "goalstep_video_groups.tsv").unlink()
    assert prepare("ego4d", folder, tmp_path, Clock()).rejects["unknown video group"] == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no ego4d annotations: nothing at .*goalstep_\*\.json; ask at"):
        prepare("ego4d", tmp_path / "empty", tmp_path, Clock())


# The real excerpt, where it lies beside the repository: read in place, with a second reading of our own.

EXCERPTS = Path(__file__).parents[2] / "shared" / "samples" / "ego4d"
CORPORA = [EXCERPTS] if EXCERPTS.is_dir() else []


def second_reading(video: dict[str, Any], level: str) -> tuple[list[Any], int]:
    """Names and spans of the plan, and how many segments are not in it."""
    tops = video["segments"]
    chosen = tops if level == "step" else [part for top in tops for part in top["segments"]]
    used = [part for part in chosen if part["is_relevant"] == "essential"]
    used.sort(key=lambda part: (part["start_time"], part["end_time"]))
    words = [(part["step_category"] + "|" + part["step_description"]).strip().lower() for part in used]
    owner: list[int] = []  # of each used segment: which of them its step begins with
    for n, part in enumerate(used):
        same = [m for m in range(n) if words[m] == words[n]]
        owner.append(owner[same[-1]] if part["is_continued"] and same else n)
    plan = []
    for n in sorted(set(owner)):
        mine = [part for m, part in zip(owner, used, strict=True) if m == n]
        spans = [(part["start_time"], part["end_time"]) for part in mine]
        plan.append((" ".join(mine[0]["step_description"].split()), spans))
    return plan, sum(1 + len(top["segments"]) for top in tops) - len(used)


@pytest.mark.parametrize("level", ["step", "substep"])
@pytest.mark.parametrize("root", CORPORA)
def test_the_excerpt(root: Path, level: str, tmp_path: Path) -> None:
    counts = prepare("ego4d", root, tmp_path, Clock(), level=level)
    assert validate_labels(tmp_path / "ego4d") == []
    annotations = root / "ego4d_track2" / "v2" / "annotations"
    videos = json.loads((annotations / "goalstep_val.json").read_text())["videos"]
    found, unused = plans(tmp_path), 0
    for video in videos:
        plan, left = second_reading(video, level)
        unused += left + (not plan)  # without any step, the session is a reject too
        got = [(name, spans) for name, _, spans in found.pop(video["video_uid"], {}).values()]
        assert got == plan
    assert found == {}
    assert len(rejects(tmp_path)) == unused == sum(counts.rejects.values())
    rows = list(csv.DictReader((annotations / "goalstep_video_groups.tsv").open(), delimiter="\t"))
    groups = {f"ego4d/grp-{ids[0]}": ids for ids in (ast.literal_eval(row["video_group"]) for row in rows)}
    uris = {row["video_id"]: row["uri"] for row in table(tmp_path, "videos") if "grp-" in row["video_id"]}
    [(group, uri)] = uris.items()
    assert [Path(part).stem for part in uri.split("|")] == groups[group]


# The synthetic corpus, whose recordings 5, 11 and 17 are groups. Here only these are drawn.


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def write_parts(clips: list[Clip], on_video: Callable[[], None]) -> None:
        assert len({clip.path for clip in clips}) == 15 + 2 + 3 + 2
        write_videos([clip for clip in clips if clip.end - clip.start < clip.recording.duration], on_video)

    folder = tmp_path_factory.mktemp("data") / "ego4d"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.sample.corpus.write_videos", write_parts)
        write_sample("ego4d", folder, 18, 4)
    return folder


def test_the_sample_is_what_is_seen(sample: Path, tmp_path: Path) -> None:
    counts = prepare("ego4d", sample, tmp_path, Clock())
    assert validate_labels(tmp_path / "ego4d") == []
    assert (counts.sessions, counts.missing_videos) == ({"train": 13, "val": 2, "test": 3}, 15)
    unused = {"is_relevant irrelevant", "is_relevant unsure", "not the annotation of level step"}
    assert set(counts.rejects) == unused
    videos = {row["video_id"][6:]: row for row in table(tmp_path, "videos")}
    seen = {}  # of each plan, its video and the times from the first to the last of each step
    for uid, steps in plans(tmp_path).items():
        spans = tuple((round(spans[0][0] * 30), round(spans[-1][1] * 30)) for _, _, spans in steps.values())
        seen[spans] = uid
        assert any(len(spans) > 1 for _, _, spans in steps.values())
    parts = []
    for recording in make_recordings(18, 4, most_episodes=1):
        uid = seen.pop(tuple(sorted((step.start, step.end) for step in recording.episodes[0].steps)))
        if "grp-" not in uid:
            continue
        assert videos[uid]["duration_s"] == pytest.approx(float(recording.duration), abs=0.04)
        parts.append(len(videos[uid]["uri"].split("|")))
        painter = Painter(recording)
        for frame in list(tick_frames(videos[uid]["uri"], Clock(2.0)))[::7]:
            picture = painter.picture(Fraction(frame.pts_s).limit_denominator(60_000)).astype(int)
            assert np.abs(frame.image - picture).mean() < 6
    assert (parts, seen) == ([2, 3, 2], {})


def test_a_group_is_cached(sample: Path, tiny_model: Path, tmp_path: Path) -> None:
    annotations = sample / "v2" / "annotations"
    videos = json.loads((annotations / "goalstep_val.json").read_text())["videos"]
    groups = [video for video in videos if video["video_uid"].startswith("grp-")]
    put(tmp_path, "corpus/goalstep_val.json", {"videos": groups})
    name = "goalstep_video_groups.tsv"
    put(tmp_path, f"corpus/{name}", (annotations / name).read_text())
    (tmp_path / "corpus" / "video_540ss").symlink_to(sample / "v2" / "video_540ss")
    prepare("ego4d", tmp_path / "corpus", tmp_path, Clock())
    summary = cache_features(tmp_path / "ego4d", tmp_path / "shards", Here(VisionEncoder(tiny_model, "cpu")))
    [video] = table(tmp_path, "videos")
    assert (summary.failures, summary.ticks) == ([], video["last_tick_needed"] + 1)
    seconds = []
    for path in video["uri"].removeprefix("concat:").split("|"):
        with av.open(path) as file:
            seconds.append(file.streams.video[0].frames / float(file.streams.video[0].average_rate or 0))
    assert video["duration_s"] == pytest.approx(sum(seconds))
    assert summary.ticks > 2 * sum(seconds[:2])  # into the third part

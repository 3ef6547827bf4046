"""What a cache takes over from an earlier one: other tables, other plans, other places, other labels."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from little import (
    Video,
    at_step,
    before_rename_to,
    die,
    ended,
    files,
    finished_are_whole,
    make_video,
    options,
    run,
    start,
    vision_files,
    write_clip,
    write_tables,
)
from numpy.typing import NDArray

from pipeline.cache import dry_run, relabel
from pipeline.engines import Here
from pipeline.shards import ShardCache
from pipeline.vision import VisionEncoder
from schemas.errors import UserError

TICKS = {"a": 12, "b": 70, "c": 9, "d": 20, "e": 6, "f": 15}


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Video]:
    """Six videos by name. Leave the files as they are."""
    folder = tmp_path_factory.mktemp("clips")
    return {name: make_video(folder, name, ticks, seed=ticks) for name, ticks in TICKS.items()}


@pytest.fixture
def mine(clips: dict[str, Video], tmp_path: Path) -> dict[str, Video]:
    """Copies of the videos, to be removed."""
    (tmp_path / "videos").mkdir()
    copied = {name: Path(shutil.copy(each.path, tmp_path / "videos")) for name, each in clips.items()}
    return {name: each.at(copied[name]) for name, each in clips.items()}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Frames that went through a tower, batch by batch."""
    counts: list[int] = []
    begin = VisionEncoder.start

    def counting(self: VisionEncoder, frames: NDArray[np.uint8]) -> Any:
        counts.append(len(frames))
        return begin(self, frames)

    monkeypatch.setattr(VisionEncoder, "start", counting)
    return counts


def remove(*videos: Video) -> None:
    for video in videos:
        video.path.unlink()


def ledger(out: Path, stem: str = "vision-00000") -> dict[str, Any]:
    return json.loads((out / "ledger" / f"{stem}.json").read_text())


# ---- other videos and shards


@pytest.mark.parametrize("kinds", [("tar", "float16"), ("h5", "int8")], ids=" ".join)
def test_a_corpus_that_grows(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int], kinds: tuple[str, str]
) -> None:
    """Videos before, between and after: the plan shifts. Of the old videos no file is there any more."""
    storage, dtype = kinds
    old, new = [mine[name] for name in "bde"], [mine[name] for name in "acf"]
    grown = write_tables(tmp_path / "grown", [*old, *new])
    run(grown, tmp_path / "fresh", encoder, storage=storage, dtype=dtype)
    run(write_tables(tmp_path / "labels", old), tmp_path / "out", encoder, storage=storage, dtype=dtype)
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["shards"] for name in ("out", "fresh")]
    assert [[shard["videos"] for shard in plan] for plan in plans] == [
        [["b"], ["d", "e"]],
        [["a"], ["b"], ["c", "d", "e", "f"]],
    ]
    remove(*old)
    estimate, _ = dry_run(
        grown, tmp_path / "out", Here(encoder), options(storage=storage, dtype=dtype), seconds=0
    )
    assert (estimate.ticks, estimate.ticks_to_encode) == (132, sum(video.ticks for video in new))
    encoded.clear()
    summary = run(grown, tmp_path / "out", encoder, storage=storage, dtype=dtype)
    assert summary.failures == []
    assert sum(encoded) == summary.ticks == sum(video.ticks for video in new)
    assert summary.ticks_reused == sum(video.ticks for video in old)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_corpus_that_shrinks(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    some = write_tables(tmp_path / "some", [mine[name] for name in "ace"])
    run(some, tmp_path / "fresh", encoder, ticks=20)
    run(write_tables(tmp_path / "labels", list(mine.values())), tmp_path / "out", encoder, ticks=20)
    remove(*mine.values())
    encoded.clear()
    assert run(some, tmp_path / "out", encoder, ticks=20).failures == []
    assert encoded == []
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_shards_of_another_size(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    labels = write_tables(tmp_path / "labels", list(mine.values()))
    for size in (20, 1000):
        run(labels, tmp_path / f"fresh-{size}", encoder, ticks=size)
    run(labels, tmp_path / "out", encoder)
    remove(*mine.values())
    encoded.clear()
    for size in (20, 1000, 20):
        summary = run(labels, tmp_path / "out", encoder, ticks=size)
        assert (summary.ticks, summary.failures) == (0, [])
        assert files(tmp_path / "out") == files(tmp_path / f"fresh-{size}")
    assert encoded == []


def test_parts_of_an_array_job_take_over_what_is_theirs(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path
) -> None:
    old = write_tables(tmp_path / "old", [mine[name] for name in "abcde"])
    grown = write_tables(tmp_path / "grown", list(mine.values()))
    run(grown, tmp_path / "fresh", encoder)
    run(old, tmp_path / "out", encoder)
    remove(*(mine[name] for name in "abcde"))
    ticks = [run(grown, tmp_path / "out", encoder, part=part, of=2).ticks for part in (0, 1)]
    assert ticks == [TICKS["f"], 0]  # f joins the last of three shards
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def rearranged(labels: Path, out: Path, model: Path, step: int, count: Path) -> None:
    """Make shards of another size, and die before a step of that."""
    encoder = VisionEncoder(model, "cpu")
    done = at_step(step, out, die)
    run(labels, out, encoder, ticks=24)
    count.write_text(str(done[0]))


def test_killed_at_any_step(
    mine: dict[str, Video], encoder: VisionEncoder, tiny_model: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """No feature is lost, although no video is there: what was, was always there under one name or another."""
    videos = [mine[name].needing(6) for name in "abcd"]
    labels, before, count = write_tables(tmp_path / "labels", videos), tmp_path / "before", tmp_path / "count"
    run(labels, tmp_path / "fresh", encoder, ticks=24)
    run(labels, before, encoder, ticks=12)
    remove(*videos)
    encoded.clear()
    wanted = files(tmp_path / "fresh")
    assert len(vision_files(before)) == 2
    assert len(vision_files(tmp_path / "fresh")) == 1
    step = 0
    while not count.exists():
        step += 1
        out = tmp_path / "out"
        shutil.copytree(before, out)
        process = start(rearranged, labels, out, tiny_model, step, count, output=tmp_path / "said")
        assert ended(process) == (0 if count.exists() else -9)
        finished_are_whole(out)
        summary = run(labels, out, encoder, ticks=24)
        assert summary.failures == [], step
        assert files(out) == wanted, step
        shutil.rmtree(out)
    assert encoded == []
    assert step - 1 == int(count.read_text()) > 20


# ---- other files


def test_another_video_of_the_same_name(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    labels = write_tables(tmp_path / "labels", list(mine.values()))
    run(labels, tmp_path / "out", encoder)
    before = vision_files(tmp_path / "out")
    write_clip(mine["d"].path, TICKS["d"], seed=999)
    run(labels, tmp_path / "fresh", encoder)
    remove(*(mine[name] for name in "abcef"))
    encoded.clear()
    summary = run(labels, tmp_path / "out", encoder)
    assert sum(encoded) == summary.ticks == TICKS["d"]
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    after = vision_files(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == ["vision-00002.tar"]


def replaced(labels: Path, out: Path, model: Path, name: str) -> None:
    encoder = VisionEncoder(model, "cpu")
    before_rename_to(out / name, die)
    run(labels, out, encoder)


@pytest.mark.parametrize("name", ["vision-00000.tar", "ledger/vision-00000.json"])
def test_killed_when_another_video_takes_its_place(
    mine: dict[str, Video], encoder: VisionEncoder, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """The new shard has as many bytes as the old one: neither is taken for the other."""
    labels, out = write_tables(tmp_path / "labels", [mine["d"]]), tmp_path / "out"
    run(labels, out, encoder)
    write_clip(mine["d"].path, TICKS["d"], seed=999)
    assert ended(start(replaced, labels, out, tiny_model, name, output=tmp_path / "said")) == -9
    finished_are_whole(out)
    run(labels, out, encoder)
    run(labels, tmp_path / "fresh", encoder)
    assert files(out) == files(tmp_path / "fresh")


def test_a_folder_that_was_moved(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    run(write_tables(tmp_path / "labels", list(mine.values())), tmp_path / "out", encoder)
    before = vision_files(tmp_path / "out")
    (tmp_path / "videos").rename(tmp_path / "elsewhere")
    moved = [video.at(tmp_path / "elsewhere" / video.path.name) for video in mine.values()]
    labels = write_tables(tmp_path / "labels", moved)
    run(labels, tmp_path / "fresh", encoder)
    encoded.clear()
    summary = run(labels, tmp_path / "out", encoder)
    assert (summary.shards_kept, summary.shards_made, encoded) == (3, 0, [])
    assert vision_files(tmp_path / "out") == before
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert ShardCache(tmp_path / "out").session("a/early").meta["uri"] == str(moved[0].path)


# ---- other numbers of ticks


def test_fewer_ticks_than_before(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    """Also across a chunk's border."""
    fewer = [mine["a"].needing(5), mine["b"].needing(64), mine["d"]]
    labels = write_tables(tmp_path / "fewer", fewer)
    run(labels, tmp_path / "fresh", encoder)
    run(write_tables(tmp_path / "labels", [mine[name] for name in "abd"]), tmp_path / "out", encoder)
    remove(*(mine[name] for name in "abd"))
    encoded.clear()
    assert run(labels, tmp_path / "out", encoder).failures == []
    assert encoded == []
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert ShardCache(tmp_path / "out").num_ticks("b") == 64


def test_more_ticks_than_before(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    less = [mine["a"], mine["b"].needing(30), mine["d"]]
    run(write_tables(tmp_path / "labels", less), tmp_path / "out", encoder)
    labels = write_tables(tmp_path / "more", [mine[name] for name in "abd"])
    run(labels, tmp_path / "fresh", encoder)
    remove(mine["a"], mine["d"])
    encoded.clear()
    assert run(labels, tmp_path / "out", encoder).failures == []
    assert sum(encoded) == TICKS["b"]
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def break_inside(video: Video, path: Path) -> Video:
    """A copy with zeros in place of a picture in its middle, which all pictures after it need."""
    with av.open(str(video.path)) as container:
        pictures = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    picture, data = pictures[len(pictures) // 2], video.path.read_bytes()
    assert data.count(picture) == 1
    path.write_bytes(data.replace(picture, bytes(len(picture))))
    return video.at(path)


def test_ticks_that_cannot_be_read_stay_so(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    """The ledger tells of them what it would after a fresh run, for as many ticks as are needed now."""
    broken = break_inside(mine["b"], tmp_path / "videos" / "broken.mp4")
    needs = (70, 40, 36, 35, 10)
    tables = {ticks: write_tables(tmp_path / f"labels-{ticks}", [broken.needing(ticks)]) for ticks in needs}
    for ticks, labels in tables.items():
        run(labels, tmp_path / f"fresh-{ticks}", encoder)
    run(tables[70], tmp_path / "out", encoder)
    [(first, end, _)] = ledger(tmp_path / "out")["videos"]["b"]["unreadable"]
    assert (first, end) == (35, 70)
    remove(broken)
    encoded.clear()
    for ticks in needs:
        run(tables[ticks], tmp_path / "out", encoder)
        assert encoded == []
        assert files(tmp_path / "out") == files(tmp_path / f"fresh-{ticks}"), ticks


def test_a_video_that_ended_before_is_not_tried_again(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]
) -> None:
    """The ledger says why it ended, for as long as more is needed."""
    out, labels = tmp_path / "out", tmp_path / "labels"
    run(write_tables(labels, [mine["d"].needing(30)]), out, encoder)
    entry = ledger(out)
    assert (entry["videos"]["d"]["ticks"], entry["videos"]["d"]["needed"]) == (20, 30)
    entry["videos"]["d"]["unreadable"] = [[5, 8, "damaged"], [20, 20, "breaks off"]]
    (out / "ledger" / "vision-00000.json").write_text(json.dumps(entry))
    encoded.clear()
    told = [[5, 8, "damaged"], [20, 20, "breaks off"]]
    for needed, ticks, wanted in (
        (40, 20, told),
        (21, 20, told),
        (20, 20, told[:1]),
        (7, 7, [[5, 7, "damaged"]]),
        (5, 5, None),
    ):
        write_tables(labels, [mine["d"].needing(needed)])
        assert dry_run(labels, out, Here(encoder), options())[0].ticks_to_encode == 0
        run(labels, out, encoder)
        got = ledger(out)["videos"]["d"]
        assert (got["ticks"], got["needed"], got.get("unreadable")) == (ticks, needed, wanted)
    assert encoded == []


# ---- relabelling


def test_relabel(mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path, encoded: list[int]) -> None:
    """New words and other sessions, with no video there; the labels are those of a fresh cache."""
    videos, out = list(mine.values()), tmp_path / "out"
    run(write_tables(tmp_path / "labels", videos), out, encoder)
    before = {name: (digest, (out / name).stat().st_mtime_ns) for name, digest in vision_files(out).items()}
    other = [mine["a"].needing(7), *videos[1:3], replace(mine["d"], sessions=(("d/mid", 3, 9),)), *videos[4:]]
    labels = write_tables(tmp_path / "other", other, word="Quite another word.")
    run(labels, tmp_path / "fresh", encoder)
    remove(*videos)
    encoded.clear()
    summary = relabel(labels, out)
    assert (summary.shards_kept, summary.failures, encoded) == (3, [], [])
    after = {name: (digest, (out / name).stat().st_mtime_ns) for name, digest in vision_files(out).items()}
    assert after == before
    fresh, got = files(tmp_path / "fresh"), files(out)
    assert {n: d for n, d in got.items() if "labels-" in n} == {
        n: d for n, d in fresh.items() if "labels-" in n
    }
    sessions: dict[str, Any] = {}
    for path in sorted(out.glob("labels-*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".turns.json"):
                    [turn] = json.load(tar.extractfile(name) or pytest.fail(name))
                    sessions[name.removesuffix(".turns.json")] = (turn["text"], turn["tick"])
    wanted = {s[0]: ("Quite another word.", s[1]) for video in other for s in video.sessions}
    assert sessions == wanted
    assert len(sessions) == 10


def test_relabel_tells_what_is_not_there(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path
) -> None:
    labels, out = tmp_path / "labels", tmp_path / "out"
    run(write_tables(labels, [mine["a"], mine["b"].needing(30), mine["d"]]), out, encoder)
    before = vision_files(out)
    write_tables(labels, [mine["a"], mine["b"], mine["c"], replace(mine["d"], rotation_deg=90)])
    summary = relabel(labels, out)
    gone = "its video c is not in the cache: run 'dst cache-features'"
    turned = "d was cached with a rotation of 0, the tables say 90: run 'dst cache-features'"
    wanted = {
        "c/early": gone,
        "c/late": gone,
        "d/early": turned,
        "d/late": turned,
        "b/early": "needs 36 ticks of b, the video has 30",
        "b/late": "needs 70 ticks of b, the video has 30",
    }
    assert {failure.id: failure.reason for failure in summary.failures} == wanted
    assert vision_files(out) == before
    assert ShardCache(out).session_ids == ["a/early", "a/late"]
    run(labels, out, encoder)  # as they say
    assert len(ShardCache(out).session_ids) == 8


def test_relabel_where_a_vision_shard_is_gone(
    mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path
) -> None:
    """Its old labels do not stay."""
    labels, out = write_tables(tmp_path / "labels", [mine["a"], mine["b"]]), tmp_path / "out"
    run(labels, out, encoder)
    (out / "vision-00001.tar").unlink()
    write_tables(labels, [mine["a"], mine["b"]], word="Quite another word.")
    assert [failure.id for failure in relabel(labels, out).failures] == ["b/early", "b/late"]
    assert ShardCache(out).session_ids == ["a/early", "a/late"]


def test_relabel_refuses(mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path) -> None:
    labels, out = write_tables(tmp_path / "labels", [mine["a"]]), tmp_path / "out"
    with pytest.raises(UserError, match=r"out holds no cache\.json, so it is not a feature cache"):
        relabel(labels, out)
    assert not out.exists()
    run(labels, out, encoder)
    before = files(out)
    other = write_tables(tmp_path / "other", [mine["a"]], tick_hz=4.0)
    with pytest.raises(
        UserError, match=r"out was made at 2\.0 ticks a second, .*other has 4\.0; prepare with"
    ):
        relabel(other, out)
    assert files(out) == before
    (out / "vision-00000.tar").unlink()
    with pytest.raises(
        UserError, match="holds no finished shard; run 'dst cache-features' without --labels-only"
    ):
        relabel(labels, out)


def relabelled(labels: Path, out: Path, step: int, count: Path) -> None:
    done = at_step(step, out, die)
    relabel(labels, out)
    count.write_text(str(done[0]))


def test_relabel_killed_at_any_step(mine: dict[str, Video], encoder: VisionEncoder, tmp_path: Path) -> None:
    videos = [mine[name].needing(6) for name in "abcd"]
    before, count = tmp_path / "before", tmp_path / "count"
    run(write_tables(tmp_path / "labels", videos), before, encoder, ticks=12)
    labels = write_tables(tmp_path / "other", videos, word="Quite another word.")
    run(labels, tmp_path / "fresh", encoder, ticks=12)
    remove(*videos)
    step = 0
    while not count.exists():
        step += 1
        shutil.copytree(before, tmp_path / "out")
        process = start(relabelled, labels, tmp_path / "out", step, count, output=tmp_path / "said")
        assert ended(process) == (0 if count.exists() else -9)
        assert relabel(labels, tmp_path / "out").failures == []
        assert files(tmp_path / "out") == files(tmp_path / "fresh"), step
        shutil.rmtree(tmp_path / "out")
    assert step > 10

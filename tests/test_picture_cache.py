"""Pictures in the feature cache: features against transformers, drawn marks as ticks, tiles, points in label shards."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from little import files, make_video, write_tables
from numpy.typing import NDArray
from PIL import Image
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from typer.testing import CliRunner

from cli import app
from pipeline.cache import Summary, cache_features, relabel
from pipeline.decode_worker import VideoTask
from pipeline.encode import EncoderSpec
from pipeline.engines import Here, Processes
from pipeline.plan import LabelTables
from pipeline.preprocess import Preprocessor
from pipeline.shards import ShardCache, reader_of, writer_of
from pipeline.stills import draw_marks, read_picture
from pipeline.todo import CacheOptions
from pipeline.verify import verify
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from schemas.shards import Fingerprint
from schemas.tables import LabelWriter, table_of

Pixels = NDArray[np.uint8]
SIZES = [(48, 64), (64, 48), (50, 50), (90, 160), (33, 61)]


@dataclass(frozen=True)
class Pic:
    """A picture and its points in reading order, in pixels."""

    id: str
    path: Path | str
    width: int
    height: int
    points: tuple[tuple[float, float], ...]


def make_pictures(folder: Path) -> list[Pic]:
    """Five of different shapes, each with more points than the one before, the first with none."""
    folder.mkdir(parents=True)
    pics = []
    for number, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        points = [(float(x), float(y)) for x, y in rng.uniform(1, 30, (number, 2)).round(2)]
        points.sort(key=lambda point: (point[1] // 50, point[0]))
        pics.append(Pic(f"fsc147/{number}", path, width, height, tuple(points)))
    return pics


def write_counting(folder: Path, pics: Sequence[Pic], drawn: bool = False) -> Path:
    """Label tables of these pictures under ``folder``."""
    with LabelWriter(folder / "fsc147") as writer:
        for pic in pics:
            ticks = len(pic.points) + 1 if drawn else 1
            session = {"session_id": pic.id, "video_id": pic.id, "source": "fsc147", "split": "train"}
            session |= {"goal": "apples", "first_tick": 0, "num_ticks": ticks, "tick_hz": 2.0, "num_steps": 0}
            frame = {"session_id": pic.id, "split": "train", "speak": False, "dst_update": False}
            frame |= {"dst_state": [], "transitions": []}
            frames = [frame | {"tick": tick, "t_s": tick / 2} for tick in range(ticks)]
            points = [
                {
                    "session_id": pic.id,
                    "point": number,
                    "x": 2 * x / pic.width - 1,
                    "y": 2 * y / pic.height - 1,
                    "x_px": x,
                    "y_px": y,
                    "source_row": f"annotations.json, {pic.id}, {number}",
                }
                for number, (x, y) in enumerate(pic.points)
            ]
            rows = {"frames": table_of("frames", frames), "points": table_of("points", points)}
            writer.add_sessions([session | {"dialog_origin": "none"}], [pic.id], rows)
        writer.add_videos(
            {
                "video_id": pic.id,
                "source": "fsc147",
                "recording_id": pic.id,
                "uri": str(pic.path),
                "rotation_deg": 0,
                "last_tick_needed": len(pic.points) if drawn else 0,
                "marks": [list(point) for point in pic.points] if drawn else None,
            }
            for pic in pics
        )
    return folder


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> VisionEncoder:
    return VisionEncoder(tiny_model, "cpu")


@pytest.fixture
def pics(tmp_path: Path) -> list[Pic]:
    return make_pictures(tmp_path / "pictures")


def made(labels: Path, out: Path, encoder: VisionEncoder, **options: Any) -> Summary:
    return cache_features(labels, out, Here(encoder), CacheOptions(**({"workers": 2} | options)))


class Reference:
    """transformers' own processor and model."""

    def __init__(self, folder: Path) -> None:
        self._processor = SmolVLMImageProcessorPil.from_pretrained(folder)
        self._model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def features(self, image: Pixels, split: bool = False) -> NDArray[np.float32]:
        """Of the pictures that the processor makes of one, ``[n, tokens, dim]``."""
        given = self._processor(image, do_image_splitting=split, return_tensors="np")
        with torch.inference_mode():
            pixels = torch.from_numpy(given["pixel_values"][0])[:, None]
            features = self._model.get_image_features(pixels).pooler_output
        return np.stack([one.numpy() for one in features])


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


# ---- features


def test_a_picture_is_a_video_of_one_tick(
    pics: list[Pic], encoder: VisionEncoder, reference: Reference, tmp_path: Path
) -> None:
    """In both kinds of files, and beside a video with a dialog."""
    labels = write_counting(tmp_path / "labels", pics)
    write_tables(labels, [make_video(tmp_path / "videos", "a", 5, 0)])
    for storage in ("tar", "h5"):
        out = tmp_path / storage
        assert made(labels, out, encoder, storage=storage).failures == []
        cache = ShardCache(out)
        for pic in pics:
            got = cache.features(pic.id, 0, 1)
            wanted = reference.features(np.asarray(Image.open(pic.path)))
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)  # float16
            assert cache.num_ticks(pic.id) == 1
            assert cache.readable(pic.id, 0, 1).all()
            session = cache.session(pic.id)
            assert session.points == LabelTables(labels).of_session("points", pic.id).to_pylist()
            assert [(row["x_px"], row["y_px"]) for row in session.points or []] == list(pic.points)
            assert (session.meta["marks"], session.meta["goal"], session.steps) == ("none", "apples", [])
        assert cache.session("a/early").points is None
        report = verify(out, labels)
        assert (report.problems, report.counts["sessions"]) == ([], 7)


def test_only_counting_sessions_have_points_in_their_records(
    pics: list[Pic], encoder: VisionEncoder, tmp_path: Path
) -> None:
    """So that shards of dialogs have the bytes that they always had."""
    labels = write_counting(tmp_path / "labels", pics[:2])
    write_tables(labels, [make_video(tmp_path / "videos", "a", 5, 0)])
    made(labels, tmp_path / "out", encoder)
    reader = reader_of(tmp_path / "out" / "labels-00000.tar")
    dialog = ["frames", "turns", "steps", "meta"]
    assert {key: reader.members(key) for key in reader.keys} == {
        "a/early": dialog,
        "a/late": dialog,
        "fsc147/0": [*dialog, "points"],
        "fsc147/1": [*dialog, "points"],
    }
    assert "marks" not in reader.json("a/early", "meta")
    assert reader.json("fsc147/0", "points") == []
    entry = json.loads((tmp_path / "out/ledger/vision-00000.json").read_text())
    assert {len(video) for video in entry["videos"].values()} == {4}  # ticks, needed, rotation, identity
    settings = json.loads((tmp_path / "out/cache.json").read_text())
    assert "tiles" not in settings
    del settings["model"]
    needs = [["a", 0, 4], ["fsc147/0", 0, 0], ["fsc147/1", 0, 0]]  # all that a key was made of before
    key = json.dumps([settings, needs], sort_keys=True).encode()
    assert entry["key"] == hashlib.sha256(key).hexdigest()


def test_drawn_marks_are_ticks(
    pics: list[Pic], encoder: VisionEncoder, reference: Reference, tmp_path: Path
) -> None:
    labels = write_counting(tmp_path / "labels", pics, drawn=True)
    out = tmp_path / "out"
    assert made(labels, out, encoder).ticks == sum(len(pic.points) + 1 for pic in pics)
    cache = ShardCache(out)
    for pic in pics:
        got = cache.features(pic.id, 0, len(pic.points) + 1)
        pixels = np.asarray(Image.open(pic.path))
        for tick, features in enumerate(got):
            wanted = reference.features(draw_marks(pixels, pic.points, tick))[0]
            np.testing.assert_allclose(features, wanted, rtol=2e-3, atol=2e-3)
        assert all((one != two).any() for one, two in itertools.pairwise(got))
        session = cache.session(pic.id)
        assert (session.meta["marks"], len(session.frames), len(session.points or [])) == (
            "drawn",
            len(got),
            len(got) - 1,
        )
    assert verify(out, labels).problems == []
    record = reader_of(out / "vision-00000.tar")
    assert record.array("fsc147/4/00000", "pts").tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_more_marks_than_a_chunk_has_ticks(encoder: VisionEncoder, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 300, 3), 200, np.uint8)).save(tmp_path / "x.png")
    points = tuple((4.0 * n, 20.0) for n in range(70))
    many = Pic("fsc147/x", tmp_path / "x.png", 300, 40, points)
    labels = write_counting(tmp_path / "labels", [many], drawn=True)
    assert made(labels, tmp_path / "out", encoder).failures == []
    got = ShardCache(tmp_path / "out").features("fsc147/x", 69, 2)
    blank = read_picture(many.path)
    resized = [encoder.preprocessor.resize(draw_marks(blank, points, tick)) for tick in (69, 70)]
    np.testing.assert_array_equal(got, encoder.encode(np.stack(resized)).astype(np.float16))
    assert verify(tmp_path / "out", labels).problems == []


def test_the_same_bytes_whoever_makes_them(pics: list[Pic], tiny_model: Path, tmp_path: Path) -> None:
    labels = write_counting(tmp_path / "labels", pics, drawn=True)
    made(labels, tmp_path / "one", VisionEncoder(tiny_model, "cpu"), workers=1)
    made(labels, tmp_path / "two", VisionEncoder(tiny_model, "cpu", batch_size=16), workers=2)
    with Processes(EncoderSpec(tiny_model, str(tiny_model)), ["cpu"]) as engine:
        cache_features(labels, tmp_path / "three", engine, CacheOptions(workers=2))
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "three")


def test_decord_is_not_asked_for_pictures(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    row = {"rotation_deg": 0, "last_tick_needed": 1, "marks": None}
    for uri, marks, decoder in (
        ("x.mp4", None, "decord"),
        ("x.jpg", None, "pyav"),
        ("x", [[1.0, 2.0]], "pyav"),
    ):
        assert VideoTask.of(0, uri, row | {"marks": marks}, "decord").decoder == decoder
    Path(pics[1].path).write_bytes(b"no picture")
    labels = write_counting(tmp_path / "labels", pics)
    summary = made(labels, tmp_path / "out", encoder, decoder="decord")
    assert (summary.ticks, summary.notes) == (4, [])
    assert summary.failures[0].reason.endswith("holds no JPEG, PNG, WebP or BMP picture")


def test_pictures_that_lie_elsewhere(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    there = []
    for pic in pics:
        address = f"/test-pictures/{Path(pic.path).name}"
        memory.pipe_file(address, Path(pic.path).read_bytes())
        there.append(replace(pic, path=f"memory:/{address}"))
    gone = replace(pics[0], id="fsc147/gone", path="memory://test-pictures/gone.png")
    summary = made(write_counting(tmp_path / "there", [*there, gone], drawn=True), tmp_path / "out", encoder)
    made(write_counting(tmp_path / "here", pics, drawn=True), tmp_path / "other", encoder)
    assert {failure.id for failure in summary.failures} == {"fsc147/gone"}
    got, wanted = ShardCache(tmp_path / "out"), ShardCache(tmp_path / "other")
    for pic in pics:
        ticks = len(pic.points) + 1
        np.testing.assert_array_equal(got.features(pic.id, 0, ticks), wanted.features(pic.id, 0, ticks))
    assert not list((tmp_path / "out").rglob("fetched-*"))


# ---- what is broken, and what has changed


def test_broken_pictures_fail_alone(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    paths = [Path(pic.path) for pic in pics]
    whole = [path.read_bytes() for path in paths]
    paths[1].unlink()
    paths[2].write_bytes(whole[2][: len(whole[2]) // 2])
    paths[3].write_bytes(b"no picture")
    labels, out = write_counting(tmp_path / "labels", pics, drawn=True), tmp_path / "out"
    summary = made(labels, out, encoder)
    entry = json.loads((out / "ledger/vision-00000.json").read_text())
    assert list(entry["videos"]) == ["fsc147/0", "fsc147/4"]
    reasons = {failure["id"]: failure["reason"] for failure in entry["failures"]}
    assert reasons.keys() == {"fsc147/1", "fsc147/2", "fsc147/3"}
    assert reasons["fsc147/1"] == f"{paths[1]} is not there"
    assert reasons["fsc147/2"].startswith(f"{paths[2]} cannot be read as a picture (")
    assert reasons["fsc147/3"] == f"{paths[3]} holds no JPEG, PNG, WebP or BMP picture"
    assert len(summary.failures) == 6  # their sessions, too
    assert ShardCache(out).session_ids == ["fsc147/0", "fsc147/4"]
    assert verify(out, labels).problems == []
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data)
    again = made(labels, out, encoder, retry_failed=True)
    assert (again.failures, again.ticks, again.ticks_reused) == ([], 2 + 3 + 4, 1 + 5)
    made(labels, tmp_path / "fresh", encoder)
    assert files(out) == files(tmp_path / "fresh")


def test_changed_marks_are_drawn_again(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    labels = write_counting(tmp_path / "labels", pics, drawn=True)
    made(labels, out, encoder)
    assert made(labels, out, encoder).shards_kept == 1
    (x, y), *others = pics[3].points
    changed = [*pics[:3], replace(pics[3], points=((x + 0.5, y), *others)), pics[4]]
    write_counting(labels, changed, drawn=True)
    told = relabel(labels, out).failures
    assert [failure.id for failure in told] == ["fsc147/3"]
    assert "other marks" in told[0].reason
    summary = made(labels, out, encoder)
    assert (summary.ticks, summary.ticks_reused, summary.failures) == (4, 1 + 2 + 3 + 5, [])
    made(labels, tmp_path / "fresh", encoder)
    assert files(out) == files(tmp_path / "fresh")


def test_marks_that_are_drawn_no_longer(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    """Nothing is taken over, not even tick 0, which would be the same: too little to be clever about."""
    out = tmp_path / "out"
    labels = write_counting(tmp_path / "labels", pics, drawn=True)
    made(labels, out, encoder)
    write_counting(labels, pics)
    assert made(labels, out, encoder).ticks == 5
    made(labels, tmp_path / "fresh", encoder)
    assert files(out) == files(tmp_path / "fresh")


def test_another_picture_under_the_name(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    labels = write_counting(tmp_path / "labels", pics)
    made(labels, tmp_path / "out", encoder)
    shutil.copy(pics[1].path, pics[2].path)
    summary = made(labels, tmp_path / "out", encoder)
    assert (summary.ticks, summary.ticks_reused) == (1, 4)


def test_a_table_that_asks_for_more_ticks_than_marks(
    pics: list[Pic], encoder: VisionEncoder, tmp_path: Path
) -> None:
    labels = write_counting(tmp_path / "labels", pics[:1])
    more = replace(pics[0], points=((1.0, 1.0), (2.0, 1.0)))
    drawn = write_counting(tmp_path / "drawn", [more], drawn=True)
    for name in ("sessions", "frames", "points"):
        shutil.copy(drawn / "fsc147" / f"{name}.parquet", labels / "fsc147")
    with pytest.raises(
        UserError, match=r"on ticks 0 to 2 of 'fsc147/0', which videos\.parquet does not have"
    ):
        made(labels, tmp_path / "out", encoder)


def test_marks_that_are_no_points(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    for odd in ((1.0,), (float("nan"), 2.0)):
        labels = write_counting(
            tmp_path / "labels", [replace(pics[0], points=(odd + (0.0,) * (2 - len(odd)),))], True
        )
        rows = {"video_id": "fsc147/0", "source": "fsc147", "recording_id": "fsc147/0", "uri": "x.png"}
        rows |= {"rotation_deg": 0, "last_tick_needed": 1, "marks": [list(odd)]}
        pq.write_table(table_of("videos", [rows]), labels / "fsc147/videos.parquet")
        with pytest.raises(UserError, match="marks on 'fsc147/0' that are not pairs of numbers"):
            made(labels, tmp_path / "out", encoder)


# ---- what a label record must hold


def rewrite(out: Path, session_id: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the members of the one session of a cache, in its file and what the ledger says of that."""
    path, entry = out / "labels-00000.tar", out / "ledger/labels-00000.json"
    reader = reader_of(path)
    record: dict[str, Any] = {
        name: reader.json(session_id, name) for name in ("turns", "steps", "meta", "points")
    }
    record["frames"] = reader.table(session_id, "frames")
    change(record)
    new = out / "new.tar"  # the old one is mapped
    with writer_of("tar", new) as writer:
        writer.add(session_id, record)
    new.replace(path)
    data = path.read_bytes()
    known = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    entry.write_text(json.dumps(json.loads(entry.read_text()) | known))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda points, meta: points[0].update(point=5), "its points are not those of this session"),
        (
            lambda points, meta: points[0].update(session_id="fsc147/3"),
            "its points are not those of this session",
        ),
        (lambda points, meta: points[1].update(x=1.5), "point 1 lies outside of the picture"),
        (lambda points, meta: points[1].update(y=float("nan")), "point 1 lies outside of the picture"),
        (
            lambda points, meta: points[1].update(x_px=float("inf")),
            "its points have pixels that are no numbers",
        ),
        (lambda points, meta: points[2].update(y_px=777.0), "its points are not in reading order"),
        (lambda points, meta: points[1].update(y_px=3.25), "was not cached with its points drawn on it"),
        (lambda points, meta: points.pop(), "it has 5 ticks in place of 4: 3 points, marks 'drawn'"),
        (lambda points, meta: meta.update(marks="none"), "was cached with marks drawn on it"),
        (lambda points, meta: meta.update(marks=3), "its marks are 3"),
        (lambda points, meta: points[0].pop("x"), "has points that are not rows of that table"),
        (lambda points, meta: points[0].update(x=None), "has points that are not rows of that table"),
        (lambda points, meta: meta.update(dialog_origin="human"), "has points and is a dialog"),
    ],
)
def test_points_that_do_not_fit(
    pics: list[Pic], encoder: VisionEncoder, tmp_path: Path, change: Any, told: str
) -> None:
    labels, out = write_counting(tmp_path / "labels", pics[4:], drawn=True), tmp_path / "out"
    made(labels, out, encoder)

    def changed(record: dict[str, Any]) -> None:
        change(record["points"], record["meta"])

    rewrite(out, "fsc147/4", changed)
    problems = verify(out).problems
    assert any(told in problem and "fsc147/4" in problem for problem in problems), problems
    if "row" in told or "dialog" in told:
        with pytest.raises(UserError, match=told):
            ShardCache(out).session("fsc147/4")


def test_a_counting_session_without_points(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    labels, out = write_counting(tmp_path / "labels", pics[:1]), tmp_path / "out"
    made(labels, out, encoder)
    rewrite(out, "fsc147/0", lambda record: record.pop("points"))
    assert any(
        "fsc147/0: the session counts and has no points" in problem for problem in verify(out).problems
    )
    with pytest.raises(UserError, match="session fsc147/0 counts and has no points"):
        ShardCache(out).session("fsc147/0")


def test_tables_with_other_points(pics: list[Pic], encoder: VisionEncoder, tmp_path: Path) -> None:
    labels, out = write_counting(tmp_path / "labels", pics), tmp_path / "out"
    made(labels, out, encoder)
    before = files(out)
    write_counting(labels, [*pics[:4], replace(pics[4], points=pics[4].points[:-1])])
    [problem] = verify(out, labels).problems
    assert "fsc147/4 has other points in the cache; run 'dst cache-features --labels-only'" in problem
    assert relabel(labels, out).failures == []
    assert verify(out, labels).problems == []
    assert len(ShardCache(out).session("fsc147/4").points or []) == 3
    assert {name for name, digest in files(out).items() if before[name] != digest} == {
        "labels-00000.tar",
        "ledger/labels-00000.json",
    }


# ---- tiles


def with_edge(model: Path, out: Path, longest_edge: int) -> Path:
    """The checkpoint with another first resize."""
    shutil.copytree(model, out)
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"longest_edge": longest_edge}}))
    return out


def scene(height: int, width: int) -> Pixels:
    rng = np.random.default_rng(height * width)
    blocks = rng.integers(0, 256, (-(-height // 9), -(-width // 9), 3), np.uint8)
    return blocks.repeat(9, axis=0).repeat(9, axis=1)[:height, :width]


def laid_by_hand(tiles: Sequence[NDArray[np.float32]], n: int) -> NDArray[np.float32]:
    """Tokens of ``n x n`` tiles, each a grid of 2 x 2, in rows over the whole."""
    whole = np.empty((2 * n, 2 * n, tiles[0].shape[-1]), np.float32)
    for row in range(2 * n):
        for column in range(2 * n):
            tile = tiles[row // 2 * n + column // 2]
            whole[row, column] = tile[row % 2 * 2 + column % 2]
    return whole.reshape(4 * n * n, -1)


@pytest.mark.parametrize("n", [2, 3])
def test_tiles_of_a_square_picture_are_the_processors(tiny_model: Path, tmp_path: Path, n: int) -> None:
    """Its own splitting into crops, whose last one is the whole picture in small."""
    model = with_edge(tiny_model, tmp_path / "model", 128 * n)
    frame = scene(200, 200)
    split = Reference(model).features(frame, split=True)
    assert len(split) == n * n + 1
    encoder = VisionEncoder(model, "cpu", tiles=n)
    got = encoder.encode(encoder.preprocessor.resize(frame)[None])[0]
    assert got.shape == (encoder.tokens_per_frame, encoder.dim) == (4 * n * n, 128)
    np.testing.assert_allclose(got, laid_by_hand(list(split[:-1]), n), atol=1e-5)


@pytest.mark.parametrize("filter", ["lanczos", "bicubic"])
def test_each_tile_is_encoded_as_its_crop_alone(tiny_model: Path, filter: Any) -> None:
    alone = VisionEncoder(tiny_model, "cpu", filter=filter)
    encoder = VisionEncoder(tiny_model, "cpu", filter=filter, tiles=3, batch_size=2)
    frames = np.stack(
        [encoder.preprocessor.resize(scene(*size)) for size in ((90, 160), (160, 90), (400, 500))]
    )
    assert frames.shape == (3, 384, 384, 3)
    got = encoder.encode(frames)
    for frame, features in zip(frames, got, strict=True):
        crops = [frame[y : y + 128, x : x + 128] for y in (0, 128, 256) for x in (0, 128, 256)]
        np.testing.assert_array_equal(features, laid_by_hand(list(alone.encode(np.stack(crops))), 3))


def test_tiled_features_do_not_depend_on_batches(tiny_model: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3), np.uint8)
    found = {
        VisionEncoder(tiny_model, "cpu", 4, batch_size=n, tiles=2).encode(frames).tobytes() for n in (1, 2, 5)
    }
    assert len(found) == 1


def test_tiles_that_are_sent_to_a_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path, taken by the CPU: the tower gets as many pictures at once as without tiles, always."""
    encoder = VisionEncoder(tiny_model, "cpu", 4, tiles=2, batch_size=3)
    frames = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3), np.uint8)
    wanted, empty, features, sent = encoder.encode(frames), torch.empty, encoder._features, []

    def seen(pictures: torch.Tensor) -> torch.Tensor:
        sent.append(pictures.numpy().copy())
        return features(pictures)

    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how))
    monkeypatch.setattr(torch.cuda, "Event", MagicMock)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(encoder, "_features", seen)
    encoder._is_gpu = True
    np.testing.assert_allclose(encoder.encode(frames), wanted, atol=1e-5)
    assert {pictures.shape for pictures in sent} == {(3, 128, 128, 3)}
    tiles = [f[y : y + 128, x : x + 128] for f in frames for y in (0, 128) for x in (0, 128)]
    np.testing.assert_array_equal(np.concatenate(sent), [*tiles, *[np.zeros_like(tiles[0])] * 4])


def test_tiles_are_pooled_over_the_whole_grid(tiny_model: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 384, 384, 3), np.uint8)
    every = VisionEncoder(tiny_model, "cpu", tiles=3).encode(frame)[0].reshape(6, 6, -1)
    for tokens, window in ((9, 2), (4, 3), (1, 6)):
        got = VisionEncoder(tiny_model, "cpu", tokens, tiles=3).encode(frame)[0]
        wanted = [
            every[y : y + window, x : x + window].mean(axis=(0, 1))
            for y in range(0, 6, window)
            for x in range(0, 6, window)
        ]
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    with pytest.raises(UserError, match=r"does not fit the 6x6 grid; use 36, 9, 4, 1"):
        VisionEncoder(tiny_model, "cpu", 16, tiles=3)


def test_tiles_show_what_the_picture_has() -> None:
    """The first resize throws nothing away that the tiles could show, though the checkpoint's would."""
    values = (0.5, 0.5, 0.5)
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    tiled = Preprocessor(32, 32, values, values, 1 / 255, tiles=2)
    np.testing.assert_array_equal(tiled.resize(frame), frame)
    once = Preprocessor(32, 32, values, values, 1 / 255)
    assert once.resize(frame).shape == (32, 32, 3)
    larger = Preprocessor(96, 32, values, values, 1 / 255, tiles=2)  # goes on as the checkpoint asks
    wanted = (
        Image.fromarray(frame)
        .resize((96, 96), Image.Resampling.LANCZOS)
        .resize((64, 64), Image.Resampling.LANCZOS)
    )
    np.testing.assert_array_equal(larger.resize(frame), np.asarray(wanted))
    assert once.fingerprint() == tiled.fingerprint()


def test_a_tiled_cache(pics: list[Pic], tiny_model: Path, tmp_path: Path) -> None:
    """Of pictures and of a video, through the decode processes; and no other number of tiles goes with it."""
    labels, out = write_counting(tmp_path / "labels", pics, drawn=True), tmp_path / "out"
    video = make_video(tmp_path / "videos", "a", 5, 0)
    write_tables(labels, [video])
    encoder = VisionEncoder(tiny_model, "cpu", tiles=2)
    made(labels, out, encoder)
    cache = ShardCache(out)
    assert (cache.fingerprint.tiles, cache.fingerprint.tokens_per_frame) == (2, 16)
    for pic in pics:
        shown = [draw_marks(read_picture(pic.path), pic.points, tick) for tick in range(len(pic.points) + 1)]
        wanted = encoder.encode(np.stack([encoder.preprocessor.resize(image) for image in shown]))
        np.testing.assert_array_equal(cache.features(pic.id, 0, len(shown)), wanted.astype(np.float16))
    assert cache.features("a", 0, 5).shape == (5, 16, 128)
    assert verify(out, labels).problems == []
    with pytest.raises(
        UserError, match=r"other settings \(tokens_per_frame: 16 there, 4 now; tiles: 2 there, 1 now\)"
    ):
        made(labels, out, VisionEncoder(tiny_model, "cpu"))


def test_a_fingerprint_without_tiles_is_of_one() -> None:
    given: dict[str, Any] = {"model": "m", "vision_sha256": "0", "preprocessing": {}, "tick_hz": 2.0}
    given |= {"tokens_per_frame": 4, "dim": 8}
    one, two = Fingerprint(**given), Fingerprint(**given, tiles=2)
    assert Fingerprint.parse(json.dumps(given), "x").tiles == 1
    assert "tiles" not in one.text()
    assert "tiles" not in one.model_dump()
    assert Fingerprint.parse(two.text(), "x") == two
    assert two.model_dump()["tiles"] == 2
    for mine, other, told in ((one, two, "tiles: 2 there, 1 now"), (two, one, "tiles: 1 there, 2 now")):
        with pytest.raises(UserError, match=told):
            mine.require_equal(other, "x")
    one.require_equal(Fingerprint(**given | {"model": "elsewhere"}), "x")


# ---- the command


def test_the_command_tells_of_pictures(pics: list[Pic], tiny_model: Path, tmp_path: Path) -> None:
    labels, out = write_counting(tmp_path / "labels", pics, drawn=True), tmp_path / "out"
    command = [
        "cache-features",
        "--device",
        "cpu",
        "--labels",
        str(labels),
        "--out",
        str(out),
        "--tiles",
        "2",
    ]
    command += ["--model", str(tiny_model), "--workers", "1"]
    tried = CliRunner().invoke(app, [*command, "--dry-run"])
    assert tried.exit_code == 0, tried.output
    assert "15 frames of 5 pictures in 1 shards, 15 of them to encode" in tried.output
    assert not out.exists()
    write_tables(labels, [make_video(tmp_path / "videos", "a", 5, 0)])
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "20 frames of 1 videos and 5 pictures in 1 shards" in done.output
    assert ShardCache(out).fingerprint.tiles == 2
    for tiles in ("0", "9"):
        assert CliRunner().invoke(app, [*command[:-1], "1", "--tiles", tiles]).exit_code == 2

"""The dimensions of a released checkpoint, with random weights, through the cache and two steps of training."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipeline.align import align
from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.presets import init_model
from pipeline.shards import ShardCache
from pipeline.vision import VisionEncoder
from schemas.clock import Clock
from schemas.records import Rejects, Session, Split, Turn, Video
from schemas.states import Step
from schemas.tables import LabelWriter, validate_labels
from training.recipe import load_recipe
from training.trainer import train


def write_video(path: Path, seed: int) -> None:
    """One second of noise at 10 frames a second: two ticks."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_labels(folder: Path, splits: tuple[Split, ...]) -> None:
    """One session of two ticks for each split, written with the tables' own writer."""
    rejects = Rejects()
    videos = []
    with LabelWriter(folder / "hand") as writer:
        for number, split in enumerate(splits):
            write_video(folder / f"{split}.mp4", number)
            video = Video(f"hand/{split}", split, str(folder / f"{split}.mp4"))
            steps = (Step("S1", "open the box", ((0.0, 0.5),)), Step("S2", "close the box", ((0.5, 9.0),)))
            turns = (Turn(0.4, "assistant", "Now close the box."),)
            session = Session(
                f"hand/{split}", video, split, "Use the box", steps, turns, 0.0, 0.5, "human", "by hand"
            )
            aligned = align(session, Clock(2.0), rejects)
            assert aligned is not None
            row = {**aligned.session, "source": "hand"}
            writer.add_session(row, split, aligned.steps, aligned.turns, aligned.frames)
            videos.append(
                {
                    "video_id": video.video_id,
                    "source": "hand",
                    "recording_id": split,
                    "uri": video.uri,
                    "rotation_deg": 0,
                    "duration_s": None,
                    "last_tick_needed": aligned.last_tick,
                }
            )
        writer.add_videos(videos)
    assert validate_labels(folder / "hand") == []


def test_256m_dimensions_through_cache_and_training(tmp_path: Path) -> None:
    labels, shards, model = tmp_path / "labels", tmp_path / "shards", tmp_path / "model"
    labels.mkdir()
    write_labels(labels, ("train", "val"))
    init_model("smolvlm2-256m", model)
    encoder = VisionEncoder(model, "cpu")
    assert (encoder.tokens, encoder.dim, encoder.preprocessor.square) == (64, 576, 512)
    summary = cache_features(labels, shards, Here(encoder))
    assert summary.failures == []
    features = ShardCache(shards).features("hand/train", 0, 2)
    assert features.shape == (2, 64, 576)
    assert np.isfinite(features.astype(np.float32)).all()
    assert features.astype(np.float32).std() > 0.1

    recipe = load_recipe(
        None, [f"model.init={model}", "train.steps=2", "train.eval_every=2", "train.warmup_steps=1"]
    )
    train(shards, recipe, tmp_path / "run", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert (tmp_path / "run/checkpoints/best/model.safetensors").stat().st_size > 400_000_000

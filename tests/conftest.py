"""What several test files need, made once a run: a checkpoint, a corpus, its label tables, its feature cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.prepare import prepare
from pipeline.presets import init_model
from pipeline.sample.corpus import write_sample
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.clock import Clock


def put(root: Path, name: str, content: Any) -> Path:
    """A file under ``root``: bytes, text, or what JSON has for it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows_of(tables: Path, name: str) -> list[dict[str, Any]]:
    """A label table of one corpus."""
    rows: list[dict[str, Any]] = pq.read_table(tables / f"{name}.parquet").to_pylist()
    return rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of SmolVLM2's architecture."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    init_model("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic corpus in Assembly101's layout: 18 sessions with their videos. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("data") / "assembly101"
    write_sample("assembly101", folder, sessions=18, seed=3)
    return folder


@pytest.fixture(scope="session")
def labels(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of label tables of ``corpus`` at 2 Hz. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("out") / "labels"
    prepare("assembly101", corpus, folder, Clock(2.0))
    return folder


@pytest.fixture(scope="session")
def shards(labels: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature cache of ``labels`` with ``tiny_model``. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("cache") / "shards"
    summary = cache_features(labels, folder, Here(VisionEncoder(tiny_model, "cpu")), CacheOptions(workers=2))
    assert summary.failures == []
    return folder


@pytest.fixture(scope="session")
def short_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which says next to nothing: so little trained, its words would be long nonsense."""
    from training.recipe import load_recipe
    from training.trainer import train

    out = tmp_path_factory.mktemp("runs") / "short"
    changes = ["train.steps=2", "train.eval_every=2", "train.warmup_steps=1", "data.batch_rows=1"]
    train(shards, load_recipe("tiny", changes), out, device="cpu")
    for config in out.glob("checkpoints/*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"speaking_threshold": 0.95}))
    return out


@pytest.fixture(scope="session")
def counting_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature cache of a few small pictures to count in. Read it, do not change it."""
    from tiny_count import counting_cache, write_pictures

    folder = tmp_path_factory.mktemp("counting")
    return counting_cache(write_pictures(folder / "pictures"), tiny_model, folder)


@pytest.fixture(scope="session")
def drawn_shards(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with their marks drawn in. Read it, do not change it."""
    from tiny_count import counting_cache, write_pictures

    folder = tmp_path_factory.mktemp("drawn")
    return counting_cache(write_pictures(folder / "pictures"), tiny_model, folder, marks="drawn")

"""What several test files need, made once a run: a checkpoint, a corpus, its label tables, its feature cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.prepare import prepare
from pipeline.presets import init_model
from pipeline.sample.corpus import write_sample
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.clock import Clock


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

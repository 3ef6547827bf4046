"""Encoders as actors of a Ray cluster that is started here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest
from little import files, finished_are_whole, make_video, options, run, waited_for, write_tables

pytest.importorskip("ray")

from pipeline.cache import cache_features
from pipeline.encode import EncoderSpec
from pipeline.ray_engine import OnRay
from pipeline.vision import VisionEncoder
from schemas.errors import UserError


def test_actors(tiny_model: Path, tmp_path: Path) -> None:
    """Two make the files that one encoder makes here. An actor that cannot load says why."""
    videos = [
        make_video(tmp_path / "videos", name, 14 + number, seed=number) for number, name in enumerate("abcd")
    ]
    labels = write_tables(tmp_path / "labels", videos)
    run(labels, tmp_path / "here", VisionEncoder(tiny_model, "cpu"), ticks=24)
    with OnRay(EncoderSpec(tiny_model, str(tiny_model)), "cpu", actors=2) as engine:
        summary = cache_features(labels, tmp_path / "out", engine, options(24, workers=1))
        empty = shutil.copytree(
            tiny_model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors")
        )
        with pytest.raises(UserError) as there:
            OnRay(EncoderSpec(empty, "empty"), "cpu", actors=1)
    assert (summary.shards_made, summary.failures) == (4, [])
    assert files(tmp_path / "out") == files(tmp_path / "here")
    assert str(there.value).startswith(f"{empty} has no *.safetensors file")


def test_actors_that_are_killed(tiny_model: Path, tmp_path: Path) -> None:
    """While one of them waits for a video that does not come: the run ends with one sentence, and can be run again."""
    videos = [make_video(tmp_path / "videos", name, 14, seed) for seed, name in enumerate("abcd")]
    labels, out, fifo = write_tables(tmp_path / "labels", videos), tmp_path / "out", videos[-1].path
    encoder, killed = VisionEncoder(tiny_model, "cpu"), []
    run(labels, tmp_path / "here", encoder, ticks=15)
    fifo.rename(tmp_path / "aside")
    os.mkfifo(fifo)

    def on_tick(ticks: int) -> None:
        with waited_for(fifo):
            killed.extend(actors())
            for actor in killed:
                actor.kill()

    spec = EncoderSpec(tiny_model, str(tiny_model))
    with (
        OnRay(spec, "cpu", actors=2) as engine,
        pytest.raises(
            UserError, match=r"an encoder's actor ended \(.*\); run again, finished shards are kept"
        ),
    ):
        cache_features(labels, out, engine, options(15, workers=1), on_tick=on_tick)
    assert len(killed) == 2
    assert actors() == []
    finished_are_whole(out)
    (tmp_path / "aside").replace(fifo)
    assert run(labels, out, encoder, ticks=15).failures == []
    assert files(out) == files(tmp_path / "here")


def actors() -> list[psutil.Process]:
    """Their processes, which Ray calls by their class."""
    mine = psutil.Process().children(recursive=True)
    return [each for each in mine if "ray::_Actor" in " ".join(each.cmdline())]

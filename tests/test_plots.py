"""Pictures open, have the size they should, and are the same bytes every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from training.baselines import always_speak, copy_initial
from training.plots import curves_picture, timeline_picture
from training.traces import Trace, Track

TICKS, STEPS = 40, 3


@pytest.fixture
def trace() -> Trace:
    ticks = np.arange(TICKS)[:, None]
    starts = np.array([2, 12, 25])
    state = (ticks >= starts).astype(np.int8) + (ticks >= starts + 9)
    words: dict[int, str] = {2: "Pick up the $5 part.", 12: "Now the $6 one.", 25: "Turn\nit on. " * 20}
    responses = tuple(words.get(tick) for tick in range(TICKS))
    speak = np.array([text is not None for text in responses])
    update: NDArray[np.bool_] = np.any(np.diff(state, axis=0, prepend=0), axis=1)
    truth = Track(speak, update, state, responses)
    predicted = replace(
        truth, responses=tuple("a" if tick == 12 else words.get(tick) for tick in range(TICKS))
    )
    names = (
        "Attach",
        "Screw_the $x^",
        "A step whose name is a good deal longer than the room beside its band",
    )
    return Trace("toy/1", 2.0, 10, names, truth, predicted, None, None)


def frame(value: int, size: tuple[int, int] = (90, 160)) -> NDArray[np.uint8]:
    return np.full((*size, 3), value, dtype=np.uint8)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture that can be read whole."""
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_timeline_opens_and_repeats_to_the_byte(trace: Trace, tmp_path: Path) -> None:
    frames = [(tick, frame(tick * 4)) for tick in range(10, 50, 3)]
    for name in ("a.png", "b.png"):
        timeline_picture(trace, frames, tmp_path / name, "Toy, $held out$")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.width == 1950
        assert 700 < picture.height < 1500
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    # All three states and a word-perfect utterance are in it, in their colours.
    assert colours >= {(0xE6, 0xE8, 0xEB), (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)}


@pytest.mark.parametrize("predict", [always_speak, copy_initial])
def test_timeline_of_extremes(trace: Trace, tmp_path: Path, predict: type) -> None:
    silent = copy_initial(trace.truth)
    for truth in (trace.truth, silent):
        extreme = replace(trace, truth=truth, predicted=predict(trace.truth))
        timeline_picture(extreme, [(10, frame(0, (160, 90)))], tmp_path / "a.png", "portrait")
        timeline_picture(extreme, [], tmp_path / "b.png", "without frames")
        (width, with_frames), (same, without) = size_of(tmp_path / "a.png"), size_of(tmp_path / "b.png")
        assert width == same == 1950
        assert without < with_frames  # the room of the frames is not kept where there are none


def test_timeline_without_ticks_and_steps(tmp_path: Path) -> None:
    nothing = Track(np.zeros(0, np.bool_), np.zeros(0, np.bool_), np.zeros((0, 2), np.int8), ())
    timeline_picture(
        Trace("a", 2.0, 0, ("a", "b"), nothing, nothing, None, None), [], tmp_path / "a.png", "a"
    )
    two = np.zeros(2, np.bool_)
    planless = Track(two, two, np.zeros((2, 0), np.int8), (None, None))
    timeline_picture(Trace("a", 2.0, 0, (), planless, planless, None, None), [], tmp_path / "b.png", "b")
    assert [size_of(tmp_path / name)[0] for name in ("a.png", "b.png")] == [1950, 1950]


def test_curves_open_and_repeat_to_the_byte(tmp_path: Path) -> None:
    log: list[dict[str, float]] = [
        {"step": step, "train/loss_speaking": 1 / (step + 1), "train/loss_response": 3.0}
        for step in range(100)
    ]
    log[50]["train/loss_response"] = float("nan")
    log += [{"step": step, "val/combined": step / 100, "val/loss_speaking": 0.5} for step in (50, 99)]
    for name in ("a.png", "b.png"):
        curves_picture(log, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.size == (1950, 720)


def test_curves_of_an_empty_log(tmp_path: Path) -> None:
    curves_picture([], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()

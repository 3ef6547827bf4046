"""Pictures open, have the size they should, and are the same bytes every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.shards import LabelledSession
from schemas.tables import TABLES
from training.baselines import always_speak, copy_initial
from training.curves import curves_picture
from training.plots import labels_picture, timeline_picture
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


def labelled(steps: int, turns: int, mistake: bool | None) -> LabelledSession:
    """A session of ticks 20 to 319 whose steps start evenly apart, each in progress for half of that distance."""
    starts = np.arange(steps) * 300 // steps
    started = np.arange(300)[:, None] >= starts
    completed = np.arange(300)[:, None] >= starts + max(1, 150 // steps)
    columns = {
        "session_id": ["toy/a"] * 300,
        "split": ["val"] * 300,
        "tick": np.arange(20, 320),
        "t_s": np.arange(20, 320) / 2,
        "speak": [False] * 300,
        "response": [None] * 300,
        "dst_update": [False] * 300,
        "dst_state": (started.astype(np.int8) + completed).tolist(),
        "transitions": [[0] * steps] * 300,
        "mistake": [None if mistake is None else mistake and tick < 30 for tick in range(300)],
    }
    about = {"session_id": "toy/a", "split": "val", "goal": "Pay $5 or $6", "dialog_origin": "human"}
    return LabelledSession(
        meta=about | {"tick_hz": 2.0, "first_tick": 20, "num_ticks": 300},
        steps=[{"name": f"step_{step} costs $x^"} for step in range(steps)],
        turns=[
            {"tick": 20 + turn, "role": ("user", "assistant")[turn % 2], "text": "Now\nthis $x^" * 30}
            for turn in range(turns)
        ],
        frames=pa.table(columns, schema=TABLES["frames"]),
    )


def share_of(colour: tuple[int, int, int], path: Path) -> float:
    """Which part of a picture has a colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return float((pixels == colour).all(axis=-1).mean())


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


def test_labels_open_and_repeat_to_the_byte(tmp_path: Path) -> None:
    frames = [(tick, frame(tick // 2)) for tick in range(20, 320, 30)]
    for name in ("a.png", "b.png"):
        labels_picture(labelled(5, 30, True), frames, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]
    width, height = size_of(tmp_path / "a.png")
    assert width == 1950
    assert 900 < height < 1500
    for speaker in ((0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        assert share_of(speaker, tmp_path / "a.png") > 0


def test_labels_show_the_states_as_they_are(tmp_path: Path) -> None:
    """Areas of the bands: each of 4 steps starts at 0, 1/4, 1/2, 3/4 and is in progress for 1/8 of the session."""
    labels_picture(labelled(4, 0, False), [], tmp_path / "a.png")
    grey, orange, blue = (
        share_of(colour, tmp_path / "a.png")
        for colour in ((0xE6, 0xE8, 0xEB), (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2))
    )
    # Before 150 of 400 hundredths of the bands, in progress 50, after 200; the legend adds a little to each, and
    # the band of mistakes, empty here, more to the first.
    assert blue / orange == pytest.approx(200 / 50, rel=0.1)
    assert grey > orange * 150 / 50
    assert share_of((0xD5, 0x5E, 0x00), tmp_path / "a.png") < 0.001  # in the legend only


def test_labels_show_mistakes(tmp_path: Path) -> None:
    shares = []
    for mistake in (True, False, None):
        labels_picture(labelled(3, 2, mistake), [], tmp_path / "a.png")
        shares.append(share_of((0xD5, 0x5E, 0x00), tmp_path / "a.png"))
    assert shares[0] > 2 * shares[1] > 0
    assert shares[1] == pytest.approx(shares[2], rel=0.1)


def test_long_plans_stay_readable(tmp_path: Path) -> None:
    heights = {}
    for steps in (40, 41, 300):
        labels_picture(labelled(steps, 3, None), [], tmp_path / "a.png")
        heights[steps] = size_of(tmp_path / "a.png")[1]
        assert (
            share_of((0xE6, 0x9F, 0x00), tmp_path / "a.png") > 0.001
        )  # more than the legend: none is too thin
    assert heights[41] == heights[300] < heights[40] < 3000


def test_a_timeline_of_a_long_plan_is_not_endless(trace: Trace, tmp_path: Path) -> None:
    state = np.repeat(trace.truth.state, 50, axis=1)
    track = replace(trace.truth, state=state)
    names = tuple(f"step {number}" for number in range(150))
    timeline_picture(
        replace(trace, step_names=names, truth=track, predicted=track), [], tmp_path / "a.png", "long"
    )
    assert size_of(tmp_path / "a.png")[1] < 3000


def test_labels_without_frames_words_or_steps(tmp_path: Path) -> None:
    session = labelled(2, 0, None)
    nothing = pa.array([[]] * 300, TABLES["frames"].field("dst_state").type)
    planless = replace(session, steps=[], frames=session.frames.set_column(7, "dst_state", nothing))
    for each in (session, planless):
        labels_picture(each, [(20, frame(0, (160, 90)))], tmp_path / "a.png")
        labels_picture(each, [], tmp_path / "b.png")
        assert size_of(tmp_path / "a.png")[1] > size_of(tmp_path / "b.png")[1]


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


def test_only_losses_and_scores_are_curves(tmp_path: Path) -> None:
    """What else a step logs changes nothing; gradients of tasks, where there are cosines, get panels of their own."""
    log: list[dict[str, float]] = [
        {"step": step, "epoch": 0, "train/loss": 3.0, "train/loss_speaking": 1 / (step + 1)}
        for step in range(60)
    ]
    log[30]["val/combined"] = 0.5
    curves_picture(log, tmp_path / "plain.png")
    for row in log:
        row |= {
            "train/padding": 1e9,
            "train/clipped": 1.0,
            "train/grad_norm": 1e6,
            "train/weight_speaking": 9.0,
        }
    log[30] |= {"train/clip_share": 0.5, "grad/norm_speaking": 4.0}
    curves_picture(log, tmp_path / "more.png")
    assert (tmp_path / "more.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    for row in log[::10]:
        row |= {"grad/cos_speaking_dst_update": -0.5, "grad/norm_dst_update": 2.0}
    curves_picture(log, tmp_path / "gradients.png")
    assert size_of(tmp_path / "gradients.png") == (1950, 1440)
    with Image.open(tmp_path / "gradients.png") as both, Image.open(tmp_path / "plain.png") as plain:
        upper = np.asarray(both.convert("RGB"))[:720].astype(int) - np.asarray(plain.convert("RGB"))
    assert (np.abs(upper) > 40).mean() < 0.01  # the first two panels are as they were


TASKS = {
    "speaking": (0x00, 0x72, 0xB2),
    "dst_update": (0xD5, 0x5E, 0x00),
    "response": (0x00, 0x9E, 0x73),
    "dst_state": (0xCC, 0x79, 0xA7),
}


def panels_of(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The four panels of a picture with gradients, RGB."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    top, left = (size // 2 for size in pixels.shape[:2])
    return {
        "losses": pixels[:top, :left],
        "scores": pixels[:top, left:],
        "norms": pixels[top:, :left],
        "cosines": pixels[top:, left:],
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_colour_in_every_panel(task: str, tmp_path: Path) -> None:
    """A log of one task alone shows its colour and no other task's; two that are compared show both."""
    score = {"dst_state": "val/dst_state_joint", "response": "val/loss_response"}.get(task, f"val/{task}_f1")
    other = "response" if task != "response" else "speaking"
    log: list[dict[str, float]] = [
        {"step": step, f"train/loss_{task}": 1.0 + step, f"train/grad_norm_{task}": 2.0 + step, score: 0.5}
        for step in range(30)
    ]
    for row in log:
        first, second = sorted((task, other), key=list(TASKS).index)
        row[f"grad/cos_{first}_{second}"] = 0.5
    curves_picture(log, tmp_path / "a.png")
    for name, panel in panels_of(tmp_path / "a.png").items():
        if task == "response" and name == "scores":
            continue  # its score is a loss
        seen = {each for each, colour in TASKS.items() if (panel == colour).all(axis=-1).sum() > 50}
        assert seen == ({task, other} if name == "cosines" else {task}), name


def test_an_error_of_counts_has_a_panel_of_its_own(tmp_path: Path) -> None:
    """Beside scores of at most 1, objects would leave nothing to see; x and y are of the task that finds places."""
    log: list[dict[str, float]] = [
        {"step": step, "train/loss_x": 1.0 + step, "val/coord_error": 0.1} for step in range(30)
    ]
    curves_picture(log, tmp_path / "without.png")
    assert size_of(tmp_path / "without.png") == (1950, 720)
    for row in log:
        row["val/count_mae"] = 5.0
    curves_picture(log, tmp_path / "with.png")
    panels = panels_of(tmp_path / "with.png")
    coord = TASKS["speaking"]
    for name in ("losses", "scores"):
        assert (panels[name] == coord).all(axis=-1).sum() > 50, name
    assert not (panels["norms"] == coord).all(axis=-1).any()
    assert (panels["norms"] < 80).all(axis=-1).sum() > 3000  # in the colour of no task
    assert (panels["cosines"] == 255).all()


def test_a_norm_that_each_step_logs_is_not_drawn_again_where_a_probe_saw_it(tmp_path: Path) -> None:
    log: list[dict[str, float]] = [
        {"step": step, "train/grad_norm_speaking": 2.0 + step, "grad/cos_speaking_response": 0.1}
        for step in range(30)
    ]
    curves_picture(log, tmp_path / "without.png")
    for row in log[::10]:
        row["grad/norm_speaking"] = 2.0 + row["step"]
    curves_picture(log, tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_curves_of_an_empty_log(tmp_path: Path) -> None:
    curves_picture([], tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()

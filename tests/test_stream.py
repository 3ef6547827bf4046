"""`dst stream` as a user meets it: a video in; events, a recording, and sentences about what is wrong out."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import av
import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from cli import app
from pipeline.decode import TickFrame, tick_frames
from pipeline.live import Gap
from pipeline.shards import ShardCache
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.task import Task, read_task
from training.assistant import Assistant, Event
from training.board import Board
from training.evaluate import evaluate
from training.recording import HEIGHT, PANEL, recording
from training.stream import _paced, read_words, stream

PLAN = "goal: Assemble the toy\nsteps:\n- attach the wheel\n- attach the roof\n"


@pytest.fixture(scope="module")
def video(shards: Path) -> Path:
    cache = ShardCache(shards)
    return Path(cache.session(next(iter(cache.session_ids))).meta["uri"])


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def talking(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It updates at any tick and speaks as often as its gap lets it."""
    run = shutil.copytree(short_run, tmp_path_factory.mktemp("runs") / "talking")
    config = run / "checkpoints/best/config.json"
    often = {"speaking_threshold": 0.0, "dst_update_threshold": 0.0, "min_gap_ticks": 25}
    config.write_text(json.dumps(json.loads(config.read_text()) | often))
    return run


def dst(run: Path, video: Path | str, plan: Path, *more: str) -> Result:
    arguments = ["stream", "--run", str(run), "--video", str(video), "--plan", str(plan), "--device", "cpu"]
    return CliRunner().invoke(app, [*arguments, *more])


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_events_are_those_of_the_assistant(talking: Path, video: Path, plan: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("0.9 hello\n\n3 what comes next?\n")
    record = tmp_path / "seen/it.mp4"
    more = ("--words", str(words), "--events", str(tmp_path / "events.jsonl"), "--record", str(record))
    result = dst(talking, video, plan, *more)
    assert result.exit_code == 0, result.output
    assistant = Assistant.load(talking, Task("Assemble the toy", ("attach the wheel", "attach the roof")))
    assistant.hear("hello", 0.9)
    assistant.hear("what comes next?", 3.0)
    expected, ticks = [], 0
    for frame in tick_frames(video, Clock(2.0)):
        expected += [event.row() for event in assistant.step(frame.image, frame.tick / 2)]
        ticks += 1
    assert rows(result.stdout) == expected == rows((tmp_path / "events.jsonl").read_text())
    assert {"speak", "state", "user", "window"} <= {row["kind"] for row in expected}
    assert [(row["tick"], row["text"]) for row in expected if row["kind"] == "user"] == [
        (2, "hello"),
        (6, "what comes next?"),
    ]
    with av.open(str(record)) as film:
        stream = film.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert (stream.average_rate, len(frames)) == (2, ticks)
    assert "the stream ended at" in result.stderr
    assert f"{sum(row['kind'] == 'speak' for row in expected)} speak" in result.stderr


def test_a_recording_shows_picture_and_state_at_their_ticks(tmp_path: Path) -> None:
    board = Board(Task("goal", ("one", "two")))
    colours = [(200, 30, 30), (30, 30, 200), (30, 160, 30)]
    with recording(tmp_path / "film.mp4", 2.0) as recorder:
        for tick, colour in enumerate(colours):
            board.take(
                tick / 2, [Event("state", tick, tick / 2, step=0, state="in_progress")] if tick else []
            )
            recorder.take(np.full((90, 120, 3), colour, dtype=np.uint8), board)
        board.take(2.0, [Event("gap", 3, 1.5, text="no picture for 1 s", end_tick=5)])
        recorder.take(None, board, 2)
    with av.open(str(tmp_path / "film.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (HEIGHT, 640 + PANEL, 3)
    for frame, colour in zip(frames, [*colours, (10, 53, 10), (10, 53, 10)], strict=True):
        assert np.abs(frame[100:380, 100:540].mean(axis=(0, 1)) - colour).max() < 12
    panels = [frame[:, 640:] for frame in frames]
    orange = [int(((panel[..., 0] > 180) & (panel[..., 2] < 90)).sum()) for panel in panels]
    assert orange[0] == 0 < orange[1]  # the step in progress, and later the words about the picture
    assert orange[3] > orange[2]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, UserError("gave no picture for 60 s")])
def test_what_was_recorded_before_an_end_is_kept(tmp_path: Path, ending: Any) -> None:
    board = Board(Task("goal", ("one",)))

    def ended(pictures: int) -> None:
        with recording(tmp_path / "film.mp4", 2.0) as recorder:
            recorder.take(None, board, 2)
            for _ in range(pictures):
                recorder.take(np.zeros((64, 80, 3), dtype=np.uint8), board)
            raise ending

    expected = ending if isinstance(ending, type) else type(ending)
    with pytest.raises(expected):
        ended(0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(expected):
        ended(3)
    with av.open(str(tmp_path / "film.mp4")) as film:
        frames = list(film.decode(video=0))
    assert len(frames) == 5  # the gap before the first picture, too
    assert frames[0].width == 600 + PANEL
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_pictures_of_another_shape_are_not_stretched(tmp_path: Path) -> None:
    board = Board(Task("goal", ("one",)))
    with recording(tmp_path / "film.mp4", 2.0) as recorder:
        recorder.take(np.full((48, 96, 3), 200, dtype=np.uint8), board)
        recorder.take(np.full((96, 48, 3), 200, dtype=np.uint8), board)
    with av.open(str(tmp_path / "film.mp4")) as film:
        _, tall = [frame.to_ndarray(format="rgb24")[:, :960] for frame in film.decode(video=0)]
    assert np.abs(tall[100, 380:580].astype(int) - 200).max() < 12  # 240 wide, in the middle
    assert tall[100, :340].max() < 60
    assert tall[100, 620:].max() < 60


def test_a_video_that_ends_early_is_seen_to_there(
    talking: Path, video: Path, plan: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.ts"
    with av.open(str(video)) as source, av.open(str(cut), "w", format="mpegts") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2 + 77])
    result = dst(talking, cut, plan)
    assert result.exit_code == 0, result.output
    gaps = [row for row in rows(result.stdout) if row["kind"] == "gap"]
    assert len(gaps) == 1
    assert "gap" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("goal: Make tea\nsteps: []\n", "it has no steps"),
        ("goal: Make tea\nsteps:\n", "it has no steps"),
        ("goal: Make tea\nsteps: [boil, pour, boil]\n", "two steps are named 'boil'"),
        ("goal: ''\nsteps: [boil]\n", "it has no goal"),
        ("goal: Make tea\nsteps: [boil, ' ']\n", "a step has no name"),
        ("steps: [boil]\n", "must hold goal and steps"),
        ("goal: Make tea\nsteps: {a: 1}\n", "steps a list of texts"),
        ("goal: Make tea\nsteps: [1, 2]\n", "steps a list of texts"),
        ("goal: [Make tea\n", "is not YAML"),
        ("- boil\n", "must hold goal and steps"),
    ],
)
def test_a_plan_that_cannot_be_followed(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as told:
        read_task(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_wrong_is_told_in_a_sentence(
    short_run: Path, video: Path, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("3 hello\nlater: what?\n")
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    bare, kept, before = (
        shutil.copytree(short_run, tmp_path / "bare"),
        tmp_path / "kept.jsonl",
        video.read_bytes(),
    )
    kept.write_text("of last week")
    config = bare / "checkpoints/best/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"speaking_threshold": None}))
    cases: list[tuple[Sequence[Any], str]] = [
        ((short_run, tmp_path / "none.mp4", plan), "none.mp4 is not there"),
        ((short_run, tmp_path / "noise.mp4", plan), "cannot be opened as a video"),
        ((short_run, video, tmp_path / "none.yaml"), "none.yaml cannot be read"),
        ((tmp_path, video, plan), "is not a run"),
        ((short_run, video, plan, "--checkpoint", "bset"), "has no checkpoint 'bset'"),
        ((short_run, video, plan, "--words", str(tmp_path / "words.txt")), "line 2 is not seconds and words"),
        ((short_run, video, plan, "--record", str(plan / "film.mp4")), "plan.yaml: File exists"),
        ((short_run, video, plan, "--events", str(plan / "e.jsonl")), "e.jsonl cannot be written"),
        ((bare, video, plan), "has no thresholds"),
        ((short_run, video, plan, "--record", str(video)), "named twice"),
        ((short_run, video, plan, "--events", str(plan)), "named twice"),
        ((short_run, tmp_path / "none.mp4", plan, "--events", str(kept)), "none.mp4 is not there"),
        ((short_run, video, plan, "--rotate", "45"), "--rotate 45 is not"),
        ((short_run, video, plan, "--record", str(tmp_path / "a.webm")), "would be an mp4"),
    ]
    for arguments, said in cases:
        result = dst(*arguments)
        assert result.exit_code == 2, (said, result.output)
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert kept.read_text() == "of last week"
    assert (video.read_bytes(), plan.read_text()) == (before, PLAN)


def test_pictures_are_turned_and_words_after_the_end_are_told(
    talking: Path, video: Path, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("9999 still there?\n")
    result = dst(talking, video, plan, "--rotate", "90", "--words", str(tmp_path / "words.txt"))
    assert "never heard, as the stream ended before: 'still there?'" in result.stderr
    assistant = Assistant.load(talking, Task("Assemble the toy", ("attach the wheel", "attach the roof")))
    expected = []
    for frame in tick_frames(video, Clock(2.0), rotation_deg=90):
        expected += [event.row() for event in assistant.step(frame.image, frame.tick / 2)]
    assert rows(result.stdout) == expected


def test_words_with_times(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("0 hello\n  12.5   what comes   next? \n7. ok\n")
    assert read_words(path) == [(0.0, "hello"), (12.5, "what comes   next?"), (7.0, "ok")]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour, so that a stream is not over when something happens to it."""
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), dtype=np.uint8), format="rgb24")
        for tick in range(7200):
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def arguments_of(run: Path, video: Path, plan: Path, *more: Path | str) -> list[str]:
    arguments = ["stream", "--run", run, "--video", video, "--plan", plan, "--device", "cpu", *more]
    return [sys.executable, "-c", "from cli import app; app()", *map(str, arguments)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_keeps_what_was_seen(
    talking: Path, long_video: Path, plan: Path, tmp_path: Path, how: signal.Signals
) -> None:
    record = tmp_path / "film.mp4"
    process = subprocess.Popen(
        arguments_of(talking, long_video, plan, "--record", record),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["tick"] >= 3:
            break
    process.send_signal(how)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + how, errors
    assert all(json.loads(line) for line in told.splitlines())
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-2].startswith("seen up to 0:")
    assert errors.strip().splitlines()[-1] == "stopped"
    with av.open(str(record)) as film:
        assert sum(1 for _ in film.decode(video=0)) >= 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_though_what_it_raised_was_dropped(
    talking: Path, long_video: Path, plan: Path, how: signal.Signals
) -> None:
    """As compiled code may do that has called back into Python."""
    program = f"""
import os, time
from training.assistant import Assistant
look, ticks = Assistant.step, []
def step(self, *given):
    ticks.append(given)
    try:
        if len(ticks) == 3:
            os.kill(os.getpid(), {int(how)})
            time.sleep(5)
    except KeyboardInterrupt:
        pass
    return look(self, *given)
Assistant.step = step
from cli import app; app()
"""
    arguments = arguments_of(talking, long_video, plan)
    arguments[arguments.index("-c") + 1] = program
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 128 + how, done.stderr
    assert done.stderr.strip().splitlines()[-2:] == ["seen up to 0:00:01.0", "stopped"]
    assert {json.loads(line)["tick"] for line in done.stdout.splitlines()} <= {0, 1, 2}


def test_on_a_terminal_it_shows_the_plan_and_hears_what_is_typed(
    short_run: Path, long_video: Path, plan: Path, tmp_path: Path
) -> None:
    events = tmp_path / "events.jsonl"
    command = arguments_of(short_run, long_video, plan, "--events", events, "--pace")
    pid, terminal = pty.fork()
    if pid == 0:  # the child, whose terminal it is
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        os.execv(sys.executable, command)
    shown, until, ended = b"", time.monotonic() + 120, False
    to_type = [("you:", "what noww\x7f, grüße?"), ("you: what now, grüße?", "\r"), ("heard", "\x03")]
    while not ended and time.monotonic() < until:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # it has ended
                ended = True
        heard = "heard" if events.is_file() and '"user"' in events.read_text() else ""
        if to_type and to_type[0][0] in shown.decode(errors="replace") + heard:
            os.write(terminal, to_type.pop(0)[1].encode())
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    text = shown.decode(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT, text
    assert "attach the wheel" in text
    assert "Assemble the toy" in text
    assert "seen up to" in text
    said = [row for row in rows(events.read_text()) if row["kind"] == "user"]
    assert [row["text"] for row in said] == ["what now, grüße?"]
    # two ticks a second at most: it is real time
    assert said[0]["t_s"] <= time.monotonic() - until + 120


def test_a_task_within_a_video_is_what_evaluation_makes_of_it(
    talking: Path, shards: Path, tmp_path: Path
) -> None:
    """Sessions have their place on a video; with it, and the user's words, live and cached features agree."""
    cache = ShardCache(shards)
    _, traces = evaluate(talking, shards, split="train")
    trace = max(traces, key=lambda trace: (trace.first_tick > 20 and len(trace.heard) > 0, -trace.first_tick))
    assert trace.first_tick > 20
    assert trace.heard
    start = trace.first_tick / 2
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"goal": trace.goal, "steps": list(trace.step_names)}))
    said = [f"{start + tick / 2} {text}\n" for tick, text in trace.heard]
    (tmp_path / "words.txt").write_text("".join(said))
    uri = cache.session(trace.session_id).meta["uri"]
    more = ("--start", str(start), "--words", str(tmp_path / "words.txt"))
    found = rows(dst(talking, uri, tmp_path / "plan.yaml", *more).stdout)
    end = trace.first_tick + trace.truth.num_ticks
    spoken = [(row["tick"] - trace.first_tick, row["text"]) for row in found if row["kind"] == "speak"]
    meant = [(tick, text) for tick, text in enumerate(trace.predicted.responses) if text is not None]
    assert [each for each in spoken if each[0] < end - trace.first_tick] == meant
    assert len(meant) > 1
    heard = [(row["tick"] - trace.first_tick, row["text"]) for row in found if row["kind"] == "user"]
    assert heard == list(trace.heard)


def test_the_page_does_what_it_says(
    talking: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs/live.md").read_text()
    (code,), (plan,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    shutil.copytree(talking, tmp_path / "out/runs/tiny")
    shutil.copy(video, tmp_path / "kitchen.mp4")
    (tmp_path / "plan.yaml").write_text(plan)
    (tmp_path / "words.txt").write_text("2 what comes first?\n")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    more = ("--words", "words.txt")
    assert printed == rows(dst(Path("out/runs/tiny"), "kitchen.mp4", Path("plan.yaml"), *more).stdout)
    kinds = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) - {"kind"}
    assert kinds == set(get_args(get_type_hints(Event)["kind"]))


def test_a_long_plan_leaves_the_words_and_what_is_typed_in_sight() -> None:
    board = Board(Task("goal", tuple(f"step number {n}" for n in range(30))))
    events = [Event("state", 1, 0.5, step=n, state="completed") for n in range(12)]
    said = [Event("speak", 1, 0.5, text=f"words {n}") for n in range(7)]
    board.take(0.5, [*events, *said])
    console = Console(width=80, height=24, file=io.StringIO())
    console.print(board.render(24, "what n"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 24
    shown = "\n".join(lines)
    assert all(f"words {n}" in shown for n in (2, 6))
    assert "words 1" not in shown
    assert "you: what n" in shown
    assert "step number 12" in shown  # the first that is to do
    assert "step number 29" not in shown


def test_a_stream_that_drops_for_five_seconds_goes_on_from_the_own_state(talking: Path, video: Path) -> None:
    assistant = Assistant.load(talking, Task("Assemble the toy", ("attach the wheel", "attach the roof")))
    frames = list(tick_frames(video, Clock(2.0), last_tick=29))
    happened: list[tuple[int, Event]] = []
    states: list[list[int]] = []

    def on_tick(tick: TickFrame | Gap, events: Sequence[Event]) -> None:
        happened.extend((assistant.next_tick, event) for event in events)
        states.append(assistant.gate.state.tolist())

    away = Gap(10, 20, "no picture for 5.0 s")
    stream(assistant, [*frames[:10], away, *frames[20:]], lambda: None, on_tick)
    gaps = [event for _, event in happened if event.kind == "gap"]
    assert [(gap.tick, gap.end_tick, gap.text) for gap in gaps] == [(10, 20, "no picture for 5.0 s")]
    assert [event.tick for _, event in happened if event.kind == "window"] == [20]
    assert states[9] == states[10]  # nothing moves while nothing is seen
    assert assistant.next_tick == 30
    assert all(before <= after for a, b in pairwise(states) for before, after in zip(a, b, strict=True))


def test_real_time_begins_with_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], []

    def sleep(seconds: float) -> None:
        waited.append(round(seconds, 6))
        now[0] += seconds

    monkeypatch.setattr("training.stream.time.monotonic", lambda: now[0])
    monkeypatch.setattr("training.stream.time.sleep", sleep)
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    ticks = [*(TickFrame(tick, tick / 2, picture) for tick in range(6)), Gap(6, 9, "late")]
    for _ in _paced(ticks, Clock(2.0), 2.0):
        now[0] += 0.1  # what is done with it
    assert waited == [0.0] * 5 + [0.4, 1.9]  # up to second 2 at once, then 2.5 and, after the gap, 4.5

"""A run that is interrupted and resumed is the run that was not, to the last bit; what is saved is whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from tiny_run import (
    Crash,
    ask_to_stop,
    at_step,
    crash,
    left_by,
    rows_of,
    run_with_interruptions,
    small,
)
from typer.testing import CliRunner

import training.dialog
import training.loop
from cli import app
from pipeline.locks import folder_lock
from pipeline.shards import ShardCache
from schemas.errors import UserError
from training.batch import Batch
from training.data import SessionData
from training.model import DSTSmolVLM, load_trained
from training.recipe import Recipe
from training.stop import SAME_REQUEST_S, SIGNALS, StopRequest, children_that_stay
from training.trainer import Stopped, require_same_recipe, train

LORA = ("model.tune=lora", "model.lora.rank=4", "model.lora.dropout=0.2")


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(shards, small(), out, device="cpu")
    return out


def test_ten_random_interruptions_leave_no_trace(shards: Path, whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    steps = sorted(int(step) for step in rng.choice(np.arange(1, 12), 10, replace=False))
    acts = [(ask_to_stop, crash)[int(rng.integers(2))] for _ in steps]
    assert set(acts) == {ask_to_stop, crash}
    run_with_interruptions(shards, small(), tmp_path / "run", steps, acts)
    assert left_by(tmp_path / "run") == left_by(whole)


@pytest.mark.parametrize(
    "changes",
    [
        ("train.objective=independent", "train.on_plateau=freeze_task", "tasks.speaking.patience=1"),
        ("train.objective=pcgrad", "train.probe_every=2"),
        ("train.objective=uncertainty", "train.save_every=1"),
        (*LORA, "train.probe_every=3"),
    ],
    ids=["independent", "pcgrad", "uncertainty", "lora"],
)
def test_each_objective_goes_on_to_the_bit(shards: Path, tmp_path: Path, changes: tuple[str, ...]) -> None:
    recipe = small("train.steps=6", "train.eval_every=2", *changes)
    train(shards, recipe, tmp_path / "whole", device="cpu")
    run_with_interruptions(shards, recipe, tmp_path / "run", [3, 5], [ask_to_stop, crash])
    assert left_by(tmp_path / "run") == left_by(tmp_path / "whole")


def test_another_number_of_workers_changes_nothing(shards: Path, whole: Path, tmp_path: Path) -> None:
    out, others = tmp_path / "run", set(psutil.Process().children())
    with pytest.raises(Stopped):
        train(shards, small(), out, device="cpu", on_step=at_step(5, ask_to_stop))
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    train(shards, small("data.workers=2"), out, device="cpu", resume=True)
    assert left_by(out) == left_by(whole)
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == kept
    new = set(psutil.Process().children()) - others
    assert not [child for child in new if "resource_tracker" not in " ".join(child.cmdline())]


def test_a_resumed_run_that_was_done_is_done(shards: Path, whole: Path) -> None:
    before = left_by(whole)
    row = train(shards, small(), whole, device="cpu", resume=True)
    assert left_by(whole) == before
    assert row == max(
        (row for row in rows_of(whole) if "val/combined" in row), key=lambda row: row["val/combined"]
    )


def test_a_stop_in_a_validation_leaves_it_to_the_resumed_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for between two of its passes, in the same one twice, and in that of the last step."""
    out, recipe = tmp_path / "run", small("data.rows_at_once=1")
    train(shards, recipe, tmp_path / "whole", device="cpu")
    compute, passes, begin = DSTSmolVLM.hidden, 0, 0

    def ask_in_the_second_pass(model: DSTSmolVLM, batch: Batch) -> torch.Tensor:
        nonlocal passes
        passes += torch.is_inference_mode_enabled() and len(rows_of(out)) >= begin
        if passes == 2:
            ask_to_stop()
        return compute(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DSTSmolVLM, "hidden", ask_in_the_second_pass)
        for begin in (3, 3, 7, 11):
            passes = 0
            with pytest.raises(Stopped) as stopped:
                train(shards, recipe, out, device="cpu", resume=True)
            assert passes == 2  # of more
            assert stopped.value.step == len(rows_of(out)) == begin
    train(shards, recipe, out, device="cpu", resume=True)
    assert left_by(out) == left_by(tmp_path / "whole")
    assert len(rows_of(out)) == 12


def test_a_step_is_saved_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is asked to stop at a step that is saved anyhow."""
    saved: list[str] = []
    save = training.loop.save_model
    monkeypatch.setattr(training.loop, "save_model", lambda *args: [saved.append(args[2].name), save(*args)])
    recipe = small("train.save_every=2")
    for stop_at, calls in ((1, 1), (2, 1), (4, 1), (5, 1)):
        saved.clear()
        with pytest.raises(Stopped):
            train(
                shards,
                recipe,
                tmp_path / "run",
                device="cpu",
                resume=True,
                on_step=at_step(stop_at, ask_to_stop),
            )
        assert len(saved) == calls, stop_at


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_saved_under_several_names_has_its_weights_on_the_disk_once(
    shards: Path, tmp_path: Path, has_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    recipe = small("train.steps=2", "train.eval_every=1")
    train(shards, recipe, tmp_path / "run", device="cpu")
    folders = list((tmp_path / "run/checkpoints").iterdir())
    state = torch.load(tmp_path / "run/checkpoints/latest/trainer.pt", weights_only=True)
    step_of = {"latest": 2} | {name: int(step) for name, (_, step, _) in state["selection"].items()}
    assert {folder.name for folder in folders} == step_of.keys()
    for one in folders:
        assert load_trained(one) is not None
        for other in folders:
            files = [folder / "model.safetensors" for folder in (one, other)]
            same = step_of[one.name] == step_of[other.name]
            assert (files[0].read_bytes() == files[1].read_bytes()) == same
            assert os.path.samefile(*files) == (same if has_links else one == other)
            assert os.path.samefile(one / "config.json", other / "config.json") == (one == other)
    # trainer.pt has AdamW's two moments, not the weights once more
    weights = (tmp_path / "run/checkpoints/latest/model.safetensors").stat().st_size
    assert (tmp_path / "run/checkpoints/latest/trainer.pt").stat().st_size < 2.2 * weights


def in_a_process(shards: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """`dst train` as a user starts it, in a group of processes of its own."""
    settings = yaml.safe_dump(small().model_dump(mode="json"))
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(settings)
    code = "from cli import app; app()"
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "--shards",
        str(shards),
        "--recipe",
        str(recipe),
        "--device",
    ]
    command += ["cpu", "--out", str(out), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_signals_to_a_real_process_and_its_workers(shards: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step, workers in ((2, 0), (6, 2)):
        process = in_a_process(shards, out, "--resume", "--set", f"data.workers={workers}")
        wait_for_step(process, out, step)
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, to all processes of the job
        os.killpg(process.pid, signal.SIGTERM)  # and a launcher once more
        told, _ = process.communicate(timeout=120)
        done = torch.load(out / "checkpoints/latest/trainer.pt", weights_only=True)["step"]
        assert process.returncode == 128 + signal.SIGTERM, told
        assert f"stopped after step {done}, which is saved; go on with --resume" in " ".join(told.split())
        assert "Traceback" not in told
        if step == 2:
            assert "nothing to resume in" in told
        else:
            assert "going on after step" in told
        assert len(rows_of(out)) == done
    train(shards, small(), out, device="cpu", resume=True)
    assert left_by(out) == left_by(whole)


def test_a_killed_run_goes_on(shards: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = in_a_process(shards, out)
    wait_for_step(process, out, 7)
    process.kill()
    process.wait(30)
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "epo')  # as a kill in the middle of a line leaves it
    (out / "checkpoints/.latest.tmp").mkdir(exist_ok=True)
    (out / "checkpoints/.latest.tmp/model.safetensors").write_text("half")
    train(shards, small(), out, device="cpu", resume=True)
    assert left_by(out) == left_by(whole)
    assert not list(out.rglob("*.tmp"))


def test_workers_do_not_hear_what_their_group_is_told(shards: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = small("data.workers=2")

    def tell_the_workers() -> None:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for name in ("-TERM", "-INT"):  # from another process: their parent may end them
            subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
        time.sleep(0.3)
        assert all(worker.is_alive() for worker in workers)
        ask_to_stop()

    with pytest.raises(Stopped) as stopped:
        train(shards, recipe, out, device="cpu", on_step=at_step(3, tell_the_workers))
    assert (stopped.value.signal, stopped.value.step) == (signal.SIGTERM, 3)
    assert multiprocessing.active_children() == []
    train(shards, recipe, out, device="cpu", resume=True)
    assert left_by(out) == left_by(whole)


def test_a_second_request_ends_the_process_but_an_echo_does_not() -> None:
    def handler(number: int, frame: object) -> None:
        raise Crash

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with StopRequest() as stop:
            ask_to_stop()
            ask_to_stop()
            assert stop.signal == signal.SIGTERM
            stop._at -= SAME_REQUEST_S + 1
            with pytest.raises(Crash):
                ask_to_stop()
        assert signal.getsignal(signal.SIGTERM) is handler
        with children_that_stay():
            assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])  # which children begin with
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resume_where_nothing_is_starts_and_says_so(shards: Path, whole: Path, tmp_path: Path) -> None:
    started: list[int] = []
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(
            shards,
            small(),
            out,
            device="cpu",
            resume=True,
            on_start=started.append,
            on_step=at_step(2, ask_to_stop),
        )
    with pytest.raises(Stopped):
        train(
            shards,
            small(),
            out,
            device="cpu",
            resume=True,
            on_start=started.append,
            on_step=at_step(3, ask_to_stop),
        )
    assert started == [0, 2]


@pytest.fixture
def stopped(shards: Path, tmp_path: Path) -> Path:
    """A run that is saved after its first step."""
    with pytest.raises(Stopped):
        train(shards, small(), tmp_path / "run", device="cpu", on_step=at_step(1, ask_to_stop))
    return tmp_path / "run"


def test_it_goes_on_with_its_own_recipe_and_cache(
    shards: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where out/shards is nothing
    command = ["train", "--out", str(stopped), "--resume", "--device", "cpu"]
    refused = CliRunner().invoke(app, [*command, "--set", "train.lr=0.1"])
    assert "another recipe (train.lr=0.002, not 0.1)" in " ".join(refused.output.split())
    done = CliRunner().invoke(app, [*command, "--set", "data.rows_at_once=1"])
    assert done.exit_code == 0, done.output
    assert len(rows_of(stopped)) == 12


def test_only_one_process_writes_a_run(shards: Path, stopped: Path) -> None:
    before = left_by(stopped)
    with (
        folder_lock(stopped, 0, 1, print),
        pytest.raises(UserError, match=f"another run is writing {stopped}"),
    ):
        train(shards, small(), stopped, device="cpu", resume=True)
    assert left_by(stopped) == before


def test_what_is_left_of_a_run_is_not_trained_over(shards: Path, stopped: Path) -> None:
    log = (stopped / "log.jsonl").read_bytes()
    (stopped / "log.jsonl").unlink()
    with pytest.raises(UserError, match="lacks some of the 1 steps that are saved; put it back"):
        train(shards, small(), stopped, device="cpu", resume=True)
    (stopped / "log.jsonl").write_bytes(log)
    (stopped / "checkpoints/latest").rename(stopped / "checkpoints/best")
    before = left_by(stopped)
    for resume in (True, False):
        with pytest.raises(
            UserError, match="has checkpoints but no latest" if resume else "holds a run already"
        ):
            train(shards, small(), stopped, device="cpu", resume=resume)
    assert left_by(stopped) == before


def test_resume_with_another_recipe_or_other_data_is_refused(
    shards: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"another recipe \(train.lr=0.002, not 0.1\)"):
        require_same_recipe(stopped, small("train.lr=0.1"))
    require_same_recipe(stopped, small())
    other_machine = small("data.workers=3", "data.rows_at_once=1", "train.trackers=[tensorboard]")
    require_same_recipe(stopped, other_machine)
    result = CliRunner().invoke(
        app,
        [
            "train",
            "--shards",
            str(shards),
            "--out",
            str(stopped),
            "--resume",
            "--recipe",
            "tiny",
            "--device",
            "cpu",
        ],
    )
    assert result.exit_code == 2
    assert "was started with another recipe" in result.output
    before = left_by(stopped)
    with pytest.raises(UserError, match="is of another model than the recipe's"):
        train(shards, small(*LORA), stopped, device="cpu", resume=True)
    real = training.dialog.load_sessions
    for changed in ("train", "val"):

        def one_more(cache: ShardCache, split: str, blind: bool, changed: str = changed) -> list[SessionData]:
            found = real(cache, split, blind)
            return [*found, found[0]] if split == changed else found

        def another_label(
            cache: ShardCache, split: str, blind: bool, changed: str = changed
        ) -> list[SessionData]:
            first, *rest = real(cache, split, blind)
            truth = replace(first.truth, speak=~first.truth.speak) if split == changed else first.truth
            return [replace(first, truth=truth), *rest]

        for other in (one_more, another_label):
            monkeypatch.setattr(training.dialog, "load_sessions", other)
            with pytest.raises(UserError, match="are not those that"):
                train(shards, small(), stopped, device="cpu", resume=True)
    assert left_by(stopped) == before


def test_a_damaged_or_missing_state_is_one_sentence(shards: Path, stopped: Path) -> None:
    state = stopped / "checkpoints/latest/trainer.pt"
    whole_file = state.read_bytes()
    for content in (b"", whole_file[: len(whole_file) // 2]):
        state.write_bytes(content)
        with pytest.raises(
            UserError, match=r"trainer.pt cannot be read, or the weights beside it .* start a new run"
        ):
            train(shards, small(), stopped, device="cpu", resume=True)
    state.unlink()
    with pytest.raises(UserError, match="nothing to resume"):
        train(shards, small(), stopped, device="cpu", resume=True)


@pytest.fixture
def no_big_files() -> Iterator[Callable[[int], None]]:
    """Sets how large a file may become, which is what a full disk is to a writer; it is lifted at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [1_000_000, 6_000_000], ids=["in the weights", "in the state"])
def test_a_disk_that_fills_during_a_save_leaves_the_checkpoint_before(
    shards: Path, whole: Path, tmp_path: Path, no_big_files: Callable[[int], None], room: int
) -> None:
    out = tmp_path / "run"
    recipe = small("train.save_every=1")
    with pytest.raises(UserError) as caught:
        train(shards, recipe, out, device="cpu", on_step=at_step(2, lambda: no_big_files(room)))
    message = str(caught.value)
    assert "checkpoints/latest could not be saved (File too large); the checkpoint before is whole" in message
    assert "\n" not in message
    no_big_files(resource.RLIM_INFINITY)
    latest = out / "checkpoints/latest"
    assert torch.load(latest / "trainer.pt", weights_only=True)["step"] == 2
    load_trained(latest)
    assert not list(out.rglob("*.tmp"))
    train(shards, recipe, out, device="cpu", resume=True)
    assert left_by(out) == left_by(whole)


def test_the_recipe_of_a_run_is_one(whole: Path) -> None:
    assert Recipe.model_validate(yaml.safe_load((whole / "recipe.yaml").read_text())) == small()
    assert json.loads((whole / "run.json").read_text())["shards"]

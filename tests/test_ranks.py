"""Two processes that train together do what one does: gradients, losses, saving, stopping, going on alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tiny_run import rows_of, small, some_steps, trained_by

import training.loop
import training.runlog
import training.validation
from pipeline.shards import ShardCache
from training.batch import Batch
from training.data import load_sessions
from training.dialog import build
from training.family import summed
from training.losses import IGNORE
from training.recipe import Recipe
from training.sampler import TrainingSteps
from training.tasks import count_labels
from training.trainer import train

STILL = ("train.lr=1e-9", "train.head_lr=1e-9", "train.clip_norm=1e9")
"""Steps so small that a task finds the parameters as the task before it did."""

CASES: dict[str, tuple[str, ...]] = {
    "joint": (),
    "alternating": ("train.objective=independent",),
    "shared_forward": ("train.objective=independent", "train.strategy=shared_forward"),
    "pcgrad": ("train.objective=pcgrad",),
    "uncertainty": ("train.objective=uncertainty",),
    "one task": ("tasks.response.weight=0", "tasks.dst_update.weight=0", "tasks.dst_state.weight=0"),
    "a rank without rows": ("data.batch_rows=1",),
    "adapters": ("model.tune=lora", "model.lora.rank=4"),
    "less memory": ("train.gradient_checkpointing=true",),
}


def recipe_of(case: str, *more: str) -> Recipe:
    return small("data.batch_rows=5", "data.rows_at_once=1", *STILL, *CASES[case], *more)


def without_labels(batch: Batch, order: list[str]) -> Batch:
    """Some windows lose labels, by their place in ``order``: no speech, no decisions, no states, none at all."""
    place = torch.tensor([order.index(name) % 5 for name in batch.names])
    of_tick = place[batch.window_of_tick]
    of_word = place[batch.documents.flatten()[batch.response_at]]
    keep = (of_word != 1) & (of_word != 4)
    quiet = (of_tick == 2) | (of_tick == 4)
    stateless = (of_tick == 3) | (of_tick == 4)
    return replace(
        batch,
        response=batch.response[keep],
        response_at=batch.response_at[keep],
        speaking=batch.speaking.masked_fill(quiet, IGNORE),
        dst_update=batch.dst_update.masked_fill(quiet, IGNORE),
        dst_state=batch.dst_state.masked_fill(stateless[:, None], IGNORE),
    )


def found(shards: Path, recipe: Recipe, rank: int, ranks: int) -> dict[str, Any]:
    """One step as a rank takes it: what each optimizer found, what the log says, what the probe says."""
    objective = trained_by(shards, recipe)
    if recipe.train.gradient_checkpointing:
        objective.model.activation_checkpointing_enable({"use_reentrant": False})
    objective.model.train()
    gradients: dict[str, torch.Tensor] = {}
    named = dict(objective.model.named_parameters())
    for name, optimizer in objective.optimizers.items():

        def look(*_: Any, name: str = name) -> None:
            gradients.update({f"{name}: {n}": p.grad.clone() for n, p in named.items() if p.grad is not None})

        optimizer.optimizer.register_step_pre_hook(look)
    cache = ShardCache(shards)
    steps = TrainingSteps(
        load_sessions(cache, "train"), build(recipe, cache)[1], recipe, rank=rank, ranks=ranks
    )
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"rows_at_once": None})})
    order = some_steps(shards, whole, 1)[0][0].names
    passes = [without_labels(batch, order) for batch in next(iter(steps)).passes]
    vocabulary = objective.model.config.text_config.vocab_size
    own = summed([count_labels(batch, objective.tasks, vocabulary) for batch in passes])
    totals: Any = objective.accelerator.reduce(own, "sum")
    row = objective.step(passes, totals, 0)
    return {
        "gradients": gradients,
        "row": row,
        "passes": len(passes),
        "ranks": objective.accelerator.num_processes,
    }


@contextmanager
def torchrun(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes of this file, which end with the test."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    process = subprocess.Popen(
        [*launcher, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(40)  # the launcher ends its processes
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def by_two(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, by case."""
    out = tmp_path_factory.mktemp("ranks")
    with torchrun("gradients", str(shards), str(out)) as process:
        told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_of_one_with_one_batch(
    shards: Path, by_two: list[dict[str, Any]], case: str
) -> None:
    alone = found(shards, recipe_of(case, "data.rows_at_once=null"), 0, 1)
    both = [each[case] for each in by_two]
    assert [each["ranks"] for each in (alone, *both)] == [1, 2, 2]
    assert [each["passes"] for each in (alone, *both)] == ([1, 1, 1] if "without" in case else [1, 3, 3])
    for mine in both:
        assert mine["gradients"].keys() == alone["gradients"].keys()
        largest = max(gradient.abs().max() for gradient in alone["gradients"].values())
        for name, gradient in alone["gradients"].items():
            assert (mine["gradients"][name] - gradient).abs().max() <= 1e-6 * largest, name
        for name, value in alone["row"].items():
            assert mine["row"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, gradient in both[0]["gradients"].items():
        assert torch.equal(gradient, both[1]["gradients"][name]), name


def test_two_ranks_stop_together_and_one_goes_on_with_the_same_data(shards: Path, tmp_path: Path) -> None:
    recipe = small(
        "data.batch_rows=3", "data.rows_at_once=1", "train.lr=1e-4", "train.head_lr=1e-4", "train.steps=14"
    )
    train(shards, recipe, tmp_path / "alone", device="cpu")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    out = tmp_path / "run"
    arguments = ["train", "--shards", str(shards), "--recipe", str(tmp_path / "mine.yaml"), "--out", str(out)]
    for step, whom in ((3, "launcher"), (3, "rank 0 in a validation"), (8, "rank 1")):
        asks = {"STOPS_IN_VALIDATION": "1"} if "validation" in whom else {}
        with torchrun(*arguments, "--device", "cpu", "--resume", **asks) as process:
            deadline = time.monotonic() + 150
            while not asks and (
                not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < step
            ):
                assert process.poll() is None, process.stdout and process.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            if whom == "launcher":
                process.send_signal(signal.SIGTERM)
            elif whom == "rank 1":
                children = psutil.Process(process.pid).children()
                next(child for child in children if child.environ().get("RANK") == "1").terminate()
            told, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        done = len(rows_of(out))
        assert step <= done < 14, told
        if asks:
            assert done in (3, 7, 11, 13)  # before the row of a validation
        assert torch.load(out / "checkpoints/latest/trainer.pt", weights_only=True)["step"] == done, told
        assert f"stopped after step {done}, which is saved" in told, told
        assert "only the main process writes" not in told
        assert not list(out.rglob("*.tmp"))
    train(shards, recipe, out, device="cpu", resume=True)
    rows, wanted = rows_of(out), rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == list(range(1, 15))
    for row, want in zip(rows, wanted, strict=True):
        assert row["epoch"] == want["epoch"]
        for name in (name for name in want if name.startswith("train/loss")):
            assert row[name] == pytest.approx(want[name], rel=1e-4), (row["step"], name)
    last = {name: value for name, value in wanted[-1].items() if name.startswith("val/")}
    assert {name: rows[-1][name] for name in last} == pytest.approx(last, abs=0.02)


def _of_a_rank(command: str, *arguments: str) -> None:
    """What each process that `torchrun` starts does."""
    rank = int(os.environ["RANK"])
    if rank == 0 and "STOPS_IN_VALIDATION" in os.environ:
        compute = training.validation.decide_teacher

        def stopped(*args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return compute(*args)

        training.validation.decide_teacher = stopped
    if command == "gradients":
        shards, out = map(Path, arguments)
        torch.save({case: found(shards, recipe_of(case), rank, 2) for case in CASES}, out / f"{rank}.pt")
        torch.distributed.destroy_process_group()
        return
    if rank:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("only the main process writes")

        training.loop.save_model = training.loop.save_again = training.loop.write_text = refuse  # type: ignore
        training.loop.curves_picture = training.runlog.write_text = refuse  # type: ignore[assignment]
    from cli import app

    app([command, *arguments])


if __name__ == "__main__":
    _of_a_rank(*sys.argv[1:])

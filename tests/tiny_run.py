"""What tests of training share: a recipe of a few small steps, a run that can be interrupted, what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.shards import ShardCache
from training.batch import Batch
from training.data import load_sessions
from training.dialog import build
from training.family import Counts, summed
from training.model import DSTSmolVLM
from training.objectives import OBJECTIVES, Objective
from training.recipe import Recipe, load_recipe
from training.sampler import TrainingSteps
from training.steps import START
from training.tasks import count_labels
from training.trainer import Stopped, _accelerator, train

SMALL = ("train.warmup_steps=2", "data.batch_rows=2", "data.window_ticks=16", "data.max_seq_len=200")


class Crash(Exception):
    """What a test lets a run die of."""


def small(*changes: str) -> Recipe:
    """The tiny recipe with rows of one or two short windows, two of them a step."""
    return load_recipe("tiny", [*SMALL, "train.steps=12", "train.eval_every=4", *changes])


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def left_by(run: Path) -> dict[str, str]:
    """SHA-256 of the log and of all weights, by path."""
    files = [run / "log.jsonl", *sorted(run.glob("checkpoints/*/model.safetensors"))]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def at_step(number: int, act: Callable[[], None]) -> Callable[[dict[str, float]], None]:
    """An ``on_step`` that does something after one step."""

    def on_step(row: dict[str, float]) -> None:
        if row["step"] == number:
            act()

    return on_step


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise Crash


def run_with_interruptions(
    shards: Path, recipe: Recipe, out: Path, steps: list[int], acts: list[Callable[[], None]]
) -> None:
    """A run that is interrupted after each of ``steps`` in turn and resumed, until it is done."""
    for step, act in zip(steps, acts, strict=True):
        try:
            train(shards, recipe, out, device="cpu", resume=True, on_step=at_step(step, act))
        except (Stopped, Crash):
            continue
        raise AssertionError(f"not interrupted at step {step}")
    train(shards, recipe, out, device="cpu", resume=True)


def trained_by(shards: Path, recipe: Recipe) -> Objective:
    """A fresh model and the objective that trains it."""
    accelerator = _accelerator(recipe, "cpu", Path())
    model, _ = build(recipe, ShardCache(shards))
    return OBJECTIVES[recipe.train.objective](accelerator, model, recipe)


def some_steps(shards: Path, recipe: Recipe, number: int) -> list[list[Batch]]:
    """The passes of a run's first steps."""
    cache = ShardCache(shards)
    _, builder = build(recipe, cache)
    steps = iter(TrainingSteps(load_sessions(cache, "train"), builder, recipe, START))
    return [next(steps).passes for _ in range(number)]


def totals_of(passes: list[Batch], objective: Objective) -> Counts:
    vocabulary = objective.model.config.text_config.vocab_size
    return summed([count_labels(batch, objective.tasks, vocabulary) for batch in passes])


def weights_of(model: DSTSmolVLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

"""Trains a model of either family on cached features: what is refused, what is built, and the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from pipeline.locks import folder_lock
from pipeline.shards import ShardCache
from schemas.errors import UserError
from training.checkpoint import load_state
from training.counting.family import Counting, build_counter
from training.counting.recipe import CountingRecipe
from training.dialog import Dialog, build
from training.family import Family
from training.loop import Run
from training.objective import Objective
from training.objectives import OBJECTIVES
from training.recipe import AnyRecipe, Recipe, any_recipe
from training.runlog import Row, installed
from training.selection import Selection
from training.stop import Stopped as Stopped


def train(
    shards: str | Path,
    recipe: AnyRecipe,
    out: Path,
    *,
    device: str,
    resume: bool = False,
    on_start: Callable[[int], None] = lambda step: None,
    on_step: Callable[[Row], None] = lambda row: None,
    say: Callable[[str], None] = lambda text: None,
) -> Row:
    """Train a model. ``out`` gets recipe.yaml, run.json, log.jsonl, curves.png and checkpoints.

    Args:
        resume: go on from ``checkpoints/latest``, where there is one.
        on_start: called with the number of steps that are done already.
        say: told in one sentence what the user should know besides.

    Returns:
        The row of the log that belongs to the best checkpoint.

    Raises:
        UserError: the folder holds a run that is not to be resumed, cannot be, is of other data, or is being written by
            another process; the cache has no train or val part; a loss is not a number; no room to save.
        Stopped: SIGTERM or Ctrl-C came; the run is saved and can be resumed.
    """
    accelerator = _accelerator(recipe, device, out)
    latest = out / "checkpoints" / "latest"
    if not resume and (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run already; go on with --resume, give another --out, or remove it")
    model, family = _build(recipe, ShardCache(shards))
    selection = Selection(recipe.tasks.active, family.scores, recipe.best, recipe.best_by)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(folder_lock(out, 0, 1, say))
        accelerator.wait_for_everyone()
        state = load_state(model, latest) if resume and latest.is_dir() else None
        if state is not None and state["data_key"] != family.data_key:
            raise UserError(
                f"the sessions in {shards} are not those that {out} was started with; start a new run"
            )
        if state is None and (out / "checkpoints").is_dir():
            raise UserError(
                f"{out} has checkpoints but no {latest.name}, so it cannot be resumed; give another --out"
            )
        for note in family.notes:
            say(note)
        objective = _objective(accelerator, model, recipe, device)
        run = Run(accelerator, objective, family, recipe, selection, out, on_step)
        if state is not None:
            run.load_state(state)
        else:
            run.start(shards)
        on_start(run.step)
        return run.go()


def _build(recipe: AnyRecipe, cache: ShardCache) -> tuple[Any, Family]:
    """The untrained model of a recipe for a cache, and the data of its family."""
    if isinstance(recipe, CountingRecipe):
        counter, prompt = build_counter(recipe, cache)
        return counter, Counting(prompt, recipe, cache)
    assert isinstance(recipe, Recipe)
    model, builder = build(recipe, cache)
    return model, Dialog(builder, recipe, cache)


def _objective(accelerator: Accelerator, model: Any, recipe: AnyRecipe, device: str) -> Objective:
    """The model as it is to be trained, and the objective that trains it."""
    if device != "cpu" and isinstance(recipe, Recipe):  # whose windows share rows; others are causal, no more
        model.config.text_config._attn_implementation = "flex_attention"
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if recipe.train.compile:
        model.model.text_model.compile()
    return OBJECTIVES[recipe.train.objective](accelerator, model, recipe)


_MACHINE = {"workers", "rows_at_once", "images_at_once"}
"""What of the data's settings changes no result."""


def require_same_recipe(out: Path, given: AnyRecipe) -> None:
    """Refuse to resume a run with another recipe than it was started with, once something of it is saved.

    What a machine has to do with (worker processes, rows at once, trackers) may be otherwise.

    Raises:
        UserError: they differ.
    """
    saved = any_recipe(str(out / "recipe.yaml"), [])
    if type(saved) is not type(given):
        raise UserError(f"{out} is a run of the other family; resume it with --resume --out {out} alone")
    machine = {
        "data": saved.data.model_copy(update=given.data.model_dump(include=_MACHINE)),
        "train": saved.train.model_copy(update=given.train.model_dump(include={"trackers"})),
    }
    saved = saved.model_copy(update=machine)
    if (out / "checkpoints").is_dir() and given != saved:
        different = _differences(saved.model_dump(), given.model_dump())
        raise UserError(
            f"{out} was started with another recipe ({different}); resume it with --resume --out {out} alone, or "
            "start a new run"
        )


def _accelerator(recipe: AnyRecipe, device: str, out: Path) -> Accelerator:
    precision = recipe.train.precision
    if device == "cpu":
        # else two threads add up some gradients in the order they come
        torch.use_deterministic_algorithms(True)
        # each new tensor would be filled with NaN first
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if precision in ("bf16", "fp16"):
            raise UserError(
                f"train.precision={precision} is for GPUs: on a CPU it is slower; leave it at auto"
            )
        precision = "float32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    elif precision == "bf16" and torch.cuda.get_device_capability()[0] < 8:
        raise UserError("this GPU does not compute in bf16; set train.precision=fp16, or auto")
    every_head = (
        len(recipe.tasks.active) == len(type(recipe.tasks).model_fields)
        and recipe.train.on_plateau == "continue"
    )
    unused = recipe.train.objective == "independent" or not every_head
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "float32" else precision,
        log_with=installed(recipe.train.trackers) or None,
        project_dir=str(out),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"accelerate's own {accelerator.distributed_type.value} settings are not used: start with torchrun, and "
            "set train.shard=true where the model is to lie in parts"
        )
    if recipe.train.shard and accelerator.num_processes == 1:
        raise UserError("train.shard spreads a model over several processes; start it with torchrun")
    if recipe.train.shard and accelerator.scaler:
        raise UserError("train.shard does not scale losses, which fp16 needs; use cards with bf16")
    return accelerator


def _differences(saved: dict[str, Any], given: dict[str, Any], path: str = "") -> str:
    told = []
    for key, value in saved.items():
        if isinstance(value, dict):
            told.append(_differences(value, given[key], f"{path}{key}."))
        elif value != given[key]:
            told.append(f"{path}{key}={value!r}, not {given[key]!r}")
    return ", ".join(text for text in told if text)

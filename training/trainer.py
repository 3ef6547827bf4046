"""Trains the dialog model on cached features: what is refused, what is built, and the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from pipeline.locks import folder_lock
from pipeline.shards import ShardCache
from pipeline.vision import vision_sha256
from schemas.checkpoints import checkpoint_folder
from schemas.config import load_config
from schemas.errors import UserError
from training.checkpoint import load_state
from training.data import SessionData, load_sessions
from training.loop import Run
from training.model import DSTSmolVLM, from_backbone
from training.objective import Objective
from training.objectives import OBJECTIVES
from training.recipe import Recipe
from training.runlog import Row, installed
from training.selection import INLINE_SCORES, SCORES, Selection
from training.sequence import SequenceBuilder
from training.stop import Stopped as Stopped
from training.tuning import choose_trained
from training.validation import require_events


def build(recipe: Recipe, cache: ShardCache) -> tuple[DSTSmolVLM, SequenceBuilder]:
    """The untrained model of a recipe for a cache, and its sequence builder.

    Raises:
        UserError: the checkpoint is not there, or its features are not those of the cache.
    """
    fingerprint = cache.fingerprint
    name = recipe.model.init or fingerprint.model
    folder = checkpoint_folder(name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = raw.get("text_config", {}).get("hidden_size")
    if width != fingerprint.dim:
        raise UserError(
            f"{cache.folder} holds features of width {fingerprint.dim}, the model {name} has {width}; "
            "set model.init to the checkpoint the cache was made with"
        )
    tower = vision_sha256(folder)
    if tower not in (None, fingerprint.vision_sha256):
        raise UserError(
            f"{cache.folder} was made with another vision tower than that of {name}; set model.init to the checkpoint "
            "the cache was made with, or one without a vision tower"
        )
    identity = recipe.model.visual_adapter == "identity"
    if not identity and recipe.model.visual_tokens > fingerprint.tokens_per_frame:
        raise UserError(
            f"model.visual_tokens is {recipe.model.visual_tokens}, and a tick of {cache.folder} has "
            f"{fingerprint.tokens_per_frame} tokens, which fuse can only make fewer; take at most as many"
        )
    changes: dict[str, Any] = {
        "visual_adapter": recipe.model.visual_adapter,
        "cached_tokens": fingerprint.tokens_per_frame,
        "visual_tokens": fingerprint.tokens_per_frame if identity else recipe.model.visual_tokens,
        "tick_hz": fingerprint.tick_hz,
        "window_ticks": recipe.data.window_ticks,
        "max_plan_steps": recipe.data.max_plan_steps,
        "memory_turns": recipe.data.memory_turns,
        "speech": recipe.data.speech,
        "speak_by": recipe.data.speak_by,
        "vision": {
            "model": _found_again(name if tower else fingerprint.model),
            "sha256": fingerprint.vision_sha256,
            "filter": fingerprint.preprocessing["filter"],
            "dtype": fingerprint.dtype,
            "compute": fingerprint.compute,
        },
    }
    ticks = recipe.data.window_ticks * int(changes["visual_tokens"])
    if ticks >= recipe.data.max_seq_len:
        raise UserError(
            f"the ticks of a window alone are {ticks} tokens, and data.max_seq_len is {recipe.data.max_seq_len}; make "
            "data.window_ticks less, or max_seq_len more"
        )
    model = from_backbone(folder, changes, recipe.train.seed)
    builder = SequenceBuilder.of(folder, model.config)
    model.config.end_of_turn_token = builder.end_of_utterance
    choose_trained(model, recipe.model, recipe.train.seed)
    return model, builder


def _found_again(name: str) -> str:
    """A checkpoint's hub name, or its folder by a path that holds wherever one stands."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def train(
    shards: str | Path,
    recipe: Recipe,
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
    cache = ShardCache(shards)
    training, validation = (load_sessions(cache, split, recipe.data.blind) for split in ("train", "val"))
    model, builder = build(recipe, cache)
    data_key = _data_key(training + validation)
    selection = Selection(recipe.tasks.active, SCORES if recipe.data.speech == "branch" else INLINE_SCORES)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(folder_lock(out, 0, 1, say))
        accelerator.wait_for_everyone()
        state = load_state(model, latest) if resume and latest.is_dir() else None
        if state is not None and state["data_key"] != data_key:
            raise UserError(
                f"the sessions in {shards} are not those that {out} was started with; start a new run"
            )
        require_events(validation)
        if state is None and (out / "checkpoints").is_dir():
            raise UserError(
                f"{out} has checkpoints but no {latest.name}, so it cannot be resumed; give another --out"
            )
        objective = _objective(accelerator, model, recipe, device)
        run = Run(
            accelerator, objective, builder, recipe, training, validation, data_key, selection, out, on_step
        )
        if state is not None:
            run.load_state(state)
        else:
            run.start(shards)
        on_start(run.step)
        return run.go()


def _objective(accelerator: Accelerator, model: DSTSmolVLM, recipe: Recipe, device: str) -> Objective:
    """The model as it is to be trained, and the objective that trains it."""
    if device != "cpu":
        model.config.text_config._attn_implementation = "flex_attention"
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if recipe.train.compile:
        model.model.text_model.compile()
    return OBJECTIVES[recipe.train.objective](accelerator, model, recipe)


def require_same_recipe(out: Path, given: Recipe) -> None:
    """Refuse to resume a run with another recipe than it was started with, once something of it is saved.

    What a machine has to do with (worker processes, rows at once, trackers) may be otherwise.

    Raises:
        UserError: they differ.
    """
    saved = load_config(Recipe, out / "recipe.yaml", [])
    machine = {
        "data": saved.data.model_copy(update=given.data.model_dump(include={"workers", "rows_at_once"})),
        "train": saved.train.model_copy(update=given.train.model_dump(include={"trackers"})),
    }
    saved = saved.model_copy(update=machine)
    if (out / "checkpoints").is_dir() and given != saved:
        different = _differences(saved.model_dump(), given.model_dump())
        raise UserError(
            f"{out} was started with another recipe ({different}); resume it with --resume --out {out} alone, or "
            "start a new run"
        )


def _accelerator(recipe: Recipe, device: str, out: Path) -> Accelerator:
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
    every_head = len(recipe.tasks.active) == 4 and recipe.train.on_plateau == "continue"
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


def _data_key(sessions: Sequence[SessionData]) -> str:
    """Changes when the sessions do, their labels, or how their features were made; not when the cache is moved."""
    key = hashlib.sha256()
    for session in sessions:
        made = session.cache.fingerprint.model_dump(exclude={"model", "storage"})
        about = (session.session_id, session.first_tick, session.goal, session.step_names, session.words)
        key.update(repr((made, about)).encode())
        for labels in (session.truth.speak, session.truth.dst_update, session.truth.state):
            key.update(labels.tobytes())
    return key.hexdigest()


def _differences(saved: dict[str, Any], given: dict[str, Any], path: str = "") -> str:
    told = []
    for key, value in saved.items():
        if isinstance(value, dict):
            told.append(_differences(value, given[key], f"{path}{key}."))
        elif value != given[key]:
            told.append(f"{path}{key}={value!r}, not {given[key]!r}")
    return ", ".join(text for text in told if text)

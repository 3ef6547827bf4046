"""The dialog model as a family of tasks: what is built for a cache, its data, its validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.shards import ShardCache
from pipeline.vision import vision_sha256
from schemas.checkpoints import checkpoint_folder
from schemas.errors import UserError
from schemas.shards import Fingerprint
from training.data import SessionData, load_sessions
from training.model import DSTSmolVLM, from_backbone
from training.recipe import Recipe
from training.runlog import Row
from training.sampler import TrainingSteps
from training.selection import INLINE_SCORES, SCORES
from training.sequence import SequenceBuilder
from training.steps import Position
from training.tuning import choose_trained
from training.validation import require_events, validate


class Dialog:
    """Windows of sessions, as `training.family.Family`.

    Raises:
        UserError: the cache has no train or val part, or nothing happens in the latter.
    """

    notes: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ("speaking_threshold", "dst_update_threshold", "min_gap_ticks")

    def __init__(self, builder: SequenceBuilder, recipe: Recipe, cache: ShardCache) -> None:
        self.builder, self.recipe, self.tokenizer = builder, recipe, builder.tokenizer
        self.training, self.validation = (
            load_sessions(cache, split, recipe.data.blind) for split in ("train", "val")
        )
        require_events(self.validation)
        self.data_key = _data_key(self.training + self.validation)
        self.scores: tuple[str, ...] = SCORES if recipe.data.speech == "branch" else INLINE_SCORES

    def steps(self, start: Position, rank: int, ranks: int) -> TrainingSteps:
        return TrainingSteps(self.training, self.builder, self.recipe, start, rank, ranks)

    def validate(self, model: DSTSmolVLM, accelerator: Accelerator, between: Callable[[], None]) -> Row:
        data = self.recipe.data
        rows = data.rows_at_once or -(-data.batch_rows // accelerator.num_processes)
        positions = rows * data.max_seq_len
        return validate(model, self.builder, self.validation, accelerator, positions, between)


def build(recipe: Recipe, cache: ShardCache) -> tuple[DSTSmolVLM, SequenceBuilder]:
    """The untrained model of a recipe for a cache, and its sequence builder.

    Raises:
        UserError: the checkpoint is not there, or its features are not those of the cache.
    """
    fingerprint = cache.fingerprint
    folder, vision = backbone_of(recipe.model.init, cache)
    identity = recipe.model.visual_adapter == "identity"
    if not identity and recipe.model.visual_tokens > fingerprint.tokens_per_frame:
        raise UserError(
            f"model.visual_tokens is {recipe.model.visual_tokens}, and a tick of {cache.folder} has "
            f"{fingerprint.tokens_per_frame} tokens, which fuse can only make fewer; take at most as many"
        )
    changes: dict[str, Any] = {
        "visual_adapter": recipe.model.visual_adapter,
        "cached_tokens": fingerprint.tokens_per_frame,
        "tiles": fingerprint.tiles,
        "visual_tokens": fingerprint.tokens_per_frame if identity else recipe.model.visual_tokens,
        "tick_hz": fingerprint.tick_hz,
        "window_ticks": recipe.data.window_ticks,
        "max_plan_steps": recipe.data.max_plan_steps,
        "memory_turns": recipe.data.memory_turns,
        "speech": recipe.data.speech,
        "speak_by": recipe.data.speak_by,
        "vision": vision,
    }
    ticks = recipe.data.window_ticks * int(changes["visual_tokens"])
    if ticks >= recipe.data.max_seq_len:
        raise UserError(
            f"the ticks of a window alone are {ticks} tokens, and data.max_seq_len is {recipe.data.max_seq_len}; make "
            "data.window_ticks less, or max_seq_len more"
        )
    model = from_backbone(DSTSmolVLM, folder, changes, recipe.train.seed)
    builder = SequenceBuilder.of(folder, model.config)
    model.config.end_of_turn_token = builder.end_of_utterance
    choose_trained(model, recipe.model, recipe.train.seed)
    return model, builder


def backbone_of(init: str | None, cache: ShardCache) -> tuple[Path, dict[str, str]]:
    """The checkpoint to begin from, and what a model's config tells of the vision tower behind a cache.

    Args:
        init: a hub name or a folder; None takes the checkpoint the cache was made with.

    Raises:
        UserError: the checkpoint is not there, or its features are not those of the cache.
    """
    fingerprint: Fingerprint = cache.fingerprint
    name = init or fingerprint.model
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
    return folder, {
        "model": _found_again(name if tower else fingerprint.model),
        "sha256": fingerprint.vision_sha256,
        "filter": str(fingerprint.preprocessing["filter"]),
        "dtype": fingerprint.dtype,
        "compute": fingerprint.compute,
    }


def _found_again(name: str) -> str:
    """A checkpoint's hub name, or its folder by a path that holds wherever one stands."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


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

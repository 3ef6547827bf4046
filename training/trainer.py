"""Trains the dialog model on cached features: one optimizer, the weighted sum of four losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from pipeline.shards import ShardCache
from schemas.checkpoints import checkpoint_folder
from schemas.errors import UserError
from schemas.files import replacing_folder, write_text
from training.batch import Batch, Example, collate
from training.curves import curves_picture
from training.data import SessionData, TrainingWindows, load_sessions
from training.losses import loss_parts
from training.metrics import best_threshold, score
from training.model import NEW_PARTS, DSTSmolVLM, from_backbone
from training.recipe import HeadLoss, LossSettings, Recipe
from training.rollout import Thresholds, decide_teacher, traces_of_teacher
from training.sequence import SequenceBuilder

HEADS = ("speaking", "dst_update", "response", "dst_state")


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
    identity = recipe.model.visual_adapter == "identity"
    changes = {
        "visual_adapter": recipe.model.visual_adapter,
        "cached_tokens": fingerprint.tokens_per_frame,
        "visual_tokens": fingerprint.tokens_per_frame if identity else recipe.model.visual_tokens,
        "tick_hz": fingerprint.tick_hz,
        "window_ticks": recipe.data.window_ticks,
        "max_plan_steps": recipe.data.max_plan_steps,
        "memory_turns": recipe.data.memory_turns,
    }
    model = from_backbone(folder, changes, recipe.train.seed)
    return model, SequenceBuilder.of(folder, model.config)


def compute_losses(model: torch.nn.Module, batch: Batch, settings: LossSettings) -> dict[str, torch.Tensor]:
    """The loss of each head on one batch."""
    out = model(batch)
    losses = {}
    for head in HEADS:
        chosen: HeadLoss = getattr(settings, head)
        logits, labels = getattr(out, head), getattr(batch, head)
        losses[head] = loss_parts(chosen.loss, logits, labels, gamma=chosen.gamma, alpha=chosen.alpha).mean()
    return losses


def train(
    shards: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
) -> dict[str, float]:
    """Train a model. ``out`` gets recipe.yaml, run.json, log.jsonl, curves.png and checkpoints.

    Returns:
        The step and the validation scores of the best checkpoint.

    Raises:
        UserError: the run's folder is in use, the cache has no train or val part, or a loss is not a number.
    """
    if (out / "log.jsonl").exists():
        raise UserError(f"{out} holds a run already; give another --out, or remove it")
    if device == "cpu":  # else two threads add up some gradients in the order they come
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes > 1:
        raise UserError(
            "training runs in one process for now; start it without torchrun or accelerate launch"
        )
    cache = ShardCache(shards)
    training, validation = (load_sessions(cache, split, recipe.data.blind) for split in ("train", "val"))
    model, builder = build(recipe, cache)
    windows = TrainingWindows(training, builder, recipe.data, recipe.train.seed)
    optimizer = make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    write_text(out / "run.json", json.dumps({"shards": str(shards)}) + "\n")
    torch.manual_seed(recipe.train.seed)
    best: dict[str, float] = {"val/combined": -math.inf}
    rows: list[dict[str, float]] = []
    with (out / "log.jsonl").open("w", encoding="utf-8") as log:
        for step, (epoch, examples) in enumerate(_batches(windows, recipe.train.steps), 1):
            row = {"step": step, "epoch": epoch, "train/lr": float(schedule.get_last_lr()[0])}
            batch = collate(examples, recipe.data.max_seq_len, builder.pad_token).to(accelerator.device)
            row |= _take_step(prepared, batch, recipe, optimizer, accelerator, step)
            schedule.step()
            if step % recipe.train.eval_every == 0 or step == recipe.train.steps:
                row |= validate(model, builder, validation)
                _save(model, builder, out / "checkpoints" / "latest")
                if row["val/combined"] > best["val/combined"]:
                    best = {
                        key: value for key, value in row.items() if key == "step" or key.startswith("val/")
                    }
                    _save(model, builder, out / "checkpoints" / "best")
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            on_step(row)
    curves_picture(rows, out / "curves.png")
    return best


def _take_step(
    model: torch.nn.Module,
    batch: Batch,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """One forward, one backward, one step; returns what the log says of it."""
    model.train()
    losses = compute_losses(model, batch, recipe.losses)
    wrong = [head for head, loss in losses.items() if not torch.isfinite(loss)]
    if wrong:
        raise UserError(
            f"the loss of {', '.join(wrong)} is not a number at step {step}; lower train.lr, or look at the features"
        )
    total = torch.stack([getattr(recipe.losses, head).weight * losses[head] for head in HEADS]).sum()
    accelerator.backward(total)
    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.train.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    row = {f"train/loss_{head}": round(losses[head].item(), 6) for head in HEADS}
    return row | {"train/loss": round(total.item(), 6), "train/grad_norm": round(float(norm), 6)}


def make_optimizer(model: DSTSmolVLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, a learning rate of their own for what starts from nothing."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name.startswith(NEW_PARTS), parameter.ndim > 1), []).append(parameter)
    settings = recipe.train
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.head_lr if is_new else settings.lr,
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
            }
            for (is_new, is_matrix), parameters in groups.items()
        ],
        betas=(0.9, 0.95),
    )


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    settings = recipe.train
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def validate(model: DSTSmolVLM, builder: SequenceBuilder, sessions: list[SessionData]) -> dict[str, float]:
    """Choose the thresholds on the validation part, keep them in the model's config, and score with them.

    States are true at the start of each window here; `dst evaluate` runs on predicted ones.
    """
    decisions = decide_teacher(model, builder, sessions)
    chosen = {}
    for head, truth in (("speaking", "speak"), ("dst_update", "dst_update")):
        scores = np.concatenate([getattr(window, head) for windows in decisions for window in windows])
        labels = np.concatenate([getattr(session.truth, truth) for session in sessions])
        if not labels.any():
            raise UserError(f"the val part has no tick for {head}; a threshold cannot be chosen on it")
        chosen[head] = best_threshold(scores, labels)[0]
    thresholds = Thresholds(**chosen)
    model.config.speaking_threshold = thresholds.speaking
    model.config.dst_update_threshold = thresholds.dst_update
    found = score(traces_of_teacher(model, builder, sessions, decisions, thresholds))
    return {
        "val/speaking_f1": found["speaking"]["f1"],
        "val/dst_update_f1": found["dst_update"]["f1"],
        "val/dst_state_macro_f1": found["dst_state"]["macro_f1"],
        "val/dst_state_joint": found["dst_state"]["joint"],
        "val/dst_state_joint_near_transition": found["dst_state"]["joint_near_transition"],
        "val/combined": found["combined"]["value"],
    }


def _batches(windows: TrainingWindows, steps: int) -> Iterator[tuple[int, list[Example]]]:
    step, epoch = 0, 0
    while True:
        for examples in windows.epoch(epoch):
            if step == steps:
                return
            yield epoch, examples
            step += 1
        epoch += 1


def _save(model: DSTSmolVLM, builder: SequenceBuilder, folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        builder.tokenizer.save_pretrained(temporary)

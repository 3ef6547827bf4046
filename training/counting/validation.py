"""The scores of a counter while it is trained: on the validation part, with a threshold chosen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from accelerate import Accelerator

from training.counting.batch import CountingExample
from training.counting.data import (
    CountingPrompt,
    ImageData,
    full_example,
    marked_example,
    sampled_examples,
)
from training.counting.metrics import Guided, best_done_threshold, count_scores
from training.counting.model import TASKS, CountingSmolVLM, wanted_places
from training.counting.recipe import CountingRecipe
from training.counting.rollout import Rollout, Subject, roll_out
from training.ranks import dealt, from_all, in_turn

IMAGES_AT_ONCE = 64
"""Images of a pass with true marks."""


def validate(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    images: Sequence[ImageData],
    recipe: CountingRecipe,
    accelerator: Accelerator,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Roll out on the validation part, choose the threshold of the done head, and score.

    Each process takes its share of the images, and all get the same scores.

    Returns:
        ``val/loss_*`` with true marks, ``val/coord_error`` (`training.counting.metrics.score`), ``val/done_f1`` over
        numbers of marks, ``val/count_mae`` of rollouts. Drawn marks cannot be rolled out without the vision tower:
        there the count is the number of true marks after which it first believes to be done.
    """
    own = dealt(images, accelerator)
    shares = from_all(accelerator, lambda: _look(model, prompt, own, recipe, between))
    guided = in_turn([guided for guided, _, _ in shares])
    rollouts = in_turn([rollouts for _, rollouts, _ in shares])
    counts = [len(image.points) for image in images]
    threshold = best_done_threshold(rollouts, counts)
    model.config.done_threshold = threshold
    sums = {
        name: sum(share[2][name] for share in shares) for name in (*_LOSSES, "coord_weight", "done_weight")
    }
    is_end = np.concatenate([each.marked == each.count for each in guided])
    said = np.concatenate([each.done for each in guided]) >= threshold
    errors = np.concatenate([each.errors for each in guided])
    row = {
        f"val/loss_{name}": sums[name] / max(sums["done_weight" if name == "done" else "coord_weight"], 1e-9)
        for name in _LOSSES
    }
    predicted = [rollout.count(threshold) for rollout in rollouts]
    return row | {
        "val/coord_error": float(np.median(errors)) if len(errors) else 0.0,
        "val/done_f1": float(2 * (is_end & said).sum() / max(1, is_end.sum() + said.sum())),
        "val/count_mae": count_scores(predicted, counts)["mae"],
    }


_LOSSES = ("coord", "x", "y", "done")


def _look(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    images: Sequence[ImageData],
    recipe: CountingRecipe,
    between: Callable[[], None],
) -> tuple[list[Guided], list[Rollout], dict[str, float]]:
    guided, sums = guide(model, prompt, images, recipe, between)
    if model.config.marks == "drawn":
        return guided, after_true_marks(model, prompt, images, between), sums
    subjects = [Subject(image.goal, lambda marks, image=image: image.features()) for image in images]  # type: ignore[misc]
    return guided, roll_out(model, prompt, subjects, between=between), sums


@torch.inference_mode()
def guide(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    images: Sequence[ImageData],
    recipe: CountingRecipe,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Guided], dict[str, float]]:
    """What the heads say with true marks: after each of them, or where a pass looks at one number of marks, after those
    of a list that is the same in all runs.

    Returns:
        By image, and the weighted sums of the losses with the weights they are to be divided by.
    """
    model.eval()
    tasks = {name: getattr(recipe.tasks, name) for name in TASKS}
    sums: Counter[str] = Counter()
    found: list[Guided] = []
    for first in range(0, len(images), IMAGES_AT_ONCE):
        between()
        part = images[first : first + IMAGES_AT_ONCE]
        rows = [_listed(image, prompt, recipe) for image in part]
        batch = prompt.collate(list(chain.from_iterable(rows)), recipe.model.marks).to(model.device)
        outputs = model(batch)
        undivided = {name: torch.ones(1, device=model.device) for name in TASKS}
        sums.update({k: float(v) for k, v in model.task_losses(outputs, batch, tasks, undivided).items()})
        sums.update({f"{name}_weight": float(getattr(batch, f"{name}_weight").sum()) for name in TASKS})
        away = outputs["coord"] - wanted_places(outputs["coord"], batch, recipe.tasks.coord)
        error, done = away.norm(dim=-1).cpu().numpy() / 2, outputs["done"].sigmoid().cpu().numpy()
        marked = batch.marked.cpu().numpy()
        owner = np.repeat(np.arange(len(part)), [len(each) for each in rows])[batch.row_of_read.cpu().numpy()]
        for number, image in enumerate(part):
            here, count = owner == number, len(image.points)
            found.append(Guided(error[here & (marked < count)], done[here], marked[here], count))
    return found, dict(sums)


def _listed(image: ImageData, prompt: CountingPrompt, recipe: CountingRecipe) -> list[CountingExample]:
    """An image's rows, which do not depend on the seed of the run."""
    shares = recipe.tasks.done.shares
    if recipe.model.marks == "mark_tokens":
        return [full_example(image, prompt, shares)]
    rng = np.random.default_rng(list(image.session_id.encode()))
    return list(sampled_examples(image, prompt, shares, recipe.model.marks, rng).values())


@torch.inference_mode()
def after_true_marks(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    images: Sequence[ImageData],
    between: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """For drawn marks, what the done head says after each true one, as if the marks had been its own."""
    model.eval()
    found = []
    none = np.zeros(1, np.float32)
    for image in images:
        between()
        rows = [
            marked_example(image, prompt, "drawn", number, none, none)
            for number in range(len(image.points) + 1)
        ]
        outputs = model(prompt.collate(rows, "drawn").to(model.device))
        marks = [(float(x), float(y)) for x, y in image.points]
        found.append(Rollout(marks, outputs["done"].sigmoid().tolist()))
    return found

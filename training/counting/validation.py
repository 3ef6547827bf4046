"""The scores of a counter while it is trained: on the validation part, with a threshold chosen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice

import numpy as np
import torch
from accelerate import Accelerator

from training.counting.data import CountingPrompt, ImageData, examples_of
from training.counting.metrics import Guided, best_done_threshold, count_scores
from training.counting.model import TASKS, CountingSmolVLM
from training.counting.recipe import CountingRecipe
from training.counting.rollout import IMAGES_AT_ONCE, Rollout, Subject, roll_out
from training.ranks import dealt, from_all, in_turn


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
        ``val/loss_*`` with true marks, ``val/coord_error`` (median distance to the next object, whatever the target of
        the loss), ``val/done_f1`` over numbers of marks, ``val/count_mae`` of rollouts. Drawn marks cannot be rolled
        out without the vision tower: there the count is the number of true marks after which it first believes to be
        done.
    """
    own = dealt(images, accelerator)
    shares = from_all(accelerator, lambda: _look(model, prompt, own, recipe, between))
    guided = in_turn([guided for guided, _, _ in shares])
    rollouts = in_turn([rollouts for _, rollouts, _ in shares])
    counts = [len(image.points) for image in images]
    threshold = best_done_threshold(rollouts, counts)
    model.config.done_threshold = threshold
    sums = {
        name: sum(share[2].get(name, 0.0) for share in shares)  # a process without images has none
        for name in (*_LOSSES, "coord_weight", "done_weight")
    }
    is_end = np.concatenate([np.arange(count, -1, -1) == 0 for count in counts])
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
        most = model.config.max_marks
        return guided, [by_true_marks(*each, most) for each in zip(images, guided, strict=True)], sums
    subjects = [Subject(image.goal, lambda marks, image=image: image.features()) for image in images]  # type: ignore[misc]
    return guided, roll_out(model, prompt, subjects, at_once=at_once(recipe), between=between), sums


@torch.inference_mode()
def guide(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    images: Sequence[ImageData],
    recipe: CountingRecipe,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Guided], dict[str, float]]:
    """What the heads say with true marks, after each of them.

    Returns:
        By image, and the weighted sums of the losses with the weights they are to be divided by.
    """
    if not images:
        return [], {}
    model.eval()
    tasks = {name: getattr(recipe.tasks, name) for name in TASKS}
    sums: Counter[str] = Counter()
    shares, marks = recipe.tasks.done.shares, recipe.model.marks
    examples = chain.from_iterable(examples_of(image, prompt, shares, marks) for image in images)
    errors, probabilities = [], []
    while rows := list(islice(examples, at_once(recipe))):
        between()
        batch = prompt.collate(rows, marks).to(model.device)
        outputs = model(batch)
        undivided = {name: torch.ones(1, device=model.device) for name in TASKS}
        sums.update({k: float(v) for k, v in model.task_losses(outputs, batch, tasks, undivided).items()})
        sums.update({f"{name}_weight": float(getattr(batch, f"{name}_weight").sum()) for name in TASKS})
        away = outputs["coord"] - batch.coord  # the next object, whatever the loss takes for its target
        errors.append(away.norm(dim=-1).cpu().numpy() / 2)
        probabilities.append(outputs["done"].sigmoid().cpu().numpy())
    ends = np.cumsum([len(image.points) + 1 for image in images])[:-1]
    by_image = (np.split(np.concatenate(each), ends) for each in (errors, probabilities))
    # after all marks there is no next object to be away from
    return [Guided(error[:-1], done) for error, done in zip(*by_image, strict=True)], dict(sums)


def at_once(recipe: CountingRecipe) -> int:
    """Rows of a pass: as many as of one in training, where the recipe says so."""
    return recipe.data.images_at_once or IMAGES_AT_ONCE


def by_true_marks(image: ImageData, guided: Guided, most: int) -> Rollout:
    """What the done head says after each true mark, as if the marks had been the model's own; where it is never done,
    they go on to ``most``.
    """
    marks = [(float(x), float(y)) for x, y in image.points][:most]
    more = most - len(marks)
    done = guided.done.tolist()
    return Rollout(marks + [(0.0, 0.0)] * more, done[: most + 1] + [0.0] * more)

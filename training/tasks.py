"""What each task's loss looks at in a batch, and how it is divided by the labels of a whole step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.batch import Batch
from training.family import Counts
from training.losses import LossParts, label_counts, loss_parts
from training.recipe import StateTask, TaskSettings


def count_labels(batch: Batch, tasks: Mapping[str, TaskSettings], vocabulary: int) -> Counts:
    """The labels of one batch, which are known before the model has seen it."""
    classes = {"response": vocabulary, "dst_state": 3}
    return {
        name: label_counts(task.loss, getattr(batch, name), classes.get(name, 2), _weights(batch, task))
        for name, task in tasks.items()
    }


def task_losses(
    logits: Mapping[str, torch.Tensor], batch: Batch, tasks: Mapping[str, TaskSettings], totals: Counts
) -> dict[str, torch.Tensor]:
    """Each task's share of its mean loss over all labels of a step: the shares of its batches add up to it.

    Args:
        logits: of the tasks wanted, as `training.model.DSTSmolVLM` gives them.
        totals: labels of the whole step, over all batches and ranks.
    """
    return {name: _parts(logits[name], batch, name, tasks[name]).mean(totals[name]) for name in logits}


def _parts(logits: torch.Tensor, batch: Batch, name: str, task: TaskSettings) -> LossParts:
    labels = getattr(batch, name)
    return loss_parts(
        task.loss, logits, labels, weights=_weights(batch, task), gamma=task.gamma, alpha=task.alpha
    )


def _weights(batch: Batch, task: TaskSettings) -> torch.Tensor | None:
    if not isinstance(task, StateTask) or task.near_weight == 1:
        return None
    weight = torch.where(batch.near, task.near_weight, 1.0)
    return weight[:, None].expand_as(batch.dst_state)

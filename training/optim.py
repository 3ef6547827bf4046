"""Optimizers: AdamW with a learning rate of its own for what starts from nothing, warm-up, schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from training.recipe import OptimizerSettings


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings, new_parts: tuple[str, ...]
) -> torch.optim.AdamW:
    """AdamW over parameters by name; weight decay on matrices only.

    Args:
        new_parts: how the names begin of what starts from nothing, and has ``head_lr``.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((name.startswith(new_parts), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr": settings.head_lr if is_new else settings.lr,
                "base_lr": settings.head_lr if is_new else settings.lr,
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
            }
            for (is_new, is_matrix), members in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,  # one kernel for all tensors, on the CPU too
    )


def set_learning_rate(optimizer: Any, step: int, steps: int, settings: OptimizerSettings) -> None:
    """Set what holds for a step, counted from 0."""
    factor = learning_rate_factor(step, steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate_factor(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up, then a cosine to a hundredth, or no change."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

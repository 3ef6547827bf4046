"""Several tasks' gradients of the same parameters: how far they agree, and how they are made to.

What is said of them follows from their dot products, so that none is ever laid out flat, or copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from training.runlog import Row

Gradients = dict[str, torch.Tensor]
"""By parameter; one that a task does not reach is missing, and counts as 0."""


def dot_products(gradients: Mapping[str, Gradients], keys: Collection[str]) -> NDArray[np.float64]:
    """Those of all pairs of ``T`` tasks over some parameters, ``[T, T]``."""
    tasks = list(gradients.values())
    found = np.zeros((len(tasks), len(tasks)))
    for at, one in enumerate(tasks):
        for beside, other in enumerate(tasks[: at + 1]):
            both = [key for key in keys if key in one and key in other]
            parts = [(one[key].flatten() @ other[key].flatten()).double() for key in both]
            if parts:
                found[at, beside] = found[beside, at] = float(torch.stack(parts).sum())
    return found


def length(gradients: Gradients) -> float:
    """The length of one task's gradient over all parameters."""
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def cosines(names: Collection[str], dots: NDArray[np.float64]) -> Row:
    """The cosine between each two tasks' gradients, from `dot_products`; 0 where one of them is 0."""
    found: Row = {}
    for a, one in enumerate(names):
        for b, other in enumerate(names):
            if a < b:
                both = float(np.sqrt(dots[a, a] * dots[b, b]))
                found[f"grad/cos_{one}_{other}"] = float(dots[a, b]) / both if both else 0.0
    return found


def surgery(dots: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each task's gradient is in the sum ``[T]`` of all, after each has lost what it had against others.

    A gradient that was projected is a sum of the first ones still: row ``i`` of ``parts`` says how much of each is in
    that of task ``i``. It meets the others in random order.

    Args:
        dots: of the gradients as they came, ``[T, T]``.
    """
    parts = np.eye(len(dots))
    for own in range(len(dots)):
        for other in rng.permutation([task for task in range(len(dots)) if task != own]):
            dot = parts[own] @ dots[:, other]
            if dot < 0:
                parts[own, other] -= dot / dots[other, other]
    shares: NDArray[np.float64] = parts.sum(0)
    return shares


def mixed(
    gradients: Mapping[str, Gradients], shares: NDArray[np.float64], shared: Collection[str]
) -> Gradients:
    """The sum of the tasks' gradients, by ``shares`` on the parameters that are ``shared``. It uses them up."""
    out: Gradients = {}
    for task, share in zip(gradients.values(), shares.tolist(), strict=True):
        while task:
            key, gradient = task.popitem()
            weight = share if key in shared else 1.0
            out[key] = out[key].add_(gradient, alpha=weight) if key in out else gradient * weight
    return out

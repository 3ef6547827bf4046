"""How well a counter counts, finds the next object, and knows that it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from training.counting.rollout import Rollout

CLOSE = 0.05
"""A mark is an object's if it lies within this share of the image's side from its point."""

THRESHOLDS = np.round(np.arange(0.05, 0.951, 0.05), 2)
"""Probabilities of being done that a validation chooses among."""

BUCKETS = ((0, 0), (1, 5), (6, 10), (11, 20), (21, 50), (51, None))
"""Counts, from and to, that are scored apart."""


@dataclass(frozen=True)
class Guided:
    """One image of N objects, with true marks: what the heads say after each of them.

    ``errors`` float64 ``[N]`` are distances to the next object after 0..N-1 marks, as shares of the image's side;
    ``done`` float64 ``[N + 1]`` probabilities after 0..N.
    """

    errors: NDArray[np.float64]
    done: NDArray[np.float64]


def best_done_threshold(rollouts: Sequence[Rollout], counts: Sequence[int]) -> float:
    """Of `THRESHOLDS`, the highest whose mean error of the count is within a standard error of the least.

    The error hardly changes over a wide range, and there a higher threshold stops less often before the end. (The rule
    of one standard error: Breiman et al., "Classification and regression trees", 1984.)
    """
    errors = np.array(
        [[abs(rollout.count(t) - n) for rollout, n in zip(rollouts, counts, strict=True)] for t in THRESHOLDS]
    )
    means = errors.mean(1)
    least = errors[means.argmin()]
    allowed = least.mean() + least.std() / np.sqrt(len(least))
    return float(THRESHOLDS[means <= allowed].max())


def score(
    guided: Sequence[Guided],
    points: Sequence[NDArray[np.float32]],
    rollouts: Sequence[Rollout],
    threshold: float,
) -> dict[str, Any]:
    """All scores of a split.

    Args:
        points: true ones of each image, ``[N, 2]`` in -1..1.
        rollouts: on the same images.

    Returns:
        ``coord``: ``median_error``, ``mean_error`` and ``p90_error`` of the next object with true marks before it, in
        shares of the image's side, ``close``, the share within `CLOSE`. ``done``: ``false_positive``, the share of
        numbers of marks below N at which it believes to be done, ``recall``, the share at N. ``count``, of rollouts:
        ``mae``, ``rmse``, ``bias`` (mean of predicted minus true), ``exact`` (share), ``by_count``. ``marks``, of
        rollouts up to their end: ``precision``, ``recall`` and ``f1`` of marks paired with points within `CLOSE`.
        None where there is nothing to take a mean of.
    """
    errors = np.concatenate([each.errors for each in guided])
    before = [each.done[:-1] >= threshold for each in guided]
    at_end = [each.done[-1:] >= threshold for each in guided]
    counts = [len(each) for each in points]
    predicted = [rollout.count(threshold) for rollout in rollouts]
    hits = [
        paired(np.array(rollout.marks[:count]).reshape(-1, 2), true)
        for rollout, count, true in zip(rollouts, predicted, points, strict=True)
    ]
    return {
        "coord": coord_scores(errors),
        "done": {
            "false_positive": _mean(before),
            "recall": _mean(at_end),
            "threshold": threshold,
        },
        "count": count_scores(predicted, counts),
        "marks": _f1(sum(hits), sum(predicted), sum(counts)),
    }


def coord_scores(errors: NDArray[np.float64]) -> dict[str, float | None]:
    """What distances to the next object ``[n]``, as shares of the image's side, come to."""
    if not len(errors):
        return dict.fromkeys(("median_error", "mean_error", "p90_error", "close"))
    return {
        "median_error": float(np.median(errors)),
        "mean_error": float(errors.mean()),
        "p90_error": float(np.quantile(errors, 0.9)),
        "close": float((errors <= CLOSE).mean()),
    }


def count_scores(predicted: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """Errors of counts, and the mean error of those with few and with many objects."""
    off = np.asarray(predicted, np.float64) - np.asarray(counts)
    buckets = {}
    for first, last in BUCKETS:
        here = [at for at, n in enumerate(counts) if n >= first and (last is None or n <= last)]
        if here:
            name = f"{first}" if first == last else f"{first}-{last}" if last else f"{first}+"
            buckets[name] = {"images": len(here), "mae": float(np.abs(off[here]).mean())}
    return {
        "mae": float(np.abs(off).mean()),
        "rmse": float(np.sqrt((off**2).mean())),
        "bias": float(off.mean()),
        "exact": float((off == 0).mean()),
        "by_count": buckets,
    }


def paired(marks: NDArray[np.floating], points: NDArray[np.floating]) -> int:
    """The most marks ``[M, 2]`` that can be paired with a point ``[N, 2]`` each, within `CLOSE` of the side."""
    if not len(marks) or not len(points):
        return 0
    distance = np.linalg.norm(marks[:, None] - points[None], axis=-1) / 2
    rows, columns = linear_sum_assignment(distance > CLOSE)
    return int((distance[rows, columns] <= CLOSE).sum())


def _f1(hits: int, predicted: int, true: int) -> dict[str, float | None]:
    return {
        "precision": hits / predicted if predicted else None,
        "recall": hits / true if true else None,
        "f1": 2 * hits / (predicted + true) if predicted + true else None,
    }


def _mean(parts: Sequence[NDArray[np.bool_]]) -> float | None:
    values = np.concatenate(parts) if parts else np.empty(0)
    return float(values.mean()) if len(values) else None

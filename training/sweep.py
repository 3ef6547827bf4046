"""Thresholds of a decision: the best one, and the curve of precision and recall that all of them draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.tally import match_events


def best_threshold(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold that gives the best per-tick F1, where ``score >= threshold`` is a positive.

    Every distinct score is tried. The threshold lies midway between the chosen score and the next lower
    one (at the chosen one where it is the lowest); of equal F1 the higher threshold is taken.

    Args:
        scores: floats ``[N]``.
        truth: bool ``[N]``.

    Returns:
        The threshold and its F1.

    Raises:
        ValueError: nothing is positive, so that every threshold is as bad.
    """
    if not truth.any():
        raise ValueError("no tick is positive, so no threshold can be chosen")
    values, hits, predicted = _cumulative(scores, truth)
    f1 = 2 * hits / (predicted + int(truth.sum()))
    best = int(f1.argmax())
    threshold = values[best]
    if best + 1 < len(values):
        lower = values[best + 1]
        middle = lower + (threshold - lower) / 2
        # Between neighbouring floats there is no middle: rounding may land on the lower one.
        threshold = middle if middle > lower else threshold
    return float(threshold), float(f1[best])


GAPS_S = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)
"""Smallest times between two utterances that are tried, in seconds."""


def best_gap(
    sessions: Sequence[tuple[NDArray[np.floating], NDArray[np.bool_]]], threshold: float, tick_hz: float
) -> int:
    """The smallest gap between utterances, in ticks, that gives the best event F1 at 2 s; of equal ones the smallest.

    Args:
        sessions: of each the scores floats ``[T]`` and the truth bool ``[T]``.
        threshold: from which score on it would speak.
    """
    gaps = sorted({round(seconds * tick_hz) for seconds in GAPS_S})
    fired = [np.flatnonzero(scores >= threshold).tolist() for scores, _ in sessions]
    meant = [np.flatnonzero(truth).tolist() for _, truth in sessions]

    def f1(gap: int) -> float:
        said = [spaced(ticks, gap) for ticks in fired]
        hits = sum(len(match_events(*pair, 2.0 * tick_hz)) for pair in zip(meant, said, strict=True))
        return hits / max(1, sum(map(len, said)) + sum(map(len, meant)))

    return max(gaps, key=lambda gap: (f1(gap), -gap))


def spaced(ticks: Sequence[int], gap: int) -> list[int]:
    """Ascending ticks without those that come less than ``gap`` after the last one that is kept."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick - kept[-1] >= gap:
            kept.append(tick)
    return kept


def average_precision(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve: over distinct thresholds, precision times the step in recall.

    Args:
        scores: floats ``[N]``; equal ones enter together.
        truth: bool ``[N]``.
    """
    if not truth.any():
        return 0.0
    _, hits, predicted = _cumulative(scores, truth)
    steps = np.diff(hits, prepend=0) / int(truth.sum())
    return float((hits / predicted * steps).sum())


def precision_recall(
    scores: NDArray[np.floating], truth: NDArray[np.bool_], points: int = 200
) -> list[tuple[float, float, float]]:
    """The curve as (threshold, precision, recall), from the highest threshold to the lowest.

    Args:
        scores: floats ``[N]``.
        truth: bool ``[N]``, somewhere True.
        points: at most so many are returned, evenly spaced in the order of distinct scores, both ends included.
    """
    values, hits, predicted = _cumulative(scores, truth)
    chosen = np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))
    positives = int(truth.sum())
    return [(float(values[i]), float(hits[i] / predicted[i]), float(hits[i] / positives)) for i in chosen]


def _cumulative(
    scores: NDArray[np.floating], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct scores from high to low, and at each the true positives and the positives so far."""
    order = np.argsort(-scores, kind="stable")
    values = scores[order]
    last_of_value = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    hits = np.cumsum(truth[order], dtype=np.int64)
    return values[last_of_value], hits[last_of_value], last_of_value + 1

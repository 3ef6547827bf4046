"""Scores of counting against searches by hand, NumPy and scikit-learn; and what perfect and empty predictions get."""

from __future__ import annotations

import statistics
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, recall_score, root_mean_squared_error

from training.counting.metrics import (
    CLOSE,
    THRESHOLDS,
    Guided,
    best_done_threshold,
    count_scores,
    paired,
    score,
)
from training.counting.rollout import Rollout

SEEDS = st.integers(0, 2**31)


def most_pairs(marks: np.ndarray, points: np.ndarray) -> int:
    """Over all ways to give each of the fewer one of the others."""
    few, many = (marks, points) if len(marks) <= len(points) else (points, marks)
    return max(
        sum(
            bool(np.hypot(*(few[at] - many[to])) / 2 <= CLOSE)
            for at, to in zip(range(len(few)), chosen, strict=True)
        )
        for chosen in permutations(range(len(many)), len(few))
    )


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_pairs_are_the_most_that_any_assignment_has(seed: int) -> None:
    """Places on a grid of half the reach, so that many are close to several."""
    rng = np.random.default_rng(seed)
    marks, points = (rng.integers(0, 8, (int(rng.integers(0, 6)), 2)) * 0.07 for _ in range(2))
    assert paired(marks, points) == most_pairs(marks, points)


def test_one_point_pairs_once_and_the_reach_is_a_share_of_the_side() -> None:
    at = np.array([[0.0, 0.0]])
    assert paired(np.array([[0.0, 0.01], [0.01, 0.0]]), at) == 1
    assert paired(np.array([[0.099, 0.0]]), at) == 1  # of an image that is two wide, 5 % is 0.1
    assert paired(np.array([[0.101, 0.0]]), at) == 0
    # the first may take either, and has to leave the one that is all the second can have
    assert paired(np.array([[0.0, 0.0], [0.14, 0.0]]), np.array([[0.07, 0.0], [-0.07, 0.0]])) == 2


def rollouts_of(rng: np.random.Generator, number: int) -> tuple[list[Rollout], list[int]]:
    found = []
    for _ in range(number):
        marks = int(rng.integers(0, 7))
        found.append(
            Rollout(
                [(float(x), float(y)) for x, y in rng.uniform(-1, 1, (marks, 2))], list(rng.random(marks + 1))
            )
        )
    return found, rng.integers(0, 7, number).tolist()


def count_by_hand(rollout: Rollout, threshold: float) -> int:
    for number, done in enumerate(rollout.done):
        if done >= threshold:
            return number
    return len(rollout.marks)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_threshold_is_the_highest_within_a_standard_error_of_the_best(seed: int) -> None:
    rollouts, counts = rollouts_of(np.random.default_rng(seed), 6)
    predicted = {t: [count_by_hand(each, t) for each in rollouts] for t in map(float, THRESHOLDS)}
    errors = {t: mean_absolute_error(counts, each) for t, each in predicted.items()}
    assert sorted(errors) == pytest.approx(list(np.arange(1, 20) / 20))
    best = min(errors, key=lambda t: (errors[t], t))
    off = [abs(p - n) for p, n in zip(predicted[best], counts, strict=True)]
    allowed = errors[best] + statistics.pstdev(off) / len(off) ** 0.5
    chosen = best_done_threshold(rollouts, counts)
    assert errors[chosen] <= allowed + 1e-12
    assert all(errors[t] > allowed - 1e-12 for t in errors if t > chosen)


def test_of_thresholds_that_are_as_good_the_highest_is_taken() -> None:
    """Worked by hand. One image has no spread: none that is worse is allowed."""
    rollout = Rollout([(0.0, 0.0)] * 2, [0.11, 0.12, 0.88])
    assert best_done_threshold([rollout], [2]) == 0.95  # where it never ends, all marks count
    assert best_done_threshold([rollout], [0]) == 0.1  # of 0.05 and 0.1
    # errors of four images below 0.5: 0, 0, 0, 2, so 0.5 on average, and a standard error of 0.433; up to 0.7 the
    # second has one more, so 0.75; above, the third two more, so 1.25
    marks = [(0.0, 0.0)] * 4
    rollouts = [Rollout(marks, done) for done in ([0.99], [0.5, 0.99], [0.7, 0.1, 0.99], [0.99])]
    assert best_done_threshold(rollouts, [0, 0, 0, 2]) == 0.7


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_scores_of_counts_are_those_of_a_library(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 70, 30)
    predicted = np.maximum(0, true + rng.integers(-4, 5, 30))
    found = count_scores(predicted.tolist(), true.tolist())
    assert found["mae"] == pytest.approx(mean_absolute_error(true, predicted))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(true, predicted))
    assert found["bias"] == pytest.approx(np.mean(predicted) - np.mean(true))
    assert found["exact"] == pytest.approx(np.mean(predicted == true))
    edges = {
        "0": (0, 0),
        "1-5": (1, 5),
        "6-10": (6, 10),
        "11-20": (11, 20),
        "21-50": (21, 50),
        "51+": (51, 999),
    }
    for name, (first, last) in edges.items():
        here = [(t, p) for t, p in zip(true, predicted, strict=True) if first <= t <= last]
        if not here:
            assert name not in found["by_count"]
            continue
        assert found["by_count"][name]["images"] == len(here)
        assert found["by_count"][name]["mae"] == pytest.approx(mean_absolute_error(*zip(*here, strict=True)))
    assert sum(bucket["images"] for bucket in found["by_count"].values()) == 30


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_scores_of_done_and_coord_with_true_marks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    guided, said, is_end = [], [], []
    threshold = float(rng.choice(THRESHOLDS))
    for _ in range(5):
        count = int(rng.integers(0, 5))
        done = rng.random(count + 1)
        guided.append(Guided(rng.random(count), done))
        said += [bool(value >= threshold) for value in done]
        is_end += [number == count for number in range(count + 1)]
    rollouts, _ = rollouts_of(rng, 5)
    points = [rng.uniform(-1, 1, (int(rng.integers(0, 4)), 2)).astype(np.float32) for _ in range(5)]
    found = score(guided, points, rollouts, threshold)
    assert found["done"]["recall"] == pytest.approx(recall_score(is_end, said))
    if not all(is_end):
        assert found["done"]["false_positive"] == pytest.approx(1 - recall_score(is_end, said, pos_label=0))
    else:
        assert found["done"]["false_positive"] is None
    errors = [error for each in guided for error in each.errors]
    if errors:
        assert found["coord"]["median_error"] == pytest.approx(np.median(errors))
        assert found["coord"]["mean_error"] == pytest.approx(np.mean(errors))
        assert found["coord"]["p90_error"] == pytest.approx(np.percentile(errors, 90))
        assert found["coord"]["close"] == pytest.approx(np.mean(np.array(errors) <= 0.05))
    else:
        assert set(found["coord"].values()) == {None}
    counts = [count_by_hand(rollout, threshold) for rollout in rollouts]
    hits = sum(
        most_pairs(np.array(rollout.marks[:count]).reshape(-1, 2), true) if count and len(true) else 0
        for rollout, count, true in zip(rollouts, counts, points, strict=True)
    )
    true = sum(map(len, points))
    precision, recall = hits / sum(counts) if sum(counts) else None, hits / true if true else None
    assert found["marks"]["precision"] == pytest.approx(precision)
    assert found["marks"]["recall"] == pytest.approx(recall)
    if precision and recall:
        assert found["marks"]["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert found["marks"]["f1"] == (0 if sum(counts) + true else None)
    assert found["count"]["mae"] == pytest.approx(mean_absolute_error([len(each) for each in points], counts))


POINTS = [np.array([(-0.5, 0.5), (0.5, 0.5), (0.0, -0.25)], np.float32), np.zeros((0, 2), np.float32)]


def test_a_perfect_counter() -> None:
    rollouts = [
        Rollout([(float(x), float(y)) for x, y in each], [0.0] * len(each) + [1.0]) for each in POINTS
    ]
    guided = [
        Guided(np.zeros(len(each)), np.array(rollout.done))
        for each, rollout in zip(POINTS, rollouts, strict=True)
    ]
    found = score(guided, POINTS, rollouts, 0.5)
    assert found["coord"] == {"median_error": 0, "mean_error": 0, "p90_error": 0, "close": 1}
    assert found["done"] == {"false_positive": 0, "recall": 1, "threshold": 0.5}
    assert found["marks"] == {"precision": 1, "recall": 1, "f1": 1}
    count = found["count"]
    assert (count["mae"], count["rmse"], count["bias"], count["exact"]) == (0, 0, 0, 1)


def test_a_counter_that_marks_nothing() -> None:
    rollouts = [Rollout([], [1.0]) for _ in POINTS]
    guided = [Guided(np.ones(len(each)), np.ones(len(each) + 1)) for each in POINTS]
    found = score(guided, POINTS, rollouts, 0.5)
    assert found["coord"]["close"] == 0
    assert found["done"] == {"false_positive": 1, "recall": 1, "threshold": 0.5}
    assert found["marks"] == {"precision": None, "recall": 0, "f1": 0}
    assert (found["count"]["mae"], found["count"]["bias"], found["count"]["exact"]) == (1.5, -1.5, 0.5)

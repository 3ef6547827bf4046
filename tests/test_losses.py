"""Losses against values worked by hand, and against sums taken one label at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bare_windows import bare_example
from hypothesis import given
from hypothesis import strategies as st

from training.batch import collate
from training.family import summed
from training.losses import IGNORE, LossName, label_counts, loss_parts
from training.recipe import Tasks
from training.tasks import count_labels, task_losses

# Two classes with probabilities 3/4 and 1/4, and the other way round.
LIKELY = [math.log(3.0), 0.0]
UNLIKELY = [0.0, math.log(3.0)]


def test_cross_entropy_is_the_mean_of_minus_log_p() -> None:
    logits = torch.tensor([LIKELY, UNLIKELY])
    loss = loss_parts("cross_entropy", logits, torch.tensor([0, 0])).mean()
    assert loss.item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2)


def test_balanced_is_the_mean_of_the_class_means() -> None:
    logits = torch.tensor([LIKELY, LIKELY, UNLIKELY, UNLIKELY])
    labels = torch.tensor([0, 0, 0, 1])
    # Class 0: (-log 3/4 - log 3/4 - log 1/4) / 3; class 1: -log 3/4.
    expected = ((-2 * math.log(0.75) - math.log(0.25)) / 3 - math.log(0.75)) / 2
    assert loss_parts("balanced", logits, labels).mean().item() == pytest.approx(expected)


def test_balanced_with_one_class_missing_is_the_mean_of_the_other() -> None:
    loss = loss_parts("balanced", torch.tensor([LIKELY, UNLIKELY]), torch.tensor([1, 1])).mean()
    assert loss.item() == pytest.approx((-math.log(0.25) - math.log(0.75)) / 2)


def test_focal_weighs_what_is_wrong_by_alpha_of_its_class() -> None:
    logits = torch.tensor([LIKELY, LIKELY])
    loss = loss_parts("focal", logits, torch.tensor([0, 1]), gamma=2.0, alpha=(0.25, 0.75)).mean()
    # 0.25 * (1/4)^2 * -log 3/4 and 0.75 * (3/4)^2 * -log 1/4, over two labels.
    expected = (0.25 * 0.0625 * -math.log(0.75) + 0.75 * 0.5625 * -math.log(0.25)) / 2
    assert loss.item() == pytest.approx(expected)


def test_focal_with_gamma_zero_is_cross_entropy() -> None:
    logits, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    focal = loss_parts("focal", logits, labels, gamma=0.0).mean()
    assert focal.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "balanced", "focal"])
def test_masked_positions_count_for_nothing(name: str) -> None:
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, IGNORE, 1, IGNORE, 0, 1])
    kept = labels != IGNORE
    masked = loss_parts(name, logits, labels).mean()  # type: ignore[arg-type]
    alone = loss_parts(name, logits[kept], labels[kept]).mean()  # type: ignore[arg-type]
    assert masked.item() == pytest.approx(alone.item())


@pytest.mark.parametrize("name", ["cross_entropy", "balanced", "focal"])
def test_no_label_gives_a_zero_that_is_still_in_the_graph(name: str) -> None:
    logits = torch.randn(4, 2, requires_grad=True)
    loss = loss_parts(name, logits, torch.full((4,), IGNORE)).mean()  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


LABELLED = st.lists(
    st.tuples(
        st.floats(-4, 4), st.floats(-4, 4), st.sampled_from([0, 1, IGNORE]), st.sampled_from([0.5, 1.0, 3.0])
    ),
    min_size=2,
    max_size=12,
)
NAMES = st.sampled_from(["cross_entropy", "balanced", "focal"])


@given(LABELLED, st.integers(1, 11), NAMES, st.booleans())
def test_parts_of_two_batches_add_up_to_the_mean_of_the_whole(
    rows: list[tuple[float, float, int, float]], cut: int, name: LossName, weighted: bool
) -> None:
    logits = torch.tensor([row[:2] for row in rows])
    labels = torch.tensor([row[2] for row in rows])
    weights = torch.tensor([row[3] for row in rows]) if weighted else None
    halves = (slice(0, cut), slice(cut, None))
    counted = [label_counts(name, labels[s], 2, None if weights is None else weights[s]) for s in halves]
    total = torch.stack(counted).sum(0)
    gradients, values = [], []
    for split in ((slice(None),), halves):
        leaf = logits.clone().requires_grad_()
        parts = [
            loss_parts(name, leaf[s], labels[s], weights=None if weights is None else weights[s]).mean(total)
            for s in split
        ]
        (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), leaf)
        values.append(sum(part.item() for part in parts))
        gradients.append(gradient)
    assert values[1] == pytest.approx(values[0], abs=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
    assert values[0] == pytest.approx(_by_hand(name, rows, weighted), abs=1e-5)


def _by_hand(name: str, rows: list[tuple[float, float, int, float]], weighted: bool) -> float:
    """The same loss, one label at a time."""
    sums, counts = [0.0, 0.0], [0.0, 0.0]
    for first, second, label, weight in rows:
        if label == IGNORE:
            continue
        p = 1 / (1 + math.exp((second - first) if label == 0 else (first - second)))
        group = label if name == "balanced" else 0
        factor = (1 - p) ** 2 if name == "focal" else 1.0
        sums[group] += (weight if weighted else 1.0) * factor * -math.log(p)
        counts[group] += weight if weighted else 1.0
    means = [total / count for total, count in zip(sums, counts, strict=True) if count]
    return sum(means) / len(means) if means else 0.0


@given(LABELLED, NAMES, st.booleans())
def test_labels_are_counted_before_the_logits_as_they_are_with_them(
    rows: list[tuple[float, float, int, float]], name: LossName, weighted: bool
) -> None:
    logits, labels = torch.tensor([row[:2] for row in rows]), torch.tensor([row[2] for row in rows])
    weights = torch.tensor([row[3] for row in rows]) if weighted else None
    counts = label_counts(name, labels, 2, weights)
    assert torch.equal(counts, loss_parts(name, logits, labels, weights=weights).counts)
    by_class = [sum(row[3] if weighted else 1 for row in rows if row[2] == label) for label in (0, 1)]
    assert counts.tolist() == (by_class if name == "balanced" else [sum(by_class)])


def test_states_near_a_transition_weigh_more_in_sum_and_divisor() -> None:
    # Two windows of two ticks. The first shows two steps, the other one: its second is padding.
    one = bare_example([False, False])
    near = np.array([True, False])
    two_ticks = {"speaking": np.array([0, 1]), "dst_update": np.array([0, IGNORE]), "near": near}
    window = replace(one.window, tick_at=np.arange(2), visual_at=np.arange(2))
    features = np.zeros((2, 1, 4), np.float32)
    first = replace(one, window=replace(window, step_at=np.arange(2)), features=features, **two_ticks)
    first = replace(first, state=np.array([[0, 1], [2, 0]], np.int8))
    second = replace(one, window=window, features=features, **two_ticks)
    second = replace(second, state=np.array([[1], [1]], np.int8), near=np.array([False, False]))
    batch = collate([first, second], None, 0)
    assert batch.dst_state.tolist() == [[0, 1], [2, 0], [1, IGNORE], [1, IGNORE]]

    # probability of each true state, by tick and step; padding's logits may be anything
    true = [[0.5, 0.25], [0.1, 0.8], [0.4, 0.9], [0.7, 0.9]]
    logits = torch.zeros(4, 2, 3)
    for tick, (states, row) in enumerate(zip(batch.dst_state.tolist(), true, strict=True)):
        for step, (state, p) in enumerate(zip(states, row, strict=True)):
            logits[tick, step] = math.log((1 - p) / 2)
            logits[tick, step, state if state != IGNORE else 0] = math.log(p)
    tasks = Tasks.model_validate({"dst_state": {"near_weight": 3.0}}).active
    counts = count_labels(batch, tasks, vocabulary=4)
    assert counts["dst_state"].tolist() == [3 + 3 + 1 + 1 + 1 + 1]
    loss = task_losses({"dst_state": logits}, batch, tasks, counts)["dst_state"]
    # only the first window's first tick is near a transition: its two pairs count three times
    near_sum, far_sum = math.log(0.5) + math.log(0.25), sum(map(math.log, (0.1, 0.8, 0.4, 0.7)))
    assert loss.item() == pytest.approx(-(3 * near_sum + far_sum) / 10, rel=1e-6)

    # the counts of two batches are those of one: speaking is balanced, so by class
    both = summed([count_labels(collate([each], None, 0), tasks, 4) for each in (first, second)])
    assert {name: count.tolist() for name, count in both.items()} == {
        "speaking": [2, 2],
        "dst_update": [2, 0],
        "response": [0],
        "dst_state": [10],
    }


def test_focal_wants_one_alpha_a_class() -> None:
    with pytest.raises(ValueError, match="needs 2 alphas"):
        loss_parts("focal", torch.zeros(1, 2), torch.tensor([0]), alpha=(1.0, 1.0, 1.0))

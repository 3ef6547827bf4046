"""Losses against values worked by hand, and against sums taken one label at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.losses import IGNORE, loss_parts

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


@given(
    st.lists(
        st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.sampled_from([0, 1, IGNORE])),
        min_size=2,
        max_size=12,
    ),
    st.integers(1, 11),
    st.sampled_from(["cross_entropy", "balanced", "focal"]),
)
def test_parts_of_two_batches_divide_as_one(
    rows: list[tuple[float, float, int]], cut: int, name: str
) -> None:
    logits = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    labels = torch.tensor([row[2] for row in rows])
    whole = loss_parts(name, logits, labels)  # type: ignore[arg-type]
    parts = [loss_parts(name, logits[s], labels[s]) for s in (slice(0, cut), slice(cut, None))]  # type: ignore[arg-type]
    counts = parts[0].counts + parts[1].counts
    together = parts[0].mean(counts) + parts[1].mean(counts)
    assert together.item() == pytest.approx(whole.mean().item(), abs=1e-6)


def test_focal_wants_one_alpha_a_class() -> None:
    with pytest.raises(ValueError, match="needs 2 alphas"):
        loss_parts("focal", torch.zeros(1, 2), torch.tensor([0]), alpha=(1.0, 1.0, 1.0))

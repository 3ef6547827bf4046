"""The losses of counting against values worked by hand, and what makes one of them fit to choose a checkpoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.counting.losses import coord_values, nearest_unmarked, over_places, weighted

BY_HAND = {
    "three_stage": {
        0.0: 0.0,
        0.02: 0.004,
        0.0249: 0.0062001,
        0.0499: 0.0249001,
        0.05: 0.0025,
        0.07: 0.0049,
        0.0999: 0.00998001,
        0.1: 0.03,
        0.5: 0.11,
        2.0: 0.41,
    },
    "three_stage_c1": {
        0.0: 0.0,
        0.02: 0.004,
        0.0249: 0.0062001,
        0.0499: 0.0249001,
        0.05: 0.025,
        0.07: 0.045,
        0.1: 0.075,
        0.5: 0.475,
        2.0: 1.975,
    },
}
DISTANCES = st.floats(0, 4, allow_nan=False)


def loss(name: str, distance: float) -> float:
    return float(coord_values(name, torch.tensor(distance, dtype=torch.float64)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BY_HAND)
def test_its_values_are_those_worked_by_hand(name: str) -> None:
    for distance, wanted in BY_HAND[name].items():
        assert loss(name, distance) == pytest.approx(wanted, abs=1e-12), distance


def test_the_first_form_falls_where_its_stages_meet() -> None:
    """Nearly ten times less just over 0.05 than just below: the better checkpoint may have the greater loss."""
    below, over = loss("three_stage", 0.05 - 1e-9), loss("three_stage", 0.05)
    assert below == pytest.approx(0.025, abs=1e-6)
    assert below / over == pytest.approx(10, rel=1e-5)
    assert loss("three_stage", 0.04) > loss("three_stage", 0.09)


@given(DISTANCES, DISTANCES)
def test_the_other_form_never_falls(a: float, b: float) -> None:
    near, far = sorted((a, b))
    assert loss("three_stage_c1", near) <= loss("three_stage_c1", far)
    if far - near > 1e-6:
        assert loss("three_stage_c1", near) < loss("three_stage_c1", far)


@given(DISTANCES, DISTANCES)
def test_the_slope_of_the_other_form_has_no_step(a: float, b: float) -> None:
    """It is 20 d up to 1 at 0.05, and then 1: never more than 20 times as much apart as the distances are."""

    def slope(at: float) -> float:
        distance = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        coord_values("three_stage_c1", distance).backward()
        assert distance.grad is not None
        return float(distance.grad)

    assert slope(a) == pytest.approx(min(20 * a, 1.0), abs=1e-9)
    assert abs(slope(a) - slope(b)) <= 20 * abs(a - b) + 1e-9


def of_places(values: list[float], probabilities: list[float]) -> float:
    logarithms = torch.tensor(probabilities, dtype=torch.float64).log()
    return float(over_places(torch.tensor(values, dtype=torch.float64), logarithms))


def test_the_loss_of_several_places_worked_by_hand() -> None:
    """A quarter at 0.1 and three quarters at 0.2: -0.1 log(0.25 / e + 0.75 / e**2)."""
    assert of_places([0.1, 0.2], [0.25, 0.75]) == pytest.approx(0.16426260, abs=1e-8)
    assert of_places([0.0, 9.0], [0.5, 0.5]) == pytest.approx(0.1 * math.log(2), abs=1e-7)
    assert of_places([0.3, 0.1, 0.2], [0, 1, 0]) == pytest.approx(0.1, abs=1e-12)  # one place alone


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 1)), min_size=1, max_size=9))
def test_the_loss_of_several_places_lies_between_the_least_and_the_mean(
    places: list[tuple[float, float]],
) -> None:
    values = [value for value, _ in places]
    total = sum(share for _, share in places)
    shares = [share / total for _, share in places]
    found = of_places(values, shares)
    mean = sum(value * share for value, share in zip(values, shares, strict=True))
    assert min(values) - 1e-9 <= found <= mean + 1e-9


def test_a_place_that_is_thought_unlikely_is_learned() -> None:
    """Of a thousandth of the probability, but the right one: the mean of the losses would hardly pull at it."""
    scores = torch.tensor([math.log(999.0), 0.0], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([1.0, 0.0], dtype=torch.float64)
    [found] = torch.autograd.grad(over_places(values, scores.log_softmax(-1)), scores)
    [mean] = torch.autograd.grad((values * scores.softmax(-1)).sum(), scores)
    assert found[1] < -0.09  # of at most 0.1
    assert mean[1] > -0.002


@given(st.integers(0, 2**31))
def test_the_nearest_unmarked_point_is_that_of_a_search_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, most = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    points = rng.uniform(-1, 1, (rows, most, 2)).round(2)
    predicted = rng.uniform(-1, 1, (rows, 2)).round(2)
    free = rng.random((rows, most)) < 0.5
    found = nearest_unmarked(torch.tensor(predicted), torch.tensor(points), torch.tensor(free)).numpy()
    for row in range(rows):
        left = [point for point, is_free in zip(points[row], free[row], strict=True) if is_free]
        if not left:
            continue
        distances = [abs(x - predicted[row][0]) + abs(y - predicted[row][1]) for x, y in left]
        assert any(np.array_equal(found[row], point) for point in left)
        own = abs(found[row] - predicted[row]).sum()
        assert own == pytest.approx(min(distances), abs=1e-12)


def test_no_gradient_goes_through_the_choice() -> None:
    predicted = torch.tensor([[0.1, 0.2]], requires_grad=True)
    found = nearest_unmarked(
        predicted, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), torch.tensor([[True, True]])
    )
    assert not found.requires_grad
    assert found.tolist() == [[0.0, 0.0]]


def test_a_label_of_no_weight_is_left_out_even_where_it_is_no_number() -> None:
    values = torch.tensor([1.0, math.nan, 5.0, math.inf])
    parts = weighted(values, torch.tensor([1.0, 0.0, 0.25, 0.0]))
    assert parts.sums.tolist() == [2.25]
    assert parts.counts.tolist() == [1.25]
    assert float(parts.mean()) == pytest.approx(1.8)
    assert float(parts.mean(torch.tensor([2.5]))) == pytest.approx(0.9)  # as a part of a larger step
    none = weighted(values.requires_grad_(), torch.zeros(4))
    assert none.mean().item() == 0
    none.mean().backward()

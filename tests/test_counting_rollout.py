"""Counting with keys and values that are kept, against counting with all computed anew; and the scores of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tiny_count import ENCODINGS, counter_of, images_of, little, next_by_hand

from training.counting.batch import CountingBatch
from training.counting.data import CountingPrompt, ImageData, full_example
from training.counting.model import CountingSmolVLM
from training.counting.recipe import Encoding
from training.counting.rollout import Rollout, Subject, roll_out
from training.counting.validation import by_true_marks, guide, validate

Made = tuple[CountingSmolVLM, CountingPrompt, list[ImageData]]
NEVER = 2.0
"""No probability is as high, so that only the most marks end a rollout."""


@pytest.fixture(scope="module", params=ENCODINGS)
def made(request: pytest.FixtureRequest, counting_shards: Path, drawn_shards: Path) -> Made:
    """A model whose marks depend on what it sees and lie apart, which random heads do not make."""
    shards = drawn_shards if request.param == "drawn" else counting_shards
    recipe = little(f"model.marks={request.param}")
    model, prompt = counter_of(shards, recipe)
    torch.manual_seed(1)
    for parameter in model.coord_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.done_head.weight, std=0.3)
    return model.eval(), prompt, images_of(shards, recipe)


def subjects_of(model: CountingSmolVLM, images: list[ImageData]) -> list[Subject]:
    """Images; with drawn marks, any that change with each mark."""

    def look(image: ImageData) -> Any:
        def features(marks: NDArray[np.float32]) -> NDArray[Any]:
            plain = image.features().astype(np.float32)
            return plain + marks.sum() * np.sin(np.arange(plain.size)).reshape(plain.shape)

        return features if model.config.marks == "drawn" else lambda marks: image.features()

    return [Subject(image.goal, look(image)) for image in images]


@torch.no_grad()
def whole_pass(
    model: CountingSmolVLM, prompt: CountingPrompt, image: ImageData, subject: Subject, marks: list[Any]
) -> tuple[float, tuple[float, ...]]:
    """One image by itself with these marks, all of it computed: probability of being done, the next mark."""
    shown = np.array(marks, np.float32).reshape(-1, 2)
    example = replace(
        full_example(image, prompt, (0.5, 0.25, 0.25)),
        features=subject.look(shown),
        shown=shown,
        marked=np.array([len(marks)]),
        coord_weight=np.ones(1, np.float32),
        done_weight=np.ones(1, np.float32),
    )
    out = model(prompt.collate([example], model.config.marks))
    return float(torch.sigmoid(out["done"][0])), next_by_hand(out, marks)


@pytest.mark.parametrize("at_once", [64, 2])
def test_each_mark_of_a_rollout_is_what_a_whole_pass_gives_after_those_before_it(
    made: Made, at_once: int
) -> None:
    """Images of unlike prompts that end after unlike numbers of marks, together and two by two.

    Not two rollouts side by side: a model that has learned nothing makes a great difference of a last bit in a mark.
    """
    model, prompt, images = made
    subjects = subjects_of(model, images)
    free = roll_out(model, prompt, subjects, NEVER, at_once)
    assert {len(each.marks) for each in free} == {9}
    until = float(np.quantile([max(each.done[:9]) for each in free], 0.6))
    calls: list[int] = []
    ended = roll_out(model, prompt, subjects, until, at_once, lambda: calls.append(1))
    assert len({len(each.marks) for each in ended}) > 1
    assert len(calls) >= 10
    for limit, rollouts in ((NEVER, free), (until, ended)):
        for image, subject, rollout in zip(images, subjects, rollouts, strict=True):
            assert len(rollout.done) == len(rollout.marks) + 1
            for number, done in enumerate(rollout.done):
                wanted, following = whole_pass(model, prompt, image, subject, rollout.marks[:number])
                assert done == pytest.approx(wanted, abs=1e-4)
                if number < len(rollout.marks):
                    assert done < limit
                    assert rollout.marks[number] == pytest.approx(following, abs=1e-4)
            assert rollout.done[-1] >= limit or len(rollout.marks) == 9
    assert np.ptp([each.marks for each in free], axis=0).max() > 0.05  # images are counted each by itself
    assert max(np.ptp(each.marks, axis=0).max() for each in free) > 0.02  # each mark depends on those before


def test_a_rollout_ends_at_the_first_probability_that_is_enough() -> None:
    rollout = Rollout([(0.0, 0.0)] * 3, [0.1, 0.6, 0.4, 0.9])
    counts = {threshold: rollout.count(threshold) for threshold in (0.05, 0.1, 0.3, 0.6, 0.61, 0.9, 0.95)}
    assert counts == {0.05: 0, 0.1: 0, 0.3: 1, 0.6: 1, 0.61: 3, 0.9: 3, 0.95: 3}


def test_a_threshold_below_where_a_rollout_ended_gives_the_count_of_one_that_ends_there(made: Made) -> None:
    """So one rollout does for all thresholds that a validation chooses among."""
    model, prompt, images = made
    subjects = subjects_of(model, images)
    free = roll_out(model, prompt, subjects)
    for threshold in (0.2, 0.4, 0.5, 0.6, 0.8):
        ended = roll_out(model, prompt, subjects, threshold)
        assert [each.count(threshold) for each in free] == [each.count(threshold) for each in ended]
        assert [len(each.marks) for each in ended] == [each.count(threshold) for each in free]


def test_with_drawn_marks_a_validation_counts_by_the_true_ones(drawn_shards: Path) -> None:
    model, prompt = counter_of(drawn_shards, little("model.marks=drawn"))
    images = images_of(drawn_shards, little("model.marks=drawn"), "val")
    most = model.config.max_marks
    guided, _ = guide(model, prompt, images, little("model.marks=drawn", "data.images_at_once=2"))
    found = [by_true_marks(*each, most) for each in zip(images, guided, strict=True)]
    assert most > max(len(image.points) for image in images)
    for image, rollout in zip(images, found, strict=True):
        count = len(image.points)
        assert np.allclose(np.array(rollout.marks[:count]).reshape(-1, 2), image.points)
        assert (len(rollout.marks), rollout.count(NEVER)) == (
            most,
            most,
        )  # one that is never done has not counted right
        for number, done in enumerate(rollout.done[: count + 1]):
            with torch.no_grad():
                wanted = model(alone(image, prompt, "drawn", number))["done"].sigmoid()
            assert done == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("most", [0, 1, 9])
def test_with_drawn_marks_a_head_that_is_never_done_counts_to_the_most(drawn_shards: Path, most: int) -> None:
    model, prompt = counter_of(drawn_shards, little("model.marks=drawn"))
    images = images_of(drawn_shards, little("model.marks=drawn"), "val")
    assert {bool(len(image.points)) for image in images} == {False, True}
    model.config.max_marks = most
    torch.nn.init.zeros_(model.done_head.weight)
    torch.nn.init.constant_(model.done_head.bias, -10.0)
    guided, _ = guide(model, prompt, images, little("model.marks=drawn"))
    found = [by_true_marks(*each, most) for each in zip(images, guided, strict=True)]
    assert [rollout.count(0.05) for rollout in found] == [most] * len(images)
    assert [len(rollout.done) for rollout in found] == [most + 1] * len(images)


def alone(image: ImageData, prompt: CountingPrompt, marks: Encoding, number: int) -> CountingBatch:
    """An image with so many true marks, read once."""
    return prompt.collate(
        [
            replace(
                full_example(image, prompt, (1, 0, 0)),
                features=image.features(number if marks == "drawn" else 0),
                shown=image.points[:number],
                marked=np.array([number]),
                coord_weight=np.ones(1, np.float32),
                done_weight=np.ones(1, np.float32),
            )
        ],
        marks,
    )


def mixture(out: dict[str, torch.Tensor], point: NDArray[np.float32]) -> float:
    """Loss of one next point: the tokens' places, weighted by how likely each is."""
    l1 = np.abs(out["places"][0].double().numpy() - point).sum(1)
    values = np.where(l1 < 0.05, 10 * l1**2, l1 - 0.025)
    return float(-0.1 * np.log((np.exp(out["at"][0].double().numpy()) * np.exp(-values / 0.1)).sum()))


@pytest.mark.parametrize("marks", ENCODINGS)
@pytest.mark.parametrize("at_once", [1, 3, 16])
def test_the_scores_of_a_validation_by_numpy(
    counting_shards: Path, drawn_shards: Path, marks: Encoding, at_once: int
) -> None:
    """After each number of marks, whatever a pass looks at: losses weighted as in training, per-axis errors, the next
    point's distance."""
    shards = drawn_shards if marks == "drawn" else counting_shards
    recipe = little(f"model.marks={marks}", f"data.images_at_once={at_once}")
    model, prompt = counter_of(shards, recipe)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.done_head.weight, std=0.3)
    images = images_of(shards, recipe, "val")
    row = validate(model, prompt, images, recipe, Accelerator(cpu=True))
    coord, x, y, done, distances, said, is_end = [], [], [], [], [], [], []
    for image in images:
        count = len(image.points)
        with torch.no_grad():
            out = [model(alone(image, prompt, marks, number)) for number in range(count + 1)]
        probability = 1 / (1 + np.exp(-np.array([float(each["done"]) for each in out])))
        shares = [
            0.25 / (count + 1) + 0.5 * (k == count) + 0.25 * (k == max(0, count - 1))
            for k in range(count + 1)
        ]
        done.append(
            sum(
                -share * np.log(p if k == count else 1 - p)
                for k, (share, p) in enumerate(zip(shares, probability, strict=True))
            )
        )
        said += list(probability >= model.config.done_threshold)
        is_end += [k == count for k in range(count + 1)]
        if count:
            away = np.array([each["coord"][0].tolist() for each in out[:count]]) - image.points
            coord.append(np.mean([mixture(*each) for each in zip(out, image.points, strict=False)]))
            x.append((away[:, 0] ** 2).mean())
            y.append((away[:, 1] ** 2).mean())
            distances += list(np.hypot(*away.T) / 2)
    wanted = {"coord": np.mean(coord), "x": np.mean(x), "y": np.mean(y), "done": np.mean(done)}
    for name, value in wanted.items():
        assert row[f"val/loss_{name}"] == pytest.approx(value, rel=1e-5), name
    assert row["val/coord_error"] == pytest.approx(np.median(distances), rel=1e-5)
    hits = sum(a and b for a, b in zip(said, is_end, strict=True))
    assert row["val/done_f1"] == pytest.approx(2 * hits / max(1, sum(said) + sum(is_end)))
    if marks == "drawn":  # which are the true ones, without a vision tower
        most = model.config.max_marks
        ends = [len(image.points) + 1 for image in images]
        cut = np.split(np.array(said), np.cumsum(ends)[:-1])
        counted = [int(each.argmax()) if each.any() else most for each in cut]
    else:
        rollouts = roll_out(model, prompt, subjects_of(model, images))
        counted = [each.count(model.config.done_threshold) for each in rollouts]
    errors = [abs(number - len(image.points)) for number, image in zip(counted, images, strict=True)]
    assert row["val/count_mae"] == pytest.approx(np.mean(errors))

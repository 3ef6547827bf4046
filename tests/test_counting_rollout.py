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
from tiny_count import ENCODINGS, counter_of, images_of, little

from training.counting.data import CountingPrompt, ImageData, full_example
from training.counting.model import CountingSmolVLM
from training.counting.rollout import Rollout, Subject, roll_out
from training.counting.validation import after_true_marks, guide, validate

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
        shown=shown if model.config.marks != "drawn" else shown[:0],
        marked=np.array([len(marks)]),
        coord_weight=np.ones(1, np.float32),
        done_weight=np.ones(1, np.float32),
    )
    out = model(prompt.collate([example], model.config.marks))
    return float(torch.sigmoid(out["done"][0])), tuple(out["coord"][0].clamp(-1, 1).tolist())


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
    found = after_true_marks(model, prompt, images, 2)
    most = model.config.max_marks
    assert most > max(len(image.points) for image in images)
    for image, rollout in zip(images, found, strict=True):
        count = len(image.points)
        assert np.allclose(np.array(rollout.marks[:count]).reshape(-1, 2), image.points)
        assert (len(rollout.marks), rollout.count(NEVER)) == (
            most,
            most,
        )  # one that is never done has not counted right
        for number, done in enumerate(rollout.done[: count + 1]):
            example = replace(
                full_example(image, prompt, (1, 0, 0)),
                features=image.features(number),
                shown=image.points[:0],
                marked=np.array([number]),
                coord_weight=np.ones(1, np.float32),
                done_weight=np.ones(1, np.float32),
            )
            with torch.no_grad():
                alone = model(prompt.collate([example], "drawn"))["done"].sigmoid()
            assert done == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("most", [0, 1, 9])
def test_with_drawn_marks_a_head_that_is_never_done_counts_to_the_most(drawn_shards: Path, most: int) -> None:
    model, prompt = counter_of(drawn_shards, little("model.marks=drawn"))
    images = images_of(drawn_shards, little("model.marks=drawn"), "val")
    assert {bool(len(image.points)) for image in images} == {False, True}
    model.config.max_marks = most
    torch.nn.init.zeros_(model.done_head.weight)
    torch.nn.init.constant_(model.done_head.bias, -10.0)
    found = after_true_marks(model, prompt, images, 64)
    assert [rollout.count(0.05) for rollout in found] == [most] * len(images)
    assert [len(rollout.done) for rollout in found] == [most + 1] * len(images)


def test_the_scores_of_a_validation_by_numpy(counting_shards: Path) -> None:
    """With one causal pass an image: losses weighted as in training, per-axis errors, the next point's distance."""
    recipe = little()
    model, prompt = counter_of(counting_shards, recipe)
    images = images_of(counting_shards, recipe, "val")
    row = validate(model, prompt, images, recipe, Accelerator(cpu=True))
    coord, x, y, done, distances, said, is_end = [], [], [], [], [], [], []
    for image in images:
        example = full_example(image, prompt, recipe.tasks.done.shares)
        with torch.no_grad():
            out = model(prompt.collate([example], "mark_tokens"))
        count = len(image.points)
        probability = 1 / (1 + np.exp(-out["done"].double().numpy()))
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
            away = out["coord"].double().numpy()[:count] - image.points
            l1 = np.abs(away).sum(1)
            coord.append(np.where(l1 < 0.05, 10 * l1**2, l1 - 0.025).mean())
            x.append((away[:, 0] ** 2).mean())
            y.append((away[:, 1] ** 2).mean())
            distances += list(np.hypot(*away.T) / 2)
    wanted = {"coord": np.mean(coord), "x": np.mean(x), "y": np.mean(y), "done": np.mean(done)}
    for name, value in wanted.items():
        assert row[f"val/loss_{name}"] == pytest.approx(value, rel=1e-5), name
    assert row["val/coord_error"] == pytest.approx(np.median(distances), rel=1e-5)
    hits = sum(a and b for a, b in zip(said, is_end, strict=True))
    assert row["val/done_f1"] == pytest.approx(2 * hits / max(1, sum(said) + sum(is_end)))
    subjects = subjects_of(model, images)
    rollouts = roll_out(model, prompt, subjects)
    errors = [
        abs(each.count(model.config.done_threshold) - len(image.points))
        for each, image in zip(rollouts, images, strict=True)
    ]
    assert row["val/count_mae"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("marks", ["token_embed", "drawn"])
def test_the_numbers_of_marks_of_a_validation_are_always_the_same(
    counting_shards: Path, drawn_shards: Path, marks: str
) -> None:
    """Whatever the seed of the run."""
    shards = drawn_shards if marks == "drawn" else counting_shards
    seen = []
    for seed in (0, 1):
        recipe = little(f"model.marks={marks}", f"train.seed={seed}")
        model, prompt = counter_of(shards, recipe)
        guided, _ = guide(model, prompt, images_of(shards, recipe, "val"), recipe)
        seen.append([each.marked.tolist() for each in guided])
        assert [each.count for each in guided] == [2, 0, 4, 5]
    assert seen[0] == seen[1]

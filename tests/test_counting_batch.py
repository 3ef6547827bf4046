"""What a counter learns from: marks and labels by hand, what is drawn at random against what counts always."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_count import CATEGORIES, COUNTS, ENCODINGS, counter_of, images_of, little, some_passes

from training.counting.batch import CountingBatch, CountingExample, collate
from training.counting.data import (
    CountingPrompt,
    ImageData,
    done_shares,
    full_example,
    marked_example,
    noisy,
    sampled_examples,
)
from training.counting.family import CountingSteps
from training.counting.model import CountingSmolVLM
from training.counting.recipe import Encoding
from training.steps import Position

SHARES = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def made(counting_shards: Path) -> tuple[CountingSmolVLM, CountingPrompt]:
    return counter_of(counting_shards, little())


@pytest.fixture(scope="module")
def images(counting_shards: Path) -> list[ImageData]:
    return images_of(counting_shards, little())


def is_same(one: CountingBatch, other: CountingBatch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


class Chooses:
    """In place of a random generator: takes the numbers it is given, and notes with which chance it might have."""

    def __init__(self, done: int, coord: int) -> None:
        self.done, self.coord = done, coord
        self.chance_of_done = 0.0
        self.coords = 0

    def choice(self, count: int, p: Any) -> int:
        assert len(p) == count
        assert float(np.sum(p)) == pytest.approx(1, abs=1e-12)
        self.chance_of_done = float(p[self.done])
        return self.done

    def integers(self, count: int) -> int:
        self.coords = count
        return self.coord


def test_the_images_are_those_of_the_corpus(images: list[ImageData]) -> None:
    assert [len(image.points) for image in images] == list(COUNTS["train"])
    assert [image.session_id for image in images] == [f"fsc147/train{n}" for n in range(len(images))]
    assert [image.goal for image in images] == [CATEGORIES[n % 3] for n in range(len(images))]
    for image in images:
        assert (np.abs(image.points) <= 1).all()


def test_rows_by_hand() -> None:
    """One row with two marks that is read after each of 0 to 2, one without any that is read once."""

    def example(name: str, prompt: list[int], points: list[Any], shown: int, marked: list[int]) -> Any:
        ones = np.ones(len(marked), np.float32)
        array = np.array(points, np.float32).reshape(-1, 2)
        features = np.full((4, 3), len(prompt), np.float16)
        weights = (ones, np.full(len(marked), 0.5, np.float32))
        return CountingExample(name, prompt, [9], features, array, array[:shown], np.array(marked), *weights)

    one = example("one", [5, 6], [(-1, 0), (0.5, 1)], 2, [0, 1, 2])
    two = example("two", [5, 6, 7], [], 0, [0])
    batch = collate([one, two], image_token=1, pad_token=0, as_tokens=True)
    assert batch.tokens.tolist() == [[5, 6, 1, 1, 1, 1, 9, 1, 1], [5, 6, 7, 1, 1, 1, 1, 9, 0]]
    assert batch.lengths.tolist() == [9, 8]
    assert batch.padding == pytest.approx(1 / 18)
    assert batch.visual_at.tolist() == [2, 3, 4, 5, 12, 13, 14, 15]
    assert batch.mark_at.tolist() == [7, 8]
    assert batch.row_of_mark.tolist() == [0, 0]
    assert batch.marks.tolist() == [[-1, 0], [0.5, 1]]
    assert batch.read_at.tolist() == [6, 7, 8, 16]  # the prompt's end, then each mark
    assert batch.row_of_read.tolist() == [0, 0, 0, 1]
    assert batch.marked.tolist() == [0, 1, 2, 0]
    assert batch.num_points.tolist() == [2, 0]
    assert batch.coord[:2].tolist() == [[-1, 0], [0.5, 1]]
    assert batch.done.tolist() == [0, 0, 1, 1]
    assert batch.coord_weight.tolist() == [1] * 4
    assert batch.done_weight.tolist() == [0.5] * 4
    apart = collate([one, two], image_token=1, pad_token=0, as_tokens=False)
    assert apart.tokens.shape == (2, 8)
    assert apart.read_at.tolist() == [6, 6, 6, 15]
    assert len(apart.mark_at) == 0
    assert apart.marks.tolist() == [[-1, 0], [0.5, 1]]  # they are added to the image's tokens


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (0, [1.0]),
        (1, [0.375, 0.625]),  # a quarter shared by two; the other three quarters are N - 1 = 0 and N = 1
        (3, [0.0625, 0.0625, 0.3125, 0.5625]),
    ],
)
def test_the_shares_of_done(count: int, wanted: list[float]) -> None:
    assert done_shares(count, SHARES) == pytest.approx(wanted)


@pytest.mark.parametrize("shares", [SHARES, (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.2, 0.7, 0.1)])
def test_the_weights_of_an_image_add_up_to_one(
    images: list[ImageData], made: tuple[Any, CountingPrompt], shares: tuple[float, float, float]
) -> None:
    for image in images:
        example = full_example(image, made[1], shares)
        count = len(image.points)
        assert example.marked.tolist() == list(range(count + 1))
        assert example.done_weight.sum() == pytest.approx(1, abs=1e-6)
        assert example.coord_weight.sum() == pytest.approx(1 if count else 0, abs=1e-6)
        assert example.coord_weight[count] == 0


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_one_row_with_all_marks_counts_as_random_ones_on_average(
    images: list[ImageData], made: tuple[CountingSmolVLM, CountingPrompt], count: int
) -> None:
    """Each number of marks is taken in turn as the random generator might: the losses, weighted by their chances, add
    up to that of the row with all marks."""
    model, prompt = made
    model.eval()
    image = next(each for each in images if len(each.points) == count)
    tasks = little().tasks.active
    once = {name: torch.ones(1) for name in tasks}

    def losses(example: CountingExample) -> dict[str, float]:
        """By passes over rows of one image: as if drawn marks were tokens, of which the row has so many."""
        shown = replace(example, shown=image.points[: int(example.marked[-1])])
        batch = prompt.collate([shown], "mark_tokens")
        with torch.no_grad():
            found = model.task_losses(model(batch), batch, tasks, once)
        return {name: float(value) for name, value in found.items()}

    done = coord = x = 0.0
    for number in range(count + 1):
        chooses = Chooses(number, min(number, max(0, count - 1)))
        rows = sampled_examples(image, prompt, SHARES, "token_embed", cast(np.random.Generator, chooses))
        assert rows.keys() == ({"coord", "done"} if count else {"done"})
        assert len(rows["done"].shown) == number
        done += chooses.chance_of_done * losses(rows["done"])["done"]
        if number < count:
            assert chooses.coords == count  # any of 0 to N - 1 with the same chance
            found = losses(rows["coord"])
            assert found["done"] == 0  # a row of one task has no label of the other
            coord += found["coord"] / count
            x += found["x"] / count
    wanted = losses(full_example(image, prompt, SHARES))
    assert wanted["done"] == pytest.approx(done, rel=1e-5)
    assert wanted["coord"] == pytest.approx(coord, rel=1e-5, abs=1e-9)
    assert wanted["x"] == pytest.approx(x, rel=1e-5, abs=1e-9)


def test_numbers_of_marks_are_drawn_as_often_as_their_shares(
    images: list[ImageData], made: tuple[Any, CountingPrompt]
) -> None:
    image = next(each for each in images if len(each.points) == 5)
    rng = np.random.default_rng(0)
    found: dict[str, Counter[int]] = {"coord": Counter(), "done": Counter()}
    for _ in range(3000):
        for task, row in sampled_examples(image, made[1], SHARES, "token_embed", rng).items():
            found[task][int(row.marked[0])] += 1
    chances = {"coord": np.full(5, 0.2), "done": np.array([1, 1, 1, 1, 7, 13]) / 24}
    for task, wanted in chances.items():
        often = np.array([found[task][number] for number in range(len(wanted))]) / 3000
        assert (np.abs(often - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 3000)).all(), task


@pytest.mark.parametrize("marks", ["token_embed", "drawn"])
@pytest.mark.parametrize("tasks", [("coord",), ("done",), ("coord", "done")])
def test_the_rows_of_a_task_are_those_that_were_made_for_it(
    images: list[ImageData], made: tuple[Any, CountingPrompt], marks: Encoding, tasks: tuple[str, ...]
) -> None:
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    rows = [
        marked_example(
            image, made[1], "token_embed", number, *((one, none) if task == "coord" else (none, one))
        )
        for image in images[:6]
        for task in ("done", "coord")
        for number in [len(image.points) // 2]
        if task == "done" or len(image.points)
    ]
    wanted = [
        row
        for row in rows
        if ("coord" in tasks and row.coord_weight) or ("done" in tasks and row.done_weight)
    ]
    batch = made[1].collate(rows, marks).only(tasks)
    alone = made[1].collate(wanted, marks)
    assert batch.names == [row.name for row in wanted]
    width = alone.tokens.shape[1]
    assert torch.equal(batch.tokens[:, :width], alone.tokens)
    for name in (
        "lengths",
        "features",
        "marks",
        "row_of_mark",
        "row_of_read",
        "marked",
        "num_points",
        "done",
    ):
        assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    for name in ("coord_weight", "done_weight", "coord"):
        assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    extra = batch.tokens.shape[1] - width
    for name in ("visual_at", "read_at"):
        ours, theirs = getattr(batch, name), getattr(alone, name)
        row = torch.div(theirs, width, rounding_mode="floor")
        assert torch.equal(ours, theirs + row * extra), name


def test_a_row_that_is_read_after_each_mark_is_left_whole(counting_shards: Path) -> None:
    [[batch]] = some_passes(counting_shards, little(), 1)
    assert batch.only(("coord",)) is batch


def test_an_epoch_has_each_image_once_and_steps_of_like_size(
    counting_shards: Path, images: list[ImageData], made: tuple[Any, CountingPrompt]
) -> None:
    steps = CountingSteps(images, made[1], little())
    found = []
    for epoch in range(3):
        sizes = [len(planned) for planned in steps.planned(epoch)]
        assert sizes == [3, 3, 3]  # of nine, with four at most
        order = [index for planned in steps.planned(epoch) for _, index in planned]
        assert sorted(order) == list(range(9))
        found.append(order)
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("marks", ["mark_tokens", "token_embed"])
def test_steps_from_a_position_on_are_those_of_a_whole_run(
    counting_shards: Path, images: list[ImageData], made: tuple[Any, CountingPrompt], marks: str
) -> None:
    recipe = little(f"model.marks={marks}", "data.mark_noise=0.02")
    whole = iter(CountingSteps(images, made[1], recipe))
    run = [next(whole) for _ in range(5)]
    later = iter(CountingSteps(images, made[1], recipe, Position(0, 2)))
    for step in run[2:]:
        other = next(later)
        assert other.after == step.after  # type: ignore[union-attr]
        assert all(map(is_same, other.passes, step.passes))  # type: ignore[union-attr]
    workers = [CountingSteps(images, made[1], little(f"model.marks={marks}", "train.seed=1"))]
    assert not is_same(next(iter(workers[0])).passes[0], run[0].passes[0])  # type: ignore[union-attr]


def test_ranks_and_passes_share_a_step(images: list[ImageData], made: tuple[Any, CountingPrompt]) -> None:
    recipe = little("data.images_at_once=1")
    planned = next(CountingSteps(images, made[1], recipe).planned(0))
    alone = CountingSteps(images, made[1], recipe).passes(planned)
    names = [name for batch in alone for name in batch.names]
    assert len(alone) == 3
    parts = [CountingSteps(images, made[1], recipe, rank=rank, ranks=2).passes(planned) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]  # each pass is a meeting
    labelled = [batch for part in parts for batch in part if batch.done_weight.sum()]
    assert sorted(name for batch in labelled for name in batch.names) == sorted(names)
    empty = parts[1][1]
    assert float(empty.done_weight.sum() + empty.coord_weight.sum()) == 0


def test_shown_marks_may_be_off_and_labels_never(
    images: list[ImageData], made: tuple[Any, CountingPrompt]
) -> None:
    image = next(each for each in images if len(each.points) == 8)
    example = full_example(image, made[1], SHARES)
    rng = np.random.default_rng(0)
    off = np.stack([noisy(example, 0.02, rng).shown - example.shown for _ in range(200)])
    inside = np.abs(example.shown) < 0.8
    assert off[:, inside].std() == pytest.approx(0.04, rel=0.1)  # 2 % of a side that is 2 wide
    for _ in range(20):
        moved = noisy(example, 0.5, rng)
        assert (np.abs(moved.shown) <= 1).all()
        assert np.array_equal(moved.points, example.points)


@pytest.mark.parametrize("marks", ENCODINGS)
def test_a_batch_has_the_images_features(
    counting_shards: Path, drawn_shards: Path, marks: str, made: tuple[Any, CountingPrompt]
) -> None:
    """With drawn marks, those of the tick that has so many."""
    shards = drawn_shards if marks == "drawn" else counting_shards
    recipe = little(f"model.marks={marks}")
    images = {image.session_id: image for image in images_of(shards, recipe)}
    [[batch]] = some_passes(shards, recipe, 1)
    rows = list(zip(batch.names, batch.features.numpy(), strict=True))
    assert rows
    numbers = batch.marked.tolist() if marks != "mark_tokens" else [0] * len(rows)
    for (name, features), number in zip(rows, numbers, strict=True):
        tick = number if marks == "drawn" else 0
        cached = images[name].cache.features(name, tick, 1)[0]
        assert np.array_equal(features, cached)
        if marks == "drawn" and number:
            assert not np.array_equal(features, images[name].cache.features(name, 0, 1)[0])

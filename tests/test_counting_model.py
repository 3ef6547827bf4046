"""What the counter's heads may see: marks before them and nothing else; and marks on features against the connector."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_count import ENCODINGS, counter_of, images_of, little, next_by_hand
from torch import nn
from transformers import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from training.counting.batch import CountingBatch, CountingExample
from training.counting.coord import next_places, taken_before
from training.counting.data import CountingPrompt, ImageData, full_example, marked_example
from training.counting.model import CountingSmolVLM, Projection, wanted_places
from training.counting.recipe import CoordTask, Encoding

SHARES = (0.5, 0.25, 0.25)
ONE = np.ones(1, np.float32)


@pytest.fixture(scope="module")
def images(counting_shards: Path) -> list[ImageData]:
    return images_of(counting_shards, little())


@pytest.fixture(scope="module")
def tokens(counting_shards: Path) -> tuple[CountingSmolVLM, CountingPrompt]:
    model, prompt = counter_of(counting_shards, little("model.visual_adapter=identity"))
    return model.eval(), prompt


@pytest.fixture(scope="module")
def cells(counting_shards: Path) -> tuple[CountingSmolVLM, CountingPrompt]:
    """With marks as vectors of parts of tokens, which are far from nothing."""
    changes = ("model.visual_adapter=identity", "model.marks=token_embed")
    model, prompt = counter_of(counting_shards, little(*changes))
    return model.eval(), prompt


def of_count(images: list[ImageData], count: int) -> ImageData:
    return next(image for image in images if len(image.points) == count)


def made_with(marks: Encoding, shards: Path) -> tuple[CountingSmolVLM, CountingPrompt, list[ImageData]]:
    recipe = little(f"model.marks={marks}")
    model, prompt = counter_of(shards, recipe)
    return model.eval(), prompt, images_of(shards, recipe)


@torch.no_grad()
def seen(model: CountingSmolVLM, batch: CountingBatch) -> dict[str, torch.Tensor]:
    """What depends on the marks, and on the last bit of a computation by no more than that."""
    found = model(batch)
    return {name: found[name] for name in ("at", "done")}


def test_what_comes_after_a_mark_changes_nothing_before_it(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    model, prompt = tokens
    example = full_example(of_count(images, 8), prompt, SHARES)
    before = seen(model, prompt.collate([example], "mark_tokens"))
    for first in range(9):
        moved = example.shown.copy()
        moved[first:] = -moved[first:]
        after = seen(model, prompt.collate([replace(example, shown=moved)], "mark_tokens"))
        for name, values in before.items():  # mark number `first` is seen from after `first` + 1 marks on
            assert torch.allclose(values[: first + 1], after[name][: first + 1], atol=1e-5), (name, first)
            if first < 8:
                assert (values[first + 1 :] - after[name][first + 1 :]).abs().amax() > 1e-3


def test_one_pass_is_as_many_passes_as_there_are_numbers_of_marks(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    model, prompt = tokens
    example = full_example(of_count(images, 8), prompt, SHARES)
    together = seen(model, prompt.collate([example], "mark_tokens"))
    assert together["at"].shape == (9, 16)
    assert together["done"].shape == (9,)
    for number in range(9):
        alone = replace(
            *(example,),
            shown=example.shown[:number],
            marked=np.array([number]),
            coord_weight=ONE,
            done_weight=ONE,
        )
        apart = seen(model, prompt.collate([alone], "mark_tokens"))
        for name, values in together.items():
            assert torch.allclose(values[number], apart[name][0], atol=1e-5), (name, number)


@pytest.mark.parametrize("marks", ENCODINGS)
def test_rows_do_not_depend_on_each_other_nor_on_what_they_are_padded_with(
    counting_shards: Path, drawn_shards: Path, marks: Encoding
) -> None:
    model, prompt, images = made_with(marks, drawn_shards if marks == "drawn" else counting_shards)

    def rows(image: ImageData) -> list[CountingExample]:
        if marks == "mark_tokens":
            return [full_example(image, prompt, SHARES)]
        return [marked_example(image, prompt, marks, n, ONE, ONE) for n in (0, len(image.points) // 2)]

    groups = [rows(image) for image in images]
    batch = prompt.collate([row for group in groups for row in group], marks)
    assert batch.padding > 0
    together = seen(model, batch)
    other = torch.where(
        torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None], 3, batch.tokens
    )  # another padding
    assert not torch.equal(other, batch.tokens)
    padded = seen(model, replace(batch, tokens=other))
    at = 0
    for group in groups:
        alone = seen(model, prompt.collate(group, marks))
        for name, values in alone.items():
            assert torch.allclose(values, together[name][at : at + len(values)], atol=1e-5), name
            assert torch.allclose(values, padded[name][at : at + len(values)], atol=1e-5), name
        at += len(alone["done"])
    assert at == len(together["done"])


def test_each_mark_sees_the_image_and_all_marks_before_it(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    model, prompt = tokens
    example = full_example(of_count(images, 8), prompt, SHARES)
    before = seen(model, prompt.collate([example], "mark_tokens"))["at"]
    other = replace(example, features=-example.features)
    apart = (seen(model, prompt.collate([other], "mark_tokens"))["at"] - before).abs().amax(1)
    assert (apart > 1e-3).all()
    for number in range(8):
        moved = example.shown.copy()
        moved[number] = -moved[number]
        after = seen(model, prompt.collate([replace(example, shown=moved)], "mark_tokens"))["at"]
        assert ((after - before).abs().amax(1)[number + 1 :] > 1e-4).all(), number


def test_a_mark_lies_where_an_image_token_does_that_has_its_place(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    """The vector of a mark in the middle of an image token is that token's place and the mark's own."""
    model, prompt = tokens
    image = of_count(images, 3)
    middles = np.array([(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)], np.float32)  # in raster order
    batch = prompt.collate([full_example(image, prompt, SHARES)], "mark_tokens")
    embedded = model.embed(batch).flatten(0, 1)
    features = torch.from_numpy(image.features().astype(np.float32))
    places = embedded[batch.visual_at] - features
    marks = model.embed_marks(torch.from_numpy(middles))
    assert model.mark is not None
    assert torch.allclose(places, marks - model.mark.weight[0], atol=1e-5)


def connector_of(model: CountingSmolVLM) -> SmolVLMConnector:
    config: SmolVLMConfig = model.config
    torch.manual_seed(3)
    connector: SmolVLMConnector = SmolVLMConnector(config)
    nn.init.normal_(connector.modality_projection.proj.weight, std=0.1)
    return connector.eval()


def marked(images: list[ImageData], prompt: CountingPrompt, places: Any) -> CountingBatch:
    shown = np.array(places, np.float32).reshape(-1, 2)
    example = marked_example(of_count(images, 8), prompt, "token_embed", 0, ONE, ONE)
    return prompt.collate([replace(example, shown=shown)], "token_embed")


def added_by(
    model: CountingSmolVLM, prompt: CountingPrompt, images: list[ImageData], places: Any
) -> torch.Tensor:
    """What marks change in the image's tokens, as the language model takes them: ``[T, H]``."""
    batch, none = marked(images, prompt, places), marked(images, prompt, [])
    with torch.no_grad():
        return (model.embed(batch) - model.embed(none)).flatten(0, 1)[batch.visual_at]


def test_a_mark_after_the_connector_is_one_on_the_patch_before_it(
    cells: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    """A vector u on the patch that a mark lies on changes the real connector's output by W_part u, in one token: the
    vectors of parts may be such, and then both are the same, wherever the mark lies."""
    model, prompt = cells
    assert model.sub_cell is not None
    connector = connector_of(model)
    parts, width = model.config.scale_factor, model.config.vision_config.hidden_size
    side = 2 * parts  # patches of the grid, two tokens wide
    patches, u = torch.randn(1, side * side, width), torch.randn(width)
    with torch.no_grad():
        plain = connector(patches)[0]
        weight = connector.modality_projection.proj.weight.unflatten(1, (parts * parts, width))
        model.sub_cell.weight.copy_(torch.einsum("hpv,v->ph", weight, u))
        for number in range(side * side):
            row, column = divmod(number, side)
            on_patch = patches.clone()
            on_patch[0, number] += u
            wanted = connector(on_patch)[0] - plain
            middle = [(2 * column + 1) / side - 1, (2 * row + 1) / side - 1]
            found = added_by(model, prompt, images, [middle])
            assert (wanted - found).abs().amax() < 1e-5, (row, column)
            assert (wanted.abs().amax(-1) > 1e-2).sum() == 1
        three = [(0.1, -0.9), (0.1, -0.9), (-0.6, 0.3)]  # two on one patch
        all_marked = patches.clone()
        for x, y in three:
            all_marked[0, int((y + 1) / 2 * side) * side + int((x + 1) / 2 * side)] += u
        wanted = connector(all_marked)[0] - plain
        assert (wanted - added_by(model, prompt, images, three)).abs().amax() < 1e-5


@pytest.mark.parametrize(
    ("place", "token", "part"),
    [
        ((-1.0, -1.0), 0, 0),
        ((1.0, 1.0), 3, 15),  # the last, not one after it
        ((1.0, -1.0), 1, 3),
        ((-1.0, 1.0), 2, 12),
        ((0.0, 0.0), 3, 0),  # a border belongs to the token after it
        ((-1e-6, 0.0), 2, 3),
        ((0.0, -1e-6), 1, 12),
        ((-0.75, -1.0), 0, 1),
    ],
)
def test_marks_on_borders(
    cells: tuple[CountingSmolVLM, CountingPrompt],
    images: list[ImageData],
    place: tuple[float, float],
    token: int,
    part: int,
) -> None:
    model, prompt = cells
    assert model.sub_cell is not None
    found = added_by(model, prompt, images, [place])
    wanted = torch.zeros_like(found)
    wanted[token] = model.sub_cell.weight[part].detach()
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_mark_is_its_own_rows(
    cells: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    model, prompt = cells
    rows = [
        marked_example(of_count(images, count), prompt, "token_embed", count, ONE, ONE) for count in (8, 0, 5)
    ]
    together = model.embed(prompt.collate(rows, "token_embed"))
    for number, row in enumerate(rows):
        alone = model.embed(prompt.collate([row], "token_embed"))[0]
        assert torch.allclose(together[number, : len(alone)], alone, atol=1e-6)


def test_the_heads_are_float32_whatever_is_around_them(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData]
) -> None:
    model, prompt = tokens
    batch = prompt.collate([full_example(image, prompt, SHARES) for image in images[:4]], "mark_tokens")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(batch)
        losses = model.task_losses(found, batch, little().tasks.active, {n: torch.ones(1) for n in found})
    assert {values.dtype for values in (*found.values(), *losses.values())} == {torch.float32}
    for name in ("coord_head", "done_head"):
        head = getattr(model, name)
        given: list[Any] = []
        hook = head.register_forward_hook(lambda module, args, out, given=given: given.extend([args, out]))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(batch)
        hook.remove()
        arguments, out = given
        exact = copy.deepcopy(head).double()(*(each.double() for each in arguments))
        both = [each if isinstance(each, tuple) else (each,) for each in (out, exact)]
        for value, wanted in zip(*both, strict=True):
            assert torch.allclose(value.double(), wanted, atol=1e-5)  # bf16 would be a hundredth away


@given(st.integers(0, 2**31), st.sampled_from([1, 4]))
@settings(max_examples=60, deadline=None)
def test_what_has_a_mark_is_not_marked_again(seed: int, tokens: int) -> None:
    """As long as there is a place without one; three images, looked at after any number of their marks."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(-1.2, 1.2, (3, 4 * tokens, 2))
    counts = rng.integers(0, 6, 3)
    row_of_mark = np.repeat(np.arange(3), counts)
    some = np.clip(places[row_of_mark, rng.integers(0, 4 * tokens, len(row_of_mark))], -1, 1) + 0.01
    marks = np.where(rng.random((len(some), 1)) < 0.8, some, rng.uniform(-1, 1, some.shape))
    row_of_read = rng.integers(0, 3, 9)
    marked = rng.integers(0, counts[row_of_read] + 1)
    at = torch.from_numpy(np.log(rng.dirichlet(np.ones(4 * tokens), 9)))
    given = [torch.from_numpy(each) for each in (places, marks, row_of_mark, row_of_read, marked)]
    found = next_places(at, given[0][given[3]], taken_before(*given))
    for read, (row, number) in enumerate(zip(row_of_read, marked, strict=True)):
        out = {"at": at[read : read + 1], "places": given[0][row : row + 1]}
        assert tuple(found[read].tolist()) == next_by_hand(out, marks[row_of_mark == row][:number])


@pytest.mark.parametrize("marks", ENCODINGS)
def test_the_answer_is_the_likeliest_place_without_a_mark(
    counting_shards: Path, drawn_shards: Path, marks: Encoding
) -> None:
    """Whatever way marks enter; with marks on the places themselves, as in a rollout of a model that has learned."""
    model, prompt, images = made_with(marks, drawn_shards if marks == "drawn" else counting_shards)
    for image in (of_count(images, 8), of_count(images, 5)):
        with torch.no_grad():
            places = model(prompt.collate([marked_example(image, prompt, marks, 0, ONE, ONE)], marks))[
                "places"
            ]
        on_places = replace(image, points=np.resize(places[0].clamp(-1, 1).numpy(), (len(image.points), 2)))
        answers = set()
        for number in range(6):
            example = marked_example(on_places, prompt, marks, number, ONE, ONE)
            with torch.no_grad():
                out = model(prompt.collate([example], marks))
            answer = next_by_hand(out, on_places.points[:number])
            assert tuple(out["coord"][0].tolist()) == answer
            answers.add(tuple(np.round(answer, 3)))
        assert len(answers) > 1


@pytest.mark.parametrize("target", ["next", "nearest"])
def test_where_the_next_object_should_have_been_found(
    tokens: tuple[CountingSmolVLM, CountingPrompt], images: list[ImageData], target: str
) -> None:
    _, prompt = tokens
    some = [of_count(images, count) for count in (8, 0, 1, 5)]
    batch = prompt.collate([full_example(image, prompt, SHARES) for image in some], "mark_tokens")
    predicted = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (len(batch.marked), 2))).float()
    found = wanted_places(predicted, batch, CoordTask(target=target))
    at = 0
    for image in some:
        for number in range(len(image.points) + 1):
            left = image.points[number:]
            if len(left):
                distance = np.abs(left - predicted[at].numpy()).sum(1)
                wanted = left[0] if target == "next" else left[distance.argmin()]
                assert np.array_equal(found[at].numpy(), wanted), (image.session_id, number)
            at += 1
    assert at == len(found)


def test_the_projection_sees_how_a_token_differs() -> None:
    torch.manual_seed(0)
    features = torch.randn(7, 4, 6) * torch.arange(1, 7) + torch.arange(4)[:, None]
    projection = Projection(4, 6)
    projection.measure(features)
    usual = (features - features.mean(0)) / (features - features.mean(0)).std((0, 1))
    assert torch.allclose(usual.std((0, 1)), torch.ones(6), atol=1e-5)
    given: list[torch.Tensor] = []
    projection.hidden.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    out = projection(features)
    assert out.shape == features.shape
    assert torch.allclose(given[0][..., :6], usual, atol=1e-5)
    assert torch.allclose(given[0][..., 6:], usual - usual.mean(1, keepdim=True), atol=1e-5)

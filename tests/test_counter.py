"""A counter on pictures: it says of them what the model says of the cache, in pixels, whatever way marks go in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_count import (
    CATEGORIES,
    ENCODINGS,
    counter_of,
    counting_cache,
    images_of,
    little,
    next_by_hand,
    write_pictures,
)

from pipeline.cache import cache_features
from pipeline.encode import EncoderSpec
from pipeline.engines import Here
from pipeline.shards import ShardCache
from pipeline.stills import read_picture
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from training.counting.batch import CountingExample
from training.counting.counter import Counted, Counter
from training.counting.data import CountingPrompt, ImageData, full_example, load_images, marked_example
from training.counting.recipe import Encoding
from training.recipe import load_recipe
from training.trainer import train

NONE = np.zeros(1, np.float32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("fsc147"))


@pytest.fixture(scope="module")
def caches(pictures: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with marks drawn in, and one of the pictures alone for the other encodings."""
    out = tmp_path_factory.mktemp("caches")
    plain = counting_cache(pictures, tiny_model, out / "plain")
    drawn = counting_cache(pictures, tiny_model, out / "drawn", "drawn")
    return {"mark_tokens": plain, "token_embed": plain, "drawn": drawn}


@pytest.fixture(scope="module")
def run(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    train(caches["mark_tokens"], little("train.steps=3"), out, device="cpu")
    return out


def untrained(caches: dict[str, Path], marks: Encoding, tower: Path) -> tuple[Counter, list[ImageData]]:
    """A counter with random weights, and the images of the training part."""
    recipe = little(f"model.marks={marks}")
    model, prompt = counter_of(caches[marks], recipe)
    return Counter(model, prompt, VisionEncoder(tower, "cpu")), images_of(caches[marks], recipe)


def place_of(image: ImageData) -> Path:
    return Path(image.labels.meta["uri"])


def pixels_of_marks(image: ImageData) -> list[tuple[float, float]]:
    rows = sorted(image.labels.points or [], key=lambda row: row["point"])
    return [(row["x_px"], row["y_px"]) for row in rows]


def with_marks(image: ImageData, prompt: CountingPrompt, marks: Encoding, number: int) -> CountingExample:
    """The row of an image from the cache with its first so many marks."""
    if marks != "mark_tokens":
        return marked_example(image, prompt, marks, number, NONE, NONE)
    whole = full_example(image, prompt, (0.5, 0.25, 0.25))
    read = {"marked": np.array([number]), "coord_weight": NONE, "done_weight": NONE}
    return replace(whole, shown=image.points[:number], **read)


def require_one_by_one(counter: Counter, counted: Counted, picture: Path, what: str) -> None:
    """A count as it is defined: each mark is the next object after those before, until done.

    Its own marks are given at each step, since what is rounded otherwise grows from mark to mark without training.
    """
    config = counter.model.config
    assert len(counted.done) == counted.count + 1 <= config.max_marks + 1
    for number, probability in enumerate(counted.done):
        place, done = counter.predict(picture, counted.marks[:number], what)
        assert probability == pytest.approx(done, abs=1e-3)
        if number < counted.count:
            assert counted.marks[number] == pytest.approx(place, abs=0.05)
            assert probability < config.done_threshold
    assert counted.is_cut_off == (counted.done[-1] < config.done_threshold)
    assert not counted.is_cut_off or counted.count == config.max_marks


@pytest.mark.parametrize("marks", ENCODINGS)
def test_pictures_give_exactly_what_the_cache_gives(
    marks: Encoding, caches: dict[str, Path], tiny_model: Path
) -> None:
    counter, images = untrained(caches, marks, tiny_model)
    for image in images:
        places = pixels_of_marks(image)
        picture = read_picture(place_of(image))
        height, width = picture.shape[:2]
        for number in {0, len(places) // 2, len(places)}:
            drawn = number if marks == "drawn" else 0
            assert np.array_equal(counter.features(picture, places[:drawn]), image.features(drawn))
            example = with_marks(image, counter.prompt, marks, number)
            with torch.inference_mode():
                wanted = counter.model(counter.prompt.collate([example], marks))
            (x, y), done = counter.predict(picture, places[:number], image.goal)
            wanted_x, wanted_y = next_by_hand(wanted, image.points[:number])
            assert (x, y) == ((wanted_x + 1) / 2 * width, (wanted_y + 1) / 2 * height)
            assert done == float(wanted["done"].sigmoid())
            assert counter.predict_coordinates(place_of(image), places[:number], image.goal) == (x, y)
            assert counter.predict_done(str(place_of(image)), places[:number], image.goal) == done


@pytest.mark.parametrize("marks", ENCODINGS)
def test_a_count_is_one_mark_after_the_other(
    marks: Encoding, caches: dict[str, Path], tiny_model: Path
) -> None:
    counter, images = untrained(caches, marks, tiny_model)
    picture = place_of(images[3])
    counter.model.config.done_threshold = 2.0
    whole = counter.count(picture, "red discs")
    assert (whole.count, whole.is_cut_off) == (9, True)
    require_one_by_one(counter, whole, picture, "red discs")
    for threshold in (0.0, *sorted(whole.done)[3:8:2]):
        counter.model.config.done_threshold = threshold
        counted = counter.count(read_picture(picture), "red discs")
        first = next(k for k, done in enumerate(whole.done) if done >= threshold)
        assert (counted.marks, counted.done) == (whole.marks[:first], whole.done[: first + 1])
        assert not counted.is_cut_off


def test_places_are_pixels_of_the_picture(caches: dict[str, Path], tiny_model: Path) -> None:
    """Worked by hand, from the first of 2 x 2 tokens: three quarters of 80 pixels from the left, a quarter of 60 from
    above; where that has a mark, the token's second place; beyond the picture, its border."""
    counter, _ = untrained(caches, "mark_tokens", tiny_model)
    picture = np.full((60, 80, 3), 128, np.uint8)
    head = counter.model.coord_head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()  # all places are as likely, and the first is answered
        head.offset.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]) / head.REACH)
    assert counter.predict_coordinates(picture, [], "pears") == (60.0, 15.0)
    assert counter.predict_coordinates(picture, [(60.0, 15.0)], "pears") == (60.0, 45.0)
    with torch.no_grad():
        head.offset.bias.copy_(torch.tensor([3.0, -7.0]).repeat(4) / head.REACH)
    assert counter.predict_coordinates(picture, [(80, 0)], "pears") == (80.0, 0.0)


def test_what_to_count_may_be_left_away_of_one_category(caches: dict[str, Path], tiny_model: Path) -> None:
    counter, _ = untrained(caches, "mark_tokens", tiny_model)
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    assert len(counter.model.config.goals) == len(set(CATEGORIES)) > 1
    with pytest.raises(
        UserError, match="trained on 3 categories, such as blue bars, red discs, wheels; name the"
    ):
        counter.predict(picture, [])
    with pytest.raises(UserError, match="name the one to count"):
        counter.predict_done(picture, [], " ")
    counter.model.config.goals = ["pears"]
    assert counter.predict(picture, []) == counter.predict(picture, [], "pears")
    assert counter.predict(picture, []) != counter.predict(picture, [], "apples")


def test_tiles_are_those_of_the_cache(caches: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """Of a cache that was made with tiles, also from a run's folder."""
    encoder = EncoderSpec(tiny_model, str(tiny_model), tiles=2).load("cpu")
    labels = caches["mark_tokens"].parent / "labels"
    cache_features(labels, tmp_path / "shards", Here(encoder), CacheOptions(workers=1, dtype="int8"))
    train(tmp_path / "shards", little("train.steps=1"), tmp_path / "run", device="cpu")
    counter = Counter.load(tmp_path / "run")
    plain = ShardCache(caches["mark_tokens"]).fingerprint.tokens_per_frame
    assert counter.model.config.cached_tokens == 4 * plain
    for image in load_images(ShardCache(tmp_path / "shards"), "val", "mark_tokens"):
        assert np.array_equal(counter.features(read_picture(place_of(image))), image.features())


def test_a_run_is_loaded_as_it_was_saved(run: Path, caches: dict[str, Path]) -> None:
    counter = Counter.load(run)
    assert counter.model.config.done_threshold is not None
    image = images_of(caches["mark_tokens"], little(), "val")[0]
    counted = counter.count(place_of(image), image.goal)
    require_one_by_one(counter, counted, place_of(image), image.goal)


def a_dialog_run(folder: Path) -> Path:
    """As much of one as is looked at."""
    (folder / "checkpoints/best").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("tiny", []).model_dump(mode="json")))
    return folder


def test_what_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        Counter.load(tmp_path)
    with pytest.raises(UserError, match="has no checkpoint 'best'"):
        Counter.load(run, "best")
    with pytest.raises(UserError, match="is a run of the dialog model"):
        Counter.load(a_dialog_run(tmp_path / "dialog"), "best")
    other = shutil.copytree(run, tmp_path / "other")
    config = other / "checkpoints/best_joint/config.json"
    content = json.loads(config.read_text())
    for change, said in (
        ({"model": str(tmp_path / "gone")}, "which cannot be had now"),
        ({"sha256": "0" * 64}, "another vision tower"),
    ):
        config.write_text(json.dumps(content | {"vision": content["vision"] | change}))
        with pytest.raises(UserError, match=said):
            Counter.load(other)
    config.write_text(json.dumps({key: value for key, value in content.items() if key != "done_threshold"}))
    counter = Counter.load(other)
    counter.predict(np.zeros((9, 9, 3), np.uint8), [], "discs")  # needs none
    with pytest.raises(UserError, match="the checkpoint has no threshold"):
        counter.count(np.zeros((9, 9, 3), np.uint8), "discs")


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([(3, 3), (81, 3)], r"mark 2 at \(81, 3\) does not lie in the picture of 80 x 60 pixels"),
        ([(3, -0.5)], r"mark 1 at \(3, -0.5\)"),
        ([(3, float("nan"))], r"mark 1 at \(3, nan\)"),
    ],
)
def test_marks_outside(
    marks: Sequence[tuple[float, float]], said: str, caches: dict[str, Path], tiny_model: Path
) -> None:
    for encoding in ENCODINGS:
        counter, _ = untrained(caches, encoding, tiny_model)
        with pytest.raises(UserError, match=said):
            counter.predict(np.zeros((60, 80, 3), np.uint8), marks, "discs")


def test_what_is_no_picture(caches: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    counter, images = untrained(caches, "mark_tokens", tiny_model)
    counter.model.config.done_threshold = 0.5
    for wrong in (
        np.zeros((60, 80), np.uint8),
        np.zeros((60, 80, 3), np.float32),
        np.zeros((3, 60, 80), np.uint8),
        np.zeros((0, 80, 3), np.uint8),
    ):
        with pytest.raises(UserError, match="a picture is RGB uint8"):
            counter.count(wrong, "discs")
    whole = place_of(images[0]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, said in (
        ("gone.jpg", "is not there"),
        ("cut.jpg", "cannot be read as a picture"),
        ("text.jpg", "holds no"),
    ):
        with pytest.raises(UserError, match=f"{name} {said}"):
            counter.count(tmp_path / name, "discs")


def test_one_that_lies_on_its_side_is_turned(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """EXIF says how to hold a photograph; marks are of the upright picture."""
    counter, images = untrained(caches, "mark_tokens", tiny_model)
    upright = read_picture(place_of(images[0]))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees counter-clockwise
    Image.fromarray(np.rot90(upright, -1).copy()).save(tmp_path / "turned.png", exif=exif)
    mark = (float(upright.shape[1]), 5.0)  # outside of the picture as the file holds it, or inside of it
    assert counter.predict(tmp_path / "turned.png", [mark], "discs") == counter.predict(
        upright, [mark], "discs"
    )

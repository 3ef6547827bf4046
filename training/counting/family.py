"""Counting as a family of tasks: what is built for a cache, its data, its validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipeline.shards import ShardCache
from schemas.errors import UserError
from training.counting.batch import CountingBatch, CountingExample
from training.counting.data import (
    CountingPrompt,
    ImageData,
    full_example,
    load_images,
    noisy,
    room_for,
    sampled_examples,
)
from training.counting.model import CountingSmolVLM, Projection
from training.counting.recipe import CountingRecipe
from training.counting.validation import validate
from training.dialog import backbone_of
from training.model import from_backbone
from training.runlog import Row
from training.steps import START, Position, Steps
from training.tuning import choose_trained

MEASURED = 256
"""Images whose features tell the projection what is usual."""

SCORES = (
    "val/loss_coord",
    "val/loss_x",
    "val/loss_y",
    "val/loss_done",
    "val/coord_error",
    "val/done_f1",
    "val/count_mae",
)
"""What a validation measures, and a task may be selected by."""


class Counting:
    """Images with their points, as `training.family.Family`.

    Raises:
        UserError: the cache has no images to count in, none of the train or val part, or none there with an object.
    """

    chosen: tuple[str, ...] = ("done_threshold",)
    scores: tuple[str, ...] = SCORES

    def __init__(self, prompt: CountingPrompt, recipe: CountingRecipe, cache: ShardCache) -> None:
        self.prompt, self.recipe, self.tokenizer = prompt, recipe, prompt.tokenizer
        self.training, self.validation = (
            load_images(cache, split, recipe.model.marks, recipe.data.blind) for split in ("train", "val")
        )
        for split, images in (("train", self.training), ("val", self.validation)):
            if not any(len(image.points) for image in images):
                raise UserError(
                    f"{cache.folder} has no object in the images of the split {split!r}, so there is nothing to mark; "
                    "prepare and cache some that have"
                )
        self.data_key = _data_key(self.training + self.validation)
        self.notes = _notes(self.training + self.validation, recipe, cache.fingerprint.tokens_per_frame)

    def steps(self, start: Position, rank: int, ranks: int) -> CountingSteps:
        return CountingSteps(self.training, self.prompt, self.recipe, start, rank, ranks)

    def validate(self, model: CountingSmolVLM, accelerator: Accelerator, between: Callable[[], None]) -> Row:
        return validate(model, self.prompt, self.validation, self.recipe, accelerator, between)


def build_counter(recipe: CountingRecipe, cache: ShardCache) -> tuple[CountingSmolVLM, CountingPrompt]:
    """The untrained model of a recipe for a cache, and its prompt.

    Raises:
        UserError: the checkpoint is not there, or its features are not those of the cache.
    """
    fingerprint = cache.fingerprint
    folder, vision = backbone_of(recipe.model.init, cache)
    images = load_images(cache, "train", recipe.model.marks, recipe.data.blind)
    changes: dict[str, Any] = {
        "visual_adapter": recipe.model.visual_adapter,
        "cached_tokens": fingerprint.tokens_per_frame,
        "marks": recipe.model.marks,
        "tiles": fingerprint.tiles,
        "max_marks": recipe.data.max_marks,
        "goals": sorted({image.goal for image in images}),
        "vision": vision,
    }
    model = from_backbone(CountingSmolVLM, folder, changes, recipe.train.seed)
    if recipe.model.visual_adapter == "project":
        some = np.random.default_rng(recipe.train.seed).permutation(len(images))[:MEASURED]
        features = np.stack([images[index].features() for index in sorted(some)])
        adapter = model.visual_adapter
        assert isinstance(adapter, Projection)
        adapter.measure(torch.from_numpy(features).float())
    choose_trained(model, recipe.model, recipe.train.seed)
    return model, CountingPrompt.of(folder)


class CountingSteps(Steps[list[tuple[int, int]]]):
    """The steps of counting: each image once an epoch, in an order of its own, in steps of like size.

    Args:
        rank, ranks: of the processes that train together.
    """

    def __init__(
        self,
        images: Sequence[ImageData],
        prompt: CountingPrompt,
        recipe: CountingRecipe,
        start: Position = START,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(start, rank, ranks)
        self.images, self.prompt, self.recipe = images, prompt, recipe

    def planned(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Of each step, its images with the epoch, by which they are sampled."""
        order = np.random.default_rng([self.recipe.train.seed, epoch]).permutation(len(self.images))
        steps = -(-len(order) // self.recipe.data.batch_images)
        for part in np.array_split(order, steps):
            yield [(epoch, int(index)) for index in part]

    def passes(self, planned: list[tuple[int, int]]) -> list[CountingBatch]:
        """This rank's share; one that would have a pass less than others gets one without labels, since each pass is a
        meeting of all ranks."""
        at_once = self.recipe.data.images_at_once or -(-len(planned) // self.ranks)
        # images of like counts share a pass, so that little is padded
        planned = sorted(planned, key=lambda each: len(self.images[each[1]].points))
        parts = [planned[at : at + at_once] for at in range(0, len(planned), at_once)]
        own = [self._batch(part) for part in parts[self.rank :: self.ranks]]
        if len(own) < -(-len(parts) // self.ranks):
            own.append(self._batch(planned[:1]).without_labels())
        return own

    def _batch(self, part: list[tuple[int, int]]) -> CountingBatch:
        examples = [example for epoch, index in part for example in self._examples(epoch, index)]
        return self.prompt.collate(examples, self.recipe.model.marks)

    def _examples(self, epoch: int, index: int) -> list[CountingExample]:
        image, shares = self.images[index], self.recipe.tasks.done.shares
        marks, noise = self.recipe.model.marks, self.recipe.data.mark_noise
        rng = np.random.default_rng([self.recipe.train.seed, epoch, index])
        if marks == "mark_tokens":
            found = [full_example(image, self.prompt, shares)]
        else:
            found = list(sampled_examples(image, self.prompt, shares, marks, rng).values())
        if marks == "drawn" or not noise:
            return found
        return [noisy(example, noise, rng) for example in found]


def _notes(images: Sequence[ImageData], recipe: CountingRecipe, tokens: int) -> tuple[str, ...]:
    """What the recipe will not do that a user may expect of it."""
    counts = [len(image.points) for image in images]
    more = sum(count > recipe.data.max_marks for count in counts)
    notes = []
    if more:
        notes.append(
            f"{more} of {len(counts)} images have more objects than data.max_marks={recipe.data.max_marks}, where a "
            f"rollout ends; set it to {max(counts)} or more to count them"
        )
    crowded = sum(count > room_for(tokens) for count in counts)
    if crowded:
        notes.append(
            f"{crowded} of {len(counts)} images have more than {room_for(tokens)} objects, of which several share one "
            f"of their {tokens} tokens and are hard to tell apart; cache them with more (--tiles)"
        )
    if recipe.model.marks == "drawn" and recipe.data.mark_noise:
        notes.append("data.mark_noise moves no marks that are drawn in pictures already")
    return tuple(notes)


def _data_key(images: Sequence[ImageData]) -> str:
    """Changes when the images do, their points, or how their features were made; not when the cache is moved."""
    key = hashlib.sha256()
    for image in images:
        made = image.cache.fingerprint.model_dump(exclude={"model", "storage"})
        key.update(repr((made, image.session_id, image.goal)).encode())
        key.update(image.points.tobytes())
    return key.hexdigest()

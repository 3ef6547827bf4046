"""Counts by itself: marks what it believes to be the next object, again and again, until it believes to be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.counting.batch import CountingBatch, CountingExample
from training.counting.coord import are_taken, next_places
from training.counting.data import CountingPrompt
from training.counting.model import CountingSmolVLM

IMAGES_AT_ONCE = 64
"""Images of a pass, where no recipe says how many there is room for."""

SURE = 0.95
"""Probability of being done after which a rollout goes no further: thresholds are chosen below it."""

Look = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Features ``[T, H]`` of an image with marks ``[k, 2]`` drawn in; where marks enter otherwise, of the image alone."""


@dataclass(frozen=True)
class Subject:
    """What is rolled out on: what to mark, and in which image."""

    goal: str
    look: Look


@dataclass
class Rollout:
    """Marks in the order they were made, and the probability of being done before each and after the last.

    ``marks`` are ``(x, y)`` in -1..1, one less than ``done`` has.
    """

    marks: list[tuple[float, float]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)

    def count(self, threshold: float) -> int:
        """The number of marks when it first believed to be done, or all."""
        return next((k for k, done in enumerate(self.done) if done >= threshold), len(self.marks))


@torch.inference_mode()
def roll_out(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    subjects: Sequence[Subject],
    until: float = SURE,
    at_once: int = IMAGES_AT_ONCE,
    between: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Count in each image, from no mark on.

    Args:
        until: probability of being done from which an image is over; ``max_marks`` of the model's config ends it, too.
        at_once: images that advance together.
        between: called before each pass.
    """
    model.eval()
    rollouts = [Rollout() for _ in subjects]
    lengths = [sum(map(len, prompt.write(subject.goal))) for subject in subjects]
    order = sorted(range(len(subjects)), key=lambda index: lengths[index])
    advance = _by_tokens if model.config.marks == "mark_tokens" else _again
    for _, alike in groupby(order, key=lambda index: lengths[index]):  # nothing is padded
        indices = list(alike)
        for first in range(0, len(indices), at_once):
            part = indices[first : first + at_once]
            chosen = [(subjects[index], rollouts[index]) for index in part]
            advance(model, prompt, chosen, until, between)
    return rollouts


def _by_tokens(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    part: Sequence[tuple[Subject, Rollout]],
    until: float,
    between: Callable[[], None],
) -> None:
    """Each mark is one more token; keys and values of all before it are kept."""
    batch = _batch(model, prompt, part)
    embedded = model.embed(batch)
    going = [rollout for _, rollout in part]
    cache: Any = None
    image: torch.Tensor | None = None
    taken: torch.Tensor | None = None
    while going:
        between()
        out = model.trunk(embedded, cache, use_cache=True)
        cache = out.past_key_values
        image = model.image_states(out.last_hidden_state, batch) if image is None else image
        found = model.heads(out.last_hidden_state[:, -1:], image)
        at, places = found["at"][:, 0], found["places"]
        taken = torch.zeros_like(at, dtype=torch.bool) if taken is None else taken
        coord = next_places(at, places, taken)
        taken = taken | are_taken(places, coord)
        stay = _go_on(model, going, found["done"][:, 0], until)
        if len(stay) < len(going):
            going = [going[row] for row in stay]
            if going:
                cache.batch_select_indices(torch.tensor(stay, device=coord.device))
        coord, image, taken = coord[stay], image[stay], taken[stay]
        _mark(coord, going)
        embedded = model.embed_marks(coord)[:, None].to(embedded.dtype)


def _again(
    model: CountingSmolVLM,
    prompt: CountingPrompt,
    part: Sequence[tuple[Subject, Rollout]],
    until: float,
    between: Callable[[], None],
) -> None:
    """Each mark changes the image, so that all is computed anew."""
    going = list(part)
    while going:
        between()
        found = model(_batch(model, prompt, going))
        stay = _go_on(model, [rollout for _, rollout in going], found["done"], until)
        going = [going[row] for row in stay]
        _mark(found["coord"][stay], [rollout for _, rollout in going])


def _batch(
    model: CountingSmolVLM, prompt: CountingPrompt, part: Sequence[tuple[Subject, Rollout]]
) -> CountingBatch:
    """The images with the marks they have so far, which are read after these."""
    examples = []
    for subject, rollout in part:
        marks = np.array(rollout.marks, np.float32).reshape(-1, 2)
        before, after = prompt.write(subject.goal)
        none = np.zeros(1, np.float32)
        marked = np.array([len(marks)])
        examples.append(
            CountingExample("", before, after, subject.look(marks), marks[:0], marks, marked, none, none)
        )
    return prompt.collate(examples, model.config.marks).to(model.device)


def _go_on(model: CountingSmolVLM, going: Sequence[Rollout], done: torch.Tensor, until: float) -> list[int]:
    """Note the probabilities of being done ``[B]``; which of the rows go on."""
    for rollout, probability in zip(going, done.sigmoid().tolist(), strict=True):
        rollout.done.append(probability)
    most = model.config.max_marks
    return [row for row, each in enumerate(going) if each.done[-1] < until and len(each.marks) < most]


def _mark(coord: torch.Tensor, going: Sequence[Rollout]) -> None:
    for rollout, (x, y) in zip(going, coord.tolist(), strict=True):
        rollout.marks.append((x, y))

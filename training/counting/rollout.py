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
    while going:
        between()
        out = model.trunk(embedded, cache, use_cache=True)
        cache = out.past_key_values
        image = model.image_states(out.last_hidden_state, batch) if image is None else image
        coord = _take(model, out.last_hidden_state, image, going)
        stay = [row for row, rollout in enumerate(going) if not _is_over(model, rollout, until)]
        if len(stay) < len(going):
            going = [going[row] for row in stay]
            if going:
                cache.batch_select_indices(torch.tensor(stay, device=coord.device))
        coord, image = coord[stay], image[stay]
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
        batch = _batch(model, prompt, going)
        hidden = model.trunk(model.embed(batch)).last_hidden_state
        image = model.image_states(hidden, batch)
        coord = _take(model, hidden, image, [rollout for _, rollout in going])
        stay = [row for row, (_, rollout) in enumerate(going) if not _is_over(model, rollout, until)]
        going = [going[row] for row in stay]
        _mark(coord[stay], [rollout for _, rollout in going])


def _batch(
    model: CountingSmolVLM, prompt: CountingPrompt, part: Sequence[tuple[Subject, Rollout]]
) -> CountingBatch:
    """The images with the marks they have so far, where those are no tokens."""
    examples = []
    for subject, rollout in part:
        marks = np.array(rollout.marks, np.float32).reshape(-1, 2)
        before, after = prompt.write(subject.goal)
        none = np.zeros(1, np.float32)
        shown = marks if model.config.marks == "token_embed" else marks[:0]
        examples.append(
            CountingExample(
                "", before, after, subject.look(marks), marks[:0], shown, np.zeros(1, np.int64), none, none
            )
        )
    return prompt.collate(examples, model.config.marks).to(model.device)


def _take(
    model: CountingSmolVLM, hidden: torch.Tensor, image: torch.Tensor, going: Sequence[Rollout]
) -> torch.Tensor:
    """Note the probabilities of being done at the last positions; where the next objects are, ``[B, 2]``."""
    out = model.heads(hidden[:, -1:], image)
    for rollout, done in zip(going, out["done"][:, 0].sigmoid().tolist(), strict=True):
        rollout.done.append(done)
    return out["coord"][:, 0].clamp(-1, 1)


def _is_over(model: CountingSmolVLM, rollout: Rollout, until: float) -> bool:
    return rollout.done[-1] >= until or len(rollout.marks) >= model.config.max_marks


def _mark(coord: torch.Tensor, going: Sequence[Rollout]) -> None:
    for rollout, (x, y) in zip(going, coord.tolist(), strict=True):
        rollout.marks.append((x, y))

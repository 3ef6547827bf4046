"""Generates the assistant's words, a token at a time, on keys and values that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.batch import Batch
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder

MAX_WORDS_TOKENS = 64
"""An utterance that is longer is cut there and closed."""

Feed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Appends tokens int64 ``[B, n]`` to the rows that are open, bool ``[B]``; logits of the next ``[B, vocabulary]``."""


def append(
    model: DSTSmolVLM, cache: Any, embedded: torch.Tensor, seen: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """Last hidden states ``[B, n, H]`` of tokens that go on from a cache, which is extended.

    Args:
        embedded: ``[B, n, H]``; each sees those before it.
        seen: bool ``[B, keys]``, which of the cached positions they see; None: all, for which attention needs no mask.
        positions: int64 ``[B, n]``.
    """
    out = model.model.text_model(
        inputs_embeds=embedded,
        attention_mask=None if seen is None else _mask(seen, embedded),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def _mask(seen: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """Float ``[B, 1, n, keys + n]``, 0 or the lowest number."""
    rows, count, _ = embedded.shape
    new = torch.ones(count, count, dtype=torch.bool, device=embedded.device).tril()
    allowed = torch.cat([seen[:, None, :].expand(-1, count, -1), new[None].expand(rows, -1, -1)], dim=2)
    mask = torch.zeros(allowed.shape, dtype=embedded.dtype, device=embedded.device)
    return mask.masked_fill_(~allowed, torch.finfo(embedded.dtype).min)[:, None]


def utterances(feed: Feed, builder: SequenceBuilder, open_rows: torch.Tensor) -> list[list[int]]:
    """One greedy utterance, closed by its end, for each row that is open, bool ``[B]``; none for the others."""
    answers: list[list[int]] = [[] for _ in open_rows]
    prefix = torch.tensor(builder.assistant_prefix, device=open_rows.device).expand(len(open_rows), -1)
    logits = feed(prefix, open_rows)
    while bool(open_rows.any()):
        tokens = logits.argmax(-1)
        for row in torch.nonzero(open_rows)[:, 0].tolist():
            if len(answers[row]) == MAX_WORDS_TOKENS:
                tokens[row] = builder.end_of_utterance
            answers[row].append(int(tokens[row]))
        # The end of an utterance is fed too: what is said later has seen it in training.
        logits = feed(tokens[:, None], open_rows)
        open_rows = open_rows & (tokens != builder.end_of_utterance)
    return answers


def speak(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    batch: Batch,
    cache: Any,
    ticks: Sequence[NDArray[np.integer]],
) -> list[dict[int, str]]:
    """Greedy words at the given ticks of each window, as branches off an observation that is already computed.

    The first utterances of all windows are generated together, then the second ones, and so on: an utterance
    attends to the observation up to its tick and to the earlier utterances of its window.

    Args:
        batch: one window a row, written without the assistant's words.
        cache: keys and values of that batch; it is extended.
        ticks: for each example of the batch, offsets of ticks in the window, ascending.

    Returns:
        For each example, the words by tick offset.
    """
    rows, length = batch.tokens.shape
    branches = _Branches(model, batch, cache)
    said: list[dict[int, str]] = [{} for _ in range(rows)]
    for turn in range(max((len(t) for t in ticks), default=0)):
        speaking = [len(ticks[example]) > turn for example in batch.order]
        columns = torch.zeros(rows, dtype=torch.long, device=model.device)
        for row, example in enumerate(batch.order):
            if speaking[row]:
                offset = int(ticks[example][turn])
                columns[row] = batch.tick_at[batch.window_of_tick == row][offset] - row * length
        branches.begin(columns)
        answers = utterances(branches.feed, builder, torch.tensor(speaking, device=model.device))
        for row, example in enumerate(batch.order):
            if speaking[row]:
                said[example][int(ticks[example][turn])] = builder.text_of(answers[row])
    return said


class _Branches:
    """Utterances that hang on a whole observation, each on the part of it up to its tick."""

    def __init__(self, model: DSTSmolVLM, batch: Batch, cache: Any) -> None:
        self.model, self.batch, self.cache = model, batch, cache
        self.said = torch.zeros(len(batch.tokens), 0, dtype=torch.bool, device=model.device)

    def begin(self, columns: torch.Tensor) -> None:
        """A new utterance in each row, after the trunk's position in its column."""
        rows, length = self.batch.tokens.shape
        at = torch.arange(rows, device=columns.device)
        self.position = self.batch.positions[at, columns] + 1
        self.observed = torch.arange(length, device=columns.device)[None, :] <= columns[:, None]

    def feed(self, tokens: torch.Tensor, open_rows: torch.Tensor) -> torch.Tensor:
        """A `Feed`; rows that are not open get padding nobody sees."""
        count = tokens.shape[1]
        positions = self.position[:, None] + torch.arange(count, device=tokens.device)
        seen = torch.cat([self.observed, self.said], dim=1)
        embedded = self.model.get_input_embeddings()(tokens)
        hidden = append(self.model, self.cache, embedded, seen, positions)
        self.position = self.position + count
        self.said = torch.cat([self.said, open_rows[:, None].expand(-1, count)], dim=1)
        return self.model.project(hidden[:, -1])

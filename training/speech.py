"""Generates the assistant's words as branches off an observation that is already computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.batch import Batch
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder

MAX_WORDS_TOKENS = 64
"""An utterance that is longer is cut there and closed."""


def speak(
    model: DSTSmolVLM,
    builder: SequenceBuilder,
    batch: Batch,
    cache: Any,
    ticks: Sequence[NDArray[np.integer]],
) -> list[dict[int, str]]:
    """Greedy words at the given ticks of each window.

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
    speech = _Speech(model, batch, cache)
    said: list[dict[int, str]] = [{} for _ in range(rows)]
    for turn in range(max((len(t) for t in ticks), default=0)):
        speaking = [len(ticks[example]) > turn for example in batch.order]
        columns = torch.zeros(rows, dtype=torch.long, device=model.device)
        for row, example in enumerate(batch.order):
            if speaking[row]:
                offset = int(ticks[example][turn])
                columns[row] = batch.tick_at[batch.window_of_tick == row][offset] - row * length
        answers = _utterances(speech, builder, columns, speaking)
        for row, example in enumerate(batch.order):
            if speaking[row]:
                said[example][int(ticks[example][turn])] = builder.text_of(answers[row])
    return said


def _utterances(
    speech: _Speech, builder: SequenceBuilder, columns: torch.Tensor, speaking: list[bool]
) -> list[list[int]]:
    """One utterance for each row that speaks, from the observation up to its column."""
    rows = len(speaking)
    open_rows = torch.tensor(speaking, device=columns.device)
    answers: list[list[int]] = [[] for _ in range(rows)]
    prefix = torch.tensor([builder.assistant_prefix] * rows, device=columns.device)
    speech.begin(columns)
    logits = speech.feed(prefix, open_rows)
    while bool(open_rows.any()):
        tokens = logits.argmax(-1)
        for row in range(rows):
            if open_rows[row]:
                if len(answers[row]) == MAX_WORDS_TOKENS:
                    tokens[row] = builder.end_of_utterance
                answers[row].append(int(tokens[row]))
        # The end of an utterance is fed too: what is said later has seen it in training.
        logits = speech.feed(tokens[:, None], open_rows)
        open_rows = open_rows & (tokens != builder.end_of_utterance)
    return answers


class _Speech:
    """Appends tokens to the cache and keeps account of who may attend to them."""

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
        """Append tokens int64 ``[B, n]``; rows that are not open get padding nobody sees.

        Returns:
            Logits of the next token ``[B, vocabulary]``.
        """
        rows, count = tokens.shape
        new = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        seen = torch.cat([self.observed, self.said], dim=1)[:, None, :].expand(-1, count, -1)
        allowed = torch.cat([seen, new[None].expand(rows, -1, -1)], dim=2)
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=tokens.device)
        mask = mask.masked_fill(~allowed, torch.finfo(self.model.dtype).min)
        positions = self.position[:, None] + torch.arange(count, device=tokens.device)
        out = self.model.model.text_model(
            inputs_embeds=self.model.get_input_embeddings()(tokens),
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position = self.position + count
        self.said = torch.cat([self.said, open_rows[:, None].expand(-1, count)], dim=1)
        return self.model.project(out.last_hidden_state[:, -1])

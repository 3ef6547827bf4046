"""Windows that are written while they happen: a tick goes in, decisions come out, and words where it speaks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from training.gate import Decisions
from training.model import DSTSmolVLM
from training.sequence import SequenceBuilder, Window, Words
from training.speech import MAX_WORDS_TOKENS, append, utterances


@dataclass(frozen=True)
class Observation:
    """What a tick brings: its features ``[cached_tokens, H]``, and what the user says at it."""

    features: NDArray[Any]
    said: tuple[str, ...] = ()


class LiveWindows:
    """Windows under way, one a row, each as `SequenceBuilder.window` would write it with the words that come about.

    With ``speech="inline"`` what is said stays in sight of all that follows, and positions run on. With ``branch`` only
    later words see it.

    Args:
        starts: windows without a tick: plan and memory.
    """

    def __init__(self, model: DSTSmolVLM, builder: SequenceBuilder, starts: Sequence[Window]) -> None:
        self.model, self.builder, self.device = model, builder, model.device
        rows = len(starts)
        self.cache = DynamicCache()
        # Accounts are kept in numpy: on arrays as small as these its operations cost a fraction of torch's.
        # Of the cached positions [B, keys]: whether it is of the trunk, whether it is said; padding is neither.
        self.trunk = np.zeros((rows, 0), dtype=np.bool_)
        self.speech = np.zeros((rows, 0), dtype=np.bool_)
        self.position = np.zeros(rows, dtype=np.int64)  # the trunk's next
        self._all_trunk = rows == 1  # a single row has no padding; a branch is hidden from the trunk
        # of most ticks: a picture, nothing said; it knows nothing of the window, whose keys and values go away with it
        self._tokens = functools.lru_cache(64)(functools.partial(_tokens_of_tick, builder))
        self.num_steps = [len(start.step_at) for start in starts]
        hidden = self._observe([start.tokens for start in starts], None)
        most = max(self.num_steps)
        at = [np.pad(start.step_at, (0, most - len(start.step_at)), mode="edge") for start in starts]
        self.steps = hidden[np.arange(rows)[:, None], np.stack(at)]

    @torch.inference_mode()
    def observe(self, ticks: Sequence[Observation | None]) -> list[Decisions | None]:
        """Feed each row its next tick, None to a window that is over; what it decides there, ``T`` = 1."""
        tokens = [self._tokens(tick.said) if tick else np.zeros(0, dtype=np.int64) for tick in ticks]
        features = np.stack([tick.features for tick in ticks if tick])
        hidden = self._observe(tokens, torch.from_numpy(features).to(self.device))
        last = hidden[np.arange(len(ticks)), [len(part) - 1 for part in tokens]]
        logits = self.model.decide(last, self.steps)
        speaking, update, state = (each.cpu().numpy() for each in logits)
        return [
            Decisions(speaking[row : row + 1], update[row : row + 1], state[row : row + 1, :steps])
            if tick
            else None
            for row, (tick, steps) in enumerate(zip(ticks, self.num_steps, strict=True))
        ]

    @torch.inference_mode()
    def speak(self, rows: Sequence[int]) -> dict[int, str]:
        """What is said in these rows after the last tick."""
        if not rows:
            return {}
        speaking = torch.zeros(len(self.position), dtype=torch.bool, device=self.device)
        speaking[list(rows)] = True
        self.spoken_at = self.position.copy()
        answers = utterances(self._say, self.builder, speaking)
        if self.builder.speech == "inline":
            self.position = self.spoken_at
        return {row: self.builder.text_of(answers[row]) for row in rows}

    def has_room(self, said: tuple[str, ...]) -> bool:
        """Whether each window has positions left for a tick at which that is heard and as much is said as can be."""
        most = len(self._tokens(said)) + len(self.builder.assistant_prefix) + MAX_WORDS_TOKENS + 1
        return int(self.position.max()) + most <= self.context

    @property
    def context(self) -> int:
        """Positions that the model knows."""
        positions: int = self.model.config.text_config.max_position_embeddings
        return positions

    @torch.inference_mode()
    def _observe(self, parts: Sequence[NDArray[np.int64]], features: torch.Tensor | None) -> torch.Tensor:
        """Append trunk to each row; hidden states ``[B, n, H]``, those of a shorter part with padding at their end."""
        lengths = np.array([len(part) for part in parts])
        size, ahead = int(lengths.max()), np.arange(lengths.max())
        tokens = np.full((len(parts), size), self.builder.pad_token)
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = part
        on_device = torch.from_numpy(tokens).to(self.device)
        if features is None:
            embedded = self.model.get_input_embeddings()(on_device)
        else:
            # a tick ends with its visual tokens
            ends = (np.arange(len(parts)) * size + lengths)[lengths > 0]
            visual_at = ends[:, None] - np.arange(self.builder.visual_tokens, 0, -1)
            embedded = self.model.embed(
                on_device, features, torch.from_numpy(visual_at.ravel()).to(self.device)
            )
        hidden = self._append(
            embedded, None if self._all_trunk else self.trunk, self.position[:, None] + ahead
        )
        self._grow(ahead < lengths[:, None], trunk=True)
        self.position = self.position + lengths
        return hidden

    def _say(self, tokens: torch.Tensor, open_rows: torch.Tensor) -> torch.Tensor:
        """Append words, a `training.speech.Feed`."""
        count, is_open = tokens.shape[1], open_rows.cpu().numpy()
        positions = self.spoken_at[:, None] + np.arange(count)
        seen = None if len(tokens) == 1 else self.trunk | self.speech
        hidden = self._append(self.model.get_input_embeddings()(tokens), seen, positions)
        self._grow(np.repeat(is_open[:, None], count, axis=1), trunk=self.builder.speech == "inline")
        self.spoken_at = self.spoken_at + count * is_open
        return self.model.project(hidden[:, -1])

    def _append(
        self, embedded: torch.Tensor, seen: NDArray[np.bool_] | None, positions: NDArray[np.int64]
    ) -> torch.Tensor:
        mask = None if seen is None else torch.from_numpy(seen).to(self.device)
        return append(self.model, self.cache, embedded, mask, torch.from_numpy(positions).to(self.device))

    def _grow(self, real: NDArray[np.bool_], trunk: bool) -> None:
        """Keep account of what was appended, bool ``[B, n]``: False is padding."""
        self.trunk = np.concatenate([self.trunk, real & trunk], axis=1)
        self.speech = np.concatenate([self.speech, real & (not trunk)], axis=1)
        self._all_trunk &= trunk


def _tokens_of_tick(builder: SequenceBuilder, said: tuple[str, ...]) -> NDArray[np.int64]:
    """What a window holds for one tick."""
    plan = ("", (), np.zeros(0, dtype=np.int8))
    words = [Words(0, "user", text) for text in said]
    before, after = (builder.window(*plan, 0, ticks, words).tokens for ticks in (0, 1))
    return after[len(before) :]

"""Windows packed into rows, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.losses import IGNORE
from training.sequence import Window, may_attend


@dataclass(frozen=True)
class Example:
    """A window, its features and its labels.

    ``features`` ``[T, cached_tokens, H]``; ``speak`` and ``update`` bool ``[T]``; ``state`` int8 ``[T, K]`` of
    the shown steps.
    """

    window: Window
    features: NDArray[np.floating]
    speak: NDArray[np.bool_]
    update: NDArray[np.bool_]
    state: NDArray[np.int8]


@dataclass(frozen=True)
class Batch:
    """``D`` windows in ``B`` rows of ``L`` positions, with ``N`` ticks and ``R`` labelled words in all.

    Indices ending in ``_at`` point into the flattened ``[B * L]`` positions.
    """

    order: list[int]  # which example each window is: packing sorts them
    num_steps: list[int]  # steps each window shows, the others up to K are padding
    tokens: torch.Tensor  # int64 [B, L]
    positions: torch.Tensor  # int64 [B, L]
    attend: torch.Tensor  # bool [B, L, L], rows are queries
    features: torch.Tensor  # [N, cached_tokens, H]
    visual_at: torch.Tensor  # int64 [N * visual_tokens]
    tick_at: torch.Tensor  # int64 [N]
    window_of_tick: torch.Tensor  # int64 [N]
    step_at: torch.Tensor  # int64 [D, K]; a shorter plan repeats its last step, its labels there are IGNORE
    response_at: torch.Tensor  # int64 [R]
    response: torch.Tensor  # int64 [R], the next token
    speaking: torch.Tensor  # int64 [N]
    dst_update: torch.Tensor  # int64 [N]
    dst_state: torch.Tensor  # int64 [N, K]

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in moved.items()}
        return Batch(**moved)

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The attention mask every back-end reads rightly: float ``[B, 1, L, L]``, 0 or the lowest number.

        A boolean mask of this shape is taken wrongly by eager attention.
        """
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(self.attend.shape, dtype=dtype, device=self.attend.device)
        return mask.masked_fill(~self.attend, lowest)[:, None]


def pack(lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Put windows into rows: longest first, each into the first row with room.

    Returns:
        Indices of the windows of each row. A window longer than ``max_seq_len`` gets a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(max_seq_len)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def collate(examples: Sequence[Example], max_seq_len: int, pad_token: int) -> Batch:
    """Pack windows into rows no longer than needed; nothing in one window attends to another."""
    rows = pack([len(example.window.tokens) for example in examples], max_seq_len)
    chosen = [examples[index] for row in rows for index in row]
    size = max(sum(len(examples[index].window.tokens) for index in row) for row in rows)
    begins: list[int] = []  # of each window, in the flattened positions
    for number, row in enumerate(rows):
        at = number * size
        for index in row:
            begins.append(at)
            at += len(examples[index].window.tokens)

    def laid_out(parts: Sequence[NDArray[Any]], fill: int) -> NDArray[Any]:
        flat = np.full(len(rows) * size, fill, dtype=parts[0].dtype)
        for begin, part in zip(begins, parts, strict=True):
            flat[begin : begin + len(part)] = part
        return flat.reshape(len(rows), size)

    def shifted(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate([part + begin for begin, part in zip(begins, parts, strict=True)])

    windows = [example.window for example in chosen]
    most_steps = max(len(window.step_at) for window in windows)
    steps = [np.pad(window.step_at, (0, most_steps - len(window.step_at)), mode="edge") for window in windows]
    states = [
        np.pad(e.state.astype(np.int64), ((0, 0), (0, most_steps - e.state.shape[1])), constant_values=IGNORE)
        for e in chosen
    ]
    numbers = [np.full(len(window.tokens), number) for number, window in enumerate(windows)]
    documents = laid_out(numbers, -1)
    speech = laid_out([window.speech for window in windows], 0)
    targets = laid_out([window.targets for window in windows], IGNORE).reshape(-1)
    response_at = np.flatnonzero(targets != IGNORE)
    arrays: dict[str, Any] = {
        "tokens": laid_out([window.tokens for window in windows], pad_token),
        "positions": laid_out([window.positions for window in windows], 0),
        "attend": np.stack([may_attend(s, d) for s, d in zip(speech, documents, strict=True)]),
        "features": np.concatenate([example.features for example in chosen]),
        "visual_at": shifted([window.visual_at for window in windows]),
        "tick_at": shifted([window.tick_at for window in windows]),
        "window_of_tick": np.repeat(np.arange(len(chosen)), [len(window.tick_at) for window in windows]),
        "step_at": np.stack(steps) + np.array(begins)[:, None],
        "response_at": response_at,
        "response": targets[response_at],
        "speaking": np.concatenate([example.speak for example in chosen]).astype(np.int64),
        "dst_update": np.concatenate([example.update for example in chosen]).astype(np.int64),
        "dst_state": np.concatenate(states),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(
        order=[index for row in rows for index in row],
        num_steps=[len(window.step_at) for window in windows],
        **tensors,
    )

"""Windows packed into rows, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.losses import IGNORE
from training.sequence import Window


@dataclass(frozen=True)
class Example:
    """A window, its features and its labels.

    ``features`` ``[T, cached_tokens, H]``; ``speaking`` and ``dst_update`` int64 ``[T]``, 0, 1 or ``IGNORE``;
    ``state`` int8 ``[T, K]`` of the shown steps; ``near`` bool ``[T]``, whether a transition is close. ``name`` says
    in a message which window it is.
    """

    window: Window
    features: NDArray[np.floating]
    speaking: NDArray[np.int64]
    dst_update: NDArray[np.int64]
    state: NDArray[np.int8]
    near: NDArray[np.bool_]
    name: str


@dataclass(frozen=True)
class Batch:
    """``D`` windows in ``B`` rows of ``L`` positions, with ``N`` ticks and ``R`` labelled words in all.

    Indices ending in ``_at`` point into the flattened ``[B * L]`` positions.
    """

    names: list[str]  # of the windows, as they lie in the rows
    order: list[int]  # which example each window is: packing sorts them
    num_steps: list[int]  # steps each window shows, the others up to K are padding
    tokens: torch.Tensor  # int64 [B, L]
    positions: torch.Tensor  # int64 [B, L]
    documents: torch.Tensor  # int64 [B, L], number of the window; -1 in the padding
    speech: torch.Tensor  # bool [B, L], words that branch off
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
    near: torch.Tensor  # bool [N]

    @property
    def padding(self) -> float:
        """Share of the positions that no window has."""
        return float((self.documents < 0).float().mean())

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in moved.items()}
        return Batch(**moved)

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The attention mask every back-end reads rightly: float ``[B, 1, L, L]``, 0 or the lowest number.

        A position sees earlier ones of its own window; the trunk sees no speech. Padding sees padding, so that no row
        of the mask is empty. (A boolean mask of this shape is taken wrongly by eager attention.)
        """
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        same = self.documents[:, :, None] == self.documents[:, None, :]
        sees = same & (order[:, None] >= order) & (self.speech[:, :, None] | ~self.speech[:, None, :])
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]

    def block_mask(self) -> Any:
        """The same mask for FlexAttention, which skips what nobody sees."""
        from torch.nn.attention.flex_attention import create_block_mask

        documents, speech = self.documents, self.speech

        def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
            same = documents[row, query] == documents[row, key]
            return same & (query >= key) & (speech[row, query] | ~speech[row, key])

        rows, length = self.tokens.shape
        return create_block_mask(sees, rows, None, length, length, device=self.tokens.device)


def pack(lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Put windows into rows: longest first, each into the first row with room (first-fit decreasing).

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


def collate(examples: Sequence[Example], rows: Sequence[Sequence[int]] | None, pad_token: int) -> Batch:
    """Windows in rows no longer than needed; nothing in one window attends to another.

    Args:
        rows: which examples lie in each row, each once; None puts each into a row of its own.
    """
    rows = rows or [[index] for index in range(len(examples))]
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
        "documents": documents,
        "speech": speech,
        "features": np.concatenate([example.features for example in chosen]),
        "visual_at": shifted([window.visual_at for window in windows]),
        "tick_at": shifted([window.tick_at for window in windows]),
        "window_of_tick": np.repeat(np.arange(len(chosen)), [len(window.tick_at) for window in windows]),
        "step_at": np.stack(steps) + np.array(begins)[:, None],
        "response_at": response_at,
        "response": targets[response_at],
        "speaking": np.concatenate([example.speaking for example in chosen]),
        "dst_update": np.concatenate([example.dst_update for example in chosen]),
        "dst_state": np.concatenate(states),
        "near": np.concatenate([example.near for example in chosen]),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(
        names=[example.name for example in chosen],
        order=[index for row in rows for index in row],
        num_steps=[len(window.step_at) for window in windows],
        **tensors,
    )

"""Images with their marks as tensors: one row an image, or one row for each number of marks that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class CountingExample:
    """One row: an image, the marks in it, and the labels at those numbers of marks that are read.

    ``features`` ``[T, H]``; ``prompt`` the tokens before and ``closing`` those after the image; ``points`` float32
    ``[N, 2]`` all true ones in order of marking; ``shown`` float32 ``[M, 2]`` the marks that are seen, in whatever way.
    ``marked`` int64 ``[R]``: after how many marks the heads are read. A label of weight 0 is none.
    """

    name: str
    prompt: list[int]
    closing: list[int]
    features: NDArray[np.floating]
    points: NDArray[np.float32]
    shown: NDArray[np.float32]
    marked: NDArray[np.int64]
    coord_weight: NDArray[np.float32]
    done_weight: NDArray[np.float32]


@dataclass(frozen=True)
class CountingBatch:
    """``B`` rows of ``L`` positions, ``T`` image tokens each, with ``M`` marks and ``R`` places that are read in all.

    Indices ending in ``_at`` point into the flattened ``[B * L]`` positions.
    """

    names: list[str]
    tokens: torch.Tensor  # int64 [B, L]
    lengths: torch.Tensor  # int64 [B]
    features: torch.Tensor  # [B, T, H]
    visual_at: torch.Tensor  # int64 [B * T]
    marks: torch.Tensor  # float32 [M, 2]
    mark_at: torch.Tensor  # int64 [M] where marks are tokens, else [0]
    row_of_mark: torch.Tensor  # int64 [M]
    read_at: torch.Tensor  # int64 [R]
    row_of_read: torch.Tensor  # int64 [R]
    marked: torch.Tensor  # int64 [R]
    points: torch.Tensor  # float32 [B, P, 2], zeros after num_points
    num_points: torch.Tensor  # int64 [B]
    coord: torch.Tensor  # float32 [R, 2], the next point; zeros where none is left
    coord_weight: torch.Tensor  # float32 [R]
    done: torch.Tensor  # float32 [R]
    done_weight: torch.Tensor  # float32 [R]

    @property
    def padding(self) -> float:
        """Share of the positions that hold nothing."""
        return 1 - float(self.lengths.sum()) / self.tokens.numel()

    def to(self, device: torch.device | str) -> CountingBatch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in moved.items()}
        return CountingBatch(**moved)

    def only(self, tasks: Sequence[str]) -> CountingBatch:
        """The rows that have a label of one of these tasks, where each row is read once; all, where it is read after
        each mark."""
        if len(self.read_at) != len(self.tokens):
            return self
        weights = [self.coord_weight if task == "coord" else self.done_weight for task in tasks]
        kept = torch.stack(weights).sum(0) > 0
        if kept.all() or not kept.any():  # without any label, the loss is still to be attached to the graph
            return self
        length = self.tokens.shape[1]
        places = torch.arange(len(kept), device=kept.device)
        number = kept.cumsum(0) - 1  # which row each one that is kept becomes
        shift = (number - places) * length
        here = kept[self.row_of_mark]
        by_row = ("tokens", "lengths", "features", "marked", "points", "num_points")
        labels = ("coord", "coord_weight", "done", "done_weight")
        return replace(
            self,
            names=[name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep],
            visual_at=(self.visual_at.view(len(kept), -1) + shift[:, None])[kept].flatten(),
            read_at=(self.read_at + shift)[kept],
            row_of_read=number[kept],
            marks=self.marks[here],
            row_of_mark=number[self.row_of_mark[here]],
            **{name: getattr(self, name)[kept] for name in (*by_row, *labels)},
        )

    def without_labels(self) -> CountingBatch:
        none = torch.zeros_like(self.done_weight)
        return replace(self, coord_weight=none, done_weight=none)


def collate(
    examples: Sequence[CountingExample], image_token: int, pad_token: int, as_tokens: bool
) -> CountingBatch:
    """Examples as rows that are padded at their end.

    Args:
        as_tokens: marks have a position each after the image.
    """
    size_of_image = len(examples[0].features)
    lengths = [
        len(e.prompt) + size_of_image + len(e.closing) + (len(e.shown) if as_tokens else 0) for e in examples
    ]
    length = max(lengths)
    most_points = max(1, *(len(e.points) for e in examples))
    tokens = np.full((len(examples), length), pad_token, np.int64)
    points = np.zeros((len(examples), most_points, 2), np.float32)
    visual_at, mark_at, read_at, coord, done = ([] for _ in range(5))
    for row, example in enumerate(examples):
        begin, last = row * length, len(example.prompt) + size_of_image + len(example.closing)
        image = len(example.prompt)
        tokens[row, :image] = example.prompt
        tokens[row, image : image + size_of_image] = image_token
        tokens[row, image + size_of_image : last] = example.closing
        visual_at.append(begin + image + np.arange(size_of_image))
        count = len(example.points)
        points[row, :count] = example.points
        if as_tokens:
            tokens[row, last : last + len(example.shown)] = image_token
            mark_at.append(begin + last + np.arange(len(example.shown)))
        read_at.append(begin + last - 1 + (example.marked if as_tokens else np.zeros_like(example.marked)))
        coord.append(points[row, np.minimum(example.marked, most_points - 1)])
        done.append((example.marked >= count).astype(np.float32))
    arrays: dict[str, NDArray[Any]] = {
        "tokens": tokens,
        "lengths": np.array(lengths),
        "features": np.stack([example.features for example in examples]),
        "visual_at": np.concatenate(visual_at),
        "marks": np.concatenate([example.shown for example in examples]),
        "mark_at": np.concatenate([np.empty(0, np.int64), *mark_at]),
        "row_of_mark": np.repeat(np.arange(len(examples)), [len(e.shown) for e in examples]),
        "read_at": np.concatenate(read_at),
        "row_of_read": np.repeat(np.arange(len(examples)), [len(e.marked) for e in examples]),
        "marked": np.concatenate([example.marked for example in examples]),
        "points": points,
        "num_points": np.array([len(example.points) for example in examples]),
        "coord": np.concatenate(coord),
        "coord_weight": np.concatenate([example.coord_weight for example in examples]),
        "done": np.concatenate(done),
        "done_weight": np.concatenate([example.done_weight for example in examples]),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return CountingBatch(names=[example.name for example in examples], **tensors)

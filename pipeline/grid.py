"""The square grid of a frame's tokens: laid out from tiles, and pooled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError

if TYPE_CHECKING:
    import torch


def cut(frames: NDArray[np.uint8], tiles: int) -> NDArray[np.uint8]:
    """Square frames ``[n, t*s, t*s, 3]`` to a view of their tiles, ``[n, row, column, s, s, 3]``."""
    side = frames.shape[1] // tiles
    return frames.reshape(len(frames), tiles, side, tiles, side, 3).swapaxes(2, 3)


def lay_out(parts: torch.Tensor, tiles: int) -> torch.Tensor:
    """Tokens of the tiles that `cut` gives, ``[n*t*t, s*s, d]``, to those of the frames, ``[n, (t*s)**2, d]``: row by
    row of a frame's whole grid."""
    tokens, dim = parts.shape[1:]
    side = math.isqrt(tokens)
    grid = parts.reshape(-1, tiles, tiles, side, side, dim)  # rows and columns of tiles, then those in a tile
    return grid.transpose(2, 3).reshape(-1, tiles**2 * tokens, dim)


def pool_tokens(features: torch.Tensor, window: int) -> torch.Tensor:
    """Average ``window x window`` neighbours of the square token grid: ``[N, s*s, d]`` to ``[N, (s/w)**2, d]``."""
    count, tokens, dim = features.shape
    side = math.isqrt(tokens)
    grid = features.view(count, side // window, window, side // window, window, dim)
    return grid.mean(dim=(2, 4)).reshape(count, -1, dim)


def pool_window(side: int, tokens_per_frame: int) -> int:
    """How many neighbours each way make one of so many tokens of a grid.

    Raises:
        UserError: the grid does not divide so.
    """
    allowed = [(side // window) ** 2 for window in range(1, side + 1) if side % window == 0]
    if tokens_per_frame not in allowed:
        names = ", ".join(map(str, allowed))
        raise UserError(
            f"--tokens-per-frame {tokens_per_frame} does not fit the {side}x{side} grid; use {names}"
        )
    return side // math.isqrt(tokens_per_frame)

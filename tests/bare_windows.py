"""Windows without a text, for tests of what lies where and what a loss makes of it."""

from __future__ import annotations

import numpy as np

from training.batch import Example
from training.losses import IGNORE
from training.sequence import Window


def bare_example(speech: list[bool]) -> Example:
    """A window that is nothing but positions, of which some are spoken."""
    size, one = len(speech), np.zeros(1, np.int64)
    window = Window(
        tokens=np.arange(size),
        speech=np.array(speech),
        positions=np.arange(size),
        visual_at=one,
        tick_at=one,
        step_at=one,
        shown=one,
        targets=np.full(size, IGNORE),
    )
    features, state = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1), np.int8)
    return Example(window, features, one, one, state, np.zeros(1, np.bool_), "bare")

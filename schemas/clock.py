"""The clock of a video: everything that happens is placed on its ticks."""

from __future__ import annotations

import math
from dataclasses import dataclass

TICK_TOLERANCE = 1e-6
"""Ticks by which an event may lie past a tick and still belong to it: floating-point rounding only."""


@dataclass(frozen=True)
class Clock:
    """Ticks at a fixed rate from a video's first decoded frame. Tick k is the instant ``k / tick_hz`` seconds.

    Raises:
        ValueError: when ``tick_hz`` is not a positive, finite number.
    """

    tick_hz: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tick_hz) and self.tick_hz > 0):
            raise ValueError(f"tick_hz must be a positive number, not {self.tick_hz}")

    def time_of(self, tick: int) -> float:
        """The instant of a tick, in seconds."""
        return tick / self.tick_hz

    def tick_of(self, t: float) -> int:
        """The tick an event at ``t`` seconds belongs to: the first one at or after it.

        A model at that tick has seen the moment the event happened, and nothing later.
        """
        # within what can be counted: infinity has no integer
        return math.ceil(max(-1e300, min(t * self.tick_hz, 1e300)) - TICK_TOLERANCE)

    def num_ticks(self, duration_s: float) -> int:
        """How many ticks a video of that duration has: every k >= 0 with ``k / tick_hz < duration_s``."""
        return max(0, math.ceil(duration_s * self.tick_hz - TICK_TOLERANCE))

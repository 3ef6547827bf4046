"""Two runs side by side on the same sessions: how much better one is, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from training.matched import Similarity, match_trace
from training.metrics import scores_of
from training.tally import Tally, add_up, tally
from training.traces import Trace

COMPARED = {
    "speak F1": ("speaking", "f1"),
    "speak F1 2 s": ("speaking", "event_f1", "2"),
    "update F1": ("dst_update", "f1"),
    "state F1": ("dst_state", "macro_f1"),
    "joint": ("dst_state", "joint"),
    "joint near": ("dst_state", "joint_near_transition"),
    "transition F1 2 s": ("dst_state", "transition_f1", "2"),
    "words": ("response", "exact_match"),
    "matched precision": ("matched", "precision"),
    "matched recall": ("matched", "recall"),
    "matched F1": ("matched", "f1"),
    "combined": ("combined", "value"),
}


@dataclass(frozen=True)
class Compared:
    """A score of two runs; ``low`` and ``high`` hold 95 % of the differences, second minus first."""

    name: str
    first: float
    second: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high


def compare(
    first: Sequence[Trace],
    second: Sequence[Trace],
    similarity: Similarity,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> list[Compared]:
    """Compare predictions of the same sessions by a paired bootstrap over recordings.

    Recordings, not sessions, are drawn with replacement, since what is said on one, from any of its cameras, stands and
    falls together; both runs get the same draw. The interval is the one between the percentiles 2.5 and 97.5 of the
    differences (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

    Raises:
        UserError: the sessions or their truth are not the same, or all are of one recording.
    """
    _require_same(first, second)
    names = sorted({trace.recording_id for trace in first})
    if len(names) < 2:
        raise UserError(
            f"all sessions are of the recording {names[0]!r}, so nothing can be said about others; score more"
        )
    counts = [_by_recording(traces, names, similarity) for traces in (first, second)]
    values = [_values(add_up(each)) for each in counts]
    draws = np.random.default_rng(seed).integers(len(names), size=(samples, len(names)))
    keys = list(counts[0][0])
    tables = [np.array([[one[key] for key in keys] for one in each]) for each in counts]
    drawn = np.array([[_values(_sum_of(table, keys, draw)) for table in tables] for draw in draws])
    low, high = np.percentile(drawn[:, 1] - drawn[:, 0], (2.5, 97.5), axis=0)
    return [
        Compared(name, *(float(each[place]) for each in (*values, low, high)))
        for place, name in enumerate(COMPARED)
    ]


def _by_recording(traces: Sequence[Trace], names: Sequence[str], similarity: Similarity) -> list[Tally]:
    counts: dict[str, list[Tally]] = {name: [] for name in names}
    for trace in traces:
        counts[trace.recording_id].append(tally(trace, match_trace(trace, similarity)))
    return [add_up(each) for each in counts.values()]


def _sum_of(table: NDArray[np.float64], keys: Sequence[str], draw: NDArray[np.int64]) -> Tally:
    """The sum over the recordings drawn, each as often as it was."""
    return dict(zip(keys, table[draw].sum(axis=0).tolist(), strict=True))


def _values(counts: Tally) -> list[float]:
    scores: Any = scores_of(counts)
    values = []
    for path in COMPARED.values():
        value = scores
        for key in path:
            value = value[key]
        values.append(value)
    return values


def _require_same(first: Sequence[Trace], second: Sequence[Trace]) -> None:
    for one, other in zip(first, second, strict=False):
        if one.session_id != other.session_id:
            raise UserError(
                f"one run was scored on session {one.session_id}, the other on {other.session_id}; {_AGAIN}"
            )
        same = (
            one.first_tick == other.first_tick
            and one.truth.responses == other.truth.responses
            and np.array_equal(one.truth.state, other.truth.state)
        )
        if not same:
            raise UserError(
                f"the labels of session {one.session_id} are not the same for both runs; {_AGAIN}"
            )
    if len(first) != len(second):
        raise UserError(f"one run was scored on {len(first)} sessions, the other on {len(second)}; {_AGAIN}")


_AGAIN = "score both with 'dst evaluate' on one cache and split"

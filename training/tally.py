"""What is counted in one session. Counts of sessions add up, and all scores are shares of such sums.

So a score over any choice of sessions, a resampled one too, needs each session to be gone through only once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.states import COMPLETE, COMPLETED, START, STATE_NAMES
from training.matched import ALIKE, Pair, utterances
from training.traces import Trace, Track

TOLERANCES_S = {"0.5": 0.5, "2": 2.0, "5": 5.0}
"""How far an event may lie from its truth, in seconds, and the key each is reported under."""

NEAR_TICKS = 2
"""A tick is near a transition when the true state changes at most this many ticks before or after it."""

Tally = dict[str, float]
"""Counts by name, such as ``speaking.hits``; ``@`` is followed by a tolerance, ``confusion.T.P`` by true and
predicted state."""


def tally(trace: Trace, pairs: Sequence[Pair] | None) -> Tally:
    """Count a session.

    Args:
        pairs: what `training.matched.match_trace` finds; None for decisions that come without words.
    """
    counts = {
        **_decision("speaking", trace, "speak"),
        **_decision("dst_update", trace, "dst_update"),
        **_states(trace),
        **_transitions(trace),
        **_course(trace),
    }
    return counts if pairs is None else {**counts, **_words(trace, pairs)}


def add_up(tallies: Iterable[Mapping[str, float]]) -> Tally:
    """The sum of tallies with equal names."""
    total: Tally = {}
    for each in tallies:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def match_events(true: Sequence[int], predicted: Sequence[int], tolerance: float) -> list[tuple[int, int]]:
    """As many one-to-one pairs (true, predicted) as possible, each at most ``tolerance`` ticks apart.

    Args:
        true, predicted: ticks, ascending.
    """
    # One tolerance for all makes the greedy choice maximum. If the two earliest events fit, some best
    # matching pairs them: the partners each would have instead are later, and fit one another. If they
    # do not fit, the earlier one is too early for every event that is left.
    pairs, i, j = [], 0, 0
    while i < len(true) and j < len(predicted):
        if abs(true[i] - predicted[j]) <= tolerance + 1e-9:
            pairs.append((true[i], predicted[j]))
            i, j = i + 1, j + 1
        elif true[i] < predicted[j]:
            i += 1
        else:
            j += 1
    return pairs


def near_transition(truth: Track) -> NDArray[np.bool_]:
    """The ticks within `NEAR_TICKS` of a change of the true state: bool ``[T]``."""
    near = np.zeros(truth.num_ticks, dtype=np.bool_)
    for tick in np.flatnonzero(truth.transitions().any(axis=1)):
        near[max(0, tick - NEAR_TICKS) : tick + NEAR_TICKS + 1] = True
    return near


def _decision(name: str, trace: Trace, column: str) -> Tally:
    """Counts of one of a track's decisions, per tick and per event."""
    true, predicted = getattr(trace.truth, column), getattr(trace.predicted, column)
    meant, said = np.flatnonzero(true).tolist(), np.flatnonzero(predicted).tolist()
    counts = {"hits": int((true & predicted).sum()), "true": len(meant), "predicted": len(said)}
    for key, seconds in TOLERANCES_S.items():
        counts[f"hits@{key}"] = len(match_events(meant, said, seconds * trace.tick_hz))
    counts["ticks"] = len(true)
    return {f"{name}.{key}": count for key, count in counts.items()}


def _states(trace: Trace) -> Tally:
    true, predicted = trace.truth.state, trace.predicted.state
    right = (true == predicted).all(axis=1)
    counts: Tally = {}
    for where, mask in (("all", np.ones(len(true), dtype=np.bool_)), ("near", near_transition(trace.truth))):
        confusion = np.zeros((len(STATE_NAMES), len(STATE_NAMES)), dtype=np.int64)
        np.add.at(confusion, (true[mask], predicted[mask]), 1)
        counts |= {
            f"state.{where}.confusion.{t}.{p}": int(count) for (t, p), count in np.ndenumerate(confusion)
        }
        counts |= {f"state.{where}.joint": int(right[mask].sum()), f"state.{where}.ticks": int(mask.sum())}
    return counts


def _transitions(trace: Trace) -> Tally:
    """Events (step, start or complete, tick), matched within their step and kind."""
    true, predicted = trace.truth.transitions(), trace.predicted.transitions()
    events = [
        (np.flatnonzero(true[:, step] & kind).tolist(), np.flatnonzero(predicted[:, step] & kind).tolist())
        for step in range(trace.truth.num_steps)
        for kind in (START, COMPLETE)
    ]
    counts: Tally = {
        "transition.true": sum(len(meant) for meant, _ in events),
        "transition.predicted": sum(len(said) for _, said in events),
    }
    for key, seconds in TOLERANCES_S.items():
        found = [
            pair for meant, said in events for pair in match_events(meant, said, seconds * trace.tick_hz)
        ]
        counts[f"transition.hits@{key}"] = len(found)
    # of what is matched at the widest tolerance
    counts["transition.late_s"] = sum(said - meant for meant, said in found) / trace.tick_hz
    return counts


def _course(trace: Trace) -> Tally:
    shares = [
        (track.state == COMPLETED).sum(axis=1) / max(1, track.num_steps)
        for track in (trace.truth, trace.predicted)
    ]
    return {
        "progress.error": float(np.abs(shares[1] - shares[0]).sum()),
        "order.edit_score": _edit_score(_order(trace.truth), _order(trace.predicted)),
        "sessions": 1,
        "transition.proposed": trace.proposed_transitions,
        "transition.rejected": len(trace.rejections),
    }


def _order(track: Track) -> list[tuple[int, int]]:
    """The (step, kind) of every transition in order of time; in one tick by step, its start first."""
    bits = track.transitions()
    return [
        (int(step), kind)
        for tick, step in np.argwhere(bits)
        for kind in (START, COMPLETE)
        if bits[tick, step] & kind
    ]


def _edit_score(true: Sequence[Any], predicted: Sequence[Any]) -> float:
    """100 * (1 - Levenshtein distance / longer length), the segmental edit score of Lea et al. 2016,
    "Segmental Spatiotemporal CNNs for Fine-grained Action Segmentation". Two empty sequences are equal: 100.
    """
    row = list(range(len(predicted) + 1))
    for i, meant in enumerate(true, start=1):
        above, row = row, [i]
        for j, found in enumerate(predicted, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (meant != found)))
    longer = max(len(true), len(predicted))
    return 100 * (1 - row[-1] / longer) if longer else 100.0


def _words(trace: Trace, pairs: Sequence[Pair]) -> Tally:
    outcomes = Counter(outcome for _, outcome in trace.spoken())
    alike = [pair for pair in pairs if pair.similarity > ALIKE]
    return {
        "response.exact": outcomes["exact"],
        "response.other_words": outcomes["words"],
        "response.missed": outcomes["missed"],
        "matched.pairs": len(pairs),
        "matched.alike": len(alike),
        "matched.missed": len(utterances(trace.truth)) - len(pairs),
        "matched.redundant": len(utterances(trace.predicted)) - len(pairs),
        "matched.similarity": sum(pair.similarity for pair in alike),
        "matched.apart_s": sum(pair.distance for pair in alike) / trace.tick_hz,
    }

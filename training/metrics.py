"""Scores of decisions, dialog state and words. Counts are summed over all sessions first, then divided.

A share of nothing is 0.0: an F1 with nothing true and nothing predicted, the recall of events that never
happen, a score near transitions where there are none. So a corpus without an event cannot look solved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.states import COMPLETE, COMPLETED, START, STATE_NAMES
from training.matched import BAG_OF_WORDS, Similarity, matched_scores
from training.traces import Trace, Track

TOLERANCES_S = {"0.5": 0.5, "2": 2.0, "5": 5.0}
"""How far an event may lie from its truth, in seconds, and the key each is reported under."""

NEAR_TICKS = 2
"""A tick is near a transition when the true state changes at most this many ticks before or after it."""

DECISIONS_FORMULA = (
    'mean of speaking.event_f1["2"], dst_state.transition_f1["2"], dst_state.macro_f1_near_transition'
)
"""What ``combined`` is of decisions without words; with words, `COMBINED_FORMULA`."""
COMBINED_FORMULA = f"{DECISIONS_FORMULA}, matched.f1"

Scores = dict[str, dict[str, Any]]


def score(
    traces: Sequence[Trace],
    thresholds: Mapping[str, float] | None = None,
    similarity: Similarity | None = BAG_OF_WORDS,
) -> Scores:
    """Score predicted sessions against their truth.

    Args:
        traces: the sessions, at least one.
        thresholds: those the decisions were made with, by ``speaking`` and ``dst_update``; only reported.
        similarity: tells how alike words are; None for decisions that come without words, of which nothing is scored
            that words are needed for.

    Returns:
        ``speaking``, ``dst_update``, ``dst_state``, ``combined``, and with words ``response`` and ``matched``, each a
        dictionary of plain numbers. All are shares in [0, 1], but for ``transition_time_error`` and ``time_diff``
        (seconds), ``order_edit_score`` (0 to 100), and None where a score cannot be known.

    Raises:
        ValueError: no session is given.
    """
    if not traces:
        raise ValueError("there is no session to score")
    thresholds = thresholds or {}
    speaking = _decision(traces, "speak", [trace.speak_score for trace in traces])
    dst_update = _decision(traces, "dst_update", [trace.update_score for trace in traces])
    dst_state = {**_state_shares(traces), **_transitions(traces), **_course(traces)}
    parts = [
        speaking["event_f1"]["2"],
        dst_state["transition_f1"]["2"],
        dst_state["macro_f1_near_transition"],
    ]
    scores: Scores = {
        "speaking": {**speaking, "threshold": thresholds.get("speaking")},
        "dst_update": {**dst_update, "threshold": thresholds.get("dst_update")},
        "dst_state": dst_state,
    }
    if similarity is not None:
        scores["response"] = _response(traces)
        scores["matched"] = matched_scores(traces, similarity)
        parts.append(scores["matched"]["f1"])
    formula = DECISIONS_FORMULA if similarity is None else COMBINED_FORMULA
    return {**scores, "combined": {"value": sum(parts) / len(parts), "formula": formula}}


def best_threshold(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold that gives the best per-tick F1, where ``score >= threshold`` is a positive.

    Every distinct score is tried. The threshold lies midway between the chosen score and the next lower
    one (at the chosen one where it is the lowest); of equal F1 the higher threshold is taken.

    Args:
        scores: floats ``[N]``.
        truth: bool ``[N]``.

    Returns:
        The threshold and its F1.

    Raises:
        ValueError: nothing is positive, so that every threshold is as bad.
    """
    if not truth.any():
        raise ValueError("no tick is positive, so no threshold can be chosen")
    values, hits, predicted = _cumulative(scores, truth)
    f1 = 2 * hits / (predicted + int(truth.sum()))
    best = int(f1.argmax())
    threshold = values[best]
    if best + 1 < len(values):
        lower = values[best + 1]
        middle = lower + (threshold - lower) / 2
        # Between neighbouring floats there is no middle: rounding may land on the lower one.
        threshold = middle if middle > lower else threshold
    return float(threshold), float(f1[best])


def average_precision(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve: over distinct thresholds, precision times the step in recall.

    Args:
        scores: floats ``[N]``; equal ones enter together.
        truth: bool ``[N]``.
    """
    if not truth.any():
        return 0.0
    _, hits, predicted = _cumulative(scores, truth)
    steps = np.diff(hits, prepend=0) / int(truth.sum())
    return float((hits / predicted * steps).sum())


def _cumulative(
    scores: NDArray[np.floating], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct scores from high to low, and at each the true positives and the positives so far."""
    order = np.argsort(-scores, kind="stable")
    values = scores[order]
    last_of_value = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    hits = np.cumsum(truth[order], dtype=np.int64)
    return values[last_of_value], hits[last_of_value], last_of_value + 1


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


def _decision(
    traces: Sequence[Trace], name: str, scores: Sequence[NDArray[np.float32] | None]
) -> dict[str, Any]:
    """Scores of one of a track's decisions, ``speak`` or ``dst_update``, per tick and per event."""
    pairs = [(getattr(trace.truth, name), getattr(trace.predicted, name)) for trace in traces]
    true = np.concatenate([pair[0] for pair in pairs])
    predicted = np.concatenate([pair[1] for pair in pairs])
    hits, positives, said = int((true & predicted).sum()), int(true.sum()), int(predicted.sum())
    negatives = len(true) - positives
    correct_silences = negatives - (said - hits)
    recalls = [share for share in ((hits, positives), (correct_silences, negatives)) if share[1]]
    known = [score for score in scores if score is not None]
    events = [
        (trace.tick_hz, np.flatnonzero(pair[0]).tolist(), np.flatnonzero(pair[1]).tolist())
        for trace, pair in zip(traces, pairs, strict=True)
    ]
    return {
        "precision": _share(hits, said),
        "recall": _share(hits, positives),
        "f1": _f1(hits, positives, said),
        "balanced_accuracy": _mean(_share(*share) for share in recalls),
        "pr_auc": average_precision(np.concatenate(known), true) if len(known) == len(scores) else None,
        "event_f1": {key: _event_f1(events, tolerance) for key, tolerance in TOLERANCES_S.items()},
    }


def _event_f1(events: Sequence[tuple[float, list[int], list[int]]], tolerance_s: float) -> float:
    """F1 of one-to-one matched events, each row (tick_hz, true ticks, predicted ticks) matched by itself."""
    hits = sum(len(match_events(true, predicted, tolerance_s * hz)) for hz, true, predicted in events)
    return _f1(hits, sum(len(row[1]) for row in events), sum(len(row[2]) for row in events))


def _state_shares(traces: Sequence[Trace]) -> dict[str, Any]:
    near = [near_transition(trace.truth) for trace in traces]
    everywhere = [np.ones_like(mask) for mask in near]
    confusion = _confusion(traces, everywhere)
    return {
        "macro_f1": _macro_f1(confusion),
        "accuracy": _share(int(np.trace(confusion)), int(confusion.sum())),
        "joint": _joint(traces, everywhere),
        "joint_near_transition": _joint(traces, near),
        "macro_f1_near_transition": _macro_f1(_confusion(traces, near)),
    }


def near_transition(truth: Track) -> NDArray[np.bool_]:
    """The ticks within `NEAR_TICKS` of a change of the true state: bool ``[T]``."""
    near = np.zeros(truth.num_ticks, dtype=np.bool_)
    for tick in np.flatnonzero(truth.transitions().any(axis=1)):
        near[max(0, tick - NEAR_TICKS) : tick + NEAR_TICKS + 1] = True
    return near


def _confusion(traces: Sequence[Trace], masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """How often each true state (row) is predicted as each state (column), at the ticks of the masks."""
    counts = np.zeros((len(STATE_NAMES), len(STATE_NAMES)), dtype=np.int64)
    for trace, mask in zip(traces, masks, strict=True):
        np.add.at(counts, (trace.truth.state[mask], trace.predicted.state[mask]), 1)
    return counts


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = np.flatnonzero(true + predicted)
    return _mean(_f1(int(hits[c]), int(true[c]), int(predicted[c])) for c in present)


def _joint(traces: Sequence[Trace], masks: Sequence[NDArray[np.bool_]]) -> float:
    """Share of the masked ticks at which every step's state is right."""
    right = sum(
        int((trace.truth.state == trace.predicted.state).all(axis=1)[mask].sum())
        for trace, mask in zip(traces, masks, strict=True)
    )
    return _share(right, sum(int(mask.sum()) for mask in masks))


def _transitions(traces: Sequence[Trace]) -> dict[str, Any]:
    """Events (session, step, start or complete, tick), matched within their session, step and kind."""
    events = []
    for trace in traces:
        true, predicted = trace.truth.transitions(), trace.predicted.transitions()
        for step in range(trace.truth.num_steps):
            for kind in (START, COMPLETE):
                ticks = [np.flatnonzero(bits[:, step] & kind).tolist() for bits in (true, predicted)]
                events.append((trace.tick_hz, ticks[0], ticks[1]))
    errors = [
        (found - meant) / hz
        for hz, true_ticks, predicted_ticks in events
        for meant, found in match_events(true_ticks, predicted_ticks, TOLERANCES_S["5"] * hz)
    ]
    return {
        "transition_f1": {key: _event_f1(events, tolerance) for key, tolerance in TOLERANCES_S.items()},
        # Seconds, predicted minus true, over what is matched at 5 s: late is positive.
        "transition_time_error": _mean(errors) if errors else None,
    }


def _course(traces: Sequence[Trace]) -> dict[str, Any]:
    errors = [np.abs(_progress(trace.predicted) - _progress(trace.truth)) for trace in traces]
    proposed = sum(trace.proposed_transitions for trace in traces)
    rejected = sum(trace.rejected_transitions for trace in traces)
    return {
        "progress_mae": float(_mean(np.concatenate(errors))),
        "order_edit_score": _mean(_edit_score(_order(t.truth), _order(t.predicted)) for t in traces),
        "valid_ratio": 1 - rejected / proposed if proposed else 1.0,
    }


def _progress(track: Track) -> NDArray[np.float64]:
    """Share of the steps that are completed at each tick, ``[T]``."""
    return (track.state == COMPLETED).sum(axis=1) / max(1, track.num_steps)


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


def _response(traces: Sequence[Trace]) -> dict[str, Any]:
    """Words at true speaking ticks: exactly the true ones, among all of them and among those spoken at."""
    outcomes = Counter(outcome for trace in traces for _, outcome in trace.spoken())
    spoken = outcomes["exact"] + outcomes["words"]
    return {
        "exact_match": _share(outcomes["exact"], spoken + outcomes["missed"]),
        "exact_match_when_spoken": _share(outcomes["exact"], spoken),
    }


def _f1(hits: int, true: int, predicted: int) -> float:
    return _share(2 * hits, true + predicted)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0

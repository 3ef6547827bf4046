"""Scores of decisions, dialog state and words. Counts are summed over all sessions first, then divided.

A share of nothing is 0.0: an F1 with nothing true and nothing predicted, the recall of events that never
happen, a score near transitions where there are none. So a corpus without an event cannot look solved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.states import STATE_NAMES
from training.matched import BAG_OF_WORDS, Similarity, match_trace
from training.sweep import average_precision
from training.tally import TOLERANCES_S, Tally, add_up, tally
from training.traces import Trace

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
    pairs = [None if similarity is None else match_trace(trace, similarity) for trace in traces]
    scores = scores_of(add_up(tally(trace, found) for trace, found in zip(traces, pairs, strict=True)))
    for name, column, probability in (
        ("speaking", "speak", "speak_score"),
        ("dst_update", "dst_update", "update_score"),
    ):
        scores[name]["pr_auc"] = _pr_auc(traces, column, probability)
        scores[name]["threshold"] = (thresholds or {}).get(name)
    return scores


def scores_of(counts: Tally) -> Scores:
    """The scores that are shares of counts: all but the areas under curves."""
    speaking, dst_update = _decision(counts, "speaking"), _decision(counts, "dst_update")
    dst_state = {**_state(counts), **_transitions(counts)}
    scores: Scores = {"speaking": speaking, "dst_update": dst_update, "dst_state": dst_state}
    parts = [
        speaking["event_f1"]["2"],
        dst_state["transition_f1"]["2"],
        dst_state["macro_f1_near_transition"],
    ]
    formula = DECISIONS_FORMULA
    if "matched.pairs" in counts:
        scores |= _words(counts)
        parts.append(scores["matched"]["f1"])
        formula = COMBINED_FORMULA
    return {**scores, "combined": {"value": sum(parts) / len(parts), "formula": formula}}


def _pr_auc(traces: Sequence[Trace], column: str, probability: str) -> float | None:
    """Area under the curve of precision and recall; None where a session has no probabilities."""
    known = [each for trace in traces if (each := getattr(trace, probability)) is not None]
    if len(known) < len(traces):
        return None
    truth = np.concatenate([getattr(trace.truth, column) for trace in traces])
    return average_precision(np.concatenate(known), truth)


def _decision(counts: Tally, name: str) -> dict[str, Any]:
    """Scores of a decision, per tick and per event."""
    hits, true, predicted, ticks = (counts[f"{name}.{key}"] for key in ("hits", "true", "predicted", "ticks"))
    negatives = ticks - true
    correct_silences = negatives - (predicted - hits)
    recalls = [share for share in ((hits, true), (correct_silences, negatives)) if share[1]]
    return {
        "precision": _share(hits, predicted),
        "recall": _share(hits, true),
        "f1": _f1(hits, true, predicted),
        "balanced_accuracy": _mean(_share(*share) for share in recalls),
        "event_f1": {key: _f1(counts[f"{name}.hits@{key}"], true, predicted) for key in TOLERANCES_S},
    }


def _state(counts: Tally) -> dict[str, float]:
    everywhere, near = (_confusion(counts, where) for where in ("all", "near"))
    return {
        "macro_f1": _macro_f1(everywhere),
        "accuracy": _share(float(np.trace(everywhere)), float(everywhere.sum())),
        "joint": _share(counts["state.all.joint"], counts["state.all.ticks"]),
        "joint_near_transition": _share(counts["state.near.joint"], counts["state.near.ticks"]),
        "macro_f1_near_transition": _macro_f1(near),
    }


def _confusion(counts: Tally, where: str) -> NDArray[np.float64]:
    """How often each true state (row) is predicted as each state (column)."""
    states = range(len(STATE_NAMES))
    return np.array([[counts[f"state.{where}.confusion.{t}.{p}"] for p in states] for t in states])


def _macro_f1(confusion: NDArray[np.float64]) -> float:
    hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = np.flatnonzero(true + predicted)
    return _mean(_f1(float(hits[c]), float(true[c]), float(predicted[c])) for c in present)


def _transitions(counts: Tally) -> dict[str, Any]:
    true, predicted = counts["transition.true"], counts["transition.predicted"]
    hits = {key: counts[f"transition.hits@{key}"] for key in TOLERANCES_S}
    widest = hits[max(TOLERANCES_S, key=lambda key: TOLERANCES_S[key])]
    proposed = counts["transition.proposed"]
    return {
        "transition_f1": {key: _f1(found, true, predicted) for key, found in hits.items()},
        # Seconds, predicted minus true, over what is matched at 5 s: late is positive.
        "transition_time_error": counts["transition.late_s"] / widest if widest else None,
        "progress_mae": _share(counts["progress.error"], counts["state.all.ticks"]),
        "order_edit_score": _share(counts["order.edit_score"], counts["sessions"]),
        "valid_ratio": 1 - counts["transition.rejected"] / proposed if proposed else 1.0,
    }


def _words(counts: Tally) -> Scores:
    """Words at true speaking ticks, exactly the true ones; and whole dialogues, as `training.matched` has it."""
    exact, other, not_said = (counts[f"response.{key}"] for key in ("exact", "other_words", "missed"))
    pairs, alike, missed, redundant = (
        counts[f"matched.{key}"] for key in ("pairs", "alike", "missed", "redundant")
    )
    return {
        "response": {
            "exact_match": _share(exact, exact + other + not_said),
            "exact_match_when_spoken": _share(exact, exact + other),
            "similarity": counts["matched.similarity"] / alike if alike else None,
        },
        "matched": {
            "precision": _share(alike, pairs + redundant),
            "recall": _share(alike, pairs + missed),
            "f1": _share(2 * alike, 2 * pairs + redundant + missed),
            "jaccard": _share(alike, pairs + missed + redundant),
            "missing_rate": _share(missed, pairs + missed),
            "redundant_rate": _share(redundant, pairs + redundant),
            "time_diff": counts["matched.apart_s"] / alike if alike else None,
        },
    }


def _f1(hits: float, true: float, predicted: float) -> float:
    return _share(2 * hits, true + predicted)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0

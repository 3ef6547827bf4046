"""A page to read an evaluation by: scores, curves, and every session to step through. One file, no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.files import write_text
from training.evaluate import TABLE, table_rows
from training.matched import ALIKE, BAG_OF_WORDS, Pair, Similarity, match_trace, utterances
from training.metrics import scores_of
from training.sweep import precision_recall, spaced
from training.tally import TOLERANCES_S, match_events, tally
from training.traces import Trace, Track

EVENT_TOLERANCE = "2"
"""The tolerance, a key of `training.tally.TOLERANCES_S`, of the events that the page's curves count."""

APART = 0.01
"""Points of a curve are left out that differ by less than this in threshold, precision and recall."""

Pictures = Callable[[Trace], Sequence[tuple[int, bytes]]]
"""Frames of a session: (tick counted from the session's first, JPEG)."""

_SCRIPTS = ("charts.js", "session.js", "timeline.js", "browser.js")

EXPLAINED = {
    "speak F1": "Speaking, right only at exactly the right tick: harmonic mean of precision and recall.",
    "update F1": "Deciding that the dialog state changes, right only at exactly the right tick: harmonic mean of "
    "precision and recall.",
    "state F1": "State of each step at each tick: F1 of not started, in progress and completed, averaged.",
    "joint": "Share of ticks at which the states of all steps are right.",
    "joint near": "The same among the ticks at most two away from a change of the true state.",
    "words": "Share of the ticks to speak at that it speaks at, in exactly the right words.",
    "matched": "What is said, paired one to one with what should be, near in time and alike in words: F1.",
    "combined": "One number to choose by; its formula is below the table.",
}
"""What each column of `training.evaluate.TABLE` means."""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    traces: Sequence[Trace],
    pictures: Pictures,
    similarity: Similarity = BAG_OF_WORDS,
) -> None:
    """Write the page. Equal input, equal bytes.

    Args:
        path: the HTML file.
        metrics: what `training.evaluate.evaluate` returns.
        traces: the sessions that were scored.
        pictures: the frames to show of a session, in order of time, perhaps none.
        similarity: what utterances were matched by; where ``metrics`` has no matched words, nothing is matched.

    Raises:
        UserError: the file cannot be written.
    """
    worded, gap_s = "matched" in metrics, metrics["about"].get("min_gap_s", 0.0)
    data = {
        "about": metrics.get("about", {}),
        "similarity": similarity.name if worded else None,
        "formula": metrics["combined"]["formula"],
        "columns": [[name, EXPLAINED[name]] for name in TABLE],
        "rows": [[_called(name), values] for name, values in table_rows(metrics)],
        "every": _every_score(metrics),
        "decisions": [
            _decision("speaking", metrics["speaking"], traces, "speak", "speak_score", gap_s),
            _decision("DST update", metrics["dst_update"], traces, "dst_update", "update_score", 0.0),
        ],
        "sessions": [
            _session(trace, match_trace(trace, similarity) if worded else None, pictures(trace))
            for trace in traces
        ],
    }
    try:
        write_text(path, _page(data))
    except OSError as error:
        raise UserError(
            f"the report {path} cannot be written ({error.strerror}); name a file in a folder that you can write to"
        ) from None


def table_markdown(metrics: dict[str, Any]) -> str:
    """The scores beside the baselines as a table in Markdown, the same rows as the page's first table, and of what."""
    lines = [["", *TABLE], ["---"] * (len(TABLE) + 1)]
    for name, values in table_rows(metrics):
        lines.append([_called(name), *("–" if value is None else f"{value:.3f}" for value in values)])
    about = metrics["about"]
    told = [
        f"{about['sessions']} {about['split']} sessions, {about['ticks']} ticks, "
        + ("free-running" if about["mode"] == "free" else "teacher-forced"),
        f"combined: {metrics['combined']['formula']}",
        *([f"words are compared by {about['embedding']}"] if "embedding" in about else []),
    ]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines) + "\n" + "; ".join(told) + ".\n"


def _called(predictor: str) -> str:
    return "blind control" if predictor == "blind" else predictor.replace("_", " ")


def _every_score(metrics: Mapping[str, Any]) -> list[list[Any]]:
    """A row [name, value of each predictor] for every single score of the model."""
    others = [metrics[name] for name in ("blind",) if name in metrics] + list(metrics["baselines"].values())
    model = {key: part for key, part in metrics.items() if key not in ("about", "blind", "baselines")}
    flat = [_flat(scores) for scores in (model, *others)]
    return [[name, *(scores.get(name) for scores in flat)] for name in flat[0]]


def _flat(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Numbers of nested dictionaries under dotted names."""
    found: dict[str, float | None] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def _decision(
    name: str,
    scores: Mapping[str, Any],
    traces: Sequence[Trace],
    column: str,
    probability: str,
    gap_s: float,
) -> dict[str, Any]:
    """A decision's curves, and the scores at the threshold that was used; without curves, why there are none."""
    at = {key: scores[key] for key in ("threshold", "pr_auc", "precision", "recall", "f1")}
    at |= {"name": name, "event_f1": scores["event_f1"][EVENT_TOLERANCE], "gap_s": gap_s}
    truths = [getattr(trace.truth, column) for trace in traces]
    known = [each for trace in traces if (each := getattr(trace, probability)) is not None]
    if len(known) < len(traces):
        return {**at, "points": [], "missing": "The predictor gives no probabilities."}
    truth = np.concatenate(truths)
    if not truth.any():
        return {**at, "points": [], "missing": "It is never called for in these sessions."}
    all_scores = np.concatenate(known)
    points = []
    positives = int(truth.sum())
    for threshold, _, _ in _thinned(precision_recall(all_scores, truth, len(all_scores))):
        hits, near, predicted = 0, 0, 0
        for trace, true, each in zip(traces, truths, known, strict=True):
            fires = spaced(np.flatnonzero(each >= threshold).tolist(), round(gap_s * trace.tick_hz))
            hits += int(true[fires].sum())
            reach = TOLERANCES_S[EVENT_TOLERANCE] * trace.tick_hz
            near += len(match_events(np.flatnonzero(true).tolist(), fires, reach))
            predicted += len(fires)
        f1, event_f1 = (2 * found / (positives + predicted) for found in (hits, near))
        values = (threshold, hits / predicted, hits / positives, f1, event_f1)
        points.append([round(value, 4) for value in values])
    return {**at, "points": points, "missing": None}


def _thinned(curve: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """A curve without points that lie on top of the one before; its ends stay."""
    kept = [curve[0]]
    for point in curve[1:]:
        if max(abs(here - there) for here, there in zip(point, kept[-1], strict=True)) >= APART:
            kept.append(point)
    return kept if kept[-1] == curve[-1] else [*kept, curve[-1]]


def _session(
    trace: Trace, pairs: Sequence[Pair] | None, pictures: Sequence[tuple[int, bytes]]
) -> dict[str, Any]:
    scores = scores_of(tally(trace, pairs))
    return {
        "id": trace.session_id,
        "video": trace.video_id,
        "goal": trace.goal,
        "hz": trace.tick_hz,
        "first": trace.first_tick,
        "ticks": trace.truth.num_ticks,
        "steps": trace.step_names,
        "joint": scores["dst_state"]["joint"],
        "combined": scores["combined"]["value"],
        "matched": scores["matched"]["f1"] if pairs is not None else None,
        "true": _track(trace.truth),
        "predicted": _track(trace.predicted),
        "speak": _thousandths(trace.speak_score),
        "update": _thousandths(trace.update_score),
        # Whether they are alike is told apart from how much: rounding must not decide it.
        "pairs": [
            [pair.said, pair.meant, round(pair.similarity, 3), int(pair.similarity > ALIKE)]
            for pair in pairs or ()
        ],
        "proposed": trace.proposed_transitions,
        "rejections": trace.rejections,
        "heard": trace.heard,
        "pictures": [[tick, base64.b64encode(jpeg).decode("ascii")] for tick, jpeg in pictures],
    }


def _track(track: Track) -> dict[str, Any]:
    """Ticks with words, ticks of updates, and for each step the stretches of one state as [first tick, state]."""
    stretches = [
        [[tick, int(states[tick])] for tick in np.flatnonzero(np.diff(states, prepend=-1)).tolist()]
        for states in track.state.T
    ]
    return {
        "says": utterances(track),
        "updates": np.flatnonzero(track.dst_update).tolist(),
        "states": stretches,
    }


def _thousandths(scores: NDArray[np.float32] | None) -> list[int] | None:
    """Probabilities as whole thousandths: three digits in few characters."""
    return None if scores is None else np.rint(scores.astype(np.float64) * 1000).astype(int).tolist()


def _page(data: Mapping[str, Any]) -> str:
    """The page with style, scripts and data in it; its policy lets it load nothing and run these scripts only."""
    folder = resources.files("training.report_page")
    page, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css"))
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # No text can end the element it is in when none has a "<". The data comes last: nothing is put into it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    for name, part in (("policy", policy), ("style", style), ("script", script), ("data", text)):
        page = page.replace("{{" + name + "}}", part)
    return page


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

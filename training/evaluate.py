"""Scores a run on a split: free-running, beside the baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.shards import ShardCache
from schemas.errors import UserError
from schemas.files import write_text
from training.baselines import score_baselines
from training.data import load_sessions
from training.matched import BAG_OF_WORDS, Similarity
from training.metrics import score
from training.model import load_trained
from training.recipe import load_recipe
from training.rollout import Thresholds, run_free
from training.sequence import SequenceBuilder
from training.traces import Trace


def evaluate(
    run: Path,
    shards: str | Path | None,
    *,
    split: str = "test",
    checkpoint: str = "best",
    device: str = "cpu",
    similarity: Similarity = BAG_OF_WORDS,
) -> tuple[dict[str, Any], list[Trace]]:
    """Run a checkpoint over a split on its own state and words, and score it.

    Args:
        run: a folder made by `dst train`.
        shards: the cache; None takes the one it was trained on.
        similarity: tells how alike in meaning two utterances are.

    Returns:
        The content of ``metrics.json`` (also written into the run), and one trace a session.

    Raises:
        UserError: not a run, a cache of another model, or a split without sessions.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run (no run.json); give a folder made by 'dst train'")
    shards = shards or json.loads((run / "run.json").read_text(encoding="utf-8"))["shards"]
    recipe = load_recipe(str(run / "recipe.yaml"), [])
    cache = ShardCache(shards)
    folder = run / "checkpoints" / checkpoint
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in folder.parent.glob("[!.]*"))) or "none yet"
        raise UserError(f"{run} has no checkpoint {checkpoint!r} (there are: {there})")
    model = load_trained(folder).to(device)
    config = model.config
    cached = (cache.fingerprint.tokens_per_frame, cache.fingerprint.dim, cache.fingerprint.tick_hz)
    if cached != (config.cached_tokens, config.text_config.hidden_size, config.tick_hz):
        raise UserError(
            f"{shards} holds {cached[0]} tokens of width {cached[1]} at {cached[2]} Hz, the model was trained on "
            f"{config.cached_tokens} of {config.text_config.hidden_size} at {config.tick_hz} Hz; give its cache"
        )
    sessions = load_sessions(cache, split, recipe.data.blind)
    thresholds = Thresholds(config.speaking_threshold, config.dst_update_threshold)
    traces = run_free(model, SequenceBuilder.of(folder, config), sessions, thresholds)
    metrics: dict[str, Any] = score(
        traces, {"speaking": thresholds.speaking, "dst_update": thresholds.dst_update}, similarity
    )
    metrics["baselines"] = score_baselines(traces, similarity)
    metrics["about"] = {
        "run": str(run),
        "checkpoint": checkpoint,
        "split": split,
        "sessions": len(traces),
        "ticks": sum(trace.truth.num_ticks for trace in traces),
        "mode": "free",
        "embedding": similarity.name,
        "blind": recipe.data.blind,
        "seed": recipe.train.seed,
        "versions": {name: version(name) for name in ("dst", "torch", "transformers")},
    }
    write_text(run / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics, traces


def middle_trace(traces: Sequence[Trace]) -> Trace:
    """The session in the middle by joint state accuracy: neither the best picture nor the worst."""
    by_score = sorted(
        traces, key=lambda t: (float((t.truth.state == t.predicted.state).all(1).mean()), t.session_id)
    )
    return by_score[len(by_score) // 2]


TABLE = {
    "speak F1": ("speaking", "f1"),
    "update F1": ("dst_update", "f1"),
    "state F1": ("dst_state", "macro_f1"),
    "joint": ("dst_state", "joint"),
    "joint near": ("dst_state", "joint_near_transition"),
    "words": ("response", "exact_match"),
    "matched": ("matched", "f1"),
    "combined": ("combined", "value"),
}
"""The columns of the table a user sees first."""


def table_rows(metrics: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Rows of that table: the model, its blind control where there is one, the baselines."""
    named = {
        "model": metrics,
        **({"blind": metrics["blind"]} if "blind" in metrics else {}),
        **metrics["baselines"],
    }
    return [(name, [scores[group][key] for group, key in TABLE.values()]) for name, scores in named.items()]

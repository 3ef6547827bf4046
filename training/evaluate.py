"""Scores a run on a split: free-running or teacher-forced, beside the baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pipeline.shards import ShardCache
from schemas.errors import UserError
from schemas.files import write_text
from training.baselines import score_baselines
from training.checkpoint import checkpoint_of
from training.data import SessionData, load_sessions, true_trace
from training.gate import Decisions, Thresholds, teacher_trace
from training.matched import BAG_OF_WORDS, Similarity, alike_words, match_trace
from training.metrics import Scores, score
from training.model import DSTSmolVLM, load_trained
from training.recipe import load_recipe
from training.rollout import decide_teacher, run_free
from training.sequence import SequenceBuilder
from training.trace_table import write_traces
from training.traces import Trace
from training.words import about_texts, are_installed, text_scores

Mode = Literal["free", "teacher"]


@dataclass(frozen=True)
class Reports:
    """Names the files of an evaluation: ``metrics.json`` is ``metrics-best-test.json``, of a teacher-forced one
    ``metrics-teacher-best-test.json``."""

    run: Path
    checkpoint: str
    split: str
    mode: Mode = "free"

    def file(self, name: str) -> Path:
        kind = Path(name)
        parts = [kind.stem, *(["teacher"] if self.mode == "teacher" else []), self.checkpoint, self.split]
        return self.run / f"{'-'.join(parts)}{kind.suffix}"


def evaluate(
    run: Path,
    shards: str | Path | None,
    *,
    split: str = "test",
    checkpoint: str = "best",
    mode: Mode = "free",
    device: str = "cpu",
    similarity: Similarity = BAG_OF_WORDS,
) -> tuple[dict[str, Any], list[Trace]]:
    """Run a checkpoint over a split, and score it.

    Args:
        run: a folder made by `dst train`.
        shards: the cache; None takes the one it was trained on.
        mode: ``free``: on its own state and words, all the way. ``teacher``: with the true state at the start of each
            window, and true words; nothing is said.
        similarity: tells how alike in meaning two utterances are.

    Returns:
        The scores, and one trace a session. Both are also written into the run, as `Reports` names them:
        ``metrics.json``, and ``predictions.parquet`` (`training.trace_table`), teacher-forced with all logits.

    Raises:
        UserError: not a run, a cache of another model, or a split without sessions.
    """
    folder = checkpoint_of(run, checkpoint)
    shards = shards or cache_of(run)
    recipe = load_recipe(str(run / "recipe.yaml"), [])
    cache = ShardCache(shards)
    model = load_trained(folder).to(device)
    config = model.config
    require_its_features(cache, config)
    if cache.fingerprint.tick_hz != config.tick_hz:
        raise UserError(
            f"{cache.folder} has ticks at {cache.fingerprint.tick_hz} Hz, the model was trained on {config.tick_hz} "
            "Hz; give its cache"
        )
    sessions = load_sessions(cache, split, recipe.data.blind)
    builder, thresholds = SequenceBuilder.of(folder, config), Thresholds.of(config)
    about: dict[str, Any] = {
        "run": str(run),
        "checkpoint": checkpoint,
        "split": split,
        "sessions": len(sessions),
        "ticks": sum(session.num_ticks for session in sessions),
        "mode": mode,
        "min_gap_s": thresholds.min_gap_ticks / config.tick_hz,
        "blind": recipe.data.blind,
        "seed": recipe.train.seed,
        "versions": {name: version(name) for name in ("dst", "torch", "transformers")},
    }
    decisions: list[list[Decisions]] | None = None
    if mode == "free":
        traces = run_free(model, builder, sessions, thresholds)
        about["embedding"] = similarity.name
        metrics = _score_words(traces, thresholds, similarity, about)
    else:
        decisions, traces = _teacher(model, builder, sessions, thresholds)
        metrics = score(traces, _told(thresholds), None)
    window_ticks = config.window_ticks if mode == "teacher" else None
    metrics["baselines"] = score_baselines(traces, similarity if mode == "free" else None, window_ticks)
    metrics["about"] = about
    reports = Reports(run, checkpoint, split, mode)
    write_traces(reports.file("predictions.parquet"), traces, about, decisions)
    write_text(reports.file("metrics.json"), json.dumps(metrics, indent=2) + "\n")
    return metrics, traces


def require_its_features(cache: ShardCache, config: Any) -> None:
    """Refuse a cache that was not made as the one that a model of either family was trained on.

    Raises:
        UserError: its features are of another shape or vision tower, or of pictures that were resized otherwise.
    """
    cached = (cache.fingerprint.tokens_per_frame, cache.fingerprint.dim, cache.fingerprint.tiles)
    if cached != (config.cached_tokens, config.text_config.hidden_size, config.tiles):
        raise UserError(
            f"{cache.folder} holds {cached[0]} tokens of width {cached[1]}, made with --tiles {cached[2]}, the model "
            f"was trained on {config.cached_tokens} of {config.text_config.hidden_size}, made with --tiles "
            f"{config.tiles}; give its cache"
        )
    made = {"sha256": cache.fingerprint.vision_sha256, "filter": cache.fingerprint.preprocessing["filter"]}
    other = [name for name, value in made.items() if config.vision and config.vision[name] != value]
    if other:
        what = "vision tower" if "sha256" in other else "filter of the resizing"
        raise UserError(
            f"{cache.folder} was made with another {what} than the model was trained with; give its cache"
        )


def _teacher(
    model: DSTSmolVLM, builder: SequenceBuilder, sessions: Sequence[SessionData], thresholds: Thresholds
) -> tuple[list[list[Decisions]], list[Trace]]:
    decisions, _, _ = decide_teacher(model, builder, sessions)
    traces = [
        teacher_trace(true_trace(session), windows, builder.max_plan_steps, thresholds)
        for session, windows in zip(sessions, decisions, strict=True)
    ]
    return decisions, traces


def _score_words(
    traces: Sequence[Trace], thresholds: Thresholds, similarity: Similarity, about: dict[str, Any]
) -> Scores:
    """All scores; those of texts where their packages are there, else ``about`` says what is left out."""
    scores = score(traces, _told(thresholds), similarity)
    if are_installed():
        pairs = [pair for t in traces for pair in alike_words(t, match_trace(t, similarity))]
        scores["response"] |= text_scores(pairs)
        about |= about_texts()
    else:
        about["left_out"] = "BLEU and METEOR, which need: pip install 'dst[eval]'"
    return scores


def _told(thresholds: Thresholds) -> dict[str, float]:
    return {"speaking": thresholds.speaking, "dst_update": thresholds.dst_update}


def cache_of(run: Path) -> str:
    """The cache that a run was trained on."""
    shards: str = json.loads((run / "run.json").read_text(encoding="utf-8"))["shards"]
    return shards


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


def table_rows(
    metrics: dict[str, Any], columns: Mapping[str, tuple[str, str]] = TABLE
) -> list[tuple[str, list[float | None]]]:
    """Its rows: the model, its blind control where there is one, the baselines; None for what has no such score."""
    named = {
        "model": metrics,
        **({"blind": metrics["blind"]} if "blind" in metrics else {}),
        **metrics["baselines"],
    }
    return [
        (name, [scores.get(group, {}).get(key) for group, key in columns.values()])
        for name, scores in named.items()
    ]

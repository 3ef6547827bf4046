"""What `dst evaluate` and `dst compare` do and tell on a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from csv import DictWriter
from pathlib import Path
from typing import Any

import typer

from pipeline.labels_terminal import some_frames
from pipeline.shards import ShardCache
from pipeline.terminal import echo_table
from schemas.checkpoints import DEFAULT_EMBEDDING
from schemas.errors import UserError
from schemas.files import write_text
from training.checkpoint import checkpoint_of
from training.compare import compare
from training.embedding import LOCAL_MARK, similarity_of
from training.evaluate import TABLE, Reports, cache_of, evaluate, middle_trace, table_rows
from training.matched import BAG_OF_WORDS
from training.plots import timeline_picture
from training.report import table_markdown, write_report
from training.runs import is_counting_run
from training.trace_table import read_traces
from training.traces import Trace

MOST_PICTURED = 40
"""Sessions whose frames are in the report, the worst ones first: their videos have to be decoded."""


def evaluate_any_and_tell(
    run: Path,
    shards: str | None,
    split: str,
    checkpoint: str | None,
    mode: str | None,
    embedding: str | None,
    device: str,
) -> None:
    """Score a run of either family, print its table, write its report.

    Args:
        checkpoint: None takes the family's best.
        mode, embedding: of the dialog model only; None takes ``free``, and the default embedding.

    Raises:
        UserError: as the families' own, or there is no such mode, or none in this family.
    """
    if mode not in (None, "free", "teacher"):
        raise UserError(f"--mode {mode!r} is neither free nor teacher")
    if is_counting_run(run):
        if mode or embedding:
            raise UserError(
                f"{run} is a run of counting, which says no words: leave --mode and --embedding away"
            )
        from training.counting.terminal import evaluate_and_tell as evaluate_counter_and_tell

        evaluate_counter_and_tell(Reports(run, checkpoint or "best_joint", split), shards, device)
        return
    reports = Reports(run, checkpoint or "best", split, "teacher" if mode == "teacher" else "free")
    evaluate_and_tell(reports, shards, embedding or DEFAULT_EMBEDDING, device)


def evaluate_and_tell(
    reports: Reports, shards: str | None, embedding: str, device: str, blind: Path | None = None
) -> dict[str, Any]:
    """Score a run, print its table, write its report.

    Args:
        blind: the run's blind control, scored alike and shown beside it.

    Returns:
        The scores, those of the control under ``blind``.
    """
    checkpoint_of(reports.run, reports.checkpoint)  # a mistake is told before a model is fetched
    # teacher-forced, nothing is said
    similarity = similarity_of(embedding, device) if reports.mode == "free" else BAG_OF_WORDS
    how: dict[str, Any] = {
        "split": reports.split,
        "checkpoint": reports.checkpoint,
        "mode": reports.mode,
        "device": device,
        "similarity": similarity,
    }
    metrics, traces = evaluate(reports.run, shards, **how)
    if blind is not None:
        control, _ = evaluate(blind, shards, **how)
        metrics["blind"] = {key: value for key, value in control.items() if key not in ("baselines", "about")}
    about = metrics["about"]
    manner = "free-running" if reports.mode == "free" else "with the true state at the start of each window"
    typer.echo(f"{about['sessions']} {about['split']} sessions, {about['ticks']} ticks, {manner}")
    echo_table(("", *TABLE), [(name, *values) for name, values in table_rows(metrics)])
    words = f"; words are compared by {about['embedding']}" if "embedding" in about else ""
    typer.echo(f"combined: {metrics['combined']['formula']}{words}")
    if "left_out" in about:
        typer.echo(f"left out: {about['left_out']}", err=True)
    cache = ShardCache(shards or cache_of(reports.run))
    write_text(reports.file("scores.md"), table_markdown(metrics))
    pictures = _Pictures(cache, traces)
    page = reports.file("report.html")
    write_report(page, metrics, traces, pictures, similarity)
    if pictures.missing:
        typer.echo(
            f"{len(pictures.missing)} sessions have no frames in the report: {pictures.missing[0]}; "
            "start dst where the cache was made",
            err=True,
        )
    trace = middle_trace(traces)
    picture = reports.file("timeline.png")
    frames = some_frames(cache.session(trace.session_id), lambda why: None)  # which is told already
    timeline_picture(trace, frames, picture, trace.goal)
    typer.echo(f"report to open in a browser: {page}; one session's timeline: {picture}")
    typer.echo(
        f"all scores: {reports.file('metrics.json')}; all ticks: {reports.file('predictions.parquet')}"
    )
    return metrics


class _Pictures:
    """Frames for the report: of the sessions with the worst states, so that it can be made of a large split, too."""

    def __init__(self, cache: ShardCache, traces: Sequence[Trace]) -> None:
        self.cache = cache
        self.missing: list[str] = []  # why, of each session without

        def right(trace: Trace) -> float:
            return float((trace.truth.state == trace.predicted.state).all(1).mean())

        worst = sorted(traces, key=lambda trace: (right(trace), trace.session_id))
        self.chosen = {trace.session_id for trace in worst[:MOST_PICTURED]}

    def __call__(self, trace: Trace) -> list[tuple[int, bytes]]:
        """Small ones: tick counted from the session's first, and JPEG."""
        from PIL import Image

        if trace.session_id not in self.chosen:
            return []
        shown = []
        for tick, image in some_frames(self.cache.session(trace.session_id), self.missing.append):
            picture, buffer = Image.fromarray(image), io.BytesIO()
            picture.thumbnail((240, 240))
            picture.save(buffer, "JPEG", quality=75)
            shown.append((tick - trace.first_tick, buffer.getvalue()))
        return shown


def compare_and_tell(first: Reports, second: Reports, embedding: str | None, csv: bool) -> None:
    """Print the scores of two runs, the differences, and how sure they are.

    Args:
        embedding: None takes the one that both were scored with.
    """
    for reports in (first, second):
        checkpoint_of(reports.run, reports.checkpoint)
    read = [read_traces(reports.file("predictions.parquet")) for reports in (first, second)]
    (one, about), (other, about_other) = read
    if embedding is None:
        embedding = about["embedding"]
        if embedding != about_other["embedding"]:
            raise UserError(
                f"{first.run} was scored with the embedding {embedding}, {second.run} with {about_other['embedding']}; "
                "give one with --embedding"
            )
        if LOCAL_MARK in embedding:
            raise UserError(
                f"both were scored with the embedding {embedding}; give its folder with --embedding"
            )
    rows = compare(one, other, similarity_of(embedding))
    recordings = len({trace.recording_id for trace in one})
    if csv:
        writer = DictWriter(sys.stdout, ["score", "first", "second", "low", "high"])
        writer.writeheader()
        writer.writerows(
            {"score": r.name, "first": r.first, "second": r.second, "low": r.low, "high": r.high}
            for r in rows
        )
        return
    header = ("", "first", "second", "difference", "from", "to", "sure")
    echo_table(
        header,
        [
            (r.name, r.first, r.second, r.second - r.first, r.low, r.high, "yes" if r.is_sure else "")
            for r in rows
        ],
    )
    typer.echo(f"first: {first.run}, second: {second.run}; words are compared by {embedding}")
    typer.echo(
        f"from, to: 95 % of the differences of 1000 paired draws of {recordings} recordings (seed 0); "
        "sure where 0 is outside"
    )

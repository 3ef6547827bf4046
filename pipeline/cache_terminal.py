"""What `dst cache-features` and `dst verify` tell on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pipeline.estimate import Estimate, in_bytes
from pipeline.terminal import echo_table

if TYPE_CHECKING:
    from pipeline.cache import Summary
    from pipeline.verify import Report

_MOST_SHOWN = 10


def noted(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def echo_estimate(estimate: Estimate) -> None:
    typer.echo(
        f"{estimate.ticks:,} frames of {estimate.videos:,} videos in {estimate.shards:,} shards, "
        f"{estimate.ticks_to_encode:,} of them to encode; {in_bytes(estimate.bytes_to_write)} to write, "
        f"{in_bytes(estimate.bytes_free)} free in {estimate.where}"
    )


def echo_hours(estimate: Estimate, rate: float | None, encoders: int) -> None:
    if estimate.ticks_to_encode == 0:
        typer.echo("nothing is left to encode")
        return
    if rate is None:
        typer.echo("no video could be read, so how long it takes is not known")
        return
    encoders = max(1, min(encoders, estimate.shards_to_make))
    seconds = estimate.ticks_to_encode / rate / encoders
    told = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    beside = f" for each of {encoders} encoders" if encoders > 1 else ""
    typer.echo(f"about {told} at {rate:.1f} frames a second{beside}, as tried for three seconds")


def echo_cache_summary(summary: Summary, seconds: float, out: str) -> None:
    stages = sorted(summary.seconds.items(), key=lambda stage: -stage[1])
    if stages:
        echo_table(("stage", "seconds"), [(stage, f"{taken:.1f}") for stage, taken in stages])
    rate = f", {summary.ticks / seconds:.0f} a second" if summary.ticks else ""
    reused = f", {summary.ticks_reused} taken over" if summary.ticks_reused else ""
    typer.echo(
        f"{summary.ticks} frames encoded in {seconds:.1f} s{rate}{reused}; {summary.shards_made} shards made, "
        f"{summary.shards_kept} kept, in {out}"
    )
    echo_failures(
        summary, f"all listed in {out}/ledger; when the cause is mended, run it again with --retry-failed"
    )


def echo_failures(summary: Summary, advice: str) -> None:
    for note in summary.notes[:_MOST_SHOWN]:
        noted(note)
    for failure in summary.failures[:_MOST_SHOWN]:
        typer.secho(f"failed: {failure.id}: {failure.reason}", fg="red", err=True)
    if len(summary.notes) > _MOST_SHOWN:
        noted(f"{len(summary.notes)} such notes in all, in the ledger")
    if summary.failures:
        typer.secho(
            f"{len(summary.failures)} failed, {advice}",
            fg="red",
            err=True,
        )


def echo_report(report: Report, shards: str) -> None:
    """What `dst verify` found; problems last, where they are seen."""
    echo_table(("checked", "count"), list(report.counts.items()))
    for note in report.notes:
        typer.echo(f"note: {note}")
    for failure in report.failures:
        typer.echo(f"not in the cache: {failure.id}: {failure.reason}")
    for problem in report.problems:
        typer.secho(f"problem: {problem}", fg="red", err=True)
    if report.problems:
        typer.secho(f"{len(report.problems)} problems in {shards}", fg="red", err=True)
    else:
        absent = f"; {len(report.failures)} videos and sessions are not in it" if report.failures else ""
        typer.echo(f"no problem in {shards}{absent}")

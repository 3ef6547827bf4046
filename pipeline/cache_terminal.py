"""What `dst cache-features` and `dst verify` do and tell on a terminal."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pipeline.cache import Summary, cache_features, dry_run, relabel
from pipeline.encode import EncoderSpec
from pipeline.engines import Engine, Here, Processes
from pipeline.estimate import Estimate, in_bytes
from pipeline.ledger import Failure
from pipeline.terminal import echo_table, progress
from pipeline.todo import CacheOptions

if TYPE_CHECKING:
    from pipeline.verify import Report

_MOST_SHOWN = 10


def open_engine(spec: EncoderSpec, devices: Sequence[str], on_ray: bool) -> Engine:
    """Load an encoder for each device; ``on_ray``, for each of that kind in the cluster."""
    if on_ray:
        from pipeline.ray_engine import OnRay

        return OnRay(spec, devices[0])
    return Here(spec.load(devices[0])) if len(devices) == 1 else Processes(spec, devices)


def cache_and_tell(labels: Path, out: str, engine: Engine, options: CacheOptions) -> list[Failure]:
    """Make or complete a cache, and end the engine; what failed."""
    began = time.perf_counter()
    with engine as encoders, progress("ticks") as bar:

        def on_estimate(estimate: Estimate) -> None:
            echo_estimate(estimate)
            bar.start(estimate.ticks)

        summary = cache_features(
            labels, out, encoders, options, say=noted, on_estimate=on_estimate, on_tick=bar.advance
        )
    echo_cache_summary(summary, time.perf_counter() - began, out)
    if not summary.failures and options.of == 1:
        cache = shlex.quote(out)
        typer.echo(f"next: dst verify {cache}, then dst train --shards {cache}")
    return summary.failures


def dry_run_and_tell(
    labels: Path, out: str, spec: EncoderSpec, devices: Sequence[str], options: CacheOptions
) -> None:
    """Tell what `cache_and_tell` would do.

    Raises:
        UserError: there is no room for it.
    """
    estimate, rate = dry_run(labels, out, Here(spec.load(devices[0])), options, len(devices))
    echo_estimate(estimate)
    echo_hours(estimate, rate, len(devices))
    estimate.require_room()


def relabel_and_tell(labels: Path, out: str) -> list[Failure]:
    """Write the labels of a cache anew; what failed."""
    summary = relabel(labels, out, noted)
    typer.echo(f"labels of {summary.shards_kept} shards in {out} follow {labels}; no video was opened")
    echo_failures(summary, f"all listed in {out}/ledger; run it without --labels-only to add their videos")
    return summary.failures


def noted(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def echo_estimate(estimate: Estimate) -> None:
    films = estimate.videos - estimate.pictures
    kinds = [f"{films:,} videos"] if films or not estimate.pictures else []
    kinds += [f"{estimate.pictures:,} pictures"] if estimate.pictures else []
    typer.echo(
        f"{estimate.ticks:,} frames of {' and '.join(kinds)} in {estimate.shards:,} shards, "
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
    for note in report.notes[:_MOST_SHOWN]:
        typer.echo(f"note: {note}")
    if len(report.notes) > _MOST_SHOWN:
        typer.echo(f"note: {len(report.notes)} such notes in all")
    for failure in report.failures[:_MOST_SHOWN]:
        typer.echo(f"not in the cache: {failure.id}: {failure.reason}")
    if len(report.failures) > _MOST_SHOWN:
        typer.echo(f"not in the cache: {len(report.failures)} in all, listed in {shards}/ledger")
    for problem in report.problems:
        typer.secho(f"problem: {problem}", fg="red", err=True)
    if report.problems:
        typer.secho(f"{len(report.problems)} problems in {shards}", fg="red", err=True)
    else:
        absent = f"; {len(report.failures)} videos and sessions are not in it" if report.failures else ""
        typer.echo(f"no problem in {shards}{absent}")

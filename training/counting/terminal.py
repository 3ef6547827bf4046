"""What `dst evaluate` does and tells of a run of counting, and what `dst count` does."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer

from pipeline.stills import read_picture
from pipeline.streams import DecodeError
from pipeline.terminal import echo_table
from schemas.errors import UserError
from schemas.files import write_text
from training.counting.counter import Counter, in_pixels, pixels_of
from training.counting.evaluate import TABLE, Scored, evaluate, markdown_table, named_rows
from training.counting.pictures import as_jpeg, counts_picture, marked, write_marked
from training.counting.report import write_page
from training.evaluate import Reports

_LONGER_SIDE = 640  # pixels of a picture in the report


def evaluate_and_tell(
    reports: Reports, shards: str | None, device: str, blind: Path | None = None
) -> dict[str, Any]:
    """Score a run, print its table, write its report.

    Args:
        blind: the run's blind control, scored alike and shown beside it.

    Returns:
        The scores, those of the control under ``blind``.
    """
    metrics, scored = evaluate(
        reports.run, shards, split=reports.split, checkpoint=reports.checkpoint, device=device
    )
    if blind is not None:
        control, _ = evaluate(
            blind, shards, split=reports.split, checkpoint=reports.checkpoint, device=device
        )
        metrics["blind"] = {key: value for key, value in control.items() if key not in ("baselines", "about")}
    about = metrics["about"]
    typer.echo(f"{about['images']} {about['split']} images of {about['objects']} objects")
    echo_table(("", *TABLE), [(name, *values) for name, values in named_rows(metrics)])
    typer.echo("next point: median distance with true marks, as a share of the image's side")
    if about["cut_off"]:
        typer.echo(
            f"{about['cut_off']} images ended at data.max_marks of the recipe, and were not believed to be done",
            err=True,
        )
    write_text(reports.file("scores.md"), markdown_table(metrics))
    counts, page = reports.file("counts.png"), reports.file("report.html")
    counts_picture(scored, counts, f"{about['images']} {about['split']} images")
    unread: list[str] = []
    write_page(page, metrics, scored, counts.read_bytes(), lambda each: _pictured(each, unread))
    if unread:
        typer.echo(
            f"{len(unread)} images have no picture in the report: {unread[0]}; start dst where the cache was made",
            err=True,
        )
    typer.echo(f"report to open in a browser: {page}; predicted against true counts: {counts}")
    typer.echo(
        f"all scores: {reports.file('metrics.json')}; all images: {reports.file('predictions.parquet')}"
    )
    return metrics


def _pictured(each: Scored, unread: list[str]) -> bytes | None:
    """JPEG of an image with its true points, and the marks that were made; else why there is none."""
    try:
        picture = read_picture(each.image.labels.meta["uri"])
    except DecodeError as error:
        unread.append(str(error))
        return None
    marks, points = (
        [in_pixels(place, picture) for place in places]
        for places in (each.rollout.marks, each.image.points.tolist())
    )
    return as_jpeg(marked(picture, marks, points, _LONGER_SIDE))


def count_and_tell(
    run: Path, image: Path, what: str | None, out: Path | None, checkpoint: str | None, device: str
) -> None:
    """Count in a picture, print how many there are, and write the picture with numbered marks.

    Args:
        what: None takes the only category of the training part.
        out: a PNG; None takes ``out/pictures``, as data is not written into.

    Raises:
        UserError: as `training.counting.counter.Counter` and `write_marked`, or ``out`` is no PNG or the picture.
    """
    picture = pixels_of(image)
    out = out or Path("out/pictures") / f"{image.stem}-counted.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a PNG; give a name that ends in .png")
    if out.resolve() == image.resolve():
        raise UserError(f"--out {out} is the picture itself; give another name")
    counter = Counter.load(run, checkpoint, device)
    category, goals = counter.category(what), counter.model.config.goals or []
    if category not in goals:
        near = ", ".join(difflib.get_close_matches(category, goals, n=3, cutoff=0))
        typer.echo(f"{category!r} is none of the categories it was trained on; nearest: {near}", err=True)
    counted = counter.count(picture, category)
    write_marked(picture, counted.marks, out)
    where = f"each with its number in {out}" if counted.count else f"the picture is in {out}"
    typer.echo(f"{counted.count} {category}; {where}")
    if counted.is_cut_off:
        typer.echo(
            f"there may be more: it ended at {counted.count} marks, the data.max_marks of its recipe, and does not "
            "believe to be done",
            err=True,
        )
    if counted.count > counter.most:
        typer.echo(
            f"more than {counter.most} objects crowd several to one of the {counter.model.config.cached_tokens} tokens "
            "of a picture, so that the count is unsure: cache pictures with more (--tiles) and train on that",
            err=True,
        )

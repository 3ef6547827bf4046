"""`dst demo`: all stages of a family on a synthetic corpus, with a blind control."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from pipeline.cache_terminal import cache_and_tell, open_engine
from pipeline.encode import EncoderSpec
from pipeline.labels_terminal import prepare_and_tell
from pipeline.presets import init_model
from pipeline.sample.corpus import write_sample
from pipeline.terminal import progress
from pipeline.todo import CacheOptions
from pipeline.workers import available_cores
from schemas.errors import UserError
from schemas.files import write_text
from training.evaluate import Reports
from training.recipe import any_recipe
from training.terminal import train_and_tell


@dataclass(frozen=True)
class Kind:
    """What a family's demo is made of: a corpus and the number of its sessions, a model's preset, a recipe, and which
    part of its steps the blind control gets."""

    source: str
    sessions: int
    preset: str
    recipe: str
    out: str
    control: int = 1


KINDS = {
    "dst": Kind("assembly101", 180, "tiny", "tiny", "out/demo"),
    # blind, it has learned all there is in a quarter of the steps: where objects usually are, and how many
    "counting": Kind("fsc147", 4000, "tiny-grid", "counting", "out/demo-counting", control=4),
}


def demo(
    family: Literal["dst", "counting"], out: Path | None, sessions: int | None, seed: int, steps: int | None
) -> None:
    """Sample, prepare, cache, train, train the control, evaluate; of counting, count in a picture besides.

    Args:
        out: folder for everything, None takes the family's.
        sessions, steps: None takes the family's, and its recipe's.

    Raises:
        UserError: as the stages; or ``out`` holds something else than an earlier demo.
    """
    began, kind = time.perf_counter(), KINDS[family]
    out = out or Path(kind.out)
    changes = [f"train.seed={seed}", *([f"train.steps={steps}"] if steps is not None else [])]
    any_recipe(kind.recipe, changes)  # a mistake is told now, not in four minutes
    _clear(out)
    corpus, labels, shards, model = (
        out / "data" / kind.source,
        out / "labels",
        out / "shards",
        out / "models" / kind.preset,
    )
    _stage("1/6 sample: a synthetic corpus in its official layout")
    with progress("files") as bar:
        number = kind.sessions if sessions is None else sessions
        write_sample(kind.source, corpus, number, seed, on_plan=bar.start, on_file=lambda: bar.advance(1))
    typer.echo(f"{number} sessions in {corpus}")
    _stage("2/6 prepare: annotations to label tables")
    prepare_and_tell(kind.source, corpus, labels, None, 2.0, "step", None, available_cores(), "none")
    _stage("3/6 cache-features: every tick or picture once through the vision tower")
    init_model(kind.preset, model, seed)
    engine = open_engine(EncoderSpec(model, str(model)), ["cpu"], on_ray=False)
    options = CacheOptions(workers=max(1, available_cores() // 2))  # the tower has the other half
    if cache_and_tell(labels, str(shards), engine, options):
        raise typer.Exit(1)
    _stage("4/6 train")
    run, blind = out / "runs" / kind.recipe, out / "runs/blind"
    train_and_tell(str(shards), any_recipe(kind.recipe, changes), run, "cpu", resume=False)
    part = max(1, any_recipe(kind.recipe, changes).train.steps // kind.control)
    _stage(f"5/6 train the blind control: the same for {part} steps, with all features zero")
    control = any_recipe(kind.recipe, [*changes, f"train.steps={part}", "data.blind=true"])
    train_and_tell(str(shards), control, blind, "cpu", resume=False)
    _stage("6/6 evaluate on the held-out test part")
    places = {"labels": labels / kind.source / "frames.parquet", "features": shards}
    metrics, found = (_dialog if family == "dst" else _counting)(run, blind)
    scores = Reports(out, control.best, "test").file("metrics.json")
    write_text(scores, json.dumps(metrics, indent=2) + "\n")
    places |= {"scores": scores, "curves": run / "curves.png"}
    places |= {"model": run / "checkpoints" / control.best, **found}
    typer.echo(f"{(time.perf_counter() - began) / 60:.1f} minutes. Where things lie:")
    for name, place in places.items():
        typer.echo(f"  {name:9} {place}")


def _dialog(run: Path, blind: Path) -> tuple[dict[str, Any], Mapping[str, Path]]:
    from training.report_terminal import evaluate_and_tell

    reports = Reports(run, "best", "test")
    metrics = evaluate_and_tell(reports, None, "bag-of-words", "cpu", blind=blind)
    return metrics, {"timeline": reports.file("timeline.png"), "report": reports.file("report.html")}


def _counting(run: Path, blind: Path) -> tuple[dict[str, Any], Mapping[str, Path]]:
    """Of counting, also a picture of the test part, that with a number of objects in the middle."""
    from pipeline.shards import ShardCache
    from training.counting.data import load_images
    from training.counting.terminal import count_and_tell, evaluate_and_tell
    from training.evaluate import cache_of

    reports = Reports(run, "best_joint", "test")
    metrics = evaluate_and_tell(reports, None, "cpu", blind=blind)
    images = sorted(
        load_images(ShardCache(cache_of(run)), "test", "mark_tokens"), key=lambda i: len(i.points)
    )
    middle = images[len(images) // 2]
    picture, counted = Path(middle.labels.meta["uri"]), reports.file("counted.png")
    typer.echo(f"and one picture, of {len(middle.points)} {middle.goal}:")
    count_and_tell(run, picture, middle.goal, counted, None, "cpu")
    return metrics, {"counted": counted, "report": reports.file("report.html")}


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    mark = out / ".dst-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.is_file():
            raise UserError(f"{out} is not empty and not an earlier demo; give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _stage(title: str) -> None:
    typer.secho(f"\n== {title}", bold=True)

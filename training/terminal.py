"""What `dst train` does and tells on a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from pipeline.devices import is_main_process
from pipeline.terminal import progress
from training import trainer
from training.recipe import Recipe
from training.stop import Stopped


def train_and_tell(shards: str, recipe: Recipe, out: Path, device: str, resume: bool) -> None:
    """Train with a bar and a line a validation. torchrun starts this once a GPU; the main process alone speaks.

    Raises:
        typer.Exit: a signal came, and all is saved.
    """
    with progress("steps", shown=is_main_process()) as bar:
        bar.start(recipe.train.steps)

        def on_start(step: int) -> None:
            if resume:
                bar.say(f"going on after step {step}" if step else f"nothing to resume in {out}: starting")
            bar.advance(step)

        def on_step(row: dict[str, float]) -> None:
            bar.advance(1, f"loss {row['train/loss']:.3f}")
            if "val/combined" in row:
                bar.say(_validation_line(row))

        try:
            best = trainer.train(
                *(shards, recipe, out),
                device=device,
                resume=resume,
                on_start=on_start,
                on_step=on_step,
                say=bar.say,
            )
        except Stopped as stop:
            bar.say(f"stopped after step {stop.step}, which is saved; go on with --resume")
            raise typer.Exit(128 + stop.signal) from None
    if is_main_process():
        found = f"best at step {best['step']:.0f} (val combined {best['val/combined']:.3f})"
        typer.echo(f"{found} in {out / 'checkpoints/best'}; curves in {out / 'curves.png'}")
        run, others = shlex.quote(str(out)), shlex.quote(str(out.parent))
        typer.echo(f"next: dst evaluate --run {run}; beside other runs: dst runs {others}")


def _validation_line(row: dict[str, float]) -> str:
    """The scores of a validation, the one that chooses `best` first."""
    names = sorted((key for key in row if key.startswith("val/")), key=lambda key: key != "val/combined")
    scores = ", ".join(f"{name.removeprefix('val/')} {row[name]:.3f}" for name in names)
    return f"step {row['step']:.0f}: {scores}"

"""What `dst train` does and tells on a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from pipeline.devices import is_main_process
from pipeline.terminal import progress
from training import trainer
from training.recipe import AnyRecipe
from training.stop import Stopped


def train_and_tell(shards: str, recipe: AnyRecipe, out: Path, device: str, resume: bool) -> None:
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
            if recipe.best_by in row:
                bar.say(_validation_line(row, recipe))

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
        score = recipe.best_by.removeprefix("val/").replace("_", " ")
        found = f"best at step {best['step']:.0f} (val {score} {best[recipe.best_by]:.3f})"
        typer.echo(f"{found} in {out / 'checkpoints' / recipe.best}; curves in {out / 'curves.png'}")
        run, others = shlex.quote(str(out)), shlex.quote(str(out.parent))
        typer.echo(f"next: dst evaluate --run {run}; beside other runs: dst runs {others}")


def _validation_line(row: dict[str, float], recipe: AnyRecipe) -> str:
    """The scores of a validation, the one that chooses the best first, and how patient the tasks are."""
    names = sorted((key for key in row if key.startswith("val/")), key=lambda key: key != recipe.best_by)
    scores = ", ".join(f"{name.removeprefix('val/')} {row[name]:.3f}" for name in names)
    waits = [
        f"{name} {row[f'waited/{name}']:.0f} of {task.patience}"
        for name, task in recipe.tasks.active.items()
        if task.patience is not None
    ]
    patience = f"; without a better one: {', '.join(waits)}" if waits else ""
    return f"epoch {row['epoch']:.0f}, step {row['step']:.0f}: {scores}{patience}"

"""What the runs in a folder have come to, side by side."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.config import load_config
from schemas.errors import UserError
from training.recipe import Recipe
from training.selection import COMBINED, INLINE_SCORES, Selection
from training.selection import SCORES as TRAIN_SCORES

SILENT_S = 600.0
"""Seconds without a line in its log after which an unfinished run is no longer taken to be running."""

SCORES = {
    COMBINED: "combined",
    "val/speaking_f1": "speak F1",
    "val/dst_update_f1": "update F1",
    "val/dst_state_macro_f1": "state F1",
    "val/dst_state_joint": "joint",
    "val/dst_state_joint_near_transition": "joint near",
    "val/loss_response": "words loss",
    "val/matched_f1": "matched",  # inline speech only, where a validation runs free
}
"""The validation scores that are shown, and what the table calls them."""


@dataclass(frozen=True)
class Run:
    """One run; its ``scores`` are those of the validation with the best ``val/combined``, at ``best_step``."""

    name: str
    recipe: Recipe
    state: str  # finished, running? (nobody says so, but it wrote lately) or stopped
    step: int
    best_step: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        train = self.recipe.train
        return f"{train.objective}, {train.strategy}" if train.objective == "independent" else train.objective


def read_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """All runs of a folder (or the one that it is), best ``val/combined`` first; those without a score come last.

    Returns:
        The runs, and for the name of each folder that is a run but cannot be read, why.

    Raises:
        UserError: there is no run.
    """
    places = [folder] if _is_run(folder) else sorted(p for p in _members(folder) if _is_run(p))
    if not places:
        raise UserError(f"{folder} holds no run; make one with 'dst train --out {folder / 'NAME'}'")
    runs, broken = [], {}
    for place in places:
        try:
            runs.append(_read(place))
        except (UserError, OSError) as error:
            broken[place.name] = str(error)
    return sorted(runs, key=_place), broken


def table(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows for a terminal."""
    header = ("run", "objective", "state", "steps", "best at", *SCORES.values())
    rows = [
        (
            *(run.name, run.objective, run.state, f"{run.step}/{run.recipe.train.steps}", run.best_step),
            *(run.scores.get(name) for name in SCORES),
        )
        for run in runs
    ]
    return header, rows


def records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run for other programs, every score it has at full precision."""
    names = list(dict.fromkeys([*SCORES, *(name for run in runs for name in run.scores)]))
    return [
        {"run": run.name, "objective": run.objective, "state": run.state, "step": run.step}
        | {"steps": run.recipe.train.steps, "best_step": run.best_step}
        | {name: run.scores.get(name) for name in names}
        | {"differs": differences(runs[0].recipe, run.recipe)}
        for run in runs
    ]


def differences(first: Recipe, other: Recipe) -> str:
    """What another recipe has otherwise than the first, as ``--set`` would say it."""
    mine, theirs = _flat(first.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return " ".join(f"{key}={_said(theirs[key])}" for key in mine if mine[key] != theirs[key])


def _members(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("recipe.yaml", "log.jsonl"))


def _read(folder: Path) -> Run:
    """Only lines with validation scores are parsed, and the last: a log may have 100,000 others."""
    for name in ("recipe.yaml", "log.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"it has no {name}")
    recipe = load_config(Recipe, folder / "recipe.yaml")
    measured = TRAIN_SCORES if recipe.data.speech == "branch" else INLINE_SCORES
    log, selection = folder / "log.jsonl", Selection(recipe.tasks.active, measured)
    best: dict[str, float] = {}
    frozen: set[str] = set()
    last = 0
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
    for number, line in enumerate(whole, start=1):
        if COMBINED not in line and number < len(whole):
            continue
        row = _row(line, log, number)
        last = int(row["step"])
        if COMBINED in row:
            try:
                improved = selection.update(last, row)
            except KeyError as missing:
                raise UserError(
                    f"{log}, row {number}, lacks {missing}, which the recipe selects by"
                ) from None
            if "best" in improved:
                best = row
            if recipe.train.on_plateau == "freeze_task":
                frozen |= selection.out_of_patience()
    ended = last >= recipe.train.steps or selection.is_over(frozen)
    lately = time.time() - log.stat().st_mtime < SILENT_S
    state = "finished" if ended else "running?" if lately else "stopped"
    scores = {key: value for key, value in best.items() if key.startswith("val/")}
    best_step = int(best["step"]) if best else None
    return Run(folder.resolve().name, recipe, state, last, best_step, scores)


def _row(line: str, log: Path, number: int) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f"{log}, row {number}, is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{log}, row {number}, has no step")
    return {name: math.nan if value is None else value for name, value in row.items()}


def _place(run: Run) -> tuple[float, str]:
    combined = run.scores.get(COMBINED, math.nan)
    return math.inf if math.isnan(combined) else -combined, run.name


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _said(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value

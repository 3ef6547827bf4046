"""What the runs in a folder have come to, side by side."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.locks import lock_name
from schemas.config import load_config
from schemas.errors import UserError
from training.recipe import Recipe
from training.selection import COMBINED, INLINE_SCORES, Selection
from training.selection import SCORES as TRAIN_SCORES

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
    state: str  # running, finished or stopped
    step: int
    best_step: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        train = self.recipe.train
        return f"{train.objective}, {train.strategy}" if train.objective == "independent" else train.objective

    @property
    def parts(self) -> int:
        """How many scores ``val/combined`` is the mean of: with inline speech also that of what is said."""
        return 4 if self.recipe.data.speech == "inline" else 3


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
    """Header and rows for a terminal, without scores that no run has.

    Where ``combined`` is not of as many scores in all runs, so that they cannot be compared by it, ``mean of`` says of
    how many.
    """
    columns: dict[str, list[Any]] = {
        "run": [run.name for run in runs],
        "objective": [run.objective for run in runs],
        "state": [run.state for run in runs],
        "steps": [f"{run.step}/{run.recipe.train.steps}" for run in runs],
        "best at": [run.best_step for run in runs],
    }
    for name, title in SCORES.items():
        columns[title] = [run.scores.get(name) for run in runs]
        if name == COMBINED and len({run.parts for run in runs}) > 1:
            columns["mean of"] = [run.parts for run in runs]
    shown = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
    return tuple(shown), list(zip(*shown.values(), strict=True))


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
    state = "running" if _is_being_written(folder) else "finished" if ended else "stopped"
    scores = {key: value for key, value in best.items() if key.startswith("val/")}
    best_step = int(best["step"]) if best else None
    return Run(folder.resolve().name, recipe, state, last, best_step, scores)


def _is_being_written(folder: Path) -> bool:
    """Whether a process holds the run's lock. Where the file system has none, no run is known to be running."""
    try:
        with (folder / lock_name(0, 1)).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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

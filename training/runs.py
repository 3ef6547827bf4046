"""What the runs in a folder have come to, side by side."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.locks import lock_name
from schemas.errors import UserError
from training.counting.recipe import CountingRecipe
from training.recipe import AnyRecipe, Recipe, any_recipe
from training.selection import COMBINED, Selection, is_lower_better

SCORES: Mapping[type[AnyRecipe], Mapping[str, str]] = {
    Recipe: {
        COMBINED: "combined",
        "val/speaking_f1": "speak F1",
        "val/dst_update_f1": "update F1",
        "val/dst_state_macro_f1": "state F1",
        "val/dst_state_joint": "joint",
        "val/dst_state_joint_near_transition": "joint near",
        "val/loss_response": "words loss",
        "val/matched_f1": "matched",  # inline speech only, where a validation runs free
    },
    CountingRecipe: {
        "val/count_mae": "count MAE",
        "val/coord_error": "coord error",
        "val/done_f1": "done F1",
    },
}
"""The validation scores of each family that are shown, and what the table calls them."""


@dataclass(frozen=True)
class Run:
    """One run; its ``scores`` are those of the validation that was best by the family's metric, at ``best_step``."""

    name: str
    recipe: AnyRecipe
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
        return 4 if isinstance(self.recipe, Recipe) and self.recipe.data.speech == "inline" else 3


def is_counting_run(folder: Path) -> bool:
    """Whether a folder is a run of counting. What is no run is none.

    Raises:
        UserError: its recipe does not hold.
    """
    recipe = folder / "recipe.yaml"
    return recipe.is_file() and isinstance(any_recipe(str(recipe), []), CountingRecipe)


def counting_recipe(folder: Path, what: str) -> CountingRecipe:
    """The recipe of a run, for what only a run of counting can do.

    Raises:
        UserError: it is one of the dialog model.
    """
    recipe = any_recipe(str(folder / "recipe.yaml"), [])
    if not isinstance(recipe, CountingRecipe):
        raise UserError(
            f"{folder} is a run of the dialog model, and {what} needs one of counting; give another"
        )
    return recipe


def require_dialog(folder: Path, what: str) -> None:
    """Refuse a run of counting for what is for the dialog model.

    Raises:
        UserError: it is one.
    """
    if is_counting_run(folder):
        raise UserError(
            f"{folder} is a run of counting, and {what} needs one of the dialog model; use 'dst count' and "
            "'dst evaluate' with it"
        )


def read_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """All runs of a folder (or the one that it is), the dialog model's before those of counting.

    In each family, the best by its own metric comes first, and those without a score come last.

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


def by_family(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that can be compared with each other, in the order of `read_runs`."""
    return [list(alike) for _, alike in groupby(runs, key=lambda run: type(run.recipe))]


def table(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows of one family for a terminal, without scores that no run has.

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
    for name, title in SCORES[type(runs[0].recipe)].items():
        columns[title] = [run.scores.get(name) for run in runs]
        if name == COMBINED and len({run.parts for run in runs}) > 1:
            columns["mean of"] = [run.parts for run in runs]
    shown = {title: cells for title, cells in columns.items() if any(cell is not None for cell in cells)}
    return tuple(shown), list(zip(*shown.values(), strict=True))


def records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run for other programs, every score it has at full precision."""
    families = by_family(runs)
    known = [name for alike in families for name in SCORES[type(alike[0].recipe)]]
    names = list(dict.fromkeys([*known, *(name for run in runs for name in run.scores)]))
    return [
        {"run": run.name, "objective": run.objective, "state": run.state, "step": run.step}
        | {"steps": run.recipe.train.steps, "best_step": run.best_step}
        | {name: run.scores.get(name) for name in names}
        | {"differs": differences(alike[0].recipe, run.recipe)}
        for alike in families
        for run in alike
    ]


def differences(first: AnyRecipe, other: AnyRecipe) -> str:
    """What another recipe of the same family has otherwise than the first, as ``--set`` would say it."""
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
    recipe = any_recipe(str(folder / "recipe.yaml"), [])
    tasks = recipe.tasks.active
    # whether a metric is measured at all is seen in the log
    measured = (recipe.best_by, *(task.metric for task in tasks.values()))
    log, selection = folder / "log.jsonl", Selection(tasks, measured, recipe.best, recipe.best_by)
    best: dict[str, float] = {}
    frozen: set[str] = set()
    last = 0
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
    for number, line in enumerate(whole, start=1):
        if recipe.best_by not in line and number < len(whole):
            continue
        row = _row(line, log, number)
        last = int(row["step"])
        if recipe.best_by in row:
            try:
                improved = selection.update(last, row)
            except KeyError as missing:
                raise UserError(
                    f"{log}, row {number}, lacks {missing}, which the recipe selects by"
                ) from None
            if recipe.best in improved:
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


def _place(run: Run) -> tuple[int, float, str]:
    metric = run.recipe.best_by
    score = run.scores.get(metric, math.nan)
    badness = score if is_lower_better(metric) else -score
    return list(SCORES).index(type(run.recipe)), math.inf if math.isnan(score) else badness, run.name


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _said(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value

"""Which checkpoint is the best, by which score, and when a task has had its chances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from schemas.errors import UserError
from training.recipe import AnyTask

COMBINED = "val/combined"
SCORES = (
    "val/speaking_f1",
    "val/dst_update_f1",
    "val/dst_state_macro_f1",
    "val/dst_state_joint",
    "val/dst_state_joint_near_transition",
    "val/loss_response",
    COMBINED,
)
"""What a validation measures, and a task may be selected by."""
INLINE_SCORES = (*SCORES, "val/matched_f1")
"""The same with inline speech, where the model runs free."""


def is_lower_better(metric: str) -> bool:
    """Of losses and errors, the lowest is the best."""
    return metric.startswith("val/loss_") or metric.endswith(("_error", "_mae"))


@dataclass
class Best:
    """The best score so far, the step it was reached at, and the validations since then."""

    value: float = -math.inf
    step: int = 0
    waited: int = 0


@dataclass
class Selection:
    """The best of the whole model by one metric, and of each task by its own.

    Attributes:
        tasks: their settings; their best is kept under ``best_TASK``.
        scores: what a validation measures.
        best, metric: what the whole model's best is kept under, and by which of the scores it is chosen.

    Raises:
        UserError: a task's metric is not measured.
    """

    tasks: Mapping[str, AnyTask]
    scores: tuple[str, ...] = SCORES
    best: str = "best"
    metric: str = COMBINED
    bests: dict[str, Best] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            if task.metric not in self.scores:
                raise UserError(
                    f"tasks.{name}.metric={task.metric!r} is not measured; take one of {', '.join(self.scores)}"
                )

    def update(self, step: int, row: Mapping[str, float]) -> list[str]:
        """Take a validation's scores in; the names of the checkpoints that are better than any before."""
        metrics = {self.best: self.metric}
        metrics |= {f"best_{name}": task.metric for name, task in self.tasks.items()}
        improved = []
        for name, metric in metrics.items():
            value = -row[metric] if is_lower_better(metric) else row[metric]
            value = -math.inf if math.isnan(value) else value
            best = self.bests.get(name)
            if best is None or value > best.value:  # the first is the best, whatever it is
                self.bests[name] = Best(value, step)
                improved.append(name)
            else:
                best.waited += 1
        return improved

    def waited(self) -> dict[str, float]:
        """Validations since each task's best, as ``waited/TASK``."""
        return {f"waited/{name}": float(self.bests[f"best_{name}"].waited) for name in self.tasks}

    def out_of_patience(self) -> set[str]:
        """The tasks that have not become better for as many validations as they may."""
        return {
            name
            for name, task in self.tasks.items()
            if task.patience is not None and self.bests.get(f"best_{name}", Best()).waited >= task.patience
        }

    def is_over(self, frozen: Set[str] = frozenset()) -> bool:
        """Whether every task has run out of patience, those that are ``frozen`` long ago."""
        return self.out_of_patience() | frozen == self.tasks.keys()

    def state(self) -> dict[str, list[float]]:
        return {name: [best.value, best.step, best.waited] for name, best in self.bests.items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        self.bests = {
            name: Best(value, int(step), int(waited)) for name, (value, step, waited) in state.items()
        }

"""How the tasks' losses become steps of an optimizer: one for all, one a task, or gradients that are made to agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.family import AnyBatch, Counts
from training.gradients import cosines, dot_products, mixed, surgery
from training.objective import Objective
from training.optim import set_learning_rate
from training.recipe import OptimizerSettings
from training.runlog import Row


class Joint(Objective):
    """One optimizer, the weighted sum of the losses."""

    def step(self, passes: Sequence[AnyBatch], totals: Counts, number: int) -> Row:
        losses = self._backward(passes, totals, self.going, self._weights())
        norm, clipped = self._update("all", number)
        return self._row(losses) | {"train/grad_norm": norm, "train/clipped": float(clipped)}


class Uncertainty(Objective):
    """One optimizer; each loss is weighted by ``exp(-s)`` with a learned ``s``, at the price of ``s / 2``.

    Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", 2018. ``s`` begins at minus the
    logarithm of the task's weight.
    """

    def _make_optimizers(self) -> None:
        start = [-float(np.log(task.weight)) for task in self.tasks.values()]
        device = next(self.model.parameters()).device
        self.log_variance = torch.nn.Parameter(torch.tensor(start, device=device))
        super()._make_optimizers()
        common = {name: getattr(self.recipe.train, name) for name in OptimizerSettings.model_fields}
        settings = OptimizerSettings(**common | {"weight_decay": 0.0, "lr": self.recipe.train.head_lr})
        self._add_optimizer("log_variance", {"log_variance": self.log_variance}, settings)

    def step(self, passes: Sequence[AnyBatch], totals: Counts, number: int) -> Row:
        precision = dict(zip(self.tasks, torch.exp(-self.log_variance).detach(), strict=True))
        losses = self._backward(passes, totals, self.going, precision)
        # d/ds of exp(-s) L + s / 2, which needs no pass through the model
        gone = torch.tensor([name in self.frozen for name in self.tasks], device=self.log_variance.device)
        each = torch.stack([losses.get(name, self.log_variance.new_zeros(())) for name in self.tasks])
        slope = 0.5 - torch.exp(-self.log_variance.detach()) * each
        norm, clipped = self._update("all", number)
        self.log_variance.grad = slope.masked_fill(gone, 0)
        set_learning_rate(
            self.optimizers["log_variance"], number, self.recipe.train.steps, self.settings["log_variance"]
        )
        self.optimizers["log_variance"].optimizer.step()
        self.log_variance.grad = None
        told = {f"train/weight_{name}": float(weight) for name, weight in precision.items()}
        return self._row(losses) | told | {"train/grad_norm": norm, "train/clipped": float(clipped)}

    def state(self) -> dict[str, Any]:
        return super().state() | {"log_variance": self.log_variance.detach().cpu()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])


class PCGrad(Objective):
    """One optimizer; where two tasks' gradients point against each other, each loses what it has along the other.

    Yu et al., "Gradient surgery for multi-task learning", 2020; on the parameters that the tasks share.
    """

    def step(self, passes: Sequence[AnyBatch], totals: Counts, number: int) -> Row:
        gradients, losses = self._task_gradients(passes, totals, self.going)
        rng = np.random.default_rng([self.recipe.train.seed, number])
        dots = dot_products(gradients, self.shared)
        told = cosines(gradients, dots)
        self._put(mixed(gradients, surgery(dots, rng), self.shared), self._scale)
        norm, clipped = self._update("all", number)
        return self._row(losses) | told | {"train/grad_norm": norm, "train/clipped": float(clipped)}


class Independent(Objective):
    """An optimizer a task, each with its own backward pass, clipping and schedule, over what its head can reach.

    ``alternating`` gives each task a forward pass of its own, after the step of the task before it;
    ``shared_forward`` takes all gradients from one.
    """

    def _make_optimizers(self) -> None:
        for task in self.tasks:
            others = tuple(part for name, part in self.model.own_parts.items() if name != task)
            reached = {n: p for n, p in self.parameters.items() if not n.startswith(others)}
            self._add_optimizer(task, reached, self.recipe.optimizer_of(task))

    def step(self, passes: Sequence[AnyBatch], totals: Counts, number: int) -> Row:
        losses: dict[str, torch.Tensor] = {}
        told: Row = {}
        scale = self._scale
        if self.recipe.train.strategy == "shared_forward":
            gradients, losses = self._task_gradients(passes, totals, self.going)
            told |= cosines(gradients, dot_products(gradients, self.shared))
        for task in self.going:
            if self.recipe.train.strategy == "shared_forward":
                self._put(gradients.pop(task), scale)
            else:
                losses |= self._backward(passes, totals, [task], self._weights())
            norm, clipped = self._update(task, number)
            told |= {f"train/grad_norm_{task}": norm, f"train/clipped_{task}": float(clipped)}
        return self._row(losses) | told


OBJECTIVES: dict[str, type[Objective]] = {
    "joint": Joint,
    "independent": Independent,
    "uncertainty": Uncertainty,
    "pcgrad": PCGrad,
}

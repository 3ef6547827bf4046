"""How the tasks' losses become steps of an optimizer: one for all, one a task, or gradients that are made to agree.

Each objective takes the passes of one step (batches) and the labels of the whole step, and leaves the parameters moved.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from schemas.errors import UserError
from training.batch import Batch
from training.model import OWN_PARTS, DSTSmolVLM
from training.optim import make_optimizer, set_learning_rate
from training.recipe import OptimizerSettings, Recipe
from training.sharding import gathered, shard, spread_as
from training.tasks import Counts, task_losses

Row = dict[str, float]
Gradients = dict[str, torch.Tensor]

_NOT_A_NUMBER = (
    "checkpoints/latest is from before: lower train.lr, or look at these features with 'dst verify'"
)


class Objective(ABC):
    """What all objectives share: passes, gradients of one task, checks, an optimizer's step.

    Args:
        model: trainable parameters are those that require a gradient.

    Attributes:
        optimizers: by name, to be saved and loaded.
        frozen: tasks that are no longer trained.
        spare: another model to put the parts of a sharded one together in.
    """

    def __init__(self, accelerator: Accelerator, model: DSTSmolVLM, recipe: Recipe) -> None:
        self.accelerator, self.recipe = accelerator, recipe
        self.tasks = recipe.tasks.active
        self.frozen: set[str] = set()
        self.wrapped: Any
        self.spare: DSTSmolVLM | None = None
        if recipe.train.shard:
            settings = (
                model.config,
                model.config.text_config,
            )  # thresholds, and which attention: shared by both
            self.spare = copy.deepcopy(model, {id(each): each for each in settings})
            self.wrapped = self.model = model.to(accelerator.device)
            shard(model, accelerator.device, accelerator.num_processes)
        else:
            self.wrapped = accelerator.prepare(model)
            self.model = accelerator.unwrap_model(self.wrapped)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.settings: dict[str, OptimizerSettings] = {}
        self.optimizers: dict[str, Any] = {}
        self._make_optimizers()

    @abstractmethod
    def step(self, passes: Sequence[Batch], totals: Counts, number: int) -> Row:
        """Move the parameters once, or once for each task.

        Args:
            passes: this rank's batches.
            totals: labels of all batches of all ranks.
            number: of the step, counted from 0.

        Returns:
            What the log says: ``train/loss_TASK``, ``train/loss``, ``train/grad_norm``, ``train/clipped``.

        Raises:
            UserError: a loss or a gradient is not a number; it has moved nothing.
        """

    @property
    def going(self) -> list[str]:
        """The tasks that are trained."""
        return [name for name in self.tasks if name not in self.frozen]

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on, beside the model's parameters."""
        return {
            "optimizers": {
                name: gathered(optimizer.state_dict()) for name, optimizer in self.optimizers.items()
            },
            "frozen": sorted(self.frozen),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            saved = state["optimizers"][name]
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            for number, moments in saved["state"].items():
                for key, value in moments.items():
                    if value.ndim:
                        moments[key] = spread_as(value, owned[number])
            optimizer.load_state_dict(saved)
        self.frozen = set(state["frozen"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def probe(self, batch: Batch, totals: Counts) -> Row:
        """Norm of each task's gradient on one batch, and the cosine between each two, on what they share."""
        gradients = self._task_gradients([batch], totals, self.going)[0]
        return {f"grad/norm_{n}": _norm(g.values()) for n, g in gradients.items()} | self._cosines(gradients)

    def _make_optimizers(self) -> None:
        self._add_optimizer("all", self.parameters, self.recipe.train)

    def _add_optimizer(
        self, name: str, parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings
    ) -> None:
        self.settings[name] = settings
        optimizer = make_optimizer(parameters, settings)
        # what accelerate knows of an optimizer is how to scale for fp16, which parts are not trained in
        self.optimizers[name] = optimizer if self.recipe.train.shard else self.accelerator.prepare(optimizer)

    def _losses(
        self, model: Any, batch: Batch, totals: Counts, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        logits = model(batch, heads=tuple(names))
        return task_losses(logits, batch, self.tasks, totals)

    def _backward(
        self, passes: Sequence[Batch], totals: Counts, names: Sequence[str], weights: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Gradients of the weighted sum into the parameters; the tasks' losses over all passes and ranks.

        Where several processes train, their gradients are averaged, so each one's losses count so many times.
        """
        sums: dict[str, torch.Tensor] = {}
        for number, batch in enumerate(passes):
            last = number + 1 == len(passes)
            with self._gradients_stay(not last):
                with self.accelerator.autocast():
                    losses = self._losses(self.wrapped, batch, totals, names)
                total = torch.stack([weights[name] * losses[name] for name in names]).sum()
                self.accelerator.backward(total * self.accelerator.num_processes)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        return self._checked(sums, passes)

    def _task_gradients(
        self, passes: Sequence[Batch], totals: Counts, names: Sequence[str]
    ) -> tuple[dict[str, Gradients], dict[str, torch.Tensor]]:
        """Each task's gradient of its weighted loss, by parameter, from one forward pass a batch; and the losses."""
        gradients: dict[str, Gradients] = {name: {} for name in names}
        sums: dict[str, torch.Tensor] = {}
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        for batch in passes:
            losses = self._losses(self.model, batch, totals, names)
            for at, name in enumerate(names):
                found = torch.autograd.grad(
                    losses[name] * self.tasks[name].weight * scale,
                    list(self.parameters.values()),
                    retain_graph=at + 1 < len(names),
                    allow_unused=True,
                )
                for key, gradient in zip(self.parameters, found, strict=True):
                    if gradient is not None:
                        mine, gradient = gradients[name], gradient / scale
                        mine[key] = mine[key] + gradient if key in mine else gradient
                sums[name] = sums.get(name, 0) + losses[name].detach()
        if self.accelerator.num_processes > 1:
            for each in gradients.values():
                for key in each:
                    each[key] = self.accelerator.reduce(each[key], "sum")
        return gradients, self._checked(sums, passes)

    def _checked(self, sums: dict[str, torch.Tensor], passes: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """The losses over all ranks, if they are numbers."""
        stacked = torch.stack(list(sums.values()))
        all_ranks = self.accelerator.reduce(stacked, "sum")
        if not torch.isfinite(all_ranks).all():
            wrong = [name for name, loss in zip(sums, all_ranks, strict=True) if not torch.isfinite(loss)]
            here = not bool(torch.isfinite(stacked).all())
            windows = [name for batch in passes for name in batch.names]
            place = f"in the windows {_few(windows)}" if here else "on another rank, which names the windows"
            raise UserError(f"the loss of {', '.join(wrong)} is not a number {place}; {_NOT_A_NUMBER}")
        return dict(zip(sums, all_ranks, strict=True))

    @contextmanager
    def _gradients_stay(self, stay: bool) -> Iterator[None]:
        """Gradients are not summed over ranks yet."""
        if self.recipe.train.shard:
            self.wrapped.set_requires_gradient_sync(not stay)
            yield
        else:
            with self.accelerator.no_sync(self.wrapped) if stay else nullcontext():
                yield

    def _update(self, name: str, number: int) -> tuple[float, bool]:
        """Clip the gradients that lie in the parameters, and step; their norm, and whether they were clipped."""
        optimizer, settings = self.optimizers[name], self.settings[name]
        set_learning_rate(optimizer, number, self.recipe.train.steps, settings)
        self.accelerator.unscale_gradients(optimizer)
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(owned, settings.clip_norm)))
        if not self.accelerator.scaler and not math.isfinite(
            norm
        ):  # with fp16 the scaler leaves the step out
            raise UserError(f"the gradient at step {number + 1} is not a number; {_NOT_A_NUMBER}")
        optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, norm > settings.clip_norm

    def _put(self, gradients: Gradients) -> None:
        """Gradients into the parameters, as `_update` takes them: with fp16 times what the scaler has now."""
        scaler = self.accelerator.scaler
        for key, parameter in self.parameters.items():
            gradient = gradients.get(key)
            parameter.grad = scaler.scale(gradient) if scaler and gradient is not None else gradient

    def _weights(self) -> dict[str, float]:
        return {name: task.weight for name, task in self.tasks.items()}

    def _row(self, losses: Mapping[str, torch.Tensor]) -> Row:
        row = {f"train/loss_{name}": loss.item() for name, loss in losses.items()}
        return row | {"train/loss": sum(self.tasks[n].weight * loss.item() for n, loss in losses.items())}

    def _shared(self, key: str) -> bool:
        return not key.startswith(tuple(OWN_PARTS.values()))

    def _cosines(self, gradients: Mapping[str, Gradients]) -> Row:
        flat = {
            name: torch.cat(
                [g[key].flatten() for key in sorted(self.parameters) if self._shared(key) and key in g]
            )
            for name, g in self._filled(gradients).items()
        }
        names = list(flat)
        return {
            f"grad/cos_{a}_{b}": float(torch.nn.functional.cosine_similarity(flat[a], flat[b], dim=0))
            for at, a in enumerate(names)
            for b in names[at + 1 :]
        }

    def _filled(self, gradients: Mapping[str, Gradients]) -> dict[str, Gradients]:
        """Shared parameters that a task does not reach have the gradient 0."""
        return {
            name: {
                k: g[k] if k in g else torch.zeros_like(p)
                for k, p in self.parameters.items()
                if self._shared(k)
            }
            for name, g in gradients.items()
        }


class Joint(Objective):
    """One optimizer, the weighted sum of the losses."""

    def step(self, passes: Sequence[Batch], totals: Counts, number: int) -> Row:
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
        settings = OptimizerSettings(
            **_common(self.recipe) | {"weight_decay": 0.0, "lr": self.recipe.train.head_lr}
        )
        self._add_optimizer("log_variance", {"log_variance": self.log_variance}, settings)

    def step(self, passes: Sequence[Batch], totals: Counts, number: int) -> Row:
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

    def step(self, passes: Sequence[Batch], totals: Counts, number: int) -> Row:
        gradients, losses = self._task_gradients(passes, totals, self.going)
        rng = np.random.default_rng([self.recipe.train.seed, number])
        told = self._cosines(gradients)
        self._put(_combined(gradients, self._filled(gradients), rng))
        norm, clipped = self._update("all", number)
        return self._row(losses) | told | {"train/grad_norm": norm, "train/clipped": float(clipped)}


class Independent(Objective):
    """An optimizer a task, each with its own backward pass, clipping and schedule, over what its head can reach.

    ``alternating`` gives each task a forward pass of its own, after the step of the task before it;
    ``shared_forward`` takes all gradients from one.
    """

    def _make_optimizers(self) -> None:
        for task in self.tasks:
            others = tuple(part for name, part in OWN_PARTS.items() if name != task)
            reached = {n: p for n, p in self.parameters.items() if not n.startswith(others)}
            self._add_optimizer(task, reached, self.recipe.optimizer_of(task))

    def step(self, passes: Sequence[Batch], totals: Counts, number: int) -> Row:
        losses: dict[str, torch.Tensor] = {}
        told: Row = {}
        if self.recipe.train.strategy == "shared_forward":
            gradients, losses = self._task_gradients(passes, totals, self.going)
            told |= self._cosines(gradients)
        for task in self.going:
            if self.recipe.train.strategy == "shared_forward":
                self._put(gradients[task])
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


def _combined(
    gradients: Mapping[str, Gradients], shared: Mapping[str, Gradients], rng: np.random.Generator
) -> Gradients:
    """The sum of all tasks' gradients, after each has been projected off those it disagrees with, in random order."""
    names = list(gradients)
    keys = list(next(iter(shared.values())))
    flat = {name: torch.cat([shared[name][key].flatten() for key in keys]) for name in names}
    total = torch.zeros_like(flat[names[0]])
    for name in names:
        own = flat[name].clone()
        for other in rng.permutation([n for n in names if n != name]):
            dot = own @ flat[other]
            if dot < 0:
                own -= dot / (flat[other] @ flat[other]) * flat[other]
        total += own
    combined = {key: g for each in gradients.values() for key, g in each.items() if key not in keys}
    parts = total.split([shared[names[0]][key].numel() for key in keys])
    return combined | {
        key: part.view_as(shared[names[0]][key]) for key, part in zip(keys, parts, strict=True)
    }


def _common(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe.train, name) for name in OptimizerSettings.model_fields}


def _norm(gradients: Any) -> float:
    return float(torch.stack([g.float().norm() for g in gradients]).norm())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

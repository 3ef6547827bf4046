"""What all objectives share: passes and labels of a step go in, and the parameters are moved."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from schemas.errors import UserError
from training.family import AnyBatch, Counts
from training.gradients import Gradients, cosines, dot_products, length
from training.optim import make_optimizer, set_learning_rate
from training.recipe import AnyRecipe, OptimizerSettings
from training.runlog import Row
from training.sharding import gathered, shard, spread_as

OVERFLOWS = 50
"""Steps in a row whose fp16 gradients are no numbers, after which more of them are no use: each halves the factor that
losses are multiplied with, which begins at 2^16 and by then is below 2^-33."""

_NOT_A_NUMBER = "this step is not saved: lower train.lr, or look at these features with 'dst verify'"


class Objective(ABC):
    """What all objectives share: passes, gradients of one task, checks, an optimizer's step.

    Args:
        model: as `training.family.AnyModel`; trainable parameters are those that require a gradient.

    Attributes:
        optimizers: by name, to be saved and loaded.
        frozen: tasks that are no longer trained.
        spare: another model to put the parts of a sharded one together in.
    """

    def __init__(self, accelerator: Accelerator, model: Any, recipe: AnyRecipe) -> None:
        self.accelerator, self.recipe = accelerator, recipe
        self.tasks = recipe.tasks.active
        self.frozen: set[str] = set()
        self.wrapped: Any
        self.spare: Any = None
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
        self._overflows: dict[str, int] = {}
        self._make_optimizers()

    @abstractmethod
    def step(self, passes: Sequence[AnyBatch], totals: Counts, number: int) -> Row:
        """Move the parameters once, or once for each task.

        Args:
            passes: this rank's batches.
            totals: labels of all batches of all ranks.
            number: of the step, counted from 0.

        Returns:
            What the log says: ``train/loss_TASK``, ``train/loss``, ``train/grad_norm``, ``train/clipped``.

        Raises:
            UserError: a loss or a gradient is not a number. It has moved nothing, but where each task has an optimizer,
                the tasks before this one have taken their steps.
        """

    @property
    def shared(self) -> list[str]:
        """The parameters that no head has alone."""
        return [key for key in self.parameters if not key.startswith(tuple(self.model.own_parts.values()))]

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

    def probe(self, batch: AnyBatch, totals: Counts) -> Row:
        """Norm of each task's gradient on one batch, and the cosine between each two, on what they share."""
        gradients = self._task_gradients([batch], totals, self.going)[0]
        norms = {f"grad/norm_{name}": length(each) / self._scale for name, each in gradients.items()}
        return norms | cosines(gradients, dot_products(gradients, self.shared))

    def _make_optimizers(self) -> None:
        self._add_optimizer("all", self.parameters, self.recipe.train)

    def _add_optimizer(
        self, name: str, parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings
    ) -> None:
        self.settings[name] = settings
        optimizer = make_optimizer(parameters, settings, self.model.new_parts)
        # what accelerate knows of an optimizer is how to scale for fp16, which parts are not trained in
        self.optimizers[name] = optimizer if self.recipe.train.shard else self.accelerator.prepare(optimizer)

    def _losses(
        self, model: Any, batch: AnyBatch, totals: Counts, names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        outputs = model(batch, heads=tuple(names))
        return self.model.task_losses(outputs, batch, self.tasks, totals)

    def _backward(
        self, passes: Sequence[AnyBatch], totals: Counts, names: Sequence[str], weights: Mapping[str, Any]
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
        self, passes: Sequence[AnyBatch], totals: Counts, names: Sequence[str]
    ) -> tuple[dict[str, Gradients], dict[str, torch.Tensor]]:
        """Each task's gradient of its weighted loss, by parameter, from one forward pass a batch; and the losses.

        With fp16 they are multiplied by the scaler's factor, as `_update` takes them.
        """
        gradients: dict[str, Gradients] = {name: {} for name in names}
        sums: dict[str, torch.Tensor] = {}
        for batch in passes:
            losses = self._losses(self.model, batch, totals, names)
            for at, name in enumerate(names):
                weighted, scaler = losses[name] * self.tasks[name].weight, self.accelerator.scaler
                found = torch.autograd.grad(
                    scaler.scale(weighted) if scaler else weighted,
                    list(self.parameters.values()),
                    retain_graph=at + 1 < len(names),
                    allow_unused=True,
                )
                mine = gradients[name]
                for key, gradient in zip(self.parameters, found, strict=True):
                    if gradient is not None:
                        mine[key] = mine[key] + gradient if key in mine else gradient
                del found, gradient  # else they stay while the next task's are computed
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        if self.accelerator.num_processes > 1:
            for each in gradients.values():
                for key in each:
                    each[key] = self.accelerator.reduce(each[key], "sum")
        return gradients, self._checked(sums, passes)

    def _checked(self, sums: dict[str, torch.Tensor], passes: Sequence[AnyBatch]) -> dict[str, torch.Tensor]:
        """The losses over all ranks, if they are numbers."""
        stacked = torch.stack(list(sums.values()))
        all_ranks = self.accelerator.reduce(stacked, "sum")
        if not torch.isfinite(all_ranks).all():
            wrong = [
                n
                for n, loss in zip(sums, all_ranks, strict=True)
                if n in self.tasks and not torch.isfinite(loss)
            ]
            here = not bool(torch.isfinite(stacked).all())
            names = [name for batch in passes for name in batch.names]
            place = f"in {_few(names)}" if here else "on another rank, which says where"
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
        self._overflows[name] = 0 if math.isfinite(norm) else self._overflows.get(name, 0) + 1
        if self._overflows[name] and not self.accelerator.scaler:  # which leaves such a step out
            raise UserError(f"the gradient at step {number + 1} is not a number; {_NOT_A_NUMBER}")
        if self._overflows[name] == OVERFLOWS:
            raise UserError(
                f"the fp16 gradients of the last {OVERFLOWS} steps up to step {number + 1} are not numbers, so nothing "
                "is learned; start again with train.precision=float32 (or bf16, if the GPU has it), or a lower train.lr"
            )
        optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, norm > settings.clip_norm

    def _put(self, gradients: Gradients, scale: float) -> None:
        """Gradients into the parameters, of which `_update` takes them. It uses them up.

        Args:
            scale: what `_scale` was when they were computed; since then, another optimizer's step may have changed it.
        """
        change = self._scale / scale
        for key, parameter in self.parameters.items():
            gradient = gradients.pop(key, None)
            parameter.grad = gradient if gradient is None or change == 1 else gradient * change

    @property
    def _scale(self) -> float:
        """What fp16 multiplies losses with, so that small gradients stay numbers; else 1."""
        return float(self.accelerator.scaler.get_scale()) if self.accelerator.scaler else 1.0

    def _weights(self) -> dict[str, float]:
        return {name: task.weight for name, task in self.tasks.items()}

    def _row(self, losses: Mapping[str, torch.Tensor]) -> Row:
        row = {f"train/loss_{name}": loss.item() for name, loss in losses.items()}
        total = sum(self.tasks[name].weight * losses[name].item() for name in self.tasks if name in losses)
        return row | {"train/loss": total}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

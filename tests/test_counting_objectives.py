"""Two optimizers for two tasks: the engine against the plain loop with both, and what the scale of a loss changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_count import (
    ENCODINGS,
    counter_of,
    images_of,
    little,
    objective_of,
    some_passes,
    weights_of,
)

from training.counting.batch import CountingBatch
from training.counting.data import ImageData
from training.counting.model import CountingSmolVLM
from training.counting.recipe import CountingRecipe
from training.family import summed
from training.objectives import Objective

STEPS = 4
EPS = 1e-4
"""Of AdamW, where two loops are compared: with the usual 1e-8, the last bit of a gradient next to nothing shows."""
NEW = ("visual_adapter.", "place.", "mark.", "sub_cell.", "coord_head.", "done_head.")
"""What has no weights in the checkpoint: it has a learning rate of its own."""


def shards_of(marks: str, counting_shards: Path, drawn_shards: Path) -> Path:
    return drawn_shards if marks == "drawn" else counting_shards


def coord_by_hand(distance: torch.Tensor) -> torch.Tensor:
    return 10 * distance**2 if float(distance.detach()) < 0.05 else distance - 0.025


def loss_by_hand(
    task: str,
    outputs: dict[str, torch.Tensor],
    batch: CountingBatch,
    images: dict[str, ImageData],
    marks: str,
) -> torch.Tensor:
    """The mean over images of the mean over their numbers of marks, by the shares of the documentation."""
    losses = []
    images_with_labels = set()
    for read, (row, marked) in enumerate(zip(batch.row_of_read.tolist(), batch.marked.tolist(), strict=True)):
        image = images[batch.names[row]]
        count = len(image.points)
        if marks == "mark_tokens":  # each number of marks has its share
            share = 1 / max(1, count) if marked < count else 0.0
            if task == "done":
                share = 0.25 / (count + 1) + 0.5 * (marked == count) + 0.25 * (marked == max(0, count - 1))
        else:  # each row is one draw, for one of the tasks
            share = float(getattr(batch, f"{task}_weight")[read])
        if not share:
            continue
        images_with_labels.add(row)
        if task == "coord":
            likelihood = torch.zeros(())
            for at, place in zip(outputs["at"][read], outputs["places"][read], strict=True):
                away = (place - torch.from_numpy(image.points[marked])).abs().sum()
                likelihood = likelihood + at.exp() * torch.exp(-coord_by_hand(away) / 0.1)
            losses.append(share * -0.1 * likelihood.log())
        else:
            sigmoid = torch.sigmoid(outputs["done"][read])
            losses.append(-share * torch.log(sigmoid if marked == count else 1 - sigmoid))
    return torch.stack(losses).sum() / len(images_with_labels)


class ByHand:
    """The plain loop: two AdamW over all that their task's head is computed from, each clipped by itself."""

    def __init__(self, model: CountingSmolVLM, recipe: CountingRecipe) -> None:
        self.model, self.train = model, recipe.train
        self.parameters: dict[str, list[torch.nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        for task, other in (("coord", "done_head."), ("done", "coord_head.")):
            named = {n: p for n, p in model.named_parameters() if not n.startswith(other)}
            groups = [
                {
                    "params": [p],
                    "lr": self.train.head_lr if name.startswith(NEW) else self.train.lr,
                    "weight_decay": self.train.weight_decay if p.ndim > 1 else 0.0,
                }
                for name, p in named.items()
            ]
            self.parameters[task] = list(named.values())
            self.optimizers[task] = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
        self.rates = {
            task: [group["lr"] for group in optimizer.param_groups]
            for task, optimizer in self.optimizers.items()
        }

    def step(self, number: int, losses: Any, clear: bool = True) -> None:
        """A step of each optimizer; ``losses`` gives the loss of a task, by a forward pass of its own."""
        warm = self.train.warmup_steps
        done = (number - warm) / (self.train.steps - warm)
        rate = (number + 1) / warm if number < warm else 0.01 + 0.495 * (1 + math.cos(math.pi * done))
        for task, optimizer in self.optimizers.items():
            if clear:
                for parameter in self.model.parameters():
                    parameter.grad = None
            for group, base in zip(optimizer.param_groups, self.rates[task], strict=True):
                group["lr"] = base * rate
            losses(task).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters[task], 1.0)
            optimizer.step()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((values - other[name]).abs().max()) for name, values in one.items())


def totals_of(objective: Objective, passes: list[CountingBatch]) -> Any:
    return summed([objective.model.count_labels(batch, objective.tasks) for batch in passes])


@pytest.mark.parametrize("marks", ENCODINGS)
def test_alternating_is_the_plain_loop_with_two_optimizers_step_for_step(
    counting_shards: Path, drawn_shards: Path, marks: str
) -> None:
    shards = shards_of(marks, counting_shards, drawn_shards)
    recipe = little(f"model.marks={marks}", f"train.steps={STEPS}", "train.weight_decay=0.05")
    assert (recipe.train.objective, recipe.train.strategy) == ("independent", "alternating")
    images = {image.session_id: image for image in images_of(shards, recipe)}
    objective = objective_of(shards, recipe)
    objective.model.train()
    for optimizer in objective.optimizers.values():
        for group in optimizer.param_groups:
            assert group["eps"] == 1e-8
            group["eps"] = EPS
    plain, leaky = (ByHand(counter_of(shards, recipe)[0].train(), recipe) for _ in range(2))
    assert apart(weights_of(plain.model), weights_of(objective.model)) == 0
    clipped = 0.0
    for number, [batch] in enumerate(some_passes(shards, recipe, STEPS)):
        wanted: dict[str, float] = {}
        for loop in (leaky, plain):

            def loss(task: str, loop: ByHand = loop, batch: CountingBatch = batch) -> torch.Tensor:
                value = loss_by_hand(task, loop.model(batch), batch, images, marks)
                wanted[f"train/loss_{task}"] = value.item()  # noqa: B023 (used before the next step)
                return value

            loop.step(number, loss, clear=loop is plain)
        row = objective.step([batch], totals_of(objective, [batch]), number)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        clipped += row["train/clipped_coord"] + row["train/clipped_done"]
        assert apart(weights_of(plain.model), weights_of(objective.model)) < 1e-6, number
        assert all(parameter.grad is None for parameter in objective.parameters.values())
    assert clipped > 0
    assert apart(weights_of(leaky.model), weights_of(objective.model)) > 1e-3  # what stale gradients would do


def test_the_trunk_takes_two_steps_and_each_head_one(counting_shards: Path) -> None:
    objective = objective_of(counting_shards, little())
    for number, passes in enumerate(some_passes(counting_shards, little(), 3)):
        objective.step(passes, totals_of(objective, passes), number)
    names = {id(p): n for n, p in objective.model.named_parameters()}
    steps: dict[str, int] = dict.fromkeys(names.values(), 0)
    for optimizer in objective.optimizers.values():
        for parameter, state in optimizer.state.items():
            steps[names[id(parameter)]] += int(state["step"])
    heads = {name: number for name, number in steps.items() if "_head." in name}
    assert set(heads.values()) == {3}
    assert {number for name, number in steps.items() if name not in heads} == {6}


def moves(
    shards: Path, recipe: CountingRecipe, eps: float | None
) -> tuple[list[dict[str, torch.Tensor]], float]:
    """What coord's optimizer (with joint: the only one) moves in each step, and the share of its steps that clip."""
    objective = objective_of(shards, recipe)
    found: list[dict[str, torch.Tensor]] = []
    name = "coord" if recipe.train.objective == "independent" else "all"
    optimizer = objective.optimizers[name].optimizer
    named = dict(objective.model.named_parameters())
    before: dict[str, torch.Tensor] = {}
    if eps is not None:
        for each in objective.optimizers.values():
            for group in each.param_groups:
                group["eps"] = eps
    optimizer.register_step_pre_hook(
        lambda *_: before.update({n: p.detach().clone() for n, p in named.items()})
    )
    optimizer.register_step_post_hook(
        lambda *_: found.append({n: p.detach() - before[n] for n, p in named.items()})
    )
    clipped = 0.0
    for number, passes in enumerate(some_passes(shards, recipe, STEPS)):
        row = objective.step(passes, totals_of(objective, passes), number)
        clipped += sum(value for key, value in row.items() if key.startswith("train/clipped"))
    return found, clipped


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two steps, as a share of the first one's length."""
    both = [(values, other[name]) for name, values in one.items()]
    apart = sum(float(((a - b) ** 2).sum()) for a, b in both)
    return math.sqrt(apart / sum(float((a**2).sum()) for a, _ in both))


FREE = ("train.clip_norm=1e9",)
"""Clipping, which acts on a long gradient and not on a short one, is what knows of a loss's scale."""


def test_with_two_optimizers_the_scale_of_one_loss_does_not_move_the_other_task(
    counting_shards: Path,
) -> None:
    """To the bit, where the scale is a power of two (which rounds nothing) and AdamW's eps is next to nothing; with
    100 and the usual eps nearly so, and with one optimizer not at all."""
    plain, clipped = moves(counting_shards, little(*FREE), 1e-30)
    scaled, _ = moves(counting_shards, little(*FREE, "tasks.done.weight=128"), 1e-30)
    assert clipped == 0
    assert len(plain) == len(scaled) == STEPS
    assert all(
        torch.equal(one[name], other[name]) for one, other in zip(plain, scaled, strict=True) for name in one
    )
    usual, _ = moves(counting_shards, little(*FREE), None)
    hundred, _ = moves(counting_shards, little(*FREE, "tasks.done.weight=100"), None)
    assert difference(usual[0], hundred[0]) == 0  # it comes before done's first step
    apart = [difference(one, other) for one, other in zip(usual, hundred, strict=True)]
    assert max(apart) < 0.02, apart
    joint, _ = moves(counting_shards, little(*FREE, "train.objective=joint"), None)
    pulled, _ = moves(counting_shards, little(*FREE, "train.objective=joint", "tasks.done.weight=100"), None)
    assert min(difference(one, other) for one, other in zip(joint, pulled, strict=True)) > 0.3


def test_clipping_keeps_the_scale_out_only_where_it_always_acts(counting_shards: Path) -> None:
    """A gradient that is cut to the same length in both runs is the same; one that is cut in one run alone is not."""
    always = ("train.clip_norm=1e-3",)
    plain, clipped = moves(counting_shards, little(*always), 1e-30)
    scaled, also = moves(counting_shards, little(*always, "tasks.done.weight=128"), 1e-30)
    assert clipped == also == 2 * STEPS
    assert max(difference(one, other) for one, other in zip(plain, scaled, strict=True)) < 0.05


def test_shared_forward_takes_both_gradients_at_the_same_weights(counting_shards: Path) -> None:
    """Coord's first step is alternating's; done's is not, which there comes after coord's."""
    recipes = [little(*FREE), little(*FREE, "train.strategy=shared_forward")]
    first: list[dict[str, dict[str, torch.Tensor]]] = []
    for recipe in recipes:
        objective = objective_of(counting_shards, recipe)
        named = dict(objective.model.named_parameters())
        found: dict[str, dict[str, torch.Tensor]] = {}
        for task, optimizer in objective.optimizers.items():

            def look(*_: Any, task: str = task, found: Any = found, named: Any = named) -> None:
                found[task] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}

            optimizer.optimizer.register_step_pre_hook(look)
        [passes] = some_passes(counting_shards, recipe, 1)
        objective.step(passes, totals_of(objective, passes), 0)
        first.append(found)
    alternating, shared = first
    assert difference(alternating["coord"], shared["coord"]) < 1e-5
    assert difference(alternating["done"], shared["done"]) > 1e-3

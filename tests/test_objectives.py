"""How losses become steps: each objective against the same thing written out by hand, autograd, or its paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from tiny_run import small, some_steps, totals_of, trained_by, weights_of
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import training.objective
from schemas.errors import UserError
from training.batch import Batch
from training.gradients import cosines, dot_products, mixed
from training.gradients import surgery as shares_of
from training.model import DSTSmolVLM
from training.objectives import Objective, Uncertainty
from training.recipe import Recipe
from training.tasks import task_losses
from training.trainer import _accelerator

TWO_TASKS = (
    "train.objective=independent",
    "tasks.dst_update.weight=0",
    "tasks.response.weight=0",
    "tasks.speaking.weight=0.5",
    "tasks.speaking.optimizer.lr=1e-3",
    "tasks.speaking.optimizer.schedule=constant",
    "tasks.speaking.optimizer.clip_norm=0.2",
)
ALL = ("joint", "independent", "uncertainty", "pcgrad")
HEAD_OF = {"speaking": "speaking_head.", "dst_state": "dst_state_head."}
NEW = ("visual_adapter.", "speaking_head.", "dst_update_head.", "dst_state_head.")


class ByHand:
    """The optimizer of one task of `TWO_TASKS`, its groups and learning rates written out."""

    def __init__(self, model: DSTSmolVLM, task: str, lr: float, constant: bool, clip: float) -> None:
        other = HEAD_OF["dst_state" if task == "speaking" else "speaking"]
        named = {n: p for n, p in model.named_parameters() if not n.startswith((other, "dst_update_head."))}
        # in the order of our groups: the norm's last bit is that of the order it is added up in
        kinds = list(dict.fromkeys((name.startswith(NEW), p.ndim) for name, p in named.items()))
        named = dict(
            sorted(named.items(), key=lambda item: kinds.index((item[0].startswith(NEW), item[1].ndim)))
        )
        self.parameters, self.clip, self.constant = list(named.values()), clip, constant
        self.rates = [2e-3 if name.startswith(NEW) else lr for name in named]
        groups = [
            {"params": [p], "lr": 0.0, "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in named.values()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, number: int) -> float:
        factor = (0.5, 1.0, 1.0, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 10)))[number]
        factor = 1.0 if self.constant and number > 1 else factor
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        norm = clip_grad_norm_(self.parameters, self.clip).item()
        self.optimizer.step()
        return norm


def loss_of(model: DSTSmolVLM, objective: Objective, passes: list[Batch], task: str) -> torch.Tensor:
    """A task's weighted loss over a whole step, in the graph."""
    totals = totals_of(passes, objective)
    parts = [task_losses(model(b, heads=(task,)), b, objective.tasks, totals)[task] for b in passes]
    return objective.tasks[task].weight * torch.stack(parts).sum()


@pytest.mark.parametrize("strategy", ["alternating", "shared_forward"])
def test_independent_is_the_loop_with_two_optimizers_step_for_step(shards: Path, strategy: str) -> None:
    recipe = small(*TWO_TASKS, f"train.strategy={strategy}", "data.rows_at_once=1")
    ours, theirs = trained_by(shards, recipe), trained_by(shards, recipe)
    model = theirs.model.train()
    ours.model.train()
    by_hand = {
        "speaking": ByHand(model, "speaking", 1e-3, constant=True, clip=0.2),
        "dst_state": ByHand(model, "dst_state", 2e-3, constant=False, clip=1.0),
    }

    def gradients_of(task: str, passes: list[Batch]) -> list[torch.Tensor | None]:
        model.zero_grad()
        totals = totals_of(passes, theirs)
        for batch in passes:
            losses = task_losses(model(batch, heads=(task,)), batch, theirs.tasks, totals)
            (theirs.tasks[task].weight * losses[task]).backward()
        return [parameter.grad for parameter in by_hand[task].parameters]

    for number, passes in enumerate(some_steps(shards, recipe, 4)):
        assert len(passes) == 2
        row = ours.step(passes, totals_of(passes, ours), number)
        before = {task: gradients_of(task, passes) for task in by_hand}  # of shared_forward
        for task, each in by_hand.items():
            gradients = before[task] if strategy == "shared_forward" else gradients_of(task, passes)
            model.zero_grad()
            for parameter, gradient in zip(each.parameters, gradients, strict=True):
                parameter.grad = gradient
            assert row[f"train/grad_norm_{task}"] == pytest.approx(each.step(number), rel=1e-6)
        for (name, a), b in zip(ours.model.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), (number, name, (a - b).abs().max())
    untouched = trained_by(shards, recipe).model.dst_update_head.weight
    assert torch.equal(ours.model.dst_update_head.weight, untouched)


def test_accumulated_passes_give_the_step_of_one_pass(shards: Path) -> None:
    weights = []
    for at_once in ("data.rows_at_once=1", "data.rows_at_once=null"):
        recipe = small(at_once, "train.clip_norm=1e9")
        objective = trained_by(shards, recipe)
        passes = some_steps(shards, recipe, 1)[0]
        seen = gradients_at_step(objective, "all")
        objective.step(passes, totals_of(passes, objective), 0)
        weights.append(seen[0])
    for name, gradient in weights[0].items():
        assert torch.allclose(gradient, weights[1][name], atol=1e-5), name


def gradients_at_step(objective: Objective, optimizer: str) -> list[dict[str, torch.Tensor]]:
    """The gradients by name that an optimizer finds at each of its steps, filled as they come."""
    seen: list[dict[str, torch.Tensor]] = []

    def look(*_: Any) -> None:
        named = objective.model.named_parameters()
        seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    objective.optimizers[optimizer].optimizer.register_step_pre_hook(look)
    return seen


def test_uncertainty_is_what_autograd_makes_of_the_formula(shards: Path) -> None:
    recipe = small("train.objective=uncertainty", "train.clip_norm=1e9")
    ours, theirs = trained_by(shards, recipe), trained_by(shards, recipe)
    assert isinstance(ours, Uncertainty)
    gradients = gradients_at_step(ours, "all")
    slopes: list[torch.Tensor] = []
    hook = ours.optimizers["log_variance"].optimizer.register_step_pre_hook
    hook(lambda *_: slopes.append(ours.log_variance.grad.clone()))  # type: ignore[union-attr]
    s = torch.tensor([0.0, 0.0, 0.0, -math.log(2.0)], requires_grad=True)  # dst_state weighs 2
    passes = some_steps(shards, recipe, 1)[0]
    losses = task_losses(theirs.model.train()(passes[0]), passes[0], theirs.tasks, totals_of(passes, theirs))
    torch.stack(
        [torch.exp(-s[at]) * loss + s[at] / 2 for at, loss in enumerate(losses.values())]
    ).sum().backward()
    before = ours.log_variance.detach().clone()
    assert torch.allclose(before, s)
    ours.step(passes, totals_of(passes, ours), 0)
    assert s.grad is not None
    assert torch.allclose(slopes[0], s.grad, rtol=1e-5)
    for name, parameter in theirs.model.named_parameters():
        assert torch.allclose(gradients[0][name], parameter.grad, atol=1e-5), name
    moved = ours.log_variance.detach() - before
    assert torch.equal(moved.sign(), -s.grad.sign())


def by_the_paper(gradients: list[np.ndarray], orders: list[list[int]]) -> np.ndarray:
    """Algorithm 1 of Yu et al., 2020."""
    projected = []
    for i, g in enumerate(gradients):
        pc = g.copy()
        for j in orders[i]:
            if pc @ gradients[j] < 0:
                pc = pc - (pc @ gradients[j]) / np.linalg.norm(gradients[j]) ** 2 * gradients[j]
        projected.append(pc)
    return np.sum(projected, axis=0)


def surgery(gradients: list[np.ndarray], seed: int) -> np.ndarray:
    """The surgery on flat gradients, laid into two shared parameters of other shapes, and one that each has alone."""
    made = [{"a": torch.tensor(g[:2]), "b": torch.tensor(g[2:]).view(-1, 2)} for g in gradients]
    named = {f"task{at}": each | {f"own{at}": torch.ones(2)} for at, each in enumerate(made)}
    dots = dot_products(named, "ab")
    np.testing.assert_allclose(dots, np.array(gradients) @ np.array(gradients).T, atol=1e-12)
    out = mixed(named, shares_of(dots, np.random.default_rng(seed)), "ab")
    assert out["b"].shape == made[0]["b"].shape
    assert all(torch.equal(out[f"own{at}"], torch.ones(2)) for at in range(len(gradients)))
    return torch.cat([out["a"], out["b"].flatten()]).numpy()


def test_gradient_surgery_by_hand() -> None:
    one, two = np.array([1.0, 0.0, 0.0, 0.0]), np.array([-1.0, 1.0, 0.0, 0.0])
    assert surgery([one, two], 0) == pytest.approx([0.5, 1.5, 0.0, 0.0])  # (.5, .5) and (0, 1)
    assert np.array_equal(surgery([one, -two], 0), one - two)  # no conflict: the plain sum


@pytest.mark.parametrize("seed", range(20))
def test_gradient_surgery_reads_as_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=6) for _ in range(4)]
    choice = np.random.default_rng(seed + 100)
    names = [f"task{at}" for at in range(4)]
    orders = [[int(n[4:]) for n in choice.permutation([m for m in names if m != name])] for name in names]
    assert surgery(gradients, seed + 100) == pytest.approx(by_the_paper(gradients, orders), abs=1e-12)


class Largest(TorchDispatchMode):
    """Watches how large a tensor is made, in numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, out.numel() if torch.is_tensor(out) else 0)
        return out


def test_gradients_are_compared_and_mixed_one_parameter_at_a_time() -> None:
    made = {f"task{at}": {f"p{key}": torch.randn(50, 3) for key in range(20)} for at in range(4)}
    with Largest() as largest:
        dots = dot_products(made, made["task0"].keys())
        out = mixed(made, shares_of(dots, np.random.default_rng(0)), list(made["task0"]))
    assert largest.numbers == 150
    assert len(out) == 20
    assert not any(made.values())  # each was let go of


def test_tasks_that_reach_no_parameter_in_common_have_the_cosine_zero() -> None:
    made = {
        "a": {"p": torch.ones(2)},
        "b": {"q": torch.ones(2)},
        "c": {"p": torch.ones(2), "q": -torch.ones(2)},
    }
    dots = dot_products(made, "pq")
    assert np.array_equal(dots, [[2, 0, 2], [0, 2, -2], [2, -2, 4]])
    half = 1 / math.sqrt(2)
    assert cosines(made, dots) == pytest.approx(
        {"grad/cos_a_b": 0.0, "grad/cos_a_c": half, "grad/cos_b_c": -half}
    )
    assert cosines("ab", np.zeros((2, 2))) == {"grad/cos_a_b": 0.0}


def test_gradient_surgery_leaves_what_one_head_alone_has(shards: Path) -> None:
    recipe = small("train.objective=pcgrad", "train.clip_norm=1e9")
    ours, theirs = trained_by(shards, recipe), trained_by(shards, recipe)
    seen = gradients_at_step(ours, "all")
    passes = some_steps(shards, recipe, 1)[0]
    ours.step(passes, totals_of(passes, ours), 0)
    alone = separate_gradients(theirs, passes)
    for task, part in {**HEAD_OF, "dst_update": "dst_update_head."}.items():
        for name in (n for n in seen[0] if n.startswith(part)):
            assert torch.allclose(seen[0][name], alone[task][name], atol=1e-6), name
    shared = [n for n in seen[0] if not n.startswith(NEW[1:])]
    flat = [
        torch.cat([g.get(n, torch.zeros_like(seen[0][n])).flatten() for n in shared]).double().numpy()
        for g in alone.values()
    ]
    choice = np.random.default_rng([recipe.train.seed, 0])
    tasks = list(alone)
    orders = [[tasks.index(str(n)) for n in choice.permutation([m for m in tasks if m != t])] for t in tasks]
    wanted = by_the_paper(flat, orders)
    got = torch.cat([seen[0][n].flatten() for n in shared]).double().numpy()
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def separate_gradients(objective: Objective, passes: list[Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """Each task's gradient from a forward and a backward pass of its own."""
    model, out = objective.model.train(), {}
    for task in objective.tasks:
        model.zero_grad()
        loss_of(model, objective, passes, task).backward()
        out[task] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out


def test_the_probe_tells_norms_and_cosines_and_leaves_no_trace(shards: Path) -> None:
    recipe = small()
    objective, other = trained_by(shards, recipe), trained_by(shards, recipe)
    passes = some_steps(shards, recipe, 1)[0]
    row = objective.probe(passes[0], totals_of(passes, objective))
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    alone = separate_gradients(other, passes)
    names = [n for n, _ in other.model.named_parameters() if not n.startswith(NEW[1:])]
    flat = {task: torch.cat([g[n].flatten() for n in names if n in g]) for task, g in alone.items()}
    for at, a in enumerate(alone):
        whole = torch.cat([g.flatten() for g in alone[a].values()])
        assert row[f"grad/norm_{a}"] == pytest.approx(whole.norm().item(), rel=1e-4)
        for b in list(alone)[at + 1 :]:
            cosine = (flat[a] @ flat[b] / flat[a].norm() / flat[b].norm()).item()
            assert row[f"grad/cos_{a}_{b}"] == pytest.approx(cosine, abs=1e-4)
    assert len(row) == 4 + 6


@pytest.mark.parametrize("name", ALL)
def test_a_task_that_is_frozen_moves_its_head_no_more(shards: Path, name: str) -> None:
    recipe = small(f"train.objective={name}")
    objective = trained_by(shards, recipe)
    first, second = some_steps(shards, recipe, 2)
    objective.step(first, totals_of(first, objective), 0)
    objective.frozen = {"speaking"}
    before = weights_of(objective.model)
    row = objective.step(second, totals_of(second, objective), 1)
    after = weights_of(objective.model)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert not any(n.startswith("speaking_head.") for n in moved)
    assert {"dst_update_head.weight", "dst_state_head.bilinear.weight", "visual_adapter.fuse.weight"} <= moved
    assert "train/loss_speaking" not in row


def with_scaler(shards: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Objective:
    """An objective whose losses are scaled as fp16 needs it, twice as much after each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)

    def accelerator(*_: Any) -> Any:
        made = _accelerator(recipe, "cpu", Path())
        made.scaler = scaler
        made.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(tiny_run, "_accelerator", accelerator)
        return trained_by(shards, recipe)


@pytest.mark.parametrize("name", [*ALL, "independent train.strategy=shared_forward"])
def test_scaled_losses_give_the_same_steps(shards: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(*f"train.objective={name}".split())
    scaled, plain = with_scaler(shards, recipe, monkeypatch), trained_by(shards, recipe)
    probed = []
    for number, passes in enumerate(some_steps(shards, recipe, 3)):
        totals = totals_of(passes, plain)
        rows = [objective.step(passes, totals, number) for objective in (scaled, plain)]
        assert rows[0] == rows[1]
        probed = [objective.probe(passes[0], totals) for objective in (scaled, plain)]
        assert probed[0] == probed[1]
    assert scaled.accelerator.scaler.get_scale() >= 1024 * 2**3
    for (key, a), b in zip(scaled.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_a_step_whose_scaled_gradients_overflow_is_left_out(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small()
    objective = with_scaler(shards, recipe, monkeypatch)
    passes = some_steps(shards, recipe, 1)[0]
    before = weights_of(objective.model)
    hook = objective.model.speaking_head.weight.register_hook(lambda gradient: gradient * math.inf)
    objective.step(passes, totals_of(passes, objective), 0)
    after = weights_of(objective.model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    hook.remove()
    objective.step(passes, totals_of(passes, objective), 1)
    assert all(torch.isfinite(parameter).all() for parameter in objective.model.parameters())
    assert not torch.equal(objective.model.speaking_head.weight, before["speaking_head.weight"])


@pytest.mark.parametrize("name", ["joint", "independent"])
def test_fp16_gradients_that_never_are_numbers_end_the_run(
    shards: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task's alone are enough; a step whose gradients are numbers begins the count anew."""
    monkeypatch.setattr(training.objective, "OVERFLOWS", 3)
    recipe = small(f"train.objective={name}")
    objective = with_scaler(shards, recipe, monkeypatch)
    passes = some_steps(shards, recipe, 1)[0]
    factors = [math.inf, math.inf, 1.0, math.inf, math.inf, math.inf]
    objective.model.speaking_head.weight.register_hook(lambda gradient: gradient * factors[number])
    for number in range(5):
        objective.step(passes, totals_of(passes, objective), number)
    number = 5
    told = r"last 3 steps up to step 6 are not numbers.*train.precision=float32.*or a lower train.lr"
    with pytest.raises(UserError, match=told):
        objective.step(passes, totals_of(passes, objective), number)


def stops_with(objective: Objective, passes: list[Batch], act: Callable[[], None] = lambda: None) -> str:
    """The sentence with which a step is refused, after which all parameters are as they were."""
    before = weights_of(objective.model)
    act()
    with pytest.raises(UserError) as caught:
        objective.step(passes, totals_of(passes, objective), 0)
    for name, parameter in objective.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_a_loss_that_is_not_a_number_names_the_windows_and_moves_nothing(shards: Path, name: str) -> None:
    recipe = small(f"train.objective={name}", "data.rows_at_once=1")
    objective = trained_by(shards, recipe)
    passes = some_steps(shards, recipe, 1)[0]
    broken = passes[1].features.clone()
    broken[0] = math.nan
    message = stops_with(objective, [passes[0], replace(passes[1], features=broken)])
    assert "is not a number" in message
    assert passes[1].names[0].split(" ticks ")[0] in message
    assert "\n" not in message


def test_a_gradient_that_is_not_a_number_moves_nothing(shards: Path) -> None:
    recipe: Recipe = small()
    objective = trained_by(shards, recipe)
    passes = some_steps(shards, recipe, 1)[0]
    weight = objective.model.speaking_head.weight
    message = stops_with(objective, passes, lambda: weight.register_hook(lambda g: g * math.inf) and None)
    assert "the gradient at step 1 is not a number" in message

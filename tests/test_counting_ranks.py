"""Two processes that train a counter together do what one does: gradients, losses, scores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from tiny_count import counter_of, images_of, little, objective_of

from training.counting.family import CountingSteps
from training.counting.recipe import CountingRecipe
from training.counting.validation import validate
from training.family import summed
from training.ranks import dealt, in_turn

STILL = ("train.lr=1e-9", "train.head_lr=1e-9", "train.clip_norm=1e9")
"""Steps so small that a task finds the parameters as the task before it did."""

CASES: dict[str, tuple[str, ...]] = {
    "alternating": (),
    "shared_forward": ("train.strategy=shared_forward",),
    "joint": ("train.objective=joint",),
    "token_embed": ("model.marks=token_embed",),
    "an image without objects": ("data.batch_images=2",),
    "a rank without images": ("data.batch_images=1",),
    "one task": ("tasks.done.weight=0",),
}


def recipe_of(case: str, *more: str) -> CountingRecipe:
    return little("data.batch_images=5", "data.images_at_once=1", *STILL, *CASES[case], *more)


def found(shards: Path, recipe: CountingRecipe, rank: int, ranks: int) -> dict[str, Any]:
    """One step as a rank takes it: what each optimizer found, what the log says, and a validation's scores."""
    objective = objective_of(shards, recipe)
    objective.model.train()
    gradients: dict[str, torch.Tensor] = {}
    named = dict(objective.model.named_parameters())
    for name, optimizer in objective.optimizers.items():

        def look(*_: Any, name: str = name) -> None:
            gradients.update({f"{name}: {n}": p.grad.clone() for n, p in named.items() if p.grad is not None})

        optimizer.optimizer.register_step_pre_hook(look)
    _, prompt = counter_of(shards, recipe)
    steps = CountingSteps(images_of(shards, recipe), prompt, recipe, rank=rank, ranks=ranks)
    planned = next(each for epoch in range(20) for each in steps.planned(epoch) if _suits(steps, each))
    passes = steps.passes(planned)
    own = summed([objective.model.count_labels(batch, objective.tasks) for batch in passes])
    totals: Any = objective.accelerator.reduce(own, "sum")
    row = objective.step(passes, totals, 0)
    images = images_of(shards, recipe, "val")
    # marks of a model that has learned nothing run far apart from a last bit on: here all lie at one place, and
    # the images have unlike counts
    for parameter in objective.model.coord_head.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(objective.model.done_head.weight, std=3, generator=torch.Generator().manual_seed(6))
    scores = validate(objective.model, prompt, images, recipe, objective.accelerator)
    ranks = objective.accelerator.num_processes
    return {"gradients": gradients, "row": row, "scores": scores, "passes": len(passes), "ranks": ranks}


def _suits(steps: CountingSteps, planned: list[tuple[int, int]]) -> bool:
    """Of one image, that it has objects; of two, that one of them has none."""
    empty = [len(steps.images[index].points) == 0 for _, index in planned]
    size = steps.recipe.data.batch_images
    return len(empty) == size and sum(empty) == 1 if size == 2 else not all(empty)


@pytest.fixture(scope="module")
def by_two(counting_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found, by case."""
    out = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [sys.executable, *launcher, str(counting_shards), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_and_scores_of_one(
    counting_shards: Path, by_two: list[dict[str, Any]], case: str
) -> None:
    alone = found(counting_shards, recipe_of(case, "data.images_at_once=null"), 0, 1)
    both = [each[case] for each in by_two]
    assert [each["ranks"] for each in (alone, *both)] == [1, 2, 2]
    passes = 1 if case.startswith(("a ", "an ")) else 3
    assert [each["passes"] for each in (alone, *both)] == [1, passes, passes]
    for mine in both:
        assert mine["gradients"].keys() == alone["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
        for name, gradient in alone["gradients"].items():
            assert (mine["gradients"][name] - gradient).abs().max() <= 1e-5 * largest, name
        for name, value in alone["row"].items():
            assert mine["row"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        for name, value in alone["scores"].items():
            assert mine["scores"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, gradient in both[0]["gradients"].items():
        assert torch.equal(gradient, both[1]["gradients"][name]), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("number", [0, 1, 4, 7])
def test_what_is_dealt_out_comes_back_in_its_order(ranks: int, number: int) -> None:
    shares = [
        dealt(range(number), cast(Accelerator, SimpleNamespace(process_index=rank, num_processes=ranks)))
        for rank in range(ranks)
    ]
    assert in_turn(shares) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _of_a_rank(shards: Path, out: Path) -> None:
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    torch.save({case: found(shards, recipe_of(case), rank, 2) for case in CASES}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _of_a_rank(*map(Path, sys.argv[1:]))

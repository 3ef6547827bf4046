"""Which checkpoint is kept as the best, and when a run has had its chances: by hand, and in a real run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import rows_of, small

from schemas.errors import UserError
from training.recipe import TaskSettings
from training.selection import COMBINED, SCORES, Selection
from training.trainer import train

METRICS = {
    "speaking": "val/speaking_f1",
    "dst_update": "val/dst_update_f1",
    "response": "val/loss_response",
    "dst_state": "val/dst_state_joint_near_transition",
}


def selection(**patience: int) -> Selection:
    tasks = {"speaking": "val/speaking_f1", "response": "val/loss_response"}
    return Selection({n: TaskSettings(metric=m, patience=patience.get(n)) for n, m in tasks.items()})


def row(speaking: float, response: float, combined: float) -> dict[str, float]:
    return {"val/speaking_f1": speaking, "val/loss_response": response, COMBINED: combined}


def test_each_best_is_the_best_by_its_own_score() -> None:
    chosen = selection()
    assert set(chosen.update(10, row(0.2, 3.0, 0.5))) == {"best", "best_speaking", "best_response"}
    assert chosen.update(20, row(0.3, 3.5, 0.4)) == ["best_speaking"]
    assert chosen.update(30, row(0.3, 2.5, 0.5)) == [
        "best_response"
    ]  # a draw is not better; a loss is better lower
    assert chosen.update(40, row(0.1, 9.0, 0.6)) == ["best"]
    steps = {name: best.step for name, best in chosen.bests.items()}
    assert steps == {"best": 40, "best_speaking": 20, "best_response": 30}


def test_the_end_comes_only_when_all_tasks_are_out_of_patience() -> None:
    chosen = selection(speaking=1, response=2)
    over = []
    scores = [(0.5, 3.0), (0.4, 2.0), (0.4, 2.5), (0.6, 2.5), (0.5, 2.5), (0.5, 2.5)]
    for step, (speaking, response) in enumerate(scores):
        chosen.update(step, row(speaking, response, 0.1))
        over.append((chosen.out_of_patience(), chosen.is_over()))
    assert over == [
        (set(), False),
        ({"speaking"}, False),
        ({"speaking"}, False),
        ({"response"}, False),  # speaking became better after all
        ({"speaking", "response"}, True),
        ({"speaking", "response"}, True),
    ]


def test_a_task_without_patience_keeps_the_run_going() -> None:
    chosen = selection(speaking=1)
    for step in range(50):
        chosen.update(step, row(0.0, 1.0, 0.0))
    assert chosen.out_of_patience() == {"speaking"}
    assert not chosen.is_over()


def test_a_frozen_task_that_becomes_better_counts_as_ended() -> None:
    chosen = selection(speaking=1, response=1)
    chosen.update(1, row(0.5, 1.0, 0.1))
    chosen.update(2, row(0.5, 0.5, 0.1))
    frozen = chosen.out_of_patience()
    chosen.update(3, row(0.6, 0.6, 0.1))
    assert frozen == {"speaking"}
    assert chosen.out_of_patience() == {"response"}
    assert not chosen.is_over()
    assert chosen.is_over(frozen)


def test_a_score_that_is_not_a_number_is_never_better_but_there_is_a_first() -> None:
    chosen = selection()
    assert len(chosen.update(1, row(math.nan, math.nan, math.nan))) == 3
    assert chosen.update(2, row(math.nan, 2.0, math.nan)) == ["best_response"]
    assert chosen.update(3, row(0.0, math.nan, 0.0)) == ["best", "best_speaking"]


def test_the_state_goes_on_where_it_was() -> None:
    chosen, again = selection(speaking=2), selection(speaking=2)
    chosen.update(1, row(0.5, 1.0, 0.2))
    chosen.update(2, row(0.4, 1.0, 0.2))
    again.load_state(chosen.state())
    assert again.bests == chosen.bests
    assert again.update(3, row(0.45, 0.9, 0.1)) == chosen.update(3, row(0.45, 0.9, 0.1)) == ["best_response"]


def test_a_metric_that_is_not_measured_is_refused_at_the_start(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks.speaking.metric='val/f1' is not measured; take one of val/"):
        train(shards, small("tasks.speaking.metric=val/f1"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_real_run_keeps_the_weights_of_each_best_and_ends_when_all_have_waited(
    shards: Path, tmp_path: Path
) -> None:
    patience = [f"tasks.{task}.patience=1" for task in METRICS]
    recipe = small("train.steps=40", "train.eval_every=1", "train.lr=3e-2", "train.head_lr=3e-2", *patience)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    out = tmp_path / "run"

    def keep(row: dict[str, float]) -> None:
        kept[int(row["step"])] = load_file(out / "checkpoints/latest/model.safetensors")

    best_row = train(shards, recipe, out, device="cpu", on_step=keep)
    rows = rows_of(out)
    assert {name for name in rows[0] if name.startswith("val/")} == set(SCORES)
    metrics = {"best": COMBINED, **{f"best_{task}": metric for task, metric in METRICS.items()}}
    for name, metric in metrics.items():
        sign = -1 if "loss" in metric else 1
        top = max(rows, key=lambda row: sign * row[metric])  # the first of equals
        for key, tensor in load_file(out / "checkpoints" / name / "model.safetensors").items():
            assert torch.equal(tensor, kept[int(top["step"])][key]), (name, key)
    assert best_row == max(rows, key=lambda row: row[COMBINED])

    def waiting(upto: int) -> bool:
        scores = {t: [(-1 if "loss" in m else 1) * r[m] for r in rows[:upto]] for t, m in METRICS.items()}
        return all(s[-1] <= max(s[:-1], default=-math.inf) for s in scores.values())

    ended = [upto for upto in range(1, len(rows) + 1) if waiting(upto)]
    assert ended == [len(rows)] if len(rows) < 40 else ended in ([], [40])

"""The trainer and the settings it runs by: it learns, it repeats itself to the bit, it refuses what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.shards import ShardCache
from schemas.config import load_config
from schemas.errors import UserError
from training.batch import collate
from training.data import TrainingWindows, load_sessions, window_starts, with_noise
from training.evaluate import evaluate, table_rows
from training.recipe import LossSettings, Recipe, load_recipe
from training.trainer import HEADS, build, compute_losses, learning_rate_factor, make_optimizer, train


def small(*changes: str) -> Recipe:
    defaults = ["train.steps=6", "train.eval_every=3", "train.warmup_steps=2", "data.batch_windows=4"]
    return load_recipe("tiny", [*defaults, *changes])


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    train(shards, small(), out, device="cpu")
    return out


def test_the_losses_fall_on_two_sessions(shards: Path) -> None:
    recipe = small("data.state_noise=0", "data.window_ticks=64", "data.batch_windows=8")
    cache = ShardCache(shards)
    model, builder = build(recipe, cache)
    sessions = load_sessions(cache, "train")[:2]
    windows = TrainingWindows(sessions, builder, recipe.data, seed=0)
    batch = collate(next(windows.epoch(0)), 640, builder.pad_token)
    optimizer = make_optimizer(model, recipe)
    history = []
    for _ in range(60):
        losses = compute_losses(model, batch, recipe.losses)
        history.append({head: losses[head].item() for head in HEADS})
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for head in HEADS:
        assert history[-1][head] < 0.3 * history[0][head], (head, history[0], history[-1])


def test_a_run_leaves_its_recipe_log_curves_and_checkpoints(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {f"train/loss_{head}" for head in HEADS} <= rows[0].keys()
    assert [row["step"] for row in rows if "val/combined" in row] == [3, 6]
    weighted = sum(
        rows[0][f"train/loss_{head}"] * getattr(load_recipe("tiny", []).losses, head).weight for head in HEADS
    )
    assert rows[0]["train/loss"] == pytest.approx(weighted, abs=1e-5)
    for name in ("checkpoints/latest/model.safetensors", "checkpoints/best/model.safetensors", "curves.png"):
        assert (run / name).is_file()
    assert load_config(Recipe, run / "recipe.yaml").train.steps == 6
    assert not list(run.rglob("*.tmp"))


def test_the_same_run_twice_gives_the_same_numbers(run: Path, shards: Path, tmp_path: Path) -> None:
    train(shards, small(), tmp_path / "again", device="cpu")
    assert (tmp_path / "again/log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    weights = "checkpoints/latest/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_evaluate_writes_every_key_and_the_baselines_have_them_too(run: Path) -> None:
    metrics, traces = evaluate(run, None)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    groups = ("speaking", "dst_update", "dst_state", "response")
    for name in ("copy_initial", "uniform_clock", "always_silent", "always_speak"):
        for group in groups:
            assert metrics["baselines"][name][group].keys() == metrics[group].keys()
    assert metrics["about"]["sessions"] == len(traces) == len({trace.session_id for trace in traces})
    assert metrics["about"]["mode"] == "free"
    assert next(iter(table_rows(metrics)))[0] == "model"


def test_blind_features_are_zero_and_nothing_else_changes(shards: Path) -> None:
    cache = ShardCache(shards)
    seen, blind = load_sessions(cache, "test")[0], load_sessions(cache, "test", blind=True)[0]
    first = seen.first_tick
    assert np.abs(seen.features(first, 5)).max() > 0
    assert not blind.features(first, 5).any()
    assert blind.features(first, 5).shape == seen.features(first, 5).shape
    assert np.array_equal(blind.truth.state, seen.truth.state)
    assert blind.words == seen.words


def test_every_epoch_covers_each_tick_once_at_another_phase(shards: Path) -> None:
    cache = ShardCache(shards)
    recipe = small("data.state_noise=0", "data.window_ticks=24", "data.batch_windows=5")
    _, builder = build(recipe, cache)
    sessions = load_sessions(cache, "train")
    windows = TrainingWindows(sessions, builder, recipe.data, seed=1)
    ticks = [sum(len(e.speak) for batch in windows.epoch(n) for e in batch) for n in (0, 1)]
    assert ticks == [sum(s.num_ticks for s in sessions)] * 2
    lengths = [sorted(len(e.speak) for batch in windows.epoch(n) for e in batch) for n in (0, 0, 1)]
    assert lengths[0] == lengths[1] != lengths[2]
    for phase in (0, 1, 23):
        cut = list(window_starts(sessions[0], 24, phase))
        assert [first for first, _ in cut][1:] == [first + length for first, length in cut][:-1]
        assert cut[0] == (sessions[0].first_tick, 24 - phase)


def test_noise_changes_the_stated_share_of_states_and_each_to_another() -> None:
    rng, state = np.random.default_rng(0), np.repeat(np.array([0, 1, 2], np.int8), 10_000)
    noisy = with_noise(state, 0.1, rng)
    assert (noisy != state).mean() == pytest.approx(0.1, abs=0.01)
    assert set(np.unique(noisy)) == {0, 1, 2}
    assert np.array_equal(with_noise(state, 0.0, rng), state)


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    recipe = load_recipe(None, ["train.steps=110", "train.warmup_steps=10"])
    factors = [learning_rate_factor(step, recipe) for step in range(111)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[60] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[110] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.lrr=1"], "did you mean 'lr'"),
        (["trian.lr=1"], "did you mean 'train'"),
        (["train.lr=fast"], "train.lr"),
        (["train.steps=0"], "train.steps"),
        (["data"], "key=value"),
        (["train.lr.x=1"], "'lr' is a value"),
        (
            ["losses.speaking.loss=balanced", "losses.speaking.alpha=[1, 2]"],
            "alpha belongs to the focal loss",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match="(?s)" + message.replace("(", r"\(")) as caught:
        load_recipe("tiny", changes)
    assert "\n" not in str(caught.value)


def test_numbers_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 1e-4\n")
    assert load_recipe(str(path), ["train.head_lr=5e-4"]).train.lr == 1e-4
    assert yaml.safe_load("1e-4") == "1e-4"
    path.write_text("train: [1\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_recipe(str(path), [])


def test_a_run_is_not_overwritten(run: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        train(shards, small(), run, device="cpu")


def test_a_loss_that_is_not_a_number_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a number at step"):
        train(shards, small("train.lr=1e12", "train.head_lr=1e12"), tmp_path / "run", device="cpu")


def test_losses_of_all_heads_are_chosen_by_name() -> None:
    assert set(LossSettings.model_fields) == set(HEADS)

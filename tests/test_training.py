"""The trainer and the settings it runs by: it learns, it repeats itself to the bit, it refuses what is wrong."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tiny_run import rows_of, small, some_steps, totals_of, trained_by

import training.trainer
from pipeline.presets import init_model
from pipeline.shards import ShardCache
from schemas.config import load_config
from schemas.errors import UserError
from training.data import load_sessions, window_starts
from training.dialog import build
from training.evaluate import evaluate, table_rows
from training.model import HEADS, load_trained
from training.optim import learning_rate_factor
from training.recipe import Recipe, Tasks, load_recipe
from training.runlog import RunLog
from training.sampler import TrainingSteps, with_noise
from training.trainer import train


def few(*changes: str) -> Recipe:
    return small("train.steps=6", "train.eval_every=3", *changes)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    train(shards, few(), out, device="cpu")
    return out


def test_the_losses_fall_on_a_few_windows(shards: Path) -> None:
    recipe = few("data.state_noise=0", "data.batch_rows=3", "train.steps=40", "tasks.dst_state.weight=1")
    objective = trained_by(shards, recipe)
    passes = some_steps(shards, recipe, 1)[0]
    totals = totals_of(passes, objective)
    history = [objective.step(passes, totals, number) for number in range(40)]
    for head in HEADS:
        name = f"train/loss_{head}"
        assert history[-1][name] < 0.3 * history[0][name], (head, history[0], history[-1])


def test_a_run_leaves_its_recipe_log_curves_and_checkpoints(run: Path) -> None:
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {f"train/loss_{head}" for head in HEADS} <= rows[0].keys()
    assert [row["step"] for row in rows if "val/combined" in row] == [3, 6]
    weighted = sum(
        rows[0][f"train/loss_{head}"] * getattr(load_recipe("tiny", []).tasks, head).weight for head in HEADS
    )
    assert rows[0]["train/loss"] == pytest.approx(weighted, abs=1e-5)
    for name in ("latest", "best", *(f"best_{head}" for head in HEADS)):
        assert (run / "checkpoints" / name / "model.safetensors").is_file()
    assert (run / "curves.png").is_file()
    assert load_config(Recipe, run / "recipe.yaml").train.steps == 6
    assert not list(run.rglob("*.tmp"))


def test_weights_may_be_read_by_whoever_may_read_the_rest(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]


def test_a_run_goes_on_from_what_another_has_learned(run: Path, shards: Path, tmp_path: Path) -> None:
    """Its checkpoint has no vision tower, so none can be another than the cache's."""
    best = run / "checkpoints/best"
    model, _ = build(few(f"model.init={best}"), ShardCache(shards))
    saved = load_trained(best).state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    train(shards, few(f"model.init={best}", "train.steps=1"), tmp_path / "on", device="cpu")


def test_a_cache_of_another_vision_tower_of_the_same_size(shards: Path, tmp_path: Path) -> None:
    init_model("tiny", tmp_path / "other", seed=5)
    with pytest.raises(
        UserError, match=r"was made with another vision tower than that of .*/other; set model\.init"
    ):
        train(shards, few(f"model.init={tmp_path / 'other'}"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_share_of_clipped_steps_is_that_of_the_steps_since_the_last_validation(run: Path) -> None:
    rows = rows_of(run)
    for first, last in ((0, 3), (3, 6)):
        share = sum(row["train/clipped"] for row in rows[first:last]) / 3
        assert rows[last - 1]["train/clip_share"] == pytest.approx(share)
    for row in rows:
        assert row["train/clipped"] == float(row["train/grad_norm"] > few().train.clip_norm)


def test_a_line_of_the_log_is_json_for_any_reader(tmp_path: Path) -> None:
    with RunLog(tmp_path, Accelerator(cpu=True)) as log:
        log.open(0)
        log.add({"step": 1, "train/grad_norm": math.inf, "train/loss": 0.1 + 0.2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "train/grad_norm": null, "train/loss": 0.3}\n'


def test_the_same_run_twice_gives_the_same_numbers(run: Path, shards: Path, tmp_path: Path) -> None:
    train(shards, few(), tmp_path / "again", device="cpu")
    assert (tmp_path / "again/log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    weights = "checkpoints/latest/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_evaluate_writes_every_key_and_the_baselines_have_them_too(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    config = run / "checkpoints/best/config.json"
    # so little trained, it would say long nonsense at every tick, which takes minutes
    config.write_text(json.dumps(json.loads(config.read_text()) | {"speaking_threshold": 0.9}))
    metrics, traces = evaluate(run, None)
    assert json.loads((run / "metrics-best-test.json").read_text()) == metrics
    groups = ("speaking", "dst_update", "dst_state", "response")
    texts = {
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "meteor",
    }  # of which baselines have none: they say no word
    for name in (
        "copy_initial",
        "uniform_clock",
        "always_silent",
        "always_speak",
        "never_update",
        "majority",
    ):
        for group in groups:
            own = metrics[group].keys() - texts if group == "response" else metrics[group].keys()
            assert metrics["baselines"][name][group].keys() == own
    assert texts <= metrics["response"].keys()
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
    recipe = few("data.window_ticks=24", "data.batch_rows=5")
    _, builder = build(recipe, cache)
    sessions = load_sessions(cache, "train")
    ticks: dict[int, list[str]] = {0: [], 1: []}
    epoch = 0
    for step in TrainingSteps(sessions, builder, recipe):
        ticks[epoch] += [name for batch in step.passes for name in batch.names]
        epoch = step.after.epoch
        if epoch == 2:
            break
    assert set(ticks[0]) != set(ticks[1])
    for names in ticks.values():
        covered = [
            (session, tick)
            for session, first, last in (
                re.fullmatch(r"(.*) ticks (\d+) to (\d+)", n).groups() for n in names
            )  # type: ignore[union-attr]
            for tick in range(int(first), int(last) + 1)
        ]
        there = [(s.session_id, s.first_tick + at) for s in sessions for at in range(s.num_ticks)]
        assert sorted(covered) == sorted(there)
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
    settings = load_recipe(None, ["train.steps=110", "train.warmup_steps=10"]).train
    factors = [learning_rate_factor(step, 110, settings) for step in range(111)]
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
            ["tasks.speaking.loss=balanced", "tasks.speaking.alpha=[1, 2]"],
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
        train(shards, few(), run, device="cpu")


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_what_was_saved(
    shards: Path, tmp_path: Path
) -> None:
    recipe = few("train.lr=1e30", "train.head_lr=1e30", "train.save_every=1", "train.schedule=constant")
    with pytest.raises(UserError, match="is not a number") as caught:
        train(shards, recipe, tmp_path / "run", device="cpu")
    assert "this step is not saved" in str(caught.value)
    saved = torch.load(tmp_path / "run/checkpoints/latest/trainer.pt", weights_only=True)
    assert saved["step"] == len(rows_of(tmp_path / "run")) == 1


def test_sharding_by_other_means_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(distributed_type=DistributedType.FSDP)  # as accelerate launch sets it on GPUs
    monkeypatch.setattr(training.trainer, "Accelerator", lambda **_: made)
    with pytest.raises(UserError, match="FSDP settings are not used: start with torchrun"):
        train(shards, few(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_tasks_of_all_heads_are_chosen_by_name() -> None:
    assert set(Tasks.model_fields) == set(HEADS)

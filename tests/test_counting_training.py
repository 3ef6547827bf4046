"""Runs of the counter: what they log and keep, when they end, how they go on, and what they refuse."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_count import COUNTS, ENCODINGS, counter_of, images_of, little, objective_of, some_passes
from tiny_run import Crash, ask_to_stop, at_step, crash, left_by, rows_of
from typer.testing import CliRunner

import training.counting.family
from cli import app
from pipeline.cache import cache_features
from pipeline.engines import Here
from pipeline.shards import ShardCache
from pipeline.todo import CacheOptions
from pipeline.vision import VisionEncoder
from schemas.errors import UserError
from training.counting.model import CountingSmolVLM
from training.counting.validation import validate
from training.data import load_sessions
from training.family import summed
from training.model import load_checkpoint
from training.recipe import AnyRecipe, load_recipe
from training.trainer import Stopped, train

EPOCHS_OF_SIX = ("train.steps=18", "train.lr=3e-3", "train.head_lr=3e-3")
BESTS = {"best_coord": "val/coord_error", "best_done": "val/loss_done", "best_joint": "val/count_mae"}


@pytest.fixture(scope="module")
def run(counting_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six epochs of three steps."""
    out = tmp_path_factory.mktemp("runs") / "counting"
    train(counting_shards, little(*EPOCHS_OF_SIX), out, device="cpu")
    return out


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_the_losses_fall_on_a_few_images(counting_shards: Path) -> None:
    recipe = little("train.steps=60", "train.lr=2e-3", "data.batch_images=9")
    objective = objective_of(counting_shards, recipe)
    [passes] = some_passes(counting_shards, recipe, 1)
    totals = summed([objective.model.count_labels(batch, objective.tasks) for batch in passes])
    history = [objective.step(passes, totals, number) for number in range(60)]
    for name in ("coord", "done"):
        assert history[-1][f"train/loss_{name}"] < 0.5 * history[0][f"train/loss_{name}"], (name, history)


def test_the_log_has_the_names_of_both_tasks(run: Path) -> None:
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert [row["epoch"] for row in rows] == [number // 3 for number in range(18)]
    losses = {f"loss_{name}" for name in ("coord", "x", "y", "done")}
    always = {f"train/{name}" for name in losses} | {"train/loss", "train/padding"}
    always |= {f"train/{name}_{task}" for name in ("grad_norm", "clipped") for task in ("coord", "done")}
    validated = {f"val/{name}" for name in losses} | {"val/coord_error", "val/done_f1", "val/count_mae"}
    for number, row in enumerate(rows, 1):
        here = always | (validated | {"train/clip_share"} if number % 3 == 0 else set())
        assert row.keys() == here | {"step", "epoch"}, number
        assert all(math.isfinite(value) for value in row.values())
        assert row["train/loss"] == pytest.approx(row["train/loss_coord"] + row["train/loss_done"], rel=1e-6)


def test_the_squared_errors_are_those_of_numpy(counting_shards: Path) -> None:
    """Of the mean over images of the mean over their objects, before the step is taken."""
    recipe = little("data.batch_images=9")
    [[batch]] = some_passes(counting_shards, recipe, 1)
    model, _ = counter_of(counting_shards, recipe)
    with torch.no_grad():
        predicted = model.train()(batch)["coord"].double().numpy()
    images = {image.session_id: image.points for image in images_of(counting_shards, recipe)}
    squares = []
    at = 0
    for name in batch.names:
        count = len(images[name])
        if count:
            squares.append(((predicted[at : at + count] - images[name]) ** 2).mean(0))
        at += count + 1
    objective = objective_of(counting_shards, recipe)
    objective.model.train()
    totals = objective.model.count_labels(batch, objective.tasks)
    assert float(totals["coord"]) == pytest.approx(len(squares))
    row = objective.step([batch], totals, 0)
    for name, wanted in zip("xy", np.mean(squares, 0), strict=True):
        assert row[f"train/loss_{name}"] == pytest.approx(wanted, rel=1e-5)


def test_each_best_is_kept_and_says_the_same_when_it_is_loaded(run: Path, counting_shards: Path) -> None:
    rows = {int(row["step"]): row for row in rows_of(run)}
    scored = [row for row in rows.values() if "val/count_mae" in row]
    assert sorted(path.name for path in (run / "checkpoints").glob("[!.]*")) == [*sorted(BESTS), "latest"]
    recipe = little(*EPOCHS_OF_SIX)
    images = images_of(counting_shards, recipe, "val")
    _, prompt = counter_of(counting_shards, recipe)
    summary = summary_of(run)
    for name, metric in BESTS.items():
        best = min(scored, key=lambda row: (row[metric], row["step"]))
        assert summary[f"{name}_step"] == best["step"]
        assert summary[f"{name}_epoch"] == best["epoch"]
        model = load_checkpoint(CountingSmolVLM, run / "checkpoints" / name)
        threshold = model.config.done_threshold
        found = validate(model, prompt, images, recipe, Accelerator(cpu=True))
        assert model.config.done_threshold == threshold  # chosen again as it was saved
        for score, value in found.items():
            assert float(f"{value:.9g}") == best[score], (name, score)
    for task in ("coord", "done"):
        assert summary[f"best_val_loss_{task}"] == rows[summary[f"best_{task}_step"]][f"val/loss_{task}"]
    assert summary["stopped_early"] is False
    assert summary["stopped_at_epoch"] == 5
    assert set(summary) == {
        *(f"{name}_{what}" for name in BESTS for what in ("step", "epoch")),
        *("best_val_loss_coord", "best_val_loss_done", "stopped_early", "stopped_at_epoch"),
    }


def scripted(scores: dict[str, list[float]]) -> Any:
    """In place of a validation: these scores, one after the other."""
    at: Iterator[int] = iter(range(100))

    def validate(model: Any, *_: Any) -> dict[str, float]:
        number = next(at)
        model.config.done_threshold = 0.5
        return {name: values[number] for name, values in scores.items()}

    return validate


@pytest.mark.parametrize(
    ("last", "done"), [(9, [5, 4, 3, 2, 1, 1, 2, 1, 3]), (5, [1, 2, 2, 2, 2, 0, 0, 0, 0])]
)
def test_a_run_ends_only_when_both_tasks_have_run_out_of_patience(
    counting_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, done: list[float]
) -> None:
    """Coord has from its fourth validation on; done in its ninth in one case and in its fifth in the other."""
    scores = {
        "val/coord_error": [0.3, 0.4, 0.3, 0.3, 0.31, 0.3, 0.3, 0.3, 0.3],
        "val/loss_done": [float(value) for value in done],
        "val/count_mae": [3.0, 2.0, 1.5, 1.6, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    scores |= {f"val/loss_{name}": [float(n) for n in range(10, 19)] for name in ("coord", "x", "y")}
    scores["val/done_f1"] = [0.0] * 9
    monkeypatch.setattr(training.counting.family, "validate", scripted(scores))
    recipe = little(
        "train.steps=100", "tasks.coord.patience=3", "tasks.done.patience=4", "data.batch_images=9"
    )
    told: list[dict[str, float]] = []
    train(counting_shards, recipe, tmp_path / "run", device="cpu", on_step=told.append)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == last  # of one step an epoch
    summary = summary_of(tmp_path / "run")
    assert summary["stopped_early"] is True
    assert summary["stopped_at_epoch"] == last - 1
    assert summary["best_coord_step"] == 1  # as good again is not better
    assert summary["best_done_step"] == done.index(min(done[:last])) + 1
    assert summary["best_joint_step"] == 5
    assert summary["best_val_loss_coord"] == 10
    assert summary["best_val_loss_done"] == min(done[:last])
    assert told[-1]["waited/coord"] == last - 1
    assert told[-1]["waited/done"] == 4


@pytest.mark.parametrize("marks", ENCODINGS)
def test_a_run_that_was_killed_and_stopped_leaves_no_trace_of_it(
    counting_shards: Path, drawn_shards: Path, tmp_path: Path, marks: str
) -> None:
    shards = drawn_shards if marks == "drawn" else counting_shards
    recipe = little(f"model.marks={marks}", "train.steps=8", "data.images_at_once=2")
    train(shards, recipe, tmp_path / "whole", device="cpu")
    out = tmp_path / "run"
    for number, act in ((2, ask_to_stop), (4, crash), (5, ask_to_stop), (7, crash)):
        with pytest.raises((Stopped, Crash)):
            train(shards, recipe, out, device="cpu", resume=True, on_step=at_step(number, act))
    train(shards, recipe, out, device="cpu", resume=True)
    assert left_by(out) == left_by(tmp_path / "whole")
    assert summary_of(out) == summary_of(tmp_path / "whole")


@pytest.mark.parametrize("changes", [("data.workers=2",), ("data.images_at_once=1",)])
def test_what_a_machine_has_to_do_with_changes_no_result(
    counting_shards: Path, tmp_path: Path, run: Path, changes: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    train(counting_shards, little(*EPOCHS_OF_SIX, "train.steps=4", *changes), out, device="cpu")
    train(counting_shards, little(*EPOCHS_OF_SIX, "train.steps=4"), tmp_path / "plain", device="cpu")
    if "data.workers=2" in changes:
        assert left_by(out) == left_by(tmp_path / "plain")
        return
    for row, wanted in zip(rows_of(out), rows_of(tmp_path / "plain"), strict=True):
        names = [name for name in wanted if name.startswith(("train/loss", "val/loss"))]
        assert {name: row[name] for name in names} == pytest.approx(
            {name: wanted[name] for name in names}, rel=2e-3
        )


@pytest.mark.parametrize("objective", ["joint", "uncertainty", "pcgrad"])
def test_the_engines_other_objectives_train_a_counter(
    counting_shards: Path, tmp_path: Path, objective: str
) -> None:
    train(counting_shards, little(f"train.objective={objective}", "train.steps=2"), tmp_path, device="cpu")
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert {"train/loss_coord", "train/loss_done", "train/grad_norm"} <= rows[0].keys()
    assert {"val/loss_coord", "val/count_mae"} <= rows[1].keys()


@pytest.mark.parametrize("tune", ["heads", "lora"])
def test_the_backbone_may_stay_as_it_is(counting_shards: Path, tmp_path: Path, tune: str) -> None:
    recipe = little(f"model.tune={tune}", "train.steps=2", "data.batch_images=9")
    train(counting_shards, recipe, tmp_path, device="cpu")
    before, _ = counter_of(counting_shards, little())
    after = load_checkpoint(CountingSmolVLM, tmp_path / "checkpoints/latest")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])}
    for part in CountingSmolVLM.new_parts:
        own = {name for name, _ in after.named_parameters() if name.startswith(part)}
        assert not own or own & moved, part
    of_backbone = {name for name in moved if name.startswith(("model.", "lm_head."))}
    assert bool(of_backbone) == (tune == "lora")
    assert not any("embed_tokens" in name or "norm" in name for name in of_backbone)


def test_a_blind_counter_sees_nothing(counting_shards: Path) -> None:
    recipe = little("data.blind=true")
    [[batch]] = some_passes(counting_shards, recipe, 1)
    assert not batch.features.any()
    [[plain]] = some_passes(counting_shards, little(), 1)
    assert torch.equal(batch.tokens, plain.tokens)
    assert torch.equal(batch.coord, plain.coord)
    assert plain.features.any()


@pytest.fixture(scope="module")
def mixed(
    shards: Path,
    labels: Path,
    counting_shards: Path,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The feature cache of sessions with dialogs and of images to count in."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(labels, folder / "labels")
    shutil.copytree(counting_shards.parent / "labels", folder / "labels", dirs_exist_ok=True)
    shutil.copytree(shards, folder / "shards")
    encoder = VisionEncoder(tiny_model, "cpu")
    summary = cache_features(folder / "labels", folder / "shards", Here(encoder), CacheOptions(workers=1))
    assert summary.failures == []
    return folder / "shards"


def test_a_cache_of_both_families_trains_each_as_its_own_does(
    mixed: Path, shards: Path, counting_shards: Path, tmp_path: Path
) -> None:
    few = [
        "train.steps=2",
        "train.eval_every=2",
        "train.warmup_steps=1",
        "data.batch_rows=1",
        "data.max_seq_len=400",
    ]
    recipes: dict[str, tuple[AnyRecipe, Path]] = {
        "dialog": (load_recipe("tiny", [*few, "data.window_ticks=16", "tasks.response.weight=0"]), shards),
        "counting": (little("train.steps=3"), counting_shards),
    }
    for name, (recipe, own) in recipes.items():
        train(mixed, recipe, tmp_path / name, device="cpu")
        train(own, recipe, tmp_path / f"{name} alone", device="cpu")
        assert left_by(tmp_path / name) == left_by(tmp_path / f"{name} alone")
    assert len(load_sessions(ShardCache(mixed), "train")) == len(load_sessions(ShardCache(shards), "train"))
    assert len(images_of(mixed, little())) == len(COUNTS["train"])


def told_by(shards: Path, recipe: AnyRecipe, out: Path) -> str:
    with pytest.raises(UserError) as error:
        train(shards, recipe, out, device="cpu")
    assert not (out / "checkpoints").exists()
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_a_cache_of_the_other_family_is_one_sentence(
    shards: Path, counting_shards: Path, tmp_path: Path
) -> None:
    assert "holds no images to count in" in told_by(shards, little(), tmp_path / "one")
    told = told_by(counting_shards, load_recipe("tiny", []), tmp_path / "other")
    assert "nothing but images to count in" in told
    assert "--recipe counting" in told


def test_marks_that_the_cache_has_not_as_the_model_takes_them(
    counting_shards: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    told = told_by(counting_shards, little("model.marks=drawn"), tmp_path / "one")
    assert "--marks drawn" in told
    for marks in ("mark_tokens", "token_embed"):
        told = told_by(drawn_shards, little(f"model.marks={marks}"), tmp_path / marks)
        assert "--marks none" in told
        assert marks in told


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_missing(
    counting_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    real = ShardCache.session

    def session(self: ShardCache, session_id: str) -> Any:
        found = real(self, session_id)
        if found.meta["split"] == split:
            found.meta["split"] = "test"
        return found

    monkeypatch.setattr(ShardCache, "session", session)
    assert f"has no image of the split '{split}'" in told_by(counting_shards, little(), tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_in_which_there_is_nothing_to_mark(
    counting_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    real = training.counting.family.load_images

    def empty(cache: ShardCache, wanted: str, *given: Any) -> Any:
        found = real(cache, wanted, *given)
        return [image for image in found if wanted != split or not len(image.points)]

    monkeypatch.setattr(training.counting.family, "load_images", empty)
    assert f"no object in the images of the split '{split}'" in told_by(counting_shards, little(), tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tasks.coord.loss=cross_entropy", "tasks.coord.loss"),
        ("tasks.coord.metric=val/speaking_f1", "tasks.coord.metric='val/speaking_f1' is not measured"),
        ("tasks.speaking.weight=1", "tasks.speaking"),
        ("tasks.done.shares=[1, 1, 1]", "must add up to 1"),
        ("tasks.done.shares=[0, 0.5, 0.5]", "the first must be above 0"),
        ("model.marks=arrows", "model.marks"),
        ("data.batch_rows=3", "data.batch_rows"),
        ("data.max_marks=0", "data.max_marks"),
        ("train.strategy=both", "train.strategy"),
        ("family=dst", ""),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    counting_shards: Path, tmp_path: Path, change: str, told: str
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--shards", str(counting_shards), "--recipe", "counting", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--set", change, "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert told in result.output
    assert "Traceback" not in result.output
    assert not (out / "checkpoints").exists()


def test_resume_with_another_recipe_or_other_images_is_refused(
    counting_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    recipe = little("train.steps=2", "data.batch_images=9")
    train(counting_shards, recipe, out, device="cpu")
    arguments = ["train", "--shards", str(counting_shards), "--out", str(out), "--resume", "--device", "cpu"]
    for name, told in (("counting", "another recipe"), ("tiny", "the other family")):
        result = CliRunner().invoke(app, [*arguments, "--recipe", name])
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())
    with pytest.raises(UserError, match="another model"):
        train(counting_shards, little("model.marks=token_embed"), out, device="cpu", resume=True)
    real = training.counting.family.load_images

    def moved(*given: Any) -> Any:
        found = real(*given)
        found[0].points[:1] += 1e-3
        return found

    monkeypatch.setattr(training.counting.family, "load_images", moved)
    with pytest.raises(UserError, match="are not those that"):
        train(counting_shards, recipe, out, device="cpu", resume=True)


def test_the_console_has_a_line_an_epoch_with_both_tasks(counting_shards: Path, tmp_path: Path) -> None:
    arguments = ["train", "--shards", str(counting_shards), "--recipe", "counting", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "run")]
    for change in ("train.steps=2", "train.eval_every=null", "data.batch_images=9", "data.max_marks=5"):
        arguments += ["--set", change]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    for line, row in zip(lines, rows_of(tmp_path / "run"), strict=True):
        for name in ("count_mae", "coord_error", "loss_coord", "loss_done"):
            assert f"{name} {row[f'val/{name}']:.3f}" in line
        assert "coord 0 of 5" in line or "coord 1 of 5" in line
        assert "done 0 of 5" in line or "done 1 of 5" in line
    assert "best at step" in result.output


def test_what_the_recipe_will_not_do_is_said(
    counting_shards: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    recipe = little("train.steps=1", "data.max_marks=3")
    train(counting_shards, recipe, tmp_path / "few", device="cpu", say=told.append)
    counts = [len(i.points) for split in ("train", "val") for i in images_of(counting_shards, recipe, split)]
    more = sum(count > 3 for count in counts)
    crowded = (
        f"{more} of {len(counts)} images have more than 3 objects, of which several share one of their 4 tokens and "
        "are hard to tell apart; cache them with more (--tiles)"
    )
    assert told == [
        f"{more} of {len(counts)} images have more objects than data.max_marks=3, where a rollout ends; "
        f"set it to {max(counts)} or more to count them",
        crowded,
    ]
    told.clear()
    recipe = little("train.steps=1", "model.marks=drawn", "data.mark_noise=0.1")
    train(drawn_shards, recipe, tmp_path / "drawn", device="cpu", say=told.append)
    assert told == [crowded, "data.mark_noise moves no marks that are drawn in pictures already"]


def test_a_head_that_no_task_reaches_is_not_trained(counting_shards: Path) -> None:
    """Else several processes would wait for its gradient."""
    config = counter_of(counting_shards, little())[0].config
    for is_tied in (True, False):
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
        model = CountingSmolVLM(config)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
        assert model.lm_head.weight.requires_grad == is_tied
        assert model.get_input_embeddings().weight.requires_grad

"""The comparison of runs: what it says is what their logs say."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cli import app
from schemas.errors import UserError
from training.recipe import any_recipe, load_recipe
from training.runs import (
    by_family,
    counting_recipe,
    is_counting_run,
    read_runs,
    records,
    require_dialog,
    table,
)
from training.trainer import train

SCORES = ("speaking_f1", "dst_update_f1", "dst_state_macro_f1", "dst_state_joint")


def scores(value: float) -> dict[str, float]:
    near = {"val/dst_state_joint_near_transition": value, "val/loss_response": 1 - value}
    return {f"val/{name}": value for name in SCORES} | near | {"val/combined": value}


def a_run(folder: Path, combined: dict[int, float], last: int, *changes: str) -> Path:
    """A run's folder as a run of 100 steps leaves it after ``last``, with ``val/combined`` by step."""
    folder.mkdir(parents=True)
    recipe = load_recipe("tiny", ["train.steps=100", *changes])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 1.0} for step in range(1, last + 1)]
    for step, value in combined.items():
        rows[step - 1] |= scores(value)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dst(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, arguments)])


def test_the_best_comes_first_at_its_best_step(tmp_path: Path) -> None:
    a_run(tmp_path / "low", {50: 0.3, 100: 0.2}, 100)
    a_run(tmp_path / "high", {20: 0.5, 40: 0.7, 60: 0.7, 80: math.nan, 100: 0.6}, 100, "data.blind=true")
    a_run(tmp_path / "none", {}, 7)
    a_run(tmp_path / "lost", {50: math.nan, 100: math.nan}, 100)
    lost = tmp_path / "lost/log.jsonl"
    lost.write_text(lost.read_text().replace("NaN", "null"))  # as the log says it
    runs, broken = read_runs(tmp_path)
    assert broken == {}
    assert [run.name for run in runs] == ["high", "low", "lost", "none"]
    runs = [run for run in runs if run.name != "lost"]
    assert [run.best_step for run in runs] == [40, 50, None]
    assert [run.scores.get("val/combined") for run in runs] == [0.7, 0.3, None]
    assert runs[0].scores["val/loss_response"] == pytest.approx(0.3)
    assert [(run.step, run.state) for run in runs] == [(100, "finished"), (100, "finished"), (7, "stopped")]


def test_whether_it_goes_on(tmp_path: Path) -> None:
    """It does while a process holds its folder; out of patience in every task, it is done, with steps left or not."""
    patience = [f"tasks.{task}.patience=2" for task in ("speaking", "dst_update", "response", "dst_state")]
    now = a_run(tmp_path / "now", {10: 0.5}, 15)
    a_run(tmp_path / "ended", {10: 0.5}, 15)
    a_run(tmp_path / "over", {10: 0.5, 20: 0.4, 30: 0.3}, 30, *patience)
    a_run(tmp_path / "patient", {10: 0.5, 20: 0.4, 30: 0.3}, 30, *patience[1:])
    # a task that is frozen stays so, though it becomes better by what the others learn
    slower = [*patience[:3], "tasks.dst_state.patience=3", "tasks.dst_state.metric=val/loss_response"]
    frozen = a_run(tmp_path / "frozen", {}, 50, *slower, "train.on_plateau=freeze_task")
    rows = [json.loads(line) for line in (frozen / "log.jsonl").read_text().splitlines()]
    for step, value in {10: 0.5, 20: 0.4, 30: 0.3, 40: 0.6, 50: 0.6}.items():
        rows[step - 1] |= scores(value) | {"val/loss_response": step / 100}
    (frozen / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import sys; from pathlib import Path; from pipeline.locks import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), 0, 1, print): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(now)]
    others = {"ended": "stopped", "over": "finished", "patient": "stopped", "frozen": "finished"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "held\n"
        assert {run.name: run.state for run in read_runs(tmp_path)[0]} == {"now": "running", **others}
        writer.kill()
    assert {run.name: run.state for run in read_runs(tmp_path)[0]} == {"now": "stopped", **others}
    assert (now / ".lock").is_file()  # it is there for ever: that is no sign


def test_a_line_that_a_kill_cut(tmp_path: Path) -> None:
    log = a_run(tmp_path / "cut", {10: 0.5}, 15) / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 16, "train/lo')
    (run,), broken = read_runs(tmp_path)
    assert (run.step, run.best_step, broken) == (15, 10, {})


def test_broken_runs_are_named_and_the_others_shown(tmp_path: Path) -> None:
    a_run(tmp_path / "good", {10: 0.5}, 100)
    (a_run(tmp_path / "no_recipe", {10: 0.5}, 15) / "recipe.yaml").unlink()
    (a_run(tmp_path / "no_log", {10: 0.5}, 15) / "log.jsonl").unlink()
    (a_run(tmp_path / "old", {10: 0.5}, 15) / "recipe.yaml").write_text("losses: {}\n")
    log = a_run(tmp_path / "torn", {10: 0.5}, 15) / "log.jsonl"
    log.write_text(log.read_text().replace('"val/combined": 0.5', '"val/combined": 0.'))
    (a_run(tmp_path / "stepless", {}, 15) / "log.jsonl").write_text("[1]\n")
    (tmp_path / "pictures").mkdir()  # no run at all
    assert dst(tmp_path / "torn").exit_code == 1  # nothing could be shown
    (tmp_path / "notes.txt").write_text("mine")
    result = dst(tmp_path)
    assert (result.exit_code, result.exception) == (0, None)
    assert "good" in result.stdout
    told = dict(line.split(" cannot be shown: ") for line in result.stderr.splitlines())
    assert told.keys() == {"no_recipe", "no_log", "old", "torn", "stepless"}
    assert told["no_recipe"] == "it has no recipe.yaml"
    assert told["no_log"] == "it has no log.jsonl"
    assert "unknown key 'losses'" in told["old"]
    assert told["torn"].endswith("log.jsonl, row 10, is not JSON")
    assert told["stepless"].endswith("log.jsonl, row 1, has no step")


def test_no_runs(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no run; make one with 'dst train"):
            read_runs(place)
    result = dst(tmp_path)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_the_table_names_what_the_others_have_otherwise(tmp_path: Path) -> None:
    a_run(tmp_path / "seen", {10: 0.5}, 100)
    a_run(tmp_path / "unseen", {10: 0.25}, 100, "data.blind=true", "train.lr=1e-3")
    a_run(tmp_path / "same", {10: 0.125}, 100)
    lines = dst(tmp_path).stdout.splitlines()
    (row,) = [line.split() for line in lines if line.split()[:1] == ["unseen"] and "joint" in line.split()]
    assert row == ["unseen", "joint", "finished", "100/100", "10", *["0.250"] * 6, "0.750"]
    assert "unseen beside seen: data.blind=true train.lr=0.001" in lines
    assert "same beside seen: the same settings" in lines


def test_csv_has_every_number_of_a_real_run(shards: Path, tmp_path: Path) -> None:
    changes = ["train.steps=4", "train.eval_every=2", "train.warmup_steps=1", "data.batch_rows=1"]
    train(shards, load_recipe("tiny", changes), tmp_path / "real", device="cpu")
    rows = list(csv.DictReader(io.StringIO(dst(tmp_path / "real", "--csv").stdout)))
    log = [json.loads(line) for line in (tmp_path / "real/log.jsonl").read_text().splitlines()]
    best = max((row for row in log if "val/combined" in row), key=lambda row: row["val/combined"])
    (row,) = rows
    about = {key: row[key] for key in ("run", "objective", "state", "step", "steps", "best_step")}
    assert about == {
        "run": "real",
        "objective": "joint",
        "state": "finished",
        "step": "4",
        "steps": "4",
        "best_step": str(best["step"]),
    }
    for name, value in best.items():
        if name.startswith("val/"):
            assert float(row[name]) == value
    assert row["differs"] == ""


def test_a_run_with_inline_speech_may_select_by_what_only_it_measures(tmp_path: Path) -> None:
    folder = a_run(
        tmp_path / "inline", {50: 0.4}, 100, "data.speech=inline", "tasks.response.metric=val/matched_f1"
    )
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows[49]["val/matched_f1"] = 0.25
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [run], broken = read_runs(tmp_path)
    assert (run.scores["val/matched_f1"], broken) == (0.25, {})


def test_what_cannot_be_compared_is_marked(tmp_path: Path) -> None:
    """`combined` of inline speech is a mean of one score more; a column that no run fills is left out."""
    a_run(tmp_path / "branch", {50: 0.4}, 100)
    header, rows = table(read_runs(tmp_path)[0])
    assert not {"mean of", "matched"} & set(header)
    log = a_run(tmp_path / "inline", {50: 0.3}, 100, "data.speech=inline") / "log.jsonl"
    log.write_text(log.read_text().replace('"val/combined"', '"val/matched_f1": 0.25, "val/combined"'))
    header, rows = table(read_runs(tmp_path)[0])
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["run"], row["combined"], row["mean of"], row["matched"]) for row in shown] == [
        ("branch", 0.4, 3, None),
        ("inline", 0.3, 4, 0.25),
    ]


def test_records_keep_scores_that_the_table_does_not_know(tmp_path: Path) -> None:
    log = a_run(tmp_path / "new", {10: 0.5}, 100) / "log.jsonl"
    log.write_text(log.read_text().replace('"val/combined"', '"val/matched_f1": 0.25, "val/combined"'))
    assert records(read_runs(tmp_path)[0])[0]["val/matched_f1"] == 0.25


def a_counter(folder: Path, mae: dict[int, float], last: int, *changes: str) -> Path:
    """A run of counting as `a_run` makes one of the dialog model, with ``val/count_mae`` by step."""
    folder.mkdir(parents=True)
    recipe = any_recipe("counting", ["train.steps=100", *changes])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    rows: list[dict[str, Any]] = [{"step": step, "train/loss": 1.0} for step in range(1, last + 1)]
    for step, value in mae.items():
        rows[step - 1] |= {f"val/loss_{name}": value for name in ("coord", "x", "y", "done")}
        rows[step - 1] |= {"val/count_mae": value, "val/coord_error": value / 10, "val/done_f1": 1 / value}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_families_stand_apart_each_by_its_own_metric(tmp_path: Path) -> None:
    """Of counts, the least error is the best; a dialog run is no worse or better than those."""
    a_counter(tmp_path / "a", {10: 4.0, 20: 2.5, 30: 3.0}, 100, "data.blind=true")
    a_counter(tmp_path / "b", {10: 2.0, 20: 8.0}, 100)
    a_counter(tmp_path / "c", {}, 5)
    a_run(tmp_path / "low", {10: 0.25}, 100)
    a_run(tmp_path / "high", {10: 0.5}, 100, "data.blind=true")
    runs, broken = read_runs(tmp_path)
    assert broken == {}
    assert [[run.name for run in alike] for alike in by_family(runs)] == [["high", "low"], ["b", "a", "c"]]
    assert [run.best_step for run in runs] == [10, 10, 10, 20, None]
    lines = dst(tmp_path).stdout.splitlines()
    [dialog, counting] = [line for line in lines if line.split()[:1] == ["run"]]
    assert "count MAE" not in dialog
    assert counting.split("   ")[-3:] == ["count MAE", "coord error", "done F1 "]
    (row,) = [line.split() for line in lines if line.split()[:1] == ["a"] and "beside" not in line]
    assert row[-4:] == ["20", "2.500", "0.250", "0.400"]
    assert "a beside b: data.blind=true" in lines
    assert "low beside high: data.blind=false" in lines
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(dst(tmp_path, "--csv").stdout))}
    assert (rows["a"]["val/count_mae"], rows["a"]["val/combined"], rows["a"]["differs"]) == (
        *("2.5", ""),
        "data.blind=true",
    )
    assert (rows["low"]["val/combined"], rows["low"]["val/count_mae"]) == ("0.25", "")


def test_a_counter_that_has_run_out_of_patience_is_finished(tmp_path: Path) -> None:
    """Both its tasks are by default over after five validations without a better one: all have a patience of 5."""
    a_counter(tmp_path / "over", {step: 1.0 + step for step in range(5, 31, 5)}, 30)
    a_counter(tmp_path / "early", {step: 1.0 + step for step in range(5, 26, 5)}, 25)
    runs, _ = read_runs(tmp_path)
    assert {run.name: (run.state, run.best_step) for run in runs} == {
        "over": ("finished", 5),
        "early": ("stopped", 5),
    }


def test_which_family_a_folder_is_of(tmp_path: Path) -> None:
    counter, dialog = a_counter(tmp_path / "counter", {}, 1), a_run(tmp_path / "dialog", {}, 1)
    found = [is_counting_run(folder) for folder in (counter, dialog, tmp_path, tmp_path / "nowhere")]
    assert found == [True, False, False, False]
    assert counting_recipe(counter, "this") == any_recipe("counting", ["train.steps=100"])
    with pytest.raises(
        UserError, match="dialog is a run of the dialog model, and this needs one of counting"
    ):
        counting_recipe(dialog, "this")
    require_dialog(dialog, "that")
    with pytest.raises(
        UserError, match="counter is a run of counting, and that needs one of the dialog model"
    ):
        require_dialog(counter, "that")


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """Also to read runs of both families."""
    a_counter(tmp_path / "counter", {1: 2.0}, 1)
    a_run(tmp_path / "dialog", {1: 0.5}, 1)
    code = (
        "import sys; from pathlib import Path; from training.runs import read_runs\n"
        "assert len(read_runs(Path(sys.argv[1]))[0]) == 2\n"
        "print(*(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""`dst evaluate` as a user meets it: what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import app
from schemas.errors import UserError
from training.embedding import LOCAL_MARK
from training.evaluate import evaluate
from training.gate import Thresholds, teacher_trace
from training.metrics import score
from training.model import load_trained
from training.trace_table import read_traces, write_traces


@pytest.fixture(scope="module")
def run(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that reports may be written into."""
    return shutil.copytree(short_run, tmp_path_factory.mktemp("runs") / "short")


def reports(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("*-*-*") if path.is_file()}


def test_each_checkpoint_and_split_has_reports_of_its_own(run: Path) -> None:
    for number, (checkpoint, split) in enumerate((("latest", "val"), ("best", "test"))):
        before = reports(run)
        arguments = ["evaluate", "--run", str(run), "--checkpoint", checkpoint, "--split", split]
        arguments += ["--embedding", "bag-of-words"]
        result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
        assert (result.exit_code, result.exception) == (0, None)
        after = reports(run)
        kinds = ("metrics.json", "timeline.png", "predictions.parquet", "report.html", "scores.md")
        names = {kind.replace(".", f"-{checkpoint}-{split}.") for kind in kinds}
        assert after.keys() - before.keys() == names
        assert {name: after[name] for name in before} == before
        assert len(after) == 5 * (number + 1)
        told = " ".join(result.stdout.splitlines()[-2:])
        assert all(str(run / name) in told for name in names if not name.startswith("scores"))
        about = json.loads(after[f"metrics-{checkpoint}-{split}.json"])["about"]
        assert (about["checkpoint"], about["split"]) == (checkpoint, split)


def test_a_checkpoint_that_is_not_there(run: Path) -> None:
    for name in (
        "bset",
        "best/",
        "../checkpoints/best",
        ".",
    ):  # a name, and no path: reports are called by it
        with pytest.raises(UserError, match=r"has no checkpoint .* \(there are: best, best_dst_state, "):
            evaluate(run, None, checkpoint=name)


def test_teacher_forced_logits_give_any_thresholds_without_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["evaluate", "--run", str(run), "--mode", "teacher"]  # words are not compared
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((run / "metrics-teacher-best-test.json").read_text())
    assert not {"matched", "response"} & metrics.keys()
    assert "matched" not in metrics["combined"]["formula"]
    assert metrics["baselines"].keys() >= {"copy_initial", "never_update", "majority", "uniform_clock"}
    assert (run / "report-teacher-best-test.html").is_file()
    # what the page on evaluation tells a user to write
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(run, tmp_path / "out/runs/tiny")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["about"]["mode"] == "teacher"
    chosen = Thresholds.of(load_trained(run / "checkpoints/best").config)
    traces = [
        teacher_trace(each, found, 24, chosen)
        for each, found in zip(names["sessions"], names["windows"], strict=True)
    ]
    found = score(traces, similarity=None)
    for group in ("speaking", "dst_update", "dst_state"):
        for name, value in found[group].items():
            if name != "threshold":
                assert metrics[group][name] == value, (group, name)


def test_runs_are_compared_by_what_they_left(run: Path, tmp_path: Path) -> None:
    evaluate(run, None)
    other = shutil.copytree(run, tmp_path / "other")
    arguments = ["compare", str(run), str(other), "--embedding", "bag-of-words"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(" joint near")]
    assert rows[0][4:] == [
        "0.000",
        "0.000",
        "0.000",
    ]  # a run is as good as itself, and that is all that is sure
    result = CliRunner().invoke(app, [*arguments[:3], "--csv"])  # by what both were scored with
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("joint near"))
    values = row.split(",")
    assert values[1] == values[2]
    assert (float(values[3]), float(values[4])) == (0.0, 0.0)
    table = other / "predictions-best-test.parquet"
    traces, about = read_traces(table)
    for said, change in (
        ("give one with --embedding", {"embedding": "all-mpnet-base-v2"}),
        ("give its folder", {"embedding": f"some{LOCAL_MARK}123)"}),
    ):
        write_traces(table, traces, about | change)
        both = str(other) if "folder" in said else str(run)
        result = CliRunner().invoke(app, ["compare", both, str(other)])
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    table.unlink()
    for changed, said in (
        (arguments, "run 'dst evaluate' first"),
        (["compare", str(run), str(tmp_path / "nope")], "nope is not a run"),
        ([*arguments, "--checkpoint", "bset"], "has no checkpoint 'bset'"),
    ):
        result = CliRunner().invoke(app, changed)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_cache_that_was_made_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    config = other / "checkpoints/best/config.json"
    content = json.loads(config.read_text())
    for change, said in (
        ({"vision": content["vision"] | {"sha256": "0" * 64}}, "another vision tower"),
        ({"vision": content["vision"] | {"filter": "bicubic"}}, "another filter"),
        (
            {"tiles": 2},
            r"holds 4 tokens of width \d+, made with --tiles 1, .* 4 of \d+, made with --tiles 2; give its",
        ),
        ({"tick_hz": 3.0}, "has ticks at 2.0 Hz, the model was trained on 3.0 Hz; give its cache"),
    ):
        config.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=said):
            evaluate(other, None)


def test_an_embedding_that_is_not_to_be_had_is_told_before_the_work(run: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--run", str(run), "--embedding", "none/such"])
    assert result.exit_code == 2
    assert "--embedding bag-of-words" in result.stderr

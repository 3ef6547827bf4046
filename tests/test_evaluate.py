"""`dst evaluate` as a user meets it: what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import app
from schemas.errors import UserError
from training.evaluate import evaluate


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

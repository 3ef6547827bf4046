"""What the pages tell a user to write does what they say."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from tiny_count import little

from cli import app
from training.trainer import train

ROOT = Path(__file__).parents[1]


def test_a_seventh_corpus_is_the_two_files_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text()
    (manifest,) = re.findall(r"```yaml\n(name: mycorpus.*?)```", page, re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?def units.*?)```", page, re.DOTALL)
    for package in ("schemas", "pipeline", "data_manifests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data_manifests/mycorpus.yaml").write_text(manifest)
    (tmp_path / "pipeline/sources/mycorpus.py").write_text(module)
    shutil.copy(ROOT / "cli.py", tmp_path)
    labels = tmp_path / "data/mycorpus/labels"
    labels.mkdir(parents=True)
    (labels / "one.csv").write_text(
        "1.0,3.5,take off the wheel\n3.5,3.0,oil the chain\n4.0,6.0,put on the wheel\n"
    )
    command = [
        sys.executable,
        "-c",
        "import cli; cli.app()",
        "prepare",
        "--source",
        "mycorpus",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = tmp_path / "out/labels/mycorpus"
    steps = pl.read_parquet(tables / "steps.parquet").to_dicts()
    assert [(step["name"], step["spans"], step["source_rows"]) for step in steps] == [
        ("take off the wheel", [{"start_s": 1.0, "end_s": 3.5}], ["data/mycorpus/labels/one.csv, row 1"]),
        ("put on the wheel", [{"start_s": 4.0, "end_s": 6.0}], ["data/mycorpus/labels/one.csv, row 3"]),
    ]
    rejects = pl.read_parquet(tables / "rejects.parquet").to_dicts()
    assert [(row["locator"], row["reason"]) for row in rejects] == [("row 2", "ends before it starts")]


def test_the_commands_of_counting_are_there_with_their_options() -> None:
    page = (ROOT / "docs/counting.md").read_text()
    blocks = re.findall(r"```\n(dst .*?)```", page, re.DOTALL)
    commands = [
        shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines() if line
    ]
    assert {"sample", "prepare", "cache-features", "train", "evaluate", "count"} <= {
        name for name, *_ in commands
    }
    group: Any = typer.main.get_command(app)
    for name, *options in commands:
        group.commands[name].make_context(name, list(options))  # raises where it does not know one


def test_the_python_of_counting_runs(
    counting_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/counting.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    train(
        counting_shards,
        little("train.steps=1", "data.batch_images=9"),
        Path("out/runs/counting"),
        device="cpu",
    )
    shutil.copy(counting_shards.parent / "pictures/images_384_VarV2/train0.jpg", "discs.jpg")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(code.replace("(31.0, 40.0), (102.0, 38.0)", "(31.0, 40.0), (92.0, 38.0)"), names)
    printed = capsys.readouterr().out
    assert printed == f"{names['found'].count} {names['found'].marks}\n"
    assert names["place"] == pytest.approx(
        names["counter"].predict_coordinates("discs.jpg", names["marks"], "red discs")
    )
    assert 0 < names["probability"] < 1

"""What the pages tell a user to write does what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl

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

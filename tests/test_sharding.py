"""A model in parts on two processes learns what one process learns, is saved whole, and goes on as if never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from schemas.errors import UserError
from training.model import load_trained
from training.recipe import load_recipe
from training.trainer import train

CHANGES = (
    *("train.steps=6", "train.eval_every=3", "train.warmup_steps=1"),
    *("data.batch_rows=6", "data.rows_at_once=1"),  # three passes a step on each of two processes
)

SCRIPT = """
import sys
from pathlib import Path
from training.recipe import load_recipe
from training.trainer import train

shards, out, *changes = sys.argv[1:]
recipe = load_recipe("tiny", changes)

def stop(row):
    if row["step"] == 4:
        raise KeyboardInterrupt

train(shards, recipe, Path(out) / "whole", device="cpu")
try:
    train(shards, recipe, Path(out) / "stopped", device="cpu", on_step=stop)
except KeyboardInterrupt:
    pass
train(shards, recipe, Path(out) / "stopped", device="cpu", resume=True)
"""


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` process; two with parts of the model, ``whole`` without interruption and ``stopped`` in step 4."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    train(shards, load_recipe("tiny", list(CHANGES)), folder / "one", device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(folder / "script.py"), str(shards), str(folder), *CHANGES, "train.shard=true"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return folder


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_parts_learn_what_one_process_learns(runs: Path) -> None:
    for one, parts in zip(rows(runs / "one"), rows(runs / "whole"), strict=True):
        assert parts.keys() == one.keys()
        for name in ("train/loss", "train/grad_norm", *(key for key in one if key.startswith("val/"))):
            if name in one:
                assert parts[name] == pytest.approx(one[name], rel=1e-4), name


def test_checkpoints_are_whole(runs: Path) -> None:
    one, parts = (load_trained(runs / name / "checkpoints/latest").state_dict() for name in ("one", "whole"))
    assert parts.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-4)


def test_it_goes_on_as_if_never_stopped(runs: Path) -> None:
    assert (runs / "stopped/log.jsonl").read_bytes() == (runs / "whole/log.jsonl").read_bytes()
    weights = "checkpoints/latest/model.safetensors"
    assert (runs / "stopped" / weights).read_bytes() == (runs / "whole" / weights).read_bytes()


def test_what_parts_cannot_do_is_refused(shards: Path, tmp_path: Path) -> None:
    for change in (
        "train.objective=independent",
        "train.objective=pcgrad",
        "model.tune=lora",
        "train.probe_every=5",
    ):
        with pytest.raises(
            UserError, match=r"train.shard needs objective joint, model.tune full and probe_every 0"
        ):
            load_recipe("tiny", ["train.shard=true", change])
    with pytest.raises(UserError, match="start it with torchrun"):
        train(shards, load_recipe("tiny", ["train.shard=true"]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()

"""What TensorBoard and W&B are told, read back from what they wrote."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from schemas.errors import UserError
from training.recipe import Recipe, load_recipe
from training.trainer import train

NAMES = {
    *(f"train/loss_{task}" for task in ("speaking", "dst_update", "response", "dst_state")),
    *("train/loss", "train/grad_norm"),
    *("val/speaking_f1", "val/dst_update_f1", "val/dst_state_macro_f1", "val/dst_state_joint"),
    *("val/dst_state_joint_near_transition", "val/loss_response", "val/combined"),
}
"""Names that boards and scripts of users are made for: they must stay."""

Series = dict[str, list[tuple[int, float]]]


def short(*changes: str) -> Recipe:
    few = ["train.steps=4", "train.eval_every=2", "train.warmup_steps=1", "data.batch_rows=1"]
    return load_recipe("tiny", [*few, *changes])


def logged(run: Path) -> Series:
    """log.jsonl as series by name."""
    series: Series = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        for name, value in row.items():
            if name != "step":
                series.setdefault(name, []).append((row["step"], value))
    return series


def of_tensorboard(run: Path) -> Series:
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents*")}
    board = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]
    }


def of_wandb(run: Path) -> Series:
    """An offline run's file: a header of 7 bytes, then LevelDB's log format, in which each record is a message."""
    (path,) = run.rglob("run-*.wandb")
    data, at, series = path.read_bytes(), 7, Series()
    message = b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, message = wandb_internal_pb2.Record.FromString(message), b""
            for item in record.history.item:
                name = ".".join(item.nested_key) or item.key
                series.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return series


def test_tensorboard_is_told_every_number_of_the_log(shards: Path, tmp_path: Path) -> None:
    train(shards, short("train.trackers=[tensorboard]"), tmp_path / "run", device="cpu")
    told, wanted = of_tensorboard(tmp_path / "run"), logged(tmp_path / "run")
    assert told.keys() >= NAMES
    assert told.keys() == wanted.keys()
    for name, series in wanted.items():
        assert [step for step, _ in told[name]] == [step for step, _ in series]
        assert [value for _, value in told[name]] == pytest.approx([value for _, value in series], rel=1e-6)


def test_wandb_is_told_every_number_of_the_log(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(shards, short("train.trackers=[wandb]"), tmp_path / "runs/mine", device="cpu")
    told, wanted = of_wandb(tmp_path / "runs/mine"), logged(tmp_path / "runs/mine")
    assert told.keys() >= NAMES
    for name, series in wanted.items():
        assert [step for step, _ in told[name]] == [step for step, _ in series]
        assert [value for _, value in told[name]] == pytest.approx([value for _, value in series], rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # all of it lies in the run's folder


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(
    tracker: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else there(name))
    with pytest.raises(UserError, match=rf"{tracker}.*pip install 'dst\[track\]'"):
        train(shards, short(f"train.trackers=[{tracker}]"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()

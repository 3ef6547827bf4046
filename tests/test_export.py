"""An exported folder does what the run does, without the run, the cache or the checkpoint it began from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cli import app
from pipeline.decode import tick_frames
from pipeline.shards import ShardCache
from schemas.clock import Clock
from schemas.errors import UserError
from schemas.task import Task
from training.assistant import Assistant
from training.evaluate import Reports, evaluate
from training.export import export
from training.model import DSTSmolVLM, load_trained

TASK = Task("Assemble the toy", ("attach the wheel", "attach the roof"))


@pytest.fixture(scope="module")
def run(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that says something now and then, and was scored."""
    run = shutil.copytree(short_run, tmp_path_factory.mktemp("runs") / "talking")
    config = run / "checkpoints/best/config.json"
    often = {"speaking_threshold": 0.0, "dst_update_threshold": 0.0, "min_gap_ticks": 30}
    config.write_text(json.dumps(json.loads(config.read_text()) | often))
    evaluate(run, None)
    return run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "assistant"
    assert export(run, out) is None
    return out


def test_it_sees_and_says_the_same(
    run: Path, exported: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(shards)
    video = cache.session(next(iter(cache.session_ids))).meta["uri"]
    told = []
    for folder in (run, exported):
        if folder == exported:  # which needs nothing else
            monkeypatch.delattr("training.assistant.tower_of")
        assistant = Assistant.load(folder, TASK)
        told.append([])
        for frame in tick_frames(video, Clock(2.0), last_tick=40):
            told[-1] += assistant.step(frame.image, frame.tick / 2)
    assert told[0] == told[1]
    assert {"speak", "state"} <= {event.kind for event in told[0]}


def test_the_stock_loader_reads_all_of_it(run: Path, exported: Path, tiny_model: Path) -> None:
    model, loading = DSTSmolVLM.from_pretrained(exported, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = model.state_dict()
    trained = load_trained(run / "checkpoints/best").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    backbone = load_file(tiny_model / "model.safetensors")
    tower = {n: t for n, t in backbone.items() if n.startswith(("model.vision_model.", "model.connector."))}
    assert tower
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tower.items())
    assert AutoTokenizer.from_pretrained(exported).chat_template
    assert not (exported / "trainer.pt").exists()
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1  # weights too can be read by others


def test_the_card_has_the_measured_figures(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    metrics = json.loads(Reports(run, "best", "test").file("metrics.json").read_text())
    assert f"| model | {metrics['speaking']['f1']:.3f} | {metrics['dst_update']['f1']:.3f} |" in card
    assert "at least 15 s after its last words" in card
    assert f"{metrics['about']['sessions']} test sessions" in card
    assert "words are compared by bag-of-words" in card
    assert json.loads((exported / "metrics.json").read_text()) == metrics


def test_an_export_holds_one_checkpoint(exported: Path) -> None:
    with pytest.raises(UserError, match="exported with checkpoint 'best', not 'latest'"):
        Assistant.load(exported, TASK, checkpoint="latest")
    assert not any("vision" in name for name in load_trained(exported).state_dict())  # the encoder has it


def test_what_cannot_be_exported_is_told(run: Path, short_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no export"):
        export(run, tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="has no checkpoint 'bset'"):
        export(run, tmp_path / "out", "bset")
    other = shutil.copytree(short_run, tmp_path / "other")
    config = other / "checkpoints/best/config.json"
    content = json.loads(config.read_text())
    for change, said in (
        ({"vision": {**content["vision"], "sha256": "0" * 64}}, "another vision tower"),
        ({"vision": None}, "does not say which vision tower"),
        ({"vision": {"model": "m", "sha256": "0"}}, "does not say which vision tower"),
        ({"speaking_threshold": None}, "has no thresholds"),
    ):
        config.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=said):
            export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unscored_run_says_what_its_card_lacks(short_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(short_run, tmp_path / "run")
    for scores in run.glob("metrics-*"):
        scores.unlink()
    arguments = ["export", "--run", str(run), "--out", str(tmp_path / "out")]
    for _ in range(2):  # an earlier export is replaced
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "the model card has no scores" in result.stderr
        assert "next: dst stream" in result.stdout

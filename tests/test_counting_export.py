"""An exported counter counts as its run does, without the run, the cache or the checkpoint it began from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_count_cli import dst, mistake, with_config
from tiny_count import counting_cache, little, write_pictures
from transformers import AutoTokenizer

from schemas.errors import UserError
from training.counting.counter import Counter
from training.counting.evaluate import evaluate
from training.counting.model import CountingSmolVLM
from training.model import load_checkpoint
from training.trainer import train


class Made(NamedTuple):
    """``answers`` are what the run itself says of the pictures."""

    pictures: list[Path]
    run: Path
    model: Path
    exported: Path
    scores: dict[str, Any]
    answers: list[Any]


def answers(counter: Counter, pictures: list[Path]) -> list[Any]:
    counted = [counter.count(picture, "wheels") for picture in pictures]
    return [*counted, counter.predict(pictures[0], [(31.0, 40.0)], "wheels")]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("counting")
    model = shutil.copytree(tiny_model, folder / "model")
    pictures = write_pictures(folder / "pictures")
    run = folder / "counter"
    train(counting_cache(pictures, model, folder), little("train.steps=3"), run, device="cpu")
    scores, _ = evaluate(run, None)
    exported = folder / "export"
    result = dst("export", "--run", run, "--out", exported)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert result.stdout == f"exported to {exported}; next: dst count --run {exported} --image ...\n"
    images = sorted((pictures / "images_384_VarV2").iterdir())
    return Made(images, run, model, exported, scores, answers(Counter.load(run), images))


def test_it_counts_the_same_without_anything_else(made: Made, tmp_path: Path) -> None:
    alone = shutil.copytree(made.exported, tmp_path / "alone")
    hidden = made.model.rename(tmp_path / "hidden")
    try:
        with pytest.raises(UserError, match="cannot be had now"):
            Counter.load(made.run)
        assert answers(Counter.load(alone), made.pictures) == made.answers
    finally:
        hidden.rename(made.model)
    assert len({found.count for found in made.answers[:-1]}) > 1
    out = tmp_path / "out.png"
    fixed = ("--image", made.pictures[0], "--what", "wheels", "--out", out, "--device", "cpu")
    assert dst("count", "--run", alone, *fixed).stdout.startswith(f"{made.answers[0].count} wheels; ")


def test_the_stock_loader_reads_all_of_it(made: Made) -> None:
    model, loading = CountingSmolVLM.from_pretrained(made.exported, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = model.state_dict()
    trained = load_checkpoint(CountingSmolVLM, made.run / "checkpoints/best_joint").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    backbone = load_file(made.model / "model.safetensors")
    tower = {n: t for n, t in backbone.items() if n.startswith(("model.vision_model.", "model.connector."))}
    assert tower
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in tower.items())
    assert AutoTokenizer.from_pretrained(made.exported).chat_template
    assert not (made.exported / "trainer.pt").exists()


def test_the_card_has_the_measured_figures(made: Made) -> None:
    card = (made.exported / "README.md").read_text()
    assert f"| model | {made.scores['count']['mae']:.3f} | {made.scores['count']['rmse']:.3f} |" in card
    assert "2 test images of 4 objects" in card
    assert "has made 9 marks" in card
    assert "trained on 3 categories" in card
    assert json.loads((made.exported / "metrics.json").read_text()) == made.scores


def test_what_cannot_be_exported_or_used_is_told(made: Made, tmp_path: Path) -> None:
    young = with_config(made.run, tmp_path / "young", done_threshold=None)
    assert "the checkpoint has no threshold" in mistake("export", "--run", young, "--out", tmp_path / "out")
    arguments = ("--image", made.pictures[0], "--what", "wheels", "--checkpoint", "latest")
    assert "exported with checkpoint 'best_joint', not 'latest'" in mistake(
        "count", "--run", made.exported, *arguments
    )
    plan = ("--video", "v.mp4", "--plan", "p.yaml", "--device", "cpu")
    assert "is a run of counting" in mistake("stream", "--run", made.exported, *plan)
    assert not (tmp_path / "out").exists()

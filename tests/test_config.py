"""What is said of wrong settings: one sentence, in the user's words, that names where the value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import UserError
from training.recipe import load_recipe


def told(*changes: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe) if recipe else None, list(changes))
    sentence = str(caught.value)
    assert not any(
        word in sentence for word in ("valid ", "Value error", "Input", "tuple", "dictionary", "instance")
    )
    assert len(sentence) < 300
    return sentence


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  objective: joint\n  lr: 1e-4\n  steps: 2.5\n")
    return path


def test_a_value_is_told_with_where_it_came_from(mine: Path) -> None:
    whole = "train.steps: must be a whole number (got 2.5)"
    assert told(recipe=mine) == f"{mine}: {whole}"
    assert told("train.lr=2", recipe=mine) == f"{mine}: {whole}"
    assert told("train.steps=7", "train.steps=x", recipe=mine) == (
        '--set train.steps=x: train.steps: must be a whole number (got "x")'
    )
    assert (
        told("train.lr=fast", recipe=mine)
        == f'--set train.lr=fast: train.lr: must be a number (got "fast"); {mine}: {whole}'
    )
    assert told("trian.lr=1").startswith("--set trian.lr=1: unknown key 'trian'; did you mean 'train'?")
    assert told("train.stepz=1").startswith(
        "--set train.stepz=1: unknown key 'train.stepz'; did you mean 'steps'?"
    )


def test_values_that_do_not_go_together_are_one_sentence(mine: Path) -> None:
    sentence = (
        "strategy shared_forward belongs to objective independent, not to joint; "
        "set train.strategy=alternating beside it"
    )
    change = "train.strategy=shared_forward"
    assert told("data.workers=1", change, "train.steps=9", recipe=mine) == (
        f"{mine} with --set {change} --set train.steps=9: {sentence}"
    )
    mine.write_text("train: {strategy: shared_forward}\n")
    assert told(recipe=mine) == f"{mine}: {sentence}"
    assert told(change) == f"the settings with --set {change}: {sentence}"
    assert told("train.compile=true", "train.objective=pcgrad").startswith(
        "the settings with --set train.compile=true --set train.objective=pcgrad: train.compile is for one gradient"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("train.lr=1e400", 'must be a finite number (got "1e400")'),
        ("train.lr=0", "must be greater than 0 (got 0)"),
        ("train.lr=null", "must be a number (got null)"),
        ("train.compile=maybe", 'must be true or false (got "maybe")'),
        ("train.trackers=wandb", 'must be a list, in square brackets (got "wandb")'),
        ("train.precision=fp8", "must be 'auto', 'float32', 'bf16' or 'fp16' (got \"fp8\")"),
        ("model.init=5", "must be text (got 5)"),
        ("train=5", "is a section with keys of its own, and needs them (got 5)"),
    ],
)
def test_what_is_expected(change: str, sentence: str) -> None:
    assert told(change) == f"--set {change}: {change.partition('=')[0]}: {sentence}"


def test_a_change_with_blanks_can_be_pasted() -> None:
    change = "tasks.speaking.alpha=[1, 2, 3]"
    assert told(change).startswith(f"--set '{change}': tasks.speaking.alpha: must be 2 numbers, one a class")

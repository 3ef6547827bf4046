"""The recipes of the package: each holds, says how it is run, and says what each of its values buys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import training.recipes
from schemas.errors import UserError
from training.recipe import load_recipe

FOLDER = Path(training.recipes.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def values(settings: object, path: str = "") -> dict[str, object]:
    """Settings as ``section.key: value``."""
    if not isinstance(settings, dict):
        return {path: settings}
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= values(value, f"{path}.{key}".lstrip("."))
    return flat


def test_they_are_there() -> None:
    assert {"tiny", "independent", "smolvlm2-500m-24gb", "smolvlm2-2.2b-lora"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_and_says_what_it_sets(name: str) -> None:
    """Each value of the file arrives in the recipe: none is of another key's, or lost."""
    told = values(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    loaded = values(load_recipe(name, []).model_dump(mode="json"))
    assert told
    for key, value in told.items():
        assert loaded[key] == value, key


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_its_command_and_explains_each_value(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert re.match(rf"# .*\bdst\)? train .*--recipe {re.escape(name)}\b", lines[0])
    bare = [line for line in lines if re.search(r"^\s*\w+: *[^\s#]", line) and not re.search(r"  # \w", line)]
    assert bare == []


def test_the_independent_recipe_has_an_optimizer_a_task() -> None:
    recipe = load_recipe("independent", [])
    tiny = load_recipe("tiny", [])
    assert recipe.train.objective == "independent"
    for task in recipe.tasks.active:  # four steps of the trunk a round, so each is a smaller one
        assert recipe.optimizer_of(task).lr < tiny.train.lr
    assert recipe.data == tiny.data
    assert recipe.model == tiny.model


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UserError) as told:
        load_recipe("smolvlm", [])
    assert all(name in str(told.value) for name in NAMES)

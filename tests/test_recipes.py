"""The recipes of the package: each holds, says how it is run, and says what each of its values buys."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import training.recipes
from schemas.errors import UserError
from training.counting.recipe import CountingRecipe
from training.recipe import Recipe, any_recipe, load_recipe

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
    assert {"tiny", "independent", "smolvlm2-500m-24gb", "smolvlm2-2.2b-lora", "counting"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_and_says_what_it_sets(name: str) -> None:
    """Each value of the file arrives in the recipe: none is of another key's, or lost."""
    told = values(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    loaded = values(any_recipe(name, []).model_dump(mode="json"))
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


def numbers(settings: type[BaseModel], path: str = "") -> list[str]:
    """Each setting that takes a number, as ``section.key``."""
    found: list[str] = []
    for name, field in settings.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]  # of ``X | None``
        kinds = [typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in options]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += numbers(kind, f"{path}{name}.")
        found += [f"{path}{name}"] if {int, float} & set(kinds) else []
    return found


NUMBERS = numbers(Recipe)
OF_COUNTING = numbers(CountingRecipe)


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [(None, name) for name in NUMBERS] + [("counting", name) for name in OF_COUNTING],
)
def test_a_number_is_finite_and_no_switch(recipe: str | None, setting: str) -> None:
    for value in ("1e400", "-1e400", ".inf", ".nan", "true", "false", "yes"):
        with pytest.raises(UserError, match=re.escape(f"{setting}: ")):
            any_recipe(recipe, [f"{setting}={value}"])


def test_there_are_numbers_of_each_section() -> None:
    assert {"data.batch_images", "data.max_marks", "tasks.coord.weight", "train.lr"} <= set(OF_COUNTING)
    some = {"model.visual_tokens", "model.lora.dropout", "data.state_noise", "data.rows_at_once", "train.lr"}
    assert some | {"tasks.dst_state.optimizer.weight_decay", "tasks.speaking.patience"} <= set(NUMBERS)


@pytest.mark.parametrize(
    "value", ["0.25", "[1]", "[1, 2, 3]", "[true, 0.5]", "[.inf, 1]", "[-1, 1]", "{a: 1}", "many"]
)
def test_alpha_is_a_weight_a_class(value: str) -> None:
    focal = "tasks.speaking.loss=focal"
    assert load_recipe(None, [focal, "tasks.speaking.alpha=[0.25, 0.75]"]).tasks.speaking.alpha == (
        0.25,
        0.75,
    )
    with pytest.raises(UserError, match=r"tasks\.speaking\.alpha"):
        load_recipe(None, [focal, f"tasks.speaking.alpha={value}"])


def test_alpha_says_how_many() -> None:
    for task, told in (
        ("speaking", "2 numbers, one a class, for example [0.25, 0.75]"),
        ("dst_state", "3 numbers, one"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            load_recipe(None, [f"tasks.{task}.loss=focal", f"tasks.{task}.alpha=1"])
    with pytest.raises(UserError, match="words are no classes"):
        load_recipe(None, ["tasks.response.loss=focal", "tasks.response.alpha=[1, 2]"])


@pytest.mark.parametrize(
    "value", ["0.5", "[1]", "[0.5, 0.5]", "[0.5, 0.25, 0.3]", "[1.5, -0.5, 0]", "[true, 0, 0]"]
)
def test_shares_are_three_that_add_up_to_one(value: str) -> None:
    recipe = any_recipe("counting", ["tasks.done.shares=[0.2, 0.3, 0.5]"])
    assert recipe.tasks.done.shares == (0.2, 0.3, 0.5)
    with pytest.raises(UserError, match=r"tasks\.done\.shares"):
        any_recipe("counting", [f"tasks.done.shares={value}"])


def test_the_recipe_of_one_family_is_not_the_others() -> None:
    with pytest.raises(UserError, match="counting is for counting"):
        load_recipe("counting", [])
    assert any_recipe("tiny", []) == load_recipe("tiny", [])


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UserError) as told:
        load_recipe("smolvlm", [])
    assert all(name in str(told.value) for name in NAMES)

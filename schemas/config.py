"""Settings: read from YAML, overridden by ``key=value``, refused where a key is unknown."""

from __future__ import annotations

import difflib
import json
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from schemas.errors import UserError


class Strict(BaseModel):
    """A settings model: an unknown key is an error, values are checked, and it does not change once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], path: Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read settings from a YAML file (none: all defaults) and apply ``section.key=value`` overrides in order.

    Raises:
        UserError: the file is not YAML, a key is unknown (the nearest known one is named), a value is of a
            wrong type or out of range; where it was given with ``--set``, that is named.
    """
    where = str(path) if path else "the settings"
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where} must hold keys and values, not {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        told = [f"{_source(p, where, overrides)}: {_sentence(p, model)}" for p in error.errors()]
        raise UserError("; ".join(told)) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise UserError(f"--set {override!r} is not of the form key=value, for example train.lr=1e-4")
    *parents, last = path.split(".")
    for part in parents:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise UserError(f"--set {override!r}: {part!r} is a value, not a section")
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {value!r} is not a value YAML can read") from None


def _source(problem: ErrorDetails, where: str, overrides: Sequence[str]) -> str:
    """Where a wrong value came from: the last override that set it, else the file.

    Of values that do not go together, all overrides of their section may be to blame, beside the file.
    """
    place = _name(problem)
    last = {override.partition("=")[0]: override for override in overrides}
    told = [
        f"--set {shlex.quote(override)}"
        for key, override in last.items()
        if not place or f"{key}.".startswith(f"{place}.") or f"{place}.".startswith(f"{key}.")
    ]
    if _is_of_section(problem):
        return f"{where} with {' '.join(told)}" if told else where
    return told[-1] if told else where


def _is_of_section(problem: ErrorDetails) -> bool:
    """Whether each value holds, but not beside the others."""
    return problem["type"] == "value_error" and isinstance(problem["input"], dict)


_EXPECTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list, in square brackets",
    "model_type": "is a section with keys of its own, and needs them",
}
"""What pydantic's kinds of errors ask for."""


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    name = _name(problem)
    if problem["type"] == "extra_forbidden":
        *parents, last = map(str, problem["loc"])
        known = _keys(model, parents)
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if _is_of_section(problem):
        return message  # of a whole section, which is too long to show
    return (
        f"{name}: {_EXPECTED.get(problem['type'], message)} (got {json.dumps(problem['input'], default=str)})"
    )


def _name(problem: ErrorDetails) -> str:
    return ".".join(map(str, problem["loc"]))


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    for parent in parents:
        annotation = model.model_fields[parent].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)

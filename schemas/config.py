"""Settings: read from YAML, overridden by ``key=value``, refused where a key is unknown."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import UserError


class Strict(BaseModel):
    """A settings model: an unknown key is an error, values are checked, and it does not change once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], path: Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read settings from a YAML file (none: all defaults) and apply ``section.key=value`` overrides in order.

    Raises:
        UserError: the file is not YAML, a key is unknown (the nearest known one is named), a value is of a
            wrong type or out of range.
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
        raise UserError(f"{where}: {_sentence(error, model)}") from None


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


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    parts = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        name = ".".join(location)
        if problem["type"] == "extra_forbidden":
            known = _keys(model, location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            parts.append(f"unknown key {name!r}; {hint}")
        else:
            parts.append(f"{name or 'settings'}: {problem['msg']} (got {problem['input']!r})")
    return "; ".join(parts)


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    for parent in parents:
        annotation = model.model_fields[parent].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)

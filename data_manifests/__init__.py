"""What each corpus is and where it comes from: one YAML file a corpus."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Literal

from schemas.config import Strict, load_config
from schemas.errors import UserError


class View(Strict):
    """One camera. ``rotation_deg`` is counter-clockwise, what makes its picture upright."""

    name: str
    rotation_deg: Literal[0, 90, 180, 270] = 0


class Manifest(Strict):
    """One corpus.

    ``files`` are glob patterns under the corpus' root, by what they hold. ``annotation_fps`` is the rate at
    which its annotations count frames, None where they are in seconds. ``views`` are in order of preference.
    """

    name: str
    title: str
    licence: str
    ask_at: str
    files: dict[str, str]
    splits: str
    annotation_fps: float | None = None
    views: tuple[View, ...] = ()


def manifest_names() -> list[str]:
    """The corpora there is a manifest of, in order."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files(__name__).iterdir() if file.name.endswith(".yaml")
    )


def load_manifest(source: str) -> Manifest:
    """Read the manifest of a corpus.

    Raises:
        UserError: there is no corpus of that name.
    """
    if source not in manifest_names():
        raise UserError(f"unknown source {source!r}; known: {', '.join(manifest_names())}")
    with as_file(files(__name__) / f"{source}.yaml") as path:
        return load_config(Manifest, path)

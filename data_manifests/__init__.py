"""What each corpus is, where it comes from and what belongs to it: one YAML file a corpus."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, NamedTuple

from schemas.config import Strict, load_config
from schemas.errors import UserError


class View(Strict):
    """One camera. ``rotation_deg`` is counter-clockwise, what makes its picture upright."""

    name: str
    rotation_deg: Literal[0, 90, 180, 270] = 0


class Files(Strict):
    """Files of one kind.

    ``globs`` are patterns under the corpus' folder, each with how many such files the whole corpus has: only
    one of them may find something. ``rows`` is how many lines the files have together without blank ones, headers
    included. None is not known.
    """

    globs: dict[str, int | None]
    rows: int | None = None


class Search(NamedTuple):
    """Files that were looked for; ``place`` is the pattern that found them, or the first that did not."""

    paths: list[Path]
    place: str
    of: int | None  # how many the whole corpus has


class Manifest(Strict):
    """One corpus.

    ``folders`` are where its files may begin, relative to the folder a user names: archives and download tools
    differ. ``files`` are by what they hold. ``time_base`` says what its annotations count in. ``views`` are in order
    of preference.
    """

    name: str
    title: str
    licence: str
    ask_at: str
    folders: tuple[str, ...] = (".",)
    files: dict[str, Files]
    splits: str
    time_base: str
    views: tuple[View, ...] = ()

    def find(self, root: Path, kind: str) -> list[Path]:
        """The files of one kind in a corpus' folder, sorted.

        Raises:
            UserError: they are there twice, in two layouts.
        """
        places: dict[str, list[Path]] = {}
        for folder in self.folders:
            for glob in self.files[kind].globs:
                paths = _files(root / folder, glob)
                if paths and {path.resolve() for path in paths} not in (
                    {path.resolve() for path in other} for other in places.values()
                ):
                    places[str(root / folder / glob)] = paths
        if len(places) > 1:
            raise UserError(f"{self.name} has {kind} twice: {' and '.join(places)}; take one of them away")
        return next(iter(places.values()), [])

    def search(self, root: Path, kind: str) -> Search:
        """What `find` finds, with the place and the number, and without an error where two patterns find something."""
        globs = self.files[kind].globs
        for folder in self.folders:
            for glob, count in globs.items():
                if paths := _files(root / folder, glob):
                    return Search(paths, str(root / folder / glob), count)
        glob, count = next(iter(globs.items()))
        return Search([], str(self._folder(root) / glob), count)

    def path(self, root: Path, *names: str) -> Path:
        """A file that may go by several names; where it is not there, where it would be."""
        places = [root / folder / name for folder in self.folders for name in names]
        # unlike Path.is_file, this is False for a name that no file can have
        return next((place for place in places if os.path.isfile(place)), self._folder(root) / names[0])

    def nothing_found(self, root: Path, kinds: Iterable[str]) -> UserError:
        """What to raise where none of these kinds is there."""
        globs = [glob for kind in kinds for glob in self.files[kind].globs]
        places = ", ".join(str(self._folder(root) / glob) for glob in globs)
        return UserError(f"no {self.name} annotations: nothing at {places}; ask at {self.ask_at}")

    def _folder(self, root: Path) -> Path:
        there = [root / folder for folder in self.folders if (root / folder).is_dir()]
        return there[-1] if there else root


def _files(folder: Path, glob: str) -> list[Path]:
    paths = sorted(path for path in folder.glob(glob) if path.is_file())
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(path)!r} has a name that is not UTF-8; rename it") from None
    return paths


def manifest_names() -> list[str]:
    """The corpora there is a manifest of, in order."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files(__name__).iterdir() if file.name.endswith(".yaml")
    )


@cache
def load_manifest(source: str) -> Manifest:
    """Read the manifest of a corpus.

    Raises:
        UserError: there is no corpus of that name.
    """
    if source not in manifest_names():
        raise UserError(f"unknown source {source!r}; known: {', '.join(manifest_names())}")
    with as_file(files(__name__) / f"{source}.yaml") as path:
        return load_config(Manifest, path)

"""Writes a synthetic corpus in any official layout: annotations, and videos of the toy world or pictures."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from pipeline.sample.render import Clip, write_videos
from pipeline.sample.world import Recording, make_recordings
from schemas.errors import UserError


class Layout(Protocol):
    """What a module of `pipeline.sample` named after a corpus of videos offers."""

    MOST_EPISODES: int
    """Sessions a recording may hold, 1 or 2."""
    LEAST_SESSIONS: int
    """Of fewer, some split would have none."""

    def write_annotations(self, out: Path, recordings: Sequence[Recording]) -> list[Clip]:
        """Write all files but the videos, and say which these are."""


class PictureLayout(Protocol):
    """What one named after a corpus of pictures offers."""

    LEAST_SESSIONS: int

    def write_pictures(
        self,
        out: Path,
        sessions: int,
        seed: int,
        on_plan: Callable[[int], None],
        on_file: Callable[[], None],
    ) -> None:
        """Write all files; see `write_sample`."""


def write_sample(
    source: str,
    out: Path,
    sessions: int,
    seed: int,
    on_plan: Callable[[int], None] = lambda files: None,
    on_file: Callable[[], None] = lambda: None,
) -> None:
    """Write a corpus of that many sessions; the same arguments give the same bytes.

    Args:
        source: whose layout it has.
        out: a new or empty folder.
        sessions: enough that each split has some.
        seed: decides everything that is random.
        on_plan: called once with the number of videos or pictures.
        on_file: called after each, for a progress bar.

    Raises:
        UserError: there is no synthetic corpus of that name, the folder holds something, or too few sessions.
    """
    name = f"pipeline.sample.{source}"
    if importlib.util.find_spec(name) is None:
        raise UserError(f"there is no synthetic {source}")
    layout = cast(Layout | PictureLayout, importlib.import_module(name))
    if sessions < layout.LEAST_SESSIONS:
        raise UserError(
            f"--sessions {sessions} is too few for all splits of {source}; give at least {layout.LEAST_SESSIONS}"
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder with --out, or remove it first")
    if hasattr(layout, "write_pictures"):
        layout.write_pictures(out, sessions, seed, on_plan, on_file)
        return
    clips = layout.write_annotations(out, make_recordings(sessions, seed, layout.MOST_EPISODES))
    on_plan(len(clips))
    write_videos(clips, on_file)

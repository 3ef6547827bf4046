"""Writes the toy world as any of the corpora: annotations in the official layout, and their videos."""

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
    """What a module of `pipeline.sample` named after a corpus offers."""

    MOST_EPISODES: int
    """Sessions a recording may hold, 1 or 2."""
    LEAST_SESSIONS: int
    """Of fewer, some split would have none."""

    def write_annotations(self, out: Path, recordings: Sequence[Recording]) -> list[Clip]:
        """Write all files but the videos, and say which these are."""


def write_sample(
    source: str,
    out: Path,
    sessions: int,
    seed: int,
    on_plan: Callable[[int], None] = lambda videos: None,
    on_video: Callable[[], None] = lambda: None,
) -> None:
    """Write a corpus of that many sessions; the same arguments give the same bytes.

    Args:
        source: whose layout it has.
        out: a new or empty folder.
        sessions: enough that each split has some.
        seed: decides everything that is random.
        on_plan: called once with the number of videos.
        on_video: called after each video, for a progress bar.

    Raises:
        UserError: there is no synthetic corpus of that name, the folder holds something, or too few sessions.
    """
    name = f"pipeline.sample.{source}"
    if importlib.util.find_spec(name) is None:
        raise UserError(f"there is no synthetic {source}")
    layout = cast(Layout, importlib.import_module(name))
    if sessions < layout.LEAST_SESSIONS:
        raise UserError(
            f"--sessions {sessions} is too few for all splits of {source}; give at least {layout.LEAST_SESSIONS}"
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder with --out, or remove it first")
    clips = layout.write_annotations(out, make_recordings(sessions, seed, layout.MOST_EPISODES))
    on_plan(len(clips))
    write_videos(clips, on_video)

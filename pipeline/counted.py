"""A picture whose objects are counted: rows for the label tables, as `align` makes them of a session on a video."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.align import Aligned
from schemas.clock import Clock
from schemas.points import READING_ROW_PX
from schemas.records import Marks, Picture, Point, Video
from schemas.tables import table_of


def counted(picture: Picture, clock: Clock, marks: Marks) -> tuple[Video, Aligned]:
    """A picture as a video of one tick; with drawn marks of one more for each of its objects.

    Nobody speaks on its ticks and no step changes. Its points are in reading order.
    """
    points = reading_order(picture.points)
    drawn = tuple((point.x, point.y) for point in points) if marks == "drawn" else None
    last_tick = len(points) if marks == "drawn" else 0
    video = Video(picture.picture_id, picture.picture_id, str(picture.path), marks=drawn)
    return video, Aligned(
        session=_session_row(picture, clock, last_tick),
        steps=[],
        turns=[],
        frames=table_of("frames", (_frame_row(picture, clock, tick) for tick in range(last_tick + 1))),
        last_tick=last_tick,
        joined_turns=0,
        points=[_point_row(picture, number, point) for number, point in enumerate(points)],
    )


def reading_order(points: Iterable[Point]) -> list[Point]:
    """From top to bottom in bands of `READING_ROW_PX`, in each from left to right."""
    return sorted(points, key=lambda point: (point.y // READING_ROW_PX, point.x))


def _session_row(picture: Picture, clock: Clock, last_tick: int) -> dict[str, Any]:
    return {
        "session_id": picture.picture_id,
        "video_id": picture.picture_id,
        "split": picture.split,
        "goal": picture.category,
        "first_tick": 0,
        "num_ticks": last_tick + 1,
        "tick_hz": clock.tick_hz,
        "num_steps": 0,
        "dialog_origin": "none",
    }


def _frame_row(picture: Picture, clock: Clock, tick: int) -> dict[str, Any]:
    return {
        "session_id": picture.picture_id,
        "split": picture.split,
        "tick": tick,
        "t_s": clock.time_of(tick),
        "speak": False,
        "dst_update": False,
        "dst_state": [],
        "transitions": [],
    }


def _point_row(picture: Picture, number: int, point: Point) -> dict[str, Any]:
    return {
        "session_id": picture.picture_id,
        "point": number,
        "x": 2 * point.x / picture.width - 1,
        "y": 2 * point.y / picture.height - 1,
        "x_px": point.x,
        "y_px": point.y,
        "source_row": str(point.source_row),
    }

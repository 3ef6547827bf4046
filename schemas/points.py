"""The check of the table ``points``: where the objects of a picture are, and what belongs to its other tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]

READING_ROW_PX = 50
"""Objects whose points lie in a band of this height are read from left to right, the bands from top to bottom."""


def check_points(
    points: Iterable[Row], sessions: Mapping[str, Row], videos: Mapping[str, Row]
) -> Iterator[str]:
    """One sentence for each thing that does not hold; sessions and videos are by their ids."""
    pictures = {key: row for key, row in sessions.items() if row["dialog_origin"] == "none"}
    seen: set[str] = set()
    for session_id, group in groupby(points, key=lambda row: row["session_id"]):
        if session_id not in pictures:
            yield f"points of session {session_id}, which is no picture's"
        elif session_id in seen:
            yield f"the points of session {session_id} are not one after the other"
        else:
            seen.add(session_id)
            marked = list(group)
            yield from _check_order(session_id, marked)
            for axis in "xy":
                yield from _check_places(session_id, axis, marked)
            yield from _check_ticks(pictures[session_id], videos, marked)
    for session_id in sorted(pictures.keys() - seen):
        yield from _check_ticks(pictures[session_id], videos, [])


def _check_order(session_id: str, marked: list[Row]) -> Iterator[str]:
    if [row["point"] for row in marked] != list(range(len(marked))):
        yield f"the points of session {session_id} are not counted from 0"
    order = [(row["y_px"] // READING_ROW_PX, row["x_px"]) for row in marked]
    if order != sorted(order):
        yield f"the points of session {session_id} are not in reading order"


def _check_places(session_id: str, axis: str, marked: list[Row]) -> Iterator[str]:
    """Places from -1 to 1 and in pixels are those of one picture, whose size both tell together."""
    sizes: set[int] = set()
    for row in marked:
        place, pixels = row[axis], row[f"{axis}_px"]
        where = f"session {session_id} point {row['point']}: {axis} is {place}"
        if not -1 <= place <= 1:
            yield f"{where}, outside the picture"
            continue
        size = 2 * pixels / (place + 1) if place > -1 else 0.0
        sizes.add(round(size))
        if abs(size - round(size)) > 1e-6 * max(size, 1) or (place > -1) != (pixels > 0):
            yield f"{where}, which is not {axis}_px {pixels} of a whole number of pixels"
    if len(sizes - {0}) > 1:
        yield f"the points of session {session_id} are {axis} of pictures of {sorted(sizes - {0})} pixels"


def _check_ticks(session: Row, videos: Mapping[str, Row], marked: list[Row]) -> Iterator[str]:
    video = videos.get(session["video_id"])
    if video is None:
        return  # which is told already
    marks, drawn = video["marks"], [[row["x_px"], row["y_px"]] for row in marked]
    if marks is not None and marks != drawn:
        yield f"session {session['session_id']} has other points than the marks of its video"
    ticks = 1 if marks is None else len(marked) + 1
    if (session["num_ticks"], video["last_tick_needed"]) != (ticks, ticks - 1):
        yield f"session {session['session_id']} has not a tick for each state of its picture, {ticks}"

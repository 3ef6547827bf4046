"""What `dst prepare` and `dst inspect` do and tell on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.terminal import echo_table, progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.shards import LabelledSession
    from schemas.records import Marks


def prepare_and_tell(
    source: str,
    root: Path,
    out: Path,
    dialogs: Path | None,
    tick_hz: float,
    level: str,
    view: str | None,
    workers: int,
    marks: Marks,
) -> None:
    """Write one corpus' label tables, and tell what is in them and what was left out."""
    from pipeline.prepare import prepare
    from schemas.clock import Clock

    with progress("parts") as bar:
        counts = prepare(
            *(source, root, out, Clock(tick_hz), dialogs, level, view, workers, marks),
            on_plan=bar.start,
            on_unit=lambda: bar.advance(1),
        )
    echo_table(("table", "rows"), sorted(counts.rows.items()))
    echo_table(("split", "sessions"), sorted(counts.sessions.items()))
    if counts.rejects:
        echo_table(("not used, because", "times"), sorted(counts.rejects.items()))
        typer.echo(f"each with its file and place in {out / source / 'rejects.parquet'}")
    for note, number in sorted(counts.notes.items()):
        typer.echo(f"{number} {note}")
    if counts.joined_turns:
        typer.echo(f"{counts.joined_turns} assistant turns were joined to an earlier one on their tick")
    if counts.missing_videos:
        typer.echo(f"{counts.missing_videos} of {counts.rows['videos']} videos are not there yet")
        typer.echo(f"  such as {counts.missing_video}")


def echo_counts(rows: Sequence[Mapping[str, Any]], rejects: Sequence[Mapping[str, Any]]) -> None:
    """Counts, a column for each corpus and split, as that is what fits into a terminal; and what was not used."""
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        names = [name for name in mine[0] if name not in ("source", "split")]
        echo_table(
            (source, *(row["split"] for row in mine)),
            [(name.replace("_", " "), *(row[name] for row in mine)) for name in names],
        )
    if rejects:
        echo_table(
            ("not used, because", "corpus", "times"),
            [(row["reason"], row["source"], row["count"]) for row in rejects],
        )
        typer.echo("the first of each:")
        for row in rejects:
            typer.echo(f"  {row['reason']}: {row['example']}")


def points_picture(session: LabelledSession, path: Path, say: Callable[[str], None]) -> bool:
    """Draw the numbered marks on a session's picture, twice as large, so that they cover less of it.

    Returns:
        Whether there is a picture to draw on; else a sentence is said.
    """
    import numpy as np
    from PIL import Image

    from pipeline.decode import DecodeError
    from pipeline.stills import draw_marks, read_picture
    from schemas.files import replacing_file

    try:
        plain = Image.fromarray(read_picture(session.meta["uri"]))
    except DecodeError as error:
        say(str(error))
        return False
    large = np.asarray(plain.resize((2 * plain.width, 2 * plain.height), Image.Resampling.LANCZOS))
    places = [(2 * point["x_px"], 2 * point["y_px"]) for point in session.points or ()]
    with replacing_file(path) as temporary:
        Image.fromarray(draw_marks(large, places, len(places))).save(temporary, "PNG")
    return True


def some_frames(session: LabelledSession, say: Callable[[str], None]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Eight of a session's frames, from its first tick to its last; none, and a sentence, where the video is gone."""
    from pipeline.decode import DecodeError, tick_frames
    from schemas.clock import Clock

    last = session.first_tick + session.num_ticks - 1
    wanted = {session.first_tick + i * (session.num_ticks - 1) // 7 for i in range(8)}
    meta = session.meta
    try:
        frames = tick_frames(meta["uri"], Clock(meta["tick_hz"]), last, meta["rotation_deg"])
        return [(frame.tick, frame.image) for frame in frames if frame.tick in wanted]
    except DecodeError as error:
        say(str(error))
        return []

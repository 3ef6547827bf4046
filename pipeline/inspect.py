"""What label tables hold: counts by corpus and split, what was not used, one session from beginning to end."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.shards import LabelledSession, is_counting
from schemas.errors import UserError
from schemas.states import COMPLETE, COMPLETED, NOT_STARTED, START
from schemas.tables import SPLITS, TABLES, label_folders, open_table

if TYPE_CHECKING:
    import polars as pl  # imported where it is used: it takes as long to load as all the rest

Rows = list[dict[str, Any]]


def summary(labels: Path) -> Rows:
    """Count what is labelled: a row for each corpus and split; where a corpus has several, a last row ``all``.

    Of the frames only the columns that are counted are read, a part at a time.

    Returns:
        Rows of ``source, split, videos, recordings, sessions, hours`` (of the sessions), ``video_hours`` (each
        video once, as far as a session needs it), ``speaking_share`` (of ticks), ``speaks_a_minute``,
        ``updates_a_minute``, ``users_a_minute`` (turns of the user), ``steps_a_session``, ``max_steps``,
        ``mistake_share`` (of the ticks that are judged; None where none is), ``dialog_origin`` (in words). Of a corpus
        of pictures, rows of ``source, split, pictures, categories, ticks, objects``, and of the objects in a picture
        ``fewest, lower_quartile, median, upper_quartile, most, mean``.

    Raises:
        UserError: there are no tables, or one cannot be read.
    """
    import polars as pl

    counted = pl.concat([_counted_sessions(folder) for folder in label_folders(labels)])
    if counted.is_empty():
        raise UserError(f"{labels} holds no session; run 'dst prepare' again")
    rows: Rows = []
    for source in sorted(counted["source"].unique()):
        sessions = counted.filter(pl.col("source") == source)
        summed = _summed_pictures if all(map(is_counting, sessions.iter_rows(named=True))) else _summed
        splits = sorted(sessions["split"].unique(), key=lambda split: (*SPLITS, split).index(split))
        rows += [summed(source, split, sessions.filter(pl.col("split") == split)) for split in splits]
        if len(splits) > 1:
            rows.append(summed(source, "all", sessions))
    return rows


def rejects_by_reason(labels: Path) -> Rows:
    """Count what the corpora hold and the tables do not.

    Returns:
        Rows of ``source, reason, count, example`` (file and place of the first), by corpus, the most frequent first.

    Raises:
        UserError: there are no tables, or one cannot be read.
    """
    import polars as pl

    rows: Rows = []
    example = pl.format("{}, {}", "source_file", "locator").first()
    for folder in label_folders(labels):
        sources = _read(folder, "sessions", lambda table: table.select(pl.col("source").unique().sort()))
        reasons = _read(
            folder,
            "rejects",
            lambda table: table.group_by("reason", maintain_order=True).agg(count=pl.len(), example=example),
        )
        rows += [{"source": ", ".join(sources["source"]), **row} for row in reasons.to_dicts()]
    return sorted(rows, key=lambda row: (row["source"], -row["count"], row["reason"]))


def read_session(labels: Path, session_id: str) -> LabelledSession:
    """Read one session as a label shard would hold it, without reading the tables whole.

    Raises:
        UserError: there is no such session, there are no tables, or one cannot be read.
    """
    known: list[str] = []
    for folder in label_folders(labels):
        ids = _read(folder, "sessions", lambda table: table.select("session_id"))["session_id"].to_list()
        if session_id in ids:
            return _session(folder, session_id)
        known += ids
    if not known:
        raise UserError(f"{labels} holds no session; run 'dst prepare' again")
    nearest = ", ".join(difflib.get_close_matches(session_id, sorted(known), n=3, cutoff=0.0))
    raise UserError(f"{labels} has no session {session_id!r}; the nearest are {nearest}")


def timeline(session: LabelledSession) -> list[str]:
    """Say what is labelled in a session, a line for each thing that happens: the instant, its tick, what.

    Lines are in order of ticks. Within a tick they are in the order a model meets them: the user's words, the
    steps, mistakes (of which the tables know the ticks only), the assistant's words.

    Of a picture, say where its objects are, a line for each in the order of marking.
    """
    if session.points is not None:
        return _marking(session, session.points)
    meta, final = session.meta, session.column("dst_state")[-1]
    hz, last = meta["tick_hz"], session.first_tick + session.num_ticks - 1
    started, completed = (final > NOT_STARTED).sum(), (final == COMPLETED).sum()
    events = sorted(_events(session), key=lambda event: (event.tick, event.place, event.t_s))
    return [
        session.session_id,
        f"  goal    {_one_line(meta['goal'])}",
        f"  split   {meta['split']}",
        f"  video   {meta['uri']}",
        f"  lasts   {_minutes(session.num_ticks / hz)}, {session.num_ticks} ticks at {hz:g} Hz",
        f"  steps   {len(final)}, of which {started} start and {completed} complete",
        f"  dialog  {meta['dialog_origin']}, {len(session.turns)} turns",
        f"{'time':>7} {'tick':>7}  what",
        _line(session.first_tick, session.first_tick / hz, "first tick"),
        *(_line(event.tick, event.t_s, event.what) for event in events),
        _line(last, last / hz, "last tick"),
    ]


def _read(folder: Path, name: str, query: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
    """What a query finds in a label table; only the columns and row groups it needs are read."""
    import polars as pl

    with open_table(folder, name) as path:
        try:
            return query(pl.scan_parquet(path, glob=False)).collect(engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise OSError(str(error)) from None


def _counted_sessions(folder: Path) -> pl.DataFrame:
    """The sessions of one folder, each with its video and the counts of its ticks and turns."""
    import polars as pl

    counts = {
        "ticks": pl.len(),
        "speaks": pl.col("speak").sum(),
        "updates": pl.col("dst_update").sum(),
        "judged": pl.col("mistake").count(),
        "mistaken": pl.col("mistake").sum(),
    }
    users = (pl.col("role") == "user").sum()
    frames = _read(folder, "frames", lambda table: table.group_by("session_id").agg(**counts))
    turns = _read(folder, "turns", lambda table: table.group_by("session_id").agg(users=users))
    points = _read(folder, "points", lambda table: table.group_by("session_id").agg(objects=pl.len()))
    videos = _read(folder, "videos", lambda table: table.drop("source", "marks"))
    sessions = _read(folder, "sessions", lambda table: table)
    for other, key in (
        *((videos, "video_id"), (frames, "session_id")),
        *((turns, "session_id"), (points, "session_id")),
    ):
        sessions = sessions.join(other, on=key, how="left", maintain_order="left")
    if sessions["recording_id"].null_count() or sessions["ticks"].null_count():
        raise UserError(
            f"the tables in {folder} do not belong together (a session without its video or its ticks); "
            "run 'dst prepare' again"
        )
    return sessions


def _summed(source: str, split: str, sessions: pl.DataFrame) -> dict[str, Any]:
    import polars as pl

    videos = sessions.unique("video_id", maintain_order=True)
    [video_seconds] = videos.select((pl.col("last_tick_needed") + 1) / pl.col("tick_hz")).sum().row(0)
    seconds = (pl.col("num_ticks") / pl.col("tick_hz")).sum()
    counts = pl.sum("ticks", "speaks", "updates", "judged", "mistaken", "users")
    [total] = sessions.select(counts, seconds=seconds).to_dicts()
    origins = Counter(sessions["dialog_origin"].sort()).most_common()
    return {
        "source": source,
        "split": split,
        "videos": len(videos),
        "recordings": videos["recording_id"].n_unique(),
        "sessions": len(sessions),
        "hours": total["seconds"] / 3600,
        "video_hours": video_seconds / 3600,
        "speaking_share": total["speaks"] / total["ticks"],
        **{
            f"{what}_a_minute": 60 * total[what] / total["seconds"] for what in ("speaks", "updates", "users")
        },
        "steps_a_session": sessions["num_steps"].mean(),
        "max_steps": sessions["num_steps"].max(),
        "mistake_share": total["mistaken"] / total["judged"] if total["judged"] else None,
        "dialog_origin": ", ".join(f"{origin} {count}" for origin, count in origins),
    }


def _summed_pictures(source: str, split: str, sessions: pl.DataFrame) -> dict[str, Any]:
    objects = sessions["objects"].fill_null(0)
    return {
        "source": source,
        "split": split,
        "pictures": len(sessions),
        "categories": sessions["goal"].n_unique(),
        "ticks": sessions["ticks"].sum(),
        "objects": objects.sum(),
        "fewest": objects.min(),
        **{
            name: objects.quantile(share, interpolation="linear")
            for name, share in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75))
        },
        "most": objects.max(),
        "mean": objects.mean(),
    }


def _session(folder: Path, session_id: str) -> LabelledSession:
    import polars as pl

    def rows(name: str, column: str, value: str) -> pl.DataFrame:
        return _read(folder, name, lambda table: table.filter(pl.col(column) == value))

    [session] = rows("sessions", "session_id", session_id).to_dicts()
    [video] = rows("videos", "video_id", session["video_id"]).to_dicts()
    steps, turns, frames = (rows(name, "session_id", session_id) for name in ("steps", "turns", "frames"))
    meta, points = {**session, "uri": video["uri"], "rotation_deg": video["rotation_deg"]}, None
    if is_counting(session):
        meta["marks"] = "none" if video["marks"] is None else "drawn"
        points = rows("points", "session_id", session_id).sort("point").to_dicts()
    return LabelledSession(
        meta=meta,
        steps=steps.sort("step").to_dicts(),
        turns=turns.sort("turn").to_dicts(),
        frames=frames.sort("tick").to_arrow().cast(TABLES["frames"]),
        points=points,
    )


def _marking(session: LabelledSession, points: Rows) -> list[str]:
    meta = session.meta
    return [
        session.session_id,
        f"  category {_one_line(meta['goal'])}",
        f"  split    {meta['split']}",
        f"  picture  {meta['uri']}",
        f"  ticks    {session.num_ticks}, marks {meta['marks']}",
        f"  objects  {len(points)}",
        f"{'mark':>5} {'x':>7} {'y':>7}  pixels",
        *(
            f"{row['point'] + 1:>5} {row['x']:>7.3f} {row['y']:>7.3f}  {row['x_px']:g}, {row['y_px']:g}"
            for row in points
        ),
    ]


class _Event(NamedTuple):
    """Something that happens; ``place`` is its place among the events of its tick."""

    tick: int
    t_s: float
    place: int
    what: str


def _events(session: LabelledSession) -> Iterator[_Event]:
    first, hz = session.first_tick, session.meta["tick_hz"]
    for turn in session.turns:
        place = 0 if turn["role"] == "user" else 3
        yield _Event(turn["tick"], turn["t_s"], place, f"{turn['role']}: {_one_line(turn['text'])}")
    transitions = session.column("transitions")
    # Of one instant, what completes comes before what starts.
    for row, number in sorted(np.argwhere(transitions).tolist(), key=lambda at: transitions[*at] != COMPLETE):
        step, bits = session.steps[number], transitions[row, number]
        times = [span["start_s" if bits & START else "end_s"] for span in step["spans"]]
        t = (min if bits & START else max)(times, default=(first + row) / hz)
        does = {START: "starts", COMPLETE: "completes", START | COMPLETE: "starts and completes"}[bits]
        what = f"step {number + 1} {does}: {_one_line(step['name'])}"
        yield _Event(first + row, t, 1, what)
    mistake = session.frames["mistake"].fill_null(False).to_numpy().astype(np.int8)
    for row in np.flatnonzero(np.diff(mistake, prepend=0)).tolist():
        what = "a mistake begins" if mistake[row] else "the mistake ends"
        yield _Event(first + row, (first + row) / hz, 2, what)


def _line(tick: int, t: float, what: str) -> str:
    return f"{_minutes(t):>7} {tick:>7}  {what}"


def _minutes(t: float) -> str:
    tenths = round(abs(t) * 10)
    return f"{'-' if t < 0 and tenths else ''}{tenths // 600:02d}:{tenths % 600 / 10:04.1f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())

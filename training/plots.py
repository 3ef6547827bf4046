"""Pictures of a session, as labelled or truth over prediction. Equal input, equal bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.shards import LabelledSession
from schemas.states import STATE_NAMES
from training.drawing import DPI, FAINT, INK, QUIET, WIDTH, dress, say, write_figure
from training.traces import Outcome, Trace

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Frames = Sequence[tuple[int, NDArray[np.uint8]]]

# Colours of Okabe and Ito, which remain apart under every common colour blindness.
_STATE_COLOURS = ("#E6E8EB", "#E69F00", "#0072B2")

_Look = tuple[str, str, str, bool]
"""A mark of speech: what it means, its colour, its shape, whether it is filled."""

# Drawn from the last to the first, so that the rarer and better kinds are on top.
_SPEECH: dict[Outcome, _Look] = {
    "exact": ("said as it should be", "#009E73", "o", True),
    "words": ("right tick, other words", "#56B4E9", "D", True),
    "missed": ("not said", QUIET, "o", False),
    "extra": ("said, not asked for", "#D55E00", "X", True),
}
_ROLES: dict[str, _Look] = {
    "assistant": ("the assistant speaks", "#009E73", "o", True),
    "user": ("the user speaks", "#CC79A7", "D", True),
}
_MISTAKE = "#D55E00"

_LEFT, _RIGHT, _MARGIN = 2.75, 0.85, 0.3  # inches
_PLOT = WIDTH - _LEFT - _RIGHT
_MAX_FRAMES, _MAX_UTTERANCES = 8, 12
_THUMB = 0.86  # inches, the height of a frame at most
_LINE = 0.215  # inches, one row of the list of utterances
_NUMBER_ROOM = 0.17  # inches that a number above a mark needs
_MAX_NAMED = 40  # steps; the bands of a longer plan have numbers instead of names
_THIN_BANDS = 8.0  # inches, all bands of such a plan together


@dataclass(frozen=True)
class _Scale:
    """Where a session's ticks are in time; a session without ticks is drawn one tick wide."""

    first_tick: int
    num_ticks: int
    tick_hz: float

    def time(self, tick: int) -> float:
        """Second of the video at a tick counted from the session's first."""
        return (self.first_tick + tick) / self.tick_hz

    @property
    def span(self) -> tuple[float, float]:
        """First and last second."""
        return self.time(0), self.time(max(1, self.num_ticks))

    @property
    def inch(self) -> float:
        """Seconds in an inch of the picture."""
        low, high = self.span
        return (high - low) / _PLOT


@dataclass(frozen=True)
class _Spoken:
    """Words at a tick: the rows of marks it is in, how it looks, and what stands in the list's columns."""

    tick: int
    rows: tuple[int, ...]
    look: _Look
    cells: tuple[str, ...]


def timeline_picture(trace: Trace, frames: Frames, path: Path, title: str) -> None:
    """Draw one session as a PNG: frames, every step's state, and speech, true over predicted.

    Args:
        trace: the session.
        frames: (tick of the video, RGB uint8 ``[H, W, 3]``) in order of time; at most 8 are shown, evenly chosen.
        path: the file to write.
        title: the heading.
    """
    scale = _Scale(trace.first_tick, trace.truth.num_ticks, trace.tick_hz)
    spoken = [_outcome(trace, tick, kind) for tick, kind in trace.spoken()]
    shown = _evenly(frames)
    figure, (head, film, bands, speech, _, table) = _rows(
        (1.0, _film_height(shown), _bands_height(len(trace.step_names), 0.4), 0.8, 0.6, _list_height(spoken))
    )
    reading = "of each pair of bands the upper is true, the lower predicted"
    handles = [*_state_handles(), *_mark_handles(_SPEECH.values())]
    _draw_head(head, title, _facts(trace.session_id, scale, len(trace.step_names), reading), handles)
    _draw_frames(film, shown, scale)
    tracks = [("true", trace.truth.state), ("predicted", trace.predicted.state)]
    _draw_bands(bands, trace.step_names, tracks, scale)
    _draw_speech(speech, ("said", "to be said"), _SPEECH.values(), spoken, scale)
    _draw_utterances(table, [(1.4, "to be said", 84), (7.0, "said", 84)], spoken, scale)
    write_figure(figure, path)


def labels_picture(session: LabelledSession, frames: Frames, path: Path) -> None:
    """Draw what is labelled in one session as a PNG: frames, every step's state, mistakes, who speaks when.

    Args:
        session: its rows.
        frames: (tick of the video, RGB uint8 ``[H, W, 3]``) in order of time; at most 8 are shown, evenly chosen.
        path: the file to write.
    """
    scale = _Scale(session.first_tick, session.num_ticks, float(session.meta["tick_hz"]))
    spoken = [_turn(turn, session.first_tick) for turn in session.turns]
    names = [step["name"] for step in session.steps]
    shown = _evenly(frames)
    figure, (head, film, bands, wrong, speech, _, table) = _rows(
        (1.0, _film_height(shown), _bands_height(len(names), 0.32), 0.36, 0.8, 0.6, _list_height(spoken))
    )
    reading = f"split {session.meta['split']}  ·  {session.meta['dialog_origin']} dialogue"
    handles = [*_state_handles(), _patch(_MISTAKE, "mistake"), *_mark_handles(_ROLES.values())]
    facts = _facts(session.session_id, scale, len(names), reading)
    _draw_head(head, session.meta["goal"], facts, handles)
    _draw_frames(film, shown, scale)
    _draw_bands(bands, names, [("", session.column("dst_state"))], scale)
    _draw_mistakes(wrong, session, scale)
    _draw_speech(speech, ("user", "assistant"), _ROLES.values(), spoken, scale)
    _draw_utterances(table, [(1.4, "who", 12), (2.4, "says", 150)], spoken, scale)
    write_figure(figure, path)


def _outcome(trace: Trace, tick: int, kind: Outcome) -> _Spoken:
    """Where words are to be said they are in the upper row, where they are said in the lower."""
    rows = {"missed": (1,), "extra": (0,)}.get(kind, (1, 0))
    cells = [
        (track.responses[tick] or "(no words)") if track.speak[tick] else "—"
        for track in (trace.truth, trace.predicted)
    ]
    return _Spoken(tick, rows, _SPEECH[kind], tuple(cells))


def _turn(turn: Mapping[str, Any], first_tick: int) -> _Spoken:
    role = turn["role"]
    return _Spoken(turn["tick"] - first_tick, (int(role == "assistant"),), _ROLES[role], (role, turn["text"]))


def _facts(session_id: str, scale: _Scale, steps: int, reading: str) -> str:
    plan = f"{steps} steps" + (f" (more than {_MAX_NAMED}: without names)" if steps > _MAX_NAMED else "")
    return f"{session_id}  ·  {scale.num_ticks} ticks at {scale.tick_hz:g} Hz  ·  {plan}  ·  {reading}"


def _evenly(frames: Frames) -> Frames:
    places = np.linspace(0, len(frames) - 1, min(len(frames), _MAX_FRAMES)).round().astype(int)
    return [frames[place] for place in places]


def _rows(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure of stacked bare axes of these heights in inches, all on the same stretch of its width."""
    from matplotlib.figure import Figure

    total = sum(heights) + 0.15
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    axes, top = [], total
    for height in heights:
        top -= height
        box = (_LEFT / WIDTH, top / total, _PLOT / WIDTH, max(height, 0.01) / total)
        axes.append(figure.add_axes(box))
        axes[-1].axis("off")
    return figure, axes


def _mark(look: _Look, size: float) -> dict[str, Any]:
    _, colour, marker, filled = look
    face = colour if filled else "white"
    return {"ls": "", "marker": marker, "ms": size, "mfc": face, "mec": colour, "mew": 1.2, "clip_on": False}


def _patch(colour: str, label: str) -> Artist:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _state_handles() -> list[Artist]:
    return [
        _patch(colour, name.replace("_", " "))
        for colour, name in zip(_STATE_COLOURS, STATE_NAMES, strict=True)
    ]


def _mark_handles(looks: Iterable[_Look]) -> list[Artist]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=look[0], **_mark(look, 7)) for look in looks]


def _draw_head(axes: Axes, title: str, facts: str, handles: Sequence[Artist]) -> None:
    left = (_MARGIN - _LEFT) / _PLOT
    say(axes, left, 0.74, _short(title, 95), INK, 15, fontweight="bold")
    say(axes, left, 0.45, facts, size=9)
    spacing = {"handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.8, "borderpad": 0.0}
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, **spacing}
    place = (left - 0.004, 0.18)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles), **look)


def _film_height(frames: Frames) -> float:
    return _thumb(frames)[1] + 0.45 if frames else 0.0


def _thumb(frames: Frames) -> tuple[float, float]:
    """Width and height of one frame in the picture, inches."""
    tall, wide = frames[0][1].shape[:2]
    width = min(_PLOT / len(frames) - 0.08, _THUMB * wide / tall)
    return width, width * tall / wide


def _draw_frames(axes: Axes, frames: Frames, scale: _Scale) -> None:
    """Frames as close above their time as they can stand side by side, each with a line down to it."""
    if not frames:
        return
    (low, high), inch = scale.span, scale.inch
    width, height = _thumb(frames)
    times = [tick / scale.tick_hz for tick, _ in frames]
    lefts = _side_by_side(times, width * inch, 0.08 * inch, low, high)
    for (_, picture), t, left in zip(frames, times, lefts, strict=True):
        middle = left + width * inch / 2
        axes.imshow(picture, extent=(left, left + width * inch, 0.25, 0.25 + height), aspect="auto")
        say(axes, middle, height + 0.34, f"{t:.1f} s", ha="center")
        axes.plot([middle, t, t], [0.25, 0.08, 0], color=QUIET, lw=0.8, clip_on=False)
    axes.set_xlim(low, high)
    axes.set_ylim(0, height + 0.45)


def _side_by_side(times: Sequence[float], width: float, gap: float, low: float, high: float) -> list[float]:
    """Left edges of boxes, in order and apart, within the span and near the times they are centred on."""
    lefts: list[float] = []
    for t in times:
        lefts.append(max(t - width / 2, lefts[-1] + width + gap if lefts else low))
    limit = high
    for place in reversed(range(len(lefts))):
        lefts[place] = min(lefts[place], limit - width)
        limit = lefts[place] - gap
    return lefts


def _bands_height(steps: int, row: float) -> float:
    return 0.1 + row * steps if steps <= _MAX_NAMED else _THIN_BANDS


def _draw_bands(
    axes: Axes, names: Sequence[str], tracks: Sequence[tuple[str, NDArray[np.int8]]], scale: _Scale
) -> None:
    """A row for each step with a band of states for each track; names, or in a long plan some numbers, beside it."""
    (low, high), inch = scale.span, scale.inch
    axes.set_xlim(low, high)
    axes.set_ylim(len(names) - 0.02, -0.12)
    named = len(names) <= _MAX_NAMED
    room = 0.9 if named else 1.0  # of a row; thin bands touch, as gaps would be all there is to see
    every = 10 * math.ceil(len(names) / 400)  # numbers that have room beside thin bands
    for step, name in enumerate(names):
        if named:
            label = "\n".join(textwrap.wrap(f"{step + 1}. {name}", 36, max_lines=2, placeholder="…"))
            say(axes, low - 0.11 * inch, step + 0.43, label, INK, 9, ha="right")
        elif step == 0 or (step + 1) % every == 0:
            say(axes, low - 0.11 * inch, step + 0.5, f"step {step + 1}", INK, 9, ha="right")
        for place, (says, states) in enumerate(tracks):
            top, height = step + place * room / len(tracks), room / len(tracks) - (0.04 if named else 0)
            if named:
                say(axes, high + 0.07 * inch, top + 0.21, says, size=6.5)
            for start, ticks, state in _runs(states[:, step]):
                stretch = (scale.time(start), ticks / scale.tick_hz)
                axes.broken_barh([stretch], (top, height), color=_STATE_COLOURS[state], lw=0)


def _draw_mistakes(axes: Axes, session: LabelledSession, scale: _Scale) -> None:
    (low, high), inch = scale.span, scale.inch
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1)
    say(axes, low - 0.11 * inch, 0.37, "mistakes", INK, 9, ha="right")
    if session.frames["mistake"].null_count:
        say(axes, low, 0.37, "not annotated")
        return
    for start, ticks, wrong in _runs(session.column("mistake").astype(np.int8)):
        colour = _MISTAKE if wrong else _STATE_COLOURS[0]
        axes.broken_barh([(scale.time(start), ticks / scale.tick_hz)], (0.1, 0.55), color=colour, lw=0)


def _runs(states: NDArray[np.int8]) -> list[tuple[int, int, int]]:
    """Stretches of one state: (first tick, ticks, state)."""
    starts = np.flatnonzero(np.diff(states, prepend=-1)).tolist()
    ends = [*starts, len(states)][1:]
    return [(start, end - start, int(states[start])) for start, end in zip(starts, ends, strict=True)]


def _draw_speech(
    axes: Axes, rows: Sequence[str], looks: Iterable[_Look], spoken: Sequence[_Spoken], scale: _Scale
) -> None:
    """Rows of marks, the first the lowest; the utterances that are listed are numbered."""
    (low, high), inch = scale.span, scale.inch
    axes.set_xlim(low, high)
    axes.set_ylim(-0.6, 1.75)
    axes.axis("on")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    dress(axes, "seconds")
    size = max(2.5, min(7.0, _PLOT * 72 / max(1, len(spoken))))  # points; crowded marks are smaller
    for row, says in enumerate(rows):
        say(axes, low - 0.11 * inch, row, says, INK, 9, ha="right")
        axes.axhline(row, color=FAINT, lw=0.8, zorder=0.5)
        for look in reversed([*looks]):
            times = [scale.time(each.tick) for each in spoken if each.look == look and row in each.rows]
            axes.plot(times, [row] * len(times), zorder=3, **_mark(look, size))
    free = low
    for number, each in enumerate(spoken[:_MAX_UTTERANCES], start=1):
        t = scale.time(each.tick)
        if t >= free:
            say(axes, t, max(each.rows) + 0.48, str(number), INK, 7.5, ha="center")
            free = t + _NUMBER_ROOM * inch


def _list_height(spoken: Sequence[_Spoken]) -> float:
    return _LINE * (min(len(spoken), _MAX_UTTERANCES) + 2) if spoken else 0.0


def _draw_utterances(
    axes: Axes, columns: Sequence[tuple[float, str, int]], spoken: Sequence[_Spoken], scale: _Scale
) -> None:
    """The first utterances as a list: number, time, and columns, each with its place in inches, heading and width
    in characters."""
    if not spoken:
        return
    listed = spoken[:_MAX_UTTERANCES]
    axes.set_xlim(0, _PLOT)
    axes.set_ylim(len(listed) + 1, -1)
    for x, heading, _ in columns:
        say(axes, x - _LEFT, -0.5, heading, fontweight="bold")
    for row, each in enumerate(listed):
        y = row + 0.5
        axes.plot([_MARGIN + 0.06 - _LEFT], [y], **_mark(each.look, 5))
        say(axes, 0.7 - _LEFT, y, str(row + 1), INK, ha="right")
        say(axes, 1.25 - _LEFT, y, f"{scale.time(each.tick):.1f} s", ha="right")
        for (x, _, width), text in zip(columns, each.cells, strict=True):
            say(axes, x - _LEFT, y, _short(text, width), INK)
    if len(spoken) > len(listed):
        say(axes, columns[0][0] - _LEFT, len(listed) + 0.5, f"and {len(spoken) - len(listed)} more")


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
